"""CompressKV: a few heads that find things again decide for their layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..policy import knob
from ..profile import Profile
from .calibrated import Calibrated
from .look import Look, probes

TRIED = 0.25
"""Share of older tokens that is kept where the error of keeping a part is measured."""


@dataclass(frozen=True)
class CompressKV(Calibrated):
    """Of older tokens keep those that the layer's lead heads attend to most, the same for all of its heads.

    CompressKV (arXiv 2508.02401): the `lead` best semantic retrieval heads of a layer vote, by probabilities summed
    over queries and averaged over neighbours; layers share the budget in proportion to the relative error that
    compression makes in their output, within `least` and `most` times the mean.

    There a retrieval head is one with attention on all of a needle while it is copied from a text. Here it is one with
    attention on a query's own place, and the eight around it, in earlier frames that may be dropped. The error is of
    attention over a quarter of those frames' tokens, the ones with most attention of all heads. Both are means over
    clean passes of dense videos. `least` is 32 tokens there.
    """

    paper: ClassVar[str] = "CompressKV, arXiv 2508.02401"
    summary: ClassVar[str] = "heads that find places again choose for their layer; layers share by calibrated error"
    tables: ClassVar[tuple[str, ...]] = ("lead", "error")

    lead: int = knob(2, "heads of a layer that decide what all of them keep, >= 1")
    pool: int = knob(3, "frames, rows and columns over which scores are averaged, odd; 1: none")
    least: float = knob(0.1, "least share of the budget a layer gets, over the mean, in [0, 1]")
    most: float = knob(3.0, "largest share of the budget a layer gets, over the mean, >= 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.lead >= 1, "lead is a number of heads >= 1", lead=self.lead)
        self.require_odd("pool")
        self.require(0 <= self.least <= 1, "least is a share in [0, 1]", least=self.least)
        self.require(self.most >= 1, "most is a ratio >= 1", most=self.most)

    def score(self, look: Look) -> Tensor:
        """The votes of the lead heads, for all heads."""
        lead = self.of_layer("lead", look).topk(min(self.lead, look.k.shape[2])).indices
        votes = look.pooled(look.p.sum(2), self.pool)[:, lead].mean(1, keepdim=True)
        return votes.expand(-1, look.k.shape[2], -1)

    def shares(self, look: Look) -> Tensor:
        """The layer's error over the mean of all, within bounds; the same for all heads."""
        errors = self.table("error").mean(1)
        share = min(max(errors[look.layer] / max(errors.mean(), 1e-12), self.least), self.most)
        return torch.full((look.k.shape[0], look.k.shape[2]), float(share))

    def measure(self, look: Look) -> dict[str, Tensor]:
        """Attention on near places of frames that may be dropped, and the layer's error for all heads, (H,)."""
        lost = self.droppable(look)
        if not lost.any():
            return {}
        cells, width = look.grid.tokens_per_frame, look.grid.width
        key, query = look.token[:, :, None] % cells, probes(look.grid, self.probes).to(lost.device)[:, None] % cells
        away = torch.maximum((key // width - query // width).abs(), (key % width - query % width).abs())
        lead = (look.p * (lost[:, :, None] & (away <= 1))).sum(-1).mean((0, 2))
        votes = look.p.sum((1, 2)).masked_fill(~lost[:, 0], -torch.inf)
        best = votes.argsort(-1, descending=True)[:, : max(1, round(TRIED * int(lost[0, 0].sum())))]
        stays = (~lost[:, 0]).scatter(-1, best, True)[:, None, None]
        v = look.v.transpose(1, 2).to(look.p)
        whole, part = look.p @ v, (look.p * stays) @ v / (look.p * stays).sum(-1, keepdim=True)
        error = (part - whole).norm() / whole.norm()
        return {"lead": lead, "error": error.expand(len(lead))}

    def lines(self, profile: Profile) -> Iterator[str]:
        """Of each layer: its error, and its lead heads."""
        yield "layer  error   lead heads"
        for layer, (lead, error) in enumerate(zip(profile.tables["lead"], profile.tables["error"], strict=True)):
            heads = ", ".join(str(head) for head in lead.argsort()[::-1][: self.lead])
            yield f"{layer:<5}  {error.mean():.4f}  {heads}"
