"""What was computed of the outside at earlier steps of a block, for one layer and guidance branch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernel import Partial
from ..sent import sent

Key = tuple[int, int, str]
"""Block, version of the cache, and part of the outside that was computed."""


@dataclass
class History:
    """The last partial of every head and, to extrapolate from, the one before it.

    Outputs are held in the activations' dtype and log-sum-exps in fp32: rounding those would weigh the outside wrong.
    """

    key: Key | None = None
    last: Partial | None = None
    before: Partial | None = None
    noise: list[tuple[float, float | None]] = field(default_factory=list)  # of each head's last and the one before

    def holds(self, key: Key) -> bool:
        return self.last is not None and self.key == key

    def replace(self, key: Key, partial: Partial, noise: float, twice: bool) -> None:
        """All heads were computed. `twice`: keep what was there as the one before."""
        earlier = self.noise if twice and self.holds(key) else [(noise, None)] * partial.out.shape[2]
        self.before = self.last if twice and self.holds(key) else None
        self.noise = [(noise, None if at == noise else at) for at, _ in earlier]
        self.key, self.last = key, partial

    def update(self, heads: Sequence[int], fresh: Partial, noise: float, twice: bool) -> None:
        """Some heads (B, S, heads, D) were computed anew."""
        assert self.last is not None
        at = index(heads, fresh.out.device)
        if twice:
            if self.before is None:
                self.before = Partial(*(x.clone() for x in self.last))
            for old, new in zip(self.before, self.last, strict=True):
                old[:, :, at] = new[:, :, at]
        for old, new in zip(self.last, fresh, strict=True):
            old[:, :, at] = new
        for head in heads:
            self.noise[head] = (noise, self.noise[head][0])

    def recall(self, noise: float, damping: float) -> Partial:
        """What the outside should be at this noise level: the last, or damped linear extrapolation from the last two.

        Never further ahead than the two lie apart: over long gaps it does more harm than good.
        """
        assert self.last is not None
        ahead = [0.0 if past is None else (noise - at) / (at - past) for at, past in self.noise]
        weights = [1 + damping * min(max(step, 0.0), 1.0) for step in ahead]
        if self.before is None or all(weight == 1 for weight in weights):
            return self.last
        weight = sent(torch.tensor(weights, dtype=torch.float32), self.last.lse.device)
        lse = torch.lerp(self.before.lse, self.last.lse, weight)
        out = torch.lerp(self.before.out, self.last.out, weight[:, None].to(self.last.out.dtype))
        nothing = self.last.lse.isneginf() | self.before.lse.isneginf()
        return Partial(out, torch.where(nothing, self.last.lse, lse))

    @property
    def bytes(self) -> int:
        held = [x for partial in (self.last, self.before) if partial is not None for x in partial]
        return sum(x.numel() * x.element_size() for x in held)


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
    if list(heads) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return sent(torch.tensor(heads), device)
