"""Which (query, key) pairs attend."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from .errors import KnobError


@dataclass(frozen=True, eq=False)
class Plan:
    """Which (query, key) pairs attend, in blocks, so that kernels can skip whole blocks.

    `keep` is bool (query blocks, key blocks); block i covers tokens [i * block, (i + 1) * block), the last one may
    be shorter. One plan serves every batch row and head of the call. `a & b` keeps what both keep, `a | b` what
    either does; plans with different blocks are refined to the common one first.
    """

    keep: Tensor
    queries: int
    keys: int
    query_block: int
    key_block: int

    def __post_init__(self) -> None:
        wanted = (-(-self.queries // self.query_block), -(-self.keys // self.key_block))
        if tuple(self.keep.shape) != wanted or self.keep.dtype != torch.bool:
            raise KnobError(
                f"a plan over {self.queries} queries in blocks of {self.query_block} and {self.keys} keys in blocks "
                f"of {self.key_block} needs a bool tensor of shape {wanted}, got {self.keep.dtype} of "
                f"{tuple(self.keep.shape)}"
            )

    @classmethod
    def columns(cls, kept: Tensor, queries: int) -> "Plan":
        """Every query reads the same keys: `kept` is bool (N,)."""
        return cls(kept[None], queries, kept.shape[0], query_block=queries, key_block=1)

    @classmethod
    def full(cls, queries: int, keys: int) -> "Plan":
        return cls(torch.ones(1, 1, dtype=torch.bool), queries, keys, query_block=queries, key_block=keys)

    def mask(self) -> Tensor:
        """The plan token by token, bool (S, N)."""
        rows = self.keep.repeat_interleave(self.query_block, 0)[: self.queries]
        return rows.repeat_interleave(self.key_block, 1)[:, : self.keys]

    @property
    def pairs(self) -> Tensor:
        """Number of (query, key) pairs kept, a 0-d tensor on the plan's device (reading it may synchronise)."""
        return torch.einsum(
            "q,qk,k->",
            _block_sizes(self.queries, self.query_block, self.keep.device),
            self.keep.double(),
            _block_sizes(self.keys, self.key_block, self.keep.device),
        )

    @property
    def density(self) -> float:
        """Pairs kept over pairs in all, in [0, 1]."""
        return float(self.pairs) / (self.queries * self.keys)

    def groups(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Query and key indices, (s,) and (n,) int64, of query blocks that read the same keys; covers every query."""
        patterns, owner = torch.unique(self.keep, dim=0, return_inverse=True)
        query_owner = owner.repeat_interleave(self.query_block)[: self.queries]
        for number, pattern in enumerate(patterns):
            kept = pattern.repeat_interleave(self.key_block)[: self.keys]
            yield (query_owner == number).nonzero().squeeze(1), kept.nonzero().squeeze(1)

    def __and__(self, other: "Plan") -> "Plan":
        a, b = self._aligned(other)
        return Plan(a.keep & b.keep, a.queries, a.keys, a.query_block, a.key_block)

    def __or__(self, other: "Plan") -> "Plan":
        a, b = self._aligned(other)
        return Plan(a.keep | b.keep, a.queries, a.keys, a.query_block, a.key_block)

    def _aligned(self, other: "Plan") -> "tuple[Plan, Plan]":
        if (self.queries, self.keys) != (other.queries, other.keys):
            raise KnobError(
                f"plans combine over the same tokens, got {self.queries}x{self.keys} and {other.queries}x{other.keys}"
            )
        blocks = gcd(self.query_block, other.query_block), gcd(self.key_block, other.key_block)
        return self._refined(*blocks), other._refined(*blocks)

    def _refined(self, query_block: int, key_block: int) -> "Plan":
        keep = self.keep.repeat_interleave(self.query_block // query_block, 0)[: -(-self.queries // query_block)]
        keep = keep.repeat_interleave(self.key_block // key_block, 1)[:, : -(-self.keys // key_block)]
        return Plan(keep, self.queries, self.keys, query_block, key_block)


def _block_sizes(tokens: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, tokens, block, device=device)
    return (tokens - starts).clamp(max=block).double()
