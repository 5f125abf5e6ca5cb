"""How many tiles of a kernel windows touch, and how many of those they fill."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernel.boxes import Boxes, Dilated, Tile


class TileCount(NamedTuple):
    """Pairs of a tile of queries and one of keys."""

    total: int
    visited: int  # hold a pair that attends
    full: int  # hold no other

    @property
    def bound(self) -> float:
        """How many times fewer tiles are visited than in dense attention: no kernel that skips tiles gains more."""
        return self.total / self.visited


def count_tiles(boxes: Boxes | Dilated, queries: tuple[int, int, int], keys: tuple[int, int, int]) -> TileCount:
    """Tiles of a kernel that works on `queries` by `keys` tokens (frames, rows, columns) of a permuted sequence.

    The simulation of GNA (arXiv 2504.16922): axes are independent, so a pair of tiles is visited, or full, where it is
    along every axis. Tokens of one part of a dilated grid lie together. Where a grid does not divide, the last tiles
    are smaller.
    """
    parts = [part.boxes for part in boxes.parts] if isinstance(boxes, Dilated) else [boxes]
    of_queries, of_keys, visited, full = (
        sum(each) for each in zip(*(_count(one, queries, keys) for one in parts), strict=True)
    )
    return TileCount(of_queries * of_keys, visited, full)


def _count(boxes: Boxes, queries: tuple[int, int, int], keys: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Tiles of queries and of keys, pairs that are visited, and those that are full."""
    lengths = (boxes.keys.frames, boxes.keys.height, boxes.keys.width)
    axes = [_along(*given) for given in zip(boxes.axes, lengths, queries, keys, strict=True)]
    return (
        prod(some.shape[0] for some, _ in axes),
        prod(some.shape[1] for some, _ in axes),
        prod(int(some.sum()) for some, _ in axes),
        prod(int(whole.sum()) for _, whole in axes),
    )


def _along(tiles: Sequence[Tile], length: int, of_queries: int, of_keys: int) -> tuple[Tensor, Tensor]:
    """Along one axis, which pairs of tiles hold a pair of tokens that attends, and which hold no other."""
    reads = torch.zeros(tiles[-1][0][1], length, dtype=torch.bool)
    for own, read in tiles:
        reads[slice(*own), slice(*read)] = True
    rows = [part.split(of_keys, 1) for part in reads.split(of_queries, 0)]
    some, whole = (torch.tensor([[bool(test(one)) for one in row] for row in rows]) for test in (torch.any, torch.all))
    return some, whole
