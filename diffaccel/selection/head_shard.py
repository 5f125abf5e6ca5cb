"""HeadShard: every head reads another share of the past (S2-Attention, arXiv 2407.17678)."""

from dataclasses import KW_ONLY, dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from ..policy import knob
from .asked import Asked
from .ranked import Ranked


@dataclass(frozen=True)
class HeadShard(Ranked):
    """Head h reads what is near and every n-th frame, or block of keys, of the rest, from the h-th on.

    No content is looked at; together the heads read everything once n heads differ (`(block + head) mod
    stride == 0`). n is the smallest stride at which `density` holds it all; what is left of that goes to the newest
    keys. The paper trains with this pattern. Without, it is what a selector by content has to beat.

    Differences from the paper: a stride by frames too; what is near are the `recent_frames` beside the block at work
    (16 to 32 blocks of 64 tokens there); no head or layer stays dense; the means of what is left out are read unless
    `summaries` is off.
    """

    paper: ClassVar[str] = "S2-Attention, arXiv 2407.17678"
    summary: ClassVar[str] = "lets every head read the newest frames and another share of the older ones"
    needs_blocks: ClassVar[bool] = True
    across_heads: ClassVar[str] = "a head's share goes by its number"

    unit: str = knob("frame", "what a head strides over", choices=("frame", "block"))
    _: KW_ONLY
    recent_frames: int = knob(3, "newest latent frames of the past that every query reads")

    def rank(self, asked: Asked) -> Tensor:
        """(1, H, 1, KB)."""
        keys, per_frame = asked.keys, asked.site.grid.tokens_per_frame
        block = torch.arange(keys.choices, device=asked.q.device)
        each = 1 if self.unit == "block" else max(1, per_frame / keys.block)  # blocks of a unit
        fit = max(1, asked.take // ceil(each))
        stride = ceil(keys.choices / each / fit)
        head = torch.arange(asked.q.shape[1], device=asked.q.device)[:, None]
        mine = ((block / each).long() + head) % stride == 0
        return (mine * keys.choices + block)[None, :, None]
