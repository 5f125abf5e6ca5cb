"""Task-KV: heads far from the layer's semantic centre keep everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..policy import knob
from .look import Look
from .ragged import Counts
from .scored import Scored
from .share_out import whole_first


@dataclass(frozen=True)
class TaskKV(Scored):
    """Heads whose summary of the past lies far from that of the others keep all of it; the others share the rest.

    Task-KV (arXiv 2501.15113, section 3): the semantic vector of a head is the sum of the values of its `top` tokens,
    each by its attention; heads farthest from the mean over heads are heterogeneous. `beta` of the heads are in the
    first layer, falling to `least` in the last. The others keep what scores best, as SnapKV does. The constants come
    from a third party's notes, as the paper's code was not at hand. All of it is bounded by `budget`, the mean over
    heads: where the heads that keep everything would take more than that, fewer of them do.
    """

    paper: ClassVar[str] = "Task-KV, arXiv 2501.15113"
    summary: ClassVar[str] = "lets the heads that differ most from the others keep everything, those the best of it"

    beta: float = knob(0.25, "share of heads that keep everything in the first layer, in (0, 1)")
    least: int = knob(1, "heads that keep everything in the last layer, >= 0")
    top: int = knob(256, "tokens that a head is described by, >= 1")
    pool: int = knob(3, "frames, rows and columns over which scores are averaged, odd; 1: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.beta < 1, "beta is a share in (0, 1)", beta=self.beta)
        self.require(self.least >= 0, "least is a number of heads >= 0", least=self.least)
        self.require(self.top >= 1, "top is a number of tokens >= 1", top=self.top)
        self.require_odd("pool")

    def score(self, look: Look) -> Tensor:
        """Mean probabilities, averaged over neighbours."""
        return look.pooled(look.p.mean(2), self.pool)

    def shares(self, look: Look) -> Tensor:
        """How far each head lies from the centre."""
        mass, at = self.score(look).topk(min(self.top, look.k.shape[1]), dim=-1)
        index = at.transpose(1, 2)[..., None].expand(-1, -1, -1, look.v.shape[-1])
        meaning = torch.einsum("bhn,bnhd->bhd", mass, look.v.to(mass).gather(1, index))
        return (meaning - meaning.mean(1, keepdim=True)).norm(dim=-1)

    def allocate(self, shares: Sequence[Tensor | None], available: Sequence[Counts], capacity: int) -> Sequence[Counts]:
        """All of what there is for heads far from the centre, equal numbers for the others."""
        found = []
        for layer, (distance, counts) in enumerate(zip(shares, available, strict=True)):
            assert distance is not None
            heads, depth = distance.shape[1], layer / max(1, len(available) - 1)
            most = round(heads * self.beta + (self.least - heads * self.beta) * depth)
            alike = (1000 * distance / distance.amax(1, keepdim=True)).round()  # of two heads rounding decides nothing
            ranked = alike.argsort(dim=1, descending=True, stable=True).tolist()
            found.append(
                tuple(
                    tuple(whole_first(row, order[:most], capacity * heads))
                    for row, order in zip(counts, ranked, strict=True)
                )
            )
        return found
