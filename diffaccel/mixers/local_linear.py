"""Local Linear Attention (arXiv 2510.01450): at every query a weighted linear fit of values to keys, read there."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..cache.entries import Reader
from ..cache.tiers import Fixed
from ..errors import KnobError
from ..kernel.merge import Partial
from .mixer import Mixer, Past, Tokens, extended

RIDGE = 0.01  # the authors' default


class Moments(NamedTuple):
    """Sums over keys of weight w = exp(q . k / sqrt(D) - top), with z = k - q, for queries (B, S, H, ...)."""

    top: Tensor
    w: Tensor
    wz: Tensor  # (..., D)
    wzz: Tensor  # (..., D, D)
    wv: Tensor  # (..., E)
    wzv: Tensor  # (..., D, E)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> "Moments":
        """Of keys and values (B, N, H, D)."""
        scores = torch.einsum("bshd,bnhd->bshn", q, k) * q.shape[-1] ** -0.5
        top = scores.amax(-1).detach()
        w = (scores - top[..., None]).exp()
        total, kw, vw = w.sum(-1), torch.einsum("bshn,bnhd->bshd", w, k), torch.einsum("bshn,bnhe->bshe", w, v)
        kk, kv = _products(w, k, k), _products(w, k, v)
        wz = kw - total[..., None] * q
        wzz = kk - q[..., None] * kw[..., None, :] - wz[..., None] * q[..., None, :]
        return cls(top, total, wz, wzz, vw, kv - q[..., None] * vw[..., None, :])

    def plus(self, other: "Moments") -> "Moments":
        """Of both sets of keys, for the same queries."""
        top = torch.maximum(self.top, other.top)
        a, b = (self.top - top).exp(), (other.top - top).exp()

        def both(x: Tensor, y: Tensor) -> Tensor:
            lead = (...,) + (None,) * (x.dim() - top.dim())
            return a[lead] * x + b[lead] * y

        return Moments(top, *map(both, self[1:], other[1:]))

    def solve(self, ridge: Tensor | float) -> Partial:
        """The fit at the query, and the log of the weights' sum: rho = (wzz + ridge)^-1 wz,
        out = (wv - wzv^T rho) / (w - wz . rho)."""
        eye = torch.eye(self.wz.shape[-1]).to(self.wz)
        lead = ridge[..., None, None] if isinstance(ridge, Tensor) else ridge
        rho = torch.linalg.solve(self.wzz + lead * eye, self.wz[..., None])
        total = self.w - (self.wz * rho[..., 0]).sum(-1)
        out = (self.wv - (self.wzv * rho).sum(-2)) / total[..., None]
        return Partial(out, (self.w.log() + self.top).float())


def _products(w: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """sum_n w_n k_n x_n^T (B, S, H, D, E), by whichever of the two orders holds less at once."""
    if w.shape[1] < k.shape[-1]:
        return torch.einsum("bshnd,bnhe->bshde", w[..., None] * k.transpose(1, 2)[:, None], x)
    return torch.einsum("bshn,bnhde->bshde", w, k[..., None] * x[..., None, :])


@dataclass(frozen=True, eq=False)
class LocalLinearTier(Fixed):
    """Keys that answer with a linear fit of their values in place of a mean: `ridge` to infinity is softmax attention.

    It merges by the keys' softmax mass, so tiers of a partition are attention at a large ridge, and else fit each part
    for itself; `Moments.plus` fits the parts as one. On a model trained with softmax it computes another function.
    """

    ridge: float = RIDGE

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise KnobError(f"LocalLinearTier: ridge is above 0, got {self.ridge}")

    def partial(self, q: Tensor, read: Reader) -> Partial:
        wide = torch.promote_types(q.dtype, torch.float32)
        found = Moments.of(q.to(wide), self.entries.k.to(wide), self.entries.v.to(wide)).solve(self.ridge)
        return Partial(found.out.to(q.dtype), found.lse)


class LocalLinear(Mixer):
    """Ridge regression around the query, O(N D^2) a query; its state are all keys.

    The system is solved directly (the authors: conjugate gradients in a kernel). The ridge is learned a head, from
    `ridge` on (the authors': 0.01, fixed): at a large one the layer is as it was. It is relative to a query's greatest
    weight, so that a constant on all scores changes nothing, as in softmax.

    Args:
        ridge: what is added to the diagonal at first, > 0.
    """

    paper: ClassVar[str] = "Local Linear Attention, arXiv 2510.01450"
    summary: ClassVar[str] = "at every query a weighted linear fit of values to keys"

    def __init__(self, layer: nn.Module, block: int | None = None, ridge: float = RIDGE) -> None:
        super().__init__(layer, block)
        self.require(ridge > 0, "ridge is above 0", ridge=ridge)
        self.log_ridge = nn.Parameter(torch.full((self.layer.count,), ridge).log())

    def mix(self, tokens: Tokens, state: Past | None) -> tuple[Tensor, Any]:
        seen = extended(state, tokens.k, tokens.v)
        return Moments.of(tokens.q, seen.k, seen.v).solve(self.log_ridge.exp()).out, seen
