"""What stays of tokens that left one by one, head by head."""

from collections.abc import Callable, Sequence
from operator import add
from typing import Protocol

import torch
from torch import Tensor

from .centroids import Centroids
from .ragged import ByHead, Counts, Ragged, each_head
from .stored import Stored, in_bits
from .tiers import Tier


class Remainder(Tier, Protocol):
    """A tier that takes what a cache drops."""

    def take(self, gone: Ragged, tokens_per_frame: int) -> None: ...


class MeanKey(ByHead):
    """One key and value a head, the means of all that left, with log(their number) added to its score.

    RazorAttention's compensation token (arXiv 2407.15891, section 3.3). The means are kept in fp32.
    """

    def __init__(self) -> None:
        super().__init__()
        self._means = torch.empty(0)  # keys and values, (2, B, 1, H, D)
        self._tokens: Counts = ()

    def take(self, gone: Ragged, tokens_per_frame: int) -> None:
        """Add entries to the means."""
        wide = torch.promote_types(gone.k.dtype, torch.float32)
        there = gone.there.transpose(1, 2)[..., None]
        new = torch.stack([(x.to(wide) * there).sum(1, keepdim=True) for x in (gone.k, gone.v)])
        if not self._tokens:
            self._means, self._tokens = torch.zeros_like(new), each_head(lambda _: 0, gone.counts)
        before = _column(self._tokens, new)
        self._tokens = each_head(add, self._tokens, gone.counts)
        after = _column(self._tokens, new)
        self._means = (self._means * before + new) / after.clamp(min=1)
        k, v = self._means.to(gone.k.dtype)
        held = Ragged(k, v, {}, (after > 0)[:, 0, :, 0:1], each_head(lambda n: min(1, n), self._tokens))
        self.hold(held, tokens_per_frame, self._tokens)

    @property
    def bytes(self) -> int:
        return super().bytes + self._means.numel() * self._means.element_size()


def _column(counts: Counts, like: Tensor) -> Tensor:
    """(B, 1, H, 1)."""
    return torch.tensor(counts, device=like.device, dtype=like.dtype)[:, None, :, None]


REMAINDERS: dict[str, Callable[[int], Sequence[Remainder]]] = {
    "mean": lambda layers: [MeanKey() for _ in range(layers)],
    "centroids": lambda layers: [Centroids() for _ in range(layers)],
    "bits4": lambda layers: [Stored(in_bits(4)) for _ in range(layers)],
    "bits2": lambda layers: [Stored(in_bits(2)) for _ in range(layers)],
    "host": Stored.on_host,
}
"""What `Scored.dropped` may say, and what it makes for so many layers."""
