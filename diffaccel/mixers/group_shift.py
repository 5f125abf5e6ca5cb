"""SinkLoRA (arXiv 2406.05678): attention in groups of tokens, shifted in half of the heads, with sinks."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .mixer import Mixer, Past, Tokens, attend, extended


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
        seen, half = extended(state, tokens.k, tokens.v), tokens.q.shape[2] // 2
        parts = [(slice(0, half), 0), (slice(half, None), self.group // 2)][half == 0 :]
        out = [
            self._grouped(tokens.q[:, :, heads], seen.k[:, :, heads], seen.v[:, :, heads], shift)
            for heads, shift in parts
        ]
        return torch.cat(out, 2), seen

    def _grouped(self, q: Tensor, k: Tensor, v: Tensor, shift: int) -> Tensor:
        """Of the last tokens' queries (B, S, H, D), in groups that begin `shift` tokens before the first of all."""
        (rows, new), total, size = q.shape[:2], k.shape[1], self.group
        first, last = (total - new + shift) // size, (total - 1 + shift) // size
        begin, end = first * size - shift, (last + 1) * size - shift  # tokens that these groups have place for

        def groups(x: Tensor, start: int) -> Tensor:
            """Of tokens from `start` on, (B * groups, size, H, D)."""
            x = nn.functional.pad(x[:, max(0, begin - start) :], (0, 0, 0, 0, max(0, start - begin), end - total))
            return x.reshape(-1, size, *x.shape[2:])

        place = torch.arange(begin, end, device=q.device).view(-1, size)
        sink = torch.arange(min(self.sinks, total), device=q.device)
        apart = torch.div(sink + shift, size, rounding_mode="floor") != torch.arange(first, last + 1).to(sink)[:, None]
        there = torch.cat([(place >= 0) & (place < total), apart], 1)  # a sink is not read twice
        keys, values = (
            torch.cat([groups(x, 0), x[:, : len(sink)].repeat_interleave(len(place), 0)], 1) for x in (k, v)
        )
        bias = torch.zeros(there.shape, device=q.device).masked_fill_(~there, -torch.inf)
        out = attend(groups(q, total - new), keys, values, bias.repeat(rows, 1)[:, None, None])
        return out.reshape(rows, -1, *out.shape[2:])[:, total - new - begin :][:, :new]


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
