"""What was computed of the outside at earlier steps of a block, for one layer and guidance branch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ..kernel import Partial
from ..sent import sent

Key = tuple[int, int, str]
"""Block, version of the cache, and part of the outside that was computed."""


@dataclass
class History:
    """The last partial of every head and, to extrapolate, how far it lies from the one before.

    Outputs are held in the activations' dtype and log-sum-exps in fp32: rounding those would weigh the outside wrong.
    """

    key: Key | None = None
    last: Partial | None = None
    moved: Partial | None = None
    noise: list[tuple[float, float | None]] = field(default_factory=list)  # of each head's last and the one before

    def holds(self, key: Key) -> bool:
        return self.last is not None and self.key == key

    def replace(self, key: Key, partial: Partial, noise: float, twice: bool, still: bool = False) -> None:
        """All heads were computed. `twice`: keep how far they moved; `still`: store where the last one lies."""
        if twice and self.last is not None and self.key == key:
            self.moved, earlier = _moved(self.last, partial), self.noise
        else:
            self.moved, earlier = None, [(noise, None)] * partial.out.shape[2]
        self.noise = [(noise, None if at == noise else at) for at, _ in earlier]
        self.key = key
        if not still:
            self.last = partial
        elif self.last is not None and self.last.out.shape == partial.out.shape:
            for old, new in zip(self.last, partial, strict=True):
                old.copy_(new)
        else:
            self.last = Partial(*(x.clone() for x in partial))

    def stored_again(self, key: Key, noise: float) -> None:
        """`last` was overwritten where it lies, as `replace(key, ..., still=True)` does."""
        self.key, self.moved, self.noise = key, None, [(noise, None)] * len(self.noise)

    def update(self, heads: Sequence[int], fresh: Partial, noise: float, twice: bool) -> None:
        """Some heads (B, S, heads, D) were computed anew."""
        assert self.last is not None
        at = index(heads, fresh.out.device)
        if twice:
            if self.moved is None:
                self.moved = Partial(*(torch.zeros_like(x) for x in self.last))
            found = _moved(Partial(*(x[:, :, at] for x in self.last)), fresh)
            for old, new in zip(self.moved, found, strict=True):
                old[:, :, at] = new
        for old, new in zip(self.last, fresh, strict=True):
            old[:, :, at] = new
        for head in heads:
            self.noise[head] = (noise, self.noise[head][0])

    def recall(self, noise: float, damping: float) -> Partial:
        """What the outside should be at this noise level: the last, or damped linear extrapolation from the last two.

        Never further ahead than the two lie apart: over long gaps it does more harm than good.
        """
        assert self.last is not None
        if self.moved is None:
            return self.last
        ahead = {(at, past): 0.0 if past is None else (noise - at) / (at - past) for at, past in set(self.noise)}
        weights = {pair: damping * min(max(step, 0.0), 1.0) for pair, step in ahead.items()}
        if len(weights) == 1:
            (weight,) = weights.values()
            return Partial(*(torch.add(x, by, alpha=weight) for x, by in zip(self.last, self.moved, strict=True)))
        each = _on(tuple(weights[pair] for pair in self.noise), self.last.lse.device)
        out = torch.addcmul(self.last.out, self.moved.out, each[:, None].to(self.last.out.dtype))
        return Partial(out, torch.addcmul(self.last.lse, self.moved.lse, each))

    @property
    def bytes(self) -> int:
        held = [x for partial in (self.last, self.moved) if partial is not None for x in partial]
        return sum(x.numel() * x.element_size() for x in held)


def _moved(before: Partial, now: Partial) -> Partial:
    """How far a partial moved; a log-sum-exp over no keys, before or now, not at all."""
    return Partial(now.out - before.out, (now.lse - before.lse).nan_to_num_(0.0, 0.0, 0.0))


@lru_cache(maxsize=1024)
def _on(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device; those of a step come back in every layer and block."""
    return sent(torch.tensor(numbers, dtype=torch.float32), device)


def without(whole: Partial, part: Partial) -> Partial:
    """Attention over the keys of `whole` that are not in `part`: the merge undone.

    exp(l) = exp(l_whole) - exp(l_part). Where hardly anything is left, its output is rounding, and so is its weight.
    """
    share = (part.lse - whole.lse).exp().clamp(max=1)[..., None]  # of the whole, in the part
    rest = 1 - share
    some = rest > 1e-6
    out = torch.where(some, (whole.out.float() - share * part.out.float()) / rest.clamp(min=1e-6), 0.0)
    lse = torch.where(some[..., 0], whole.lse + rest.clamp(min=1e-6).log()[..., 0], -torch.inf)
    return Partial(out.to(whole.out.dtype), lse)


def index(heads: Sequence[int], device: torch.device) -> slice | Tensor:
    """Heads as an index: a slice, which copies nothing, where they are neighbours."""
    first, last = heads[0], heads[-1]
    if last - first == len(heads) - 1:  # they ascend
        return slice(first, last + 1)
    return _indices(tuple(heads), device)


@lru_cache(maxsize=1024)
def _indices(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return sent(torch.tensor(heads), device)
