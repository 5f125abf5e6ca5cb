"""Attention over entries that stand for several tokens each, the log-multiplicity applied exactly.

A bias on every score slows a dense kernel down on a GPU, and FlashAttention-3 takes none. Entries of one multiplicity
share one bias, and a constant added to every score only moves the log-sum-exp: each group is read without bias and
weighted as it merges.
"""

from math import log
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from ..plan import Plan
from .merge import Partial, merge

if TYPE_CHECKING:
    from ..cache.entries import Entries


def over_entries(kernel: ModuleType, q: Tensor, entries: "Entries", scale: float, plan: Plan | None) -> Partial:
    """`kernel` over `entries`, (B, S, H, D) queries."""
    if plan is not None or not q.is_cuda:  # the CPU's flash attention takes a bias at no cost to speak of
        return kernel.partial(q, entries.k, entries.v, scale=scale, log_weight=entries.log_weight(), plan=plan)
    parts = []
    for k, v, tokens in entries.groups():
        part = kernel.partial(q, k, v, scale=scale)
        parts.append(part if tokens == 1 else Partial(part.out, part.lse + log(tokens)))
    return merge(parts)
