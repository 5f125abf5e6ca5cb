"""Sticky: few blocks of keys are new at a choice (NOSA, arXiv 2510.13602)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..policy import knob
from .asked import Asked
from .blocks import KeyBlocks
from .ranked import Ranked

_DECAY = 0.5  # of a block's worth, at every choice


class _Resident(NamedTuple):
    of: KeyBlocks  # whose blocks they are
    there: Tensor  # bool (B, H, KB)
    worth: Tensor  # (B, H, KB), decaying sum of the attention that the queries had for a block
    held: int  # of each head


@dataclass(frozen=True)
class Sticky(Ranked):
    """A head keeps blocks of keys at hand; its queries read the best of these, and few may come in at a choice.

    That bounds what a cache elsewhere, in host memory say, would have to bring. Which come in goes by what the queries
    want now, which stay by what they wanted before, half as much at each choice since.

    NOSA bounds it likewise: of 64 blocks 16 go by the query, the others by an importance of a token that it learns
    together with the model. Nothing is learned here, so the second part is what the queries themselves showed. All
    blocks of queries of a head share what is at hand, and all of it is new at the first choice and where the blocks
    become others (a past that outgrows their size, or a cache that drops some).
    """

    paper: ClassVar[str] = "NOSA, arXiv 2510.13602"
    remembers: ClassVar[str] = "what is at hand changes at each choice"
    summary: ClassVar[str] = "reads the best of the blocks at hand, of which few are new at each choice"

    resident: float = knob(2.0, "blocks at hand over blocks that a query reads, >= 1")
    fresh: float = knob(0.25, "blocks that may come in at a choice over blocks that a query reads, in (0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.resident >= 1, "resident is a factor >= 1", resident=self.resident)
        self.require(0 < self.fresh <= 1, "fresh is a share in (0, 1]", fresh=self.fresh)

    def rank(self, asked: Asked) -> Tensor:
        mass = asked.mass()
        there = self._residents(asked, mass.mean(2))
        return mass.masked_fill(~there[:, :, None], -1.0)

    def _residents(self, asked: Asked, wanted: Tensor) -> Tensor:
        """Which blocks are at hand for this choice, bool (B, H, KB)."""
        keys, blocks = asked.keys, wanted.shape[-1]
        room = min(blocks, round(self.resident * asked.take))
        known: _Resident | None = keys.kept.get("resident")
        if known is None or known.of is not keys:
            there, worth, count = torch.zeros_like(wanted, dtype=torch.bool), wanted, room
            there.scatter_(-1, wanted.topk(room, dim=-1).indices, True)
        else:
            more = blocks - known.there.shape[-1]
            there, worth = (torch.nn.functional.pad(x, (0, more)) for x in (known.there, known.worth))
            worth = _DECAY * worth + wanted
            enter = max(1, round(self.fresh * asked.take), asked.take - known.held)
            enter = min(enter, blocks - known.held, room)
            stay = min(known.held, room - enter)
            coming = wanted.masked_fill(there, -1.0).topk(enter, dim=-1).indices
            staying = worth.masked_fill(~there, -1.0).topk(stay, dim=-1).indices
            there = torch.zeros_like(there).scatter_(-1, torch.cat([staying, coming], -1), True)
            count = stay + enter
        keys.kept["resident"] = _Resident(keys, there, worth, count)
        return there
