"""Compressed Convolutional Attention, CCA and CCGQA (arXiv 2510.04476): attention in a compressed space."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .mixer import Mixer, Past, Tokens, attend, extended
from .projections import Rotary


class State(NamedTuple):
    past: Past | None  # compressed keys and values
    x: Tensor | None  # the last hidden states, which convolutions and the shift of values look back at


class CCA(Mixer):
    """Down-projection, attention among fewer heads, up-projection; keys and values are cached compressed.

    Queries and keys pass two causal convolutions of width two, channel by channel and then head by head; the mean of
    queries and keys before them is added to both; half of the channels of values come from the token before; queries
    and keys are normalised to length sqrt(D), keys times a learned temperature, then rotated. Compressed heads have the
    layer's head size, so that its rotary tables fit (the paper does not say so), and start at random: nothing of the
    layer is copied but its output's bias. `heads` below the layer's is C, `kv_heads` below `heads` is CCGQA.

    Args:
        heads: compressed query heads, >= 1; by default half of the layer's.
        kv_heads: of keys and values, dividing `heads`; by default `heads`.
    """

    paper: ClassVar[str] = "CCA, arXiv 2510.04476"
    summary: ClassVar[str] = "attention in a compressed space, queries and keys mixed by convolutions"

    def __init__(
        self, layer: nn.Module, block: int | None = None, heads: int | None = None, kv_heads: int | None = None
    ) -> None:
        super().__init__(layer, block)
        width, dim = self.layer.width, self.layer.dim
        heads = max(1, self.layer.count // 2) if heads is None else heads
        kv_heads = heads if kv_heads is None else kv_heads
        self.require(heads >= 1, "heads is a number >= 1", heads=heads)
        self.require(
            1 <= kv_heads <= heads and heads % kv_heads == 0, "kv_heads divides heads", heads=heads, kv_heads=kv_heads
        )
        self.require(dim % 2 == 0, "the size of a head is even, as half of its values are shifted", dim=dim)
        self.kv_heads, self.groups = kv_heads, heads // kv_heads
        self.to_q, self.to_k = (nn.Linear(width, n * dim, bias=False) for n in (heads, kv_heads))
        self.to_v, self.to_v_before = (nn.Linear(width, kv_heads * dim // 2, bias=False) for _ in range(2))
        self.conv_q, self.conv_k = (
            nn.Sequential(
                nn.Conv1d(n * dim, n * dim, 2, groups=n * dim, bias=False),
                nn.Conv1d(n * dim, n * dim, 2, groups=n, bias=False),
            )
            for n in (heads, kv_heads)
        )
        self.temperature = nn.Parameter(torch.zeros(kv_heads))
        self.up = nn.Linear(heads * dim, width)
        self.rotated = self.layer.rotated
        del self.layer

    def forward(self, x: Tensor, state: Any = None, pos: Rotary | None = None) -> tuple[Tensor, Any]:
        past, before = state or State(None, None)
        q, k, v = self.compressed(x, before, pos)
        found = []
        for start in range(0, x.shape[1], self.block or x.shape[1]):
            at = slice(start, start + (self.block or x.shape[1]))
            out, past = self.mix(Tokens(x[:, at], q[:, at], k[:, at], v[:, at]), past)
            found.append(out)
        return self.up(torch.cat(found, 1).flatten(2)), State(past, _behind(before, x)[:, -2:])

    def mix(self, tokens: Tokens, state: Past | None) -> tuple[Tensor, Any]:
        seen = extended(state, tokens.k, tokens.v)
        k, v = (each.repeat_interleave(self.groups, 2) for each in (seen.k, seen.v))
        return attend(tokens.q, k, v), seen

    def compressed(self, x: Tensor, before: Tensor | None, pos: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, S, heads, D), keys and values (B, S, kv_heads, D)."""
        x = _behind(before, x)  # two more in front
        plain_q, plain_k = self.to_q(x), self.to_k(x)
        q, k = (conv(y.mT).mT for conv, y in ((self.conv_q, plain_q), (self.conv_k, plain_k)))
        q, k = q.unflatten(2, (self.kv_heads * self.groups, -1)), k.unflatten(2, (self.kv_heads, -1))
        plain_q = plain_q[:, 2:].unflatten(2, (self.kv_heads, self.groups, -1))
        mean = (plain_q + plain_k[:, 2:].unflatten(2, (self.kv_heads, 1, -1))) / 2
        q, k = q + mean.flatten(2, 3), k + mean.mean(3)
        q, k = (nn.functional.rms_norm(y, y.shape[-1:]) for y in (q, k))
        k = k * self.temperature.exp()[:, None]
        v = torch.cat(
            [part.unflatten(2, (self.kv_heads, -1)) for part in (self.to_v(x[:, 2:]), self.to_v_before(x[:, 1:-1]))], -1
        )
        return self.rotated(q, pos), self.rotated(k, pos), v


def _behind(before: Tensor | None, x: Tensor) -> Tensor:
    """Hidden states with the two before them, zero at the beginning."""
    return torch.cat([x.new_zeros(x.shape[0], 2, x.shape[2]) if before is None else before, x], 1)
