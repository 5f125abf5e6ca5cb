"""NOSA (arXiv 2510.13602): most keys that a query reads go by an importance that they have for all queries."""

from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .mixer import Mixer, Past, Tokens, attend, extended


class Cis(Mixer):
    """A learned importance of each key, A softplus(w . v) a head, is added to its scores and ranks units of keys.

    Tokens read the first unit and their own, the units that they want most by mean keys, and then those of greatest
    importance until `density` of the units are read; the last kind is the same for all queries, so what has to be at
    hand changes little. NOSA pools its importance over 32 keys each 16 and takes the maximum of 64 keys, and reads the
    newest 1024 tokens in any case; here a unit has its mean key and its greatest importance. A starts at 0: at density
    1 the layer is as it was. The layer's maps learn beside it, as in NOSA; without query-aware units an importance is
    never shown better ones than its own.

    Args:
        density: share of the units that are read, in (0, 1].
        aware: share of the chosen ones that go by the query, in [0, 1] (the authors': 16 of 64).
        unit: keys of a unit, >= 1 (the authors': 64).
    """

    paper: ClassVar[str] = "NOSA, arXiv 2510.13602"
    summary: ClassVar[str] = "a learned importance of keys, in their scores and in the choice of what is read"

    def __init__(
        self,
        layer: nn.Module,
        block: int | None = None,
        density: float = 0.5,
        aware: float = 0.25,
        unit: int = 16,
    ) -> None:
        super().__init__(layer, block)
        self.require(0 < density <= 1, "density is a share in (0, 1]", density=density)
        self.require(0 <= aware <= 1, "aware is a share in [0, 1]", aware=aware)
        self.require(unit >= 1, "unit is a number of keys >= 1", unit=unit)
        self.density, self.aware, self.unit = density, aware, unit
        self.weight = nn.Parameter(torch.randn(self.layer.count, self.layer.dim) * self.layer.dim**-0.5)
        self.amount = nn.Parameter(torch.zeros(self.layer.count))

    def importance(self, v: Tensor) -> Tensor:
        """Log-weights (B, N, H) of keys with values (B, N, H, D)."""
        return self.amount * nn.functional.softplus((v * self.weight).sum(-1))

    def mix(self, tokens: Tokens, state: Past | None) -> tuple[Tensor, Any]:
        seen = extended(state, tokens.k, tokens.v, self.importance(tokens.v))
        assert seen.weight is not None
        bias = seen.weight.mT[:, None] + self._unread(tokens, seen)
        return attend(tokens.q, seen.k, seen.v, bias), seen

    @torch.no_grad()
    def _unread(self, tokens: Tokens, seen: Past) -> Tensor:
        """0 or -inf, (B, S, H, N)."""
        assert seen.weight is not None
        total, new = seen.k.shape[1], tokens.q.shape[1]
        units = ceil(total / self.unit)
        take = ceil(self.density * units)
        of = torch.arange(total, device=seen.k.device) // self.unit
        number = torch.bincount(of)
        mean = seen.k.new_zeros(seen.k.shape[0], units, *seen.k.shape[2:]).index_add_(1, of, seen.k)
        wanted = torch.einsum("bshd,bnhd->bshn", tokens.q, mean / number[:, None, None])
        prior = torch.stack([part.amax(1) for part in seen.weight.split(self.unit, 1)], -1)[:, None]
        always = torch.zeros(new, 1, units, dtype=torch.bool, device=of.device)
        always[..., 0] = True
        always.scatter_(2, of[total - new :, None, None], True)
        wanted = wanted.masked_fill(always, torch.inf)
        fixed = min(units, 2)  # the first unit and the token's own come before those it chooses
        aware = min(take, fixed + round(self.aware * max(0, take - fixed)))
        reads = torch.zeros_like(wanted, dtype=torch.bool).scatter_(-1, wanted.topk(aware, -1).indices, True) | always
        rest = prior.expand_as(wanted).masked_fill(reads, torch.inf)
        best = rest.argsort(dim=-1, descending=True, stable=True)  # of equal ones the oldest, on every device
        reads |= torch.zeros_like(reads).scatter_(-1, best[..., : max(take, 1)], True)
        return torch.zeros_like(wanted).masked_fill_(~reads, -torch.inf)[..., of]
