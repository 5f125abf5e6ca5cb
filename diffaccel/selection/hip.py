"""HiP: a search down a tree of keys that touches few of them (arXiv 2406.09827)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..policy import knob
from ..site import Site
from .asked import Asked
from .places import nearby
from .ranked import Ranked

if TYPE_CHECKING:
    from ..cache.entries import Entries


@dataclass(frozen=True)
class HiP(Ranked):
    """Halve groups of keys, keep the halves of which one key scores best, halve those again.

    As many groups as blocks are read tile the keys. In each round every group becomes two halves, a half scores what
    its one key has with the best query of the block, and as many halves stay as there were groups: log2(keys / read)
    rounds, and of all keys only one of each half is looked at: the middle one, or as in the authors' code the first.

    It rests on neighbours being alike. So tokens lie along a curve on which near ones in the video are near, where the
    paper has the order of a text; and where neighbours are not alike it misses what matters.

    Differences from the paper: leaves are as large as a kernel's blocks (2 keys there, for 32 queries), and all layers
    search. What its code calls `mask_refresh_interval` is `every`.
    """

    paper: ClassVar[str] = "HiP, arXiv 2406.09827"
    summary: ClassVar[str] = "finds the keys to read by a tree search that looks at few of them"

    representative: str = knob(
        "middle", "the key that stands for a group, the middle one or its first", choices=("middle", "first")
    )
    order: str = knob(
        "curve",
        'keys side by side: those near in time and place ("curve"), or as they came ("raster")',
        choices=("curve", "raster"),
    )

    def whole_frames(self) -> str:
        return "order='curve' goes by places in whole frames (order='raster' does not)" if self.order == "curve" else ""

    def rank(self, asked: Asked) -> Tensor:
        """1 for the blocks that the search ends at, (B, H, QB, KB)."""
        q, blocks, size = asked.samples(asked.query_block), asked.keys.choices, asked.keys.block
        every, weight = asked.keys.k.flatten(2, 3), asked.keys.log_weight

        def score(starts: Tensor, stops: Tensor) -> Tensor:
            place = starts * size if self.representative == "first" else (starts + stops) * size // 2
            at = place.clamp(max=blocks * size - 1).flatten(2)
            keys = every.gather(2, at[..., None].expand(-1, -1, -1, every.shape[-1])).unflatten(2, place.shape[2:])
            best = (q @ keys.float().mT).amax(3)
            return best if weight is None else best + weight.flatten(2).gather(2, at).view_as(best)

        found = search(score, asked.q.shape[:3], blocks, asked.take, q.device)
        return q.new_zeros(*found.shape[:3], blocks).scatter_(-1, found, 1.0)

    def key_buckets(self, entries: "Entries", site: Site) -> Tensor | None:
        return nearby(site.grid, entries.k) if self.order == "curve" else None

    def query_buckets(self, q: Tensor, entries: "Entries", site: Site) -> Tensor | None:
        return nearby(site.grid, q) if self.order == "curve" else None


def search(
    score: Callable[[Tensor, Tensor], Tensor], shape: Iterable[int], blocks: int, groups: int, device: torch.device
) -> Tensor:
    """The `groups` of `blocks` leaves where a search ends, int64 (*shape, groups); each once.

    `score` is asked for what groups of leaves are worth, from the first to before the last one, (*shape, n) both.
    """
    edges = torch.arange(groups + 1, device=device) * blocks // groups
    low, high = (edge.expand(*shape, -1) for edge in (edges[:-1], edges[1:]))
    width = -(-blocks // groups)
    while width > 1:
        middle = (low + high + 1) // 2
        starts, stops = torch.cat([low, middle], -1), torch.cat([middle, high], -1)
        empty = starts >= stops
        best = score(starts, stops).masked_fill(empty, -torch.inf).topk(groups, dim=-1).indices
        low, high = starts.gather(-1, best), stops.gather(-1, best)
        width = -(-width // 2)
    return low
