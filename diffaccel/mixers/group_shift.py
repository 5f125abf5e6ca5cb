"""SinkLoRA (arXiv 2406.05678): attention in groups of tokens, shifted in half of the heads, with sinks."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .mixer import Mixer, Past, Tokens, extended, softmax


class GroupShift(Mixer):
    """Tokens read their group and the first `sinks` tokens; groups of half of the heads begin half a group later.

    The groups are LongLoRA's (S2-Attn, arXiv 2309.12307), whose shifted heads let the last tokens see the first through
    a roll; SinkLoRA's point is that they stay in order, and that all tokens see the sinks. Groups here lie on the
    places of tokens, so nothing is rolled, and a block reads whole blocks before it as far as its groups reach. Only a
    low-rank change of the layer's maps is learned. SinkLoRA's own code was not at hand; this follows its description.

    Args:
        group: tokens of a group, even, >= 2.
        sinks: first tokens that all read, >= 0.
        rank: of the change, >= 1.
    """

    paper: ClassVar[str] = "SinkLoRA, arXiv 2406.05678"
    summary: ClassVar[str] = "groups of tokens, shifted in half of the heads, and sinks; low-rank changes are learned"

    def __init__(
        self, layer: nn.Module, block: int | None = None, group: int = 64, sinks: int = 4, rank: int = 8
    ) -> None:
        super().__init__(layer, block)
        self.require(group >= 2 and group % 2 == 0, "group is an even number of tokens >= 2", group=group)
        self.require(sinks >= 0, "sinks is a number of tokens >= 0", sinks=sinks)
        self.require(rank >= 1, "rank is >= 1", rank=rank)
        self.group, self.sinks = group, sinks
        self.layer.requires_grad_(False)
        for parent in list(self.layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, LowRank(child, rank))

    def mix(self, tokens: Tokens, state: Past | None) -> tuple[Tensor, Any]:
        seen = extended(state, tokens.k, tokens.v)
        total, new = seen.k.shape[1], tokens.q.shape[1]
        place = torch.arange(total, device=tokens.q.device)
        shift = torch.arange(tokens.q.shape[2], device=place.device) >= tokens.q.shape[2] // 2
        own = torch.div(place[:, None] + shift * (self.group // 2), self.group, rounding_mode="floor")  # (N, H)
        reads = (own[total - new :, :, None] == own.mT[None]) | (place < self.sinks)
        bias = torch.zeros(reads.shape, device=place.device).masked_fill_(~reads, -torch.inf)
        return softmax(tokens.q, seen.k, seen.v, bias).out, seen


class LowRank(nn.Module):
    """A frozen linear map and a learned change of low rank, which starts at zero (LoRA, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False).to(base.weight)
        self.up = nn.Linear(rank, base.out_features, bias=False).to(base.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out
