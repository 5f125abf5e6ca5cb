"""BASED (arXiv 2402.18668): the second-order Taylor series of exp as a state of fixed size, beside an exact window."""

from math import sqrt
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..cache.entries import Entries, Reader
from ..kernel.merge import Partial, merge_eager
from .mixer import Mixer, Past, Tokens, extended, softmax


def features(x: Tensor) -> Tensor:
    """phi with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d), of (..., d): 1 + d + d (d + 1) / 2 channels.

    The paper's d^2 products, of which those that come twice are kept once, times sqrt(2).
    """
    d = x.shape[-1]
    x = x * d**-0.25
    row, column = torch.triu_indices(d, d, device=x.device)
    twice = torch.where(row == column, sqrt(0.5), 1.0).to(x)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * twice], -1)


class Moments(NamedTuple):
    """Sums of phi(k) v and of phi(k) over some tokens: (B, H, F, D) and (B, H, F)."""

    kv: Tensor
    k: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Self:
        phi = features(k)
        return cls(torch.einsum("bnhf,bnhd->bhfd", phi, v), phi.sum(1))

    def plus(self, other: "Moments", sign: float = 1.0) -> "Moments":
        return Moments(self.kv + sign * other.kv, self.k + sign * other.k)

    def read(self, q: Tensor) -> Partial:
        """Attention with 1 + s + s^2 / 2 >= 1/2 in place of exp(s), so that its log-sum exists and answers merge."""
        phi = features(q)
        total = torch.einsum("bshf,bhf->bsh", phi, self.k)
        out = torch.einsum("bshf,bhfd->bshd", phi, self.kv) / total[..., None]
        return Partial(out, total.log().float())


class TaylorTier:
    """Tokens as the moments of their Taylor features: of one size however many they are. It answers with a partial.

    Without training it is near attention only where |q . k| / sqrt(D) is below one: look at the scores first.
    The features of a 64-channel head are 2 145, so below about 1 100 tokens the keys themselves are smaller.
    """

    def __init__(self) -> None:
        self._held: Moments | None = None
        self._frames: list[int] = []

    @property
    def count(self) -> int:
        return len(self._frames)

    @property
    def bytes(self) -> int:
        return 0 if self._held is None else sum(x.numel() * x.element_size() for x in self._held)

    def take(self, dropped: Entries) -> None:
        """Add tokens, summed in fp32 or wider."""
        wide = torch.promote_types(dropped.k.dtype, torch.float32)
        new = Moments.of(dropped.k.to(wide), dropped.v.to(wide))
        self._held = new if self._held is None else self._held.plus(new)
        self._frames += [0] * dropped.count if dropped.frames is None else dropped.frames.tolist()

    def partial(self, q: Tensor, read: Reader) -> Partial:
        assert self._held is not None  # empty tiers are not read
        found = self._held.read(q.to(self._held.k.dtype))
        return Partial(found.out.to(q.dtype), found.lse)

    def frames(self) -> list[Tensor]:
        return [torch.tensor(self._frames)]


class State(NamedTuple):
    near: Past  # the newest tokens, exactly
    far: Moments | None  # all before them; keys projected


class Based(Mixer):
    """Exact attention to a token's own tile and the newest tokens before its block, Taylor moments of all else.

    Queries and keys of the moments are learned projections of each head to `features` channels (the paper's 16), so
    the state is 153 x D a head. The paper alternates layers of linear attention, of a window of 64 and of short
    convolutions in a model trained from nothing; here both answer in one layer and merge by their log-sums.

    Args:
        tile: tokens of a tile, and how many before the block stay exact; >= 1.
        features: channels that keys are projected to, >= 1.
    """

    paper: ClassVar[str] = "BASED, arXiv 2402.18668"
    summary: ClassVar[str] = "an exact window, and a second-order Taylor series of softmax for the rest"

    def __init__(self, layer: nn.Module, block: int | None = None, tile: int = 64, features: int = 16) -> None:
        super().__init__(layer, block)
        self.require(tile >= 1, "tile is a number of tokens >= 1", tile=tile)
        self.require(features >= 1, "features is a number of channels >= 1", features=features)
        self.tile = tile
        shape = (self.layer.count, self.layer.dim, features)
        self.to_q, self.to_k = (nn.Parameter(torch.randn(shape) * self.layer.dim**-0.5) for _ in range(2))

    def mix(self, tokens: Tokens, state: State | None) -> tuple[Tensor, Any]:
        q, k = (torch.einsum("bshd,hdf->bshf", x, w) for x, w in ((tokens.q, self.to_q), (tokens.k, self.to_k)))
        near, far = state or (None, None)
        tiles = [Moments.of(*part) for part in zip(k.split(self.tile, 1), tokens.v.split(self.tile, 1), strict=True)]
        others = far
        for tile in tiles if len(tiles) > 1 else ():
            others = tile if others is None else others.plus(tile)
        found = []
        for i, own in enumerate(tiles):
            at = slice(i * self.tile, (i + 1) * self.tile)
            exact = extended(near, tokens.k[:, at], tokens.v[:, at])
            parts = [softmax(tokens.q[:, at], exact.k, exact.v)]
            if others is not None:
                parts.append((others.plus(own, -1.0) if len(tiles) > 1 else others).read(q[:, at]))
            found.append(merge_eager(parts).out)
        return torch.cat(found, 1), self._kept(extended(near, tokens.k, tokens.v), far)

    def _kept(self, near: Past, far: Moments | None) -> State:
        """The newest tokens stay exact, older ones go into the moments."""
        old = max(0, near.k.shape[1] - self.tile)
        if old:
            gone = Moments.of(torch.einsum("bshd,hdf->bshf", near.k[:, :old], self.to_k), near.v[:, :old])
            far = gone if far is None else far.plus(gone)
        return State(Past(near.k[:, old:], near.v[:, old:]), far)
