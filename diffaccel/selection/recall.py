"""How much of the attention mass the chosen keys hold."""

from dataclasses import replace
from types import ModuleType

from torch import Tensor

from ..cache.entries import Entries
from ..kernel.weighted import over_entries
from .blocks import Chosen, over_blocks


def mass_read(kernel: ModuleType, q: Tensor, entries: Entries, chosen: Chosen, scale: float) -> Tensor:
    """Share of the softmax mass over all `entries` that is on the keys read, (B, S, H) in [0, 1], of each query.

    Means of what is not read count for nothing. Works from the log-sum-exps of two kernel calls: no map is formed.
    """
    read = over_blocks(kernel, False, q, replace(chosen, summary=None), scale)
    return (read.lse - over_entries(kernel, q, entries, scale, None).lse).exp().clamp(max=1)
