"""Attention from boxes of queries to boxes of keys on a grid: every box's keys are gathered and read densely."""

from collections import defaultdict
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..grid import Grid
from .merge import Partial, nothing

if TYPE_CHECKING:
    from ..cache.entries import Entries

Span = tuple[int, int]
Box = tuple[Span, Span, Span]
"""First token and the one behind the last, by frame, row and column."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of queries, which cover the grid of queries once, each with the box of keys that all of it reads.

    `most_bytes` bounds the keys and values that are gathered at a time; one box is, whatever it takes.
    """

    queries: Grid
    keys: Grid
    pairs: tuple[tuple[Box, Box], ...]
    most_bytes: int

    @property
    def keys_read(self) -> float:
        """Keys that a query reads on average."""
        return sum(_volume(own) * _volume(read) for own, read in self.pairs) / self.queries.tokens


def over_boxes(kernel: ModuleType, q: Tensor, entries: "Entries", scale: float, boxes: Boxes) -> Partial:
    """`kernel` over what each of the queries (B, S, H, D) may read of `entries`, whose tokens lie on `boxes.keys`.

    Boxes of one size go together, as rows of a batch.
    """
    result = nothing(q)
    q, k, v = (_on(grid, x) for grid, x in ((boxes.queries, q), (boxes.keys, entries.k), (boxes.keys, entries.v)))
    out, lse = (_on(boxes.queries, x) for x in result)
    alike: defaultdict[tuple[int, ...], list[tuple[Box, Box]]] = defaultdict(list)
    for own, read in boxes.pairs:
        alike[tuple(stop - start for start, stop in (*own, *read))].append((own, read))
    for pairs in alike.values():
        bytes_each = 2 * _volume(pairs[0][1]) * k[:, 0, 0, 0].numel() * k.element_size()
        at_once = max(1, boxes.most_bytes // bytes_each)
        for first in range(0, len(pairs), at_once):
            some = pairs[first : first + at_once]
            queries = _gathered(q, [own for own, _ in some])
            keys, values = (_gathered(x, [read for _, read in some]) for x in (k, v))
            found = kernel.partial(queries, keys, values, scale=scale)
            for whole, part in zip((out, lse), found, strict=True):
                _scatter(whole, part, [own for own, _ in some])
    return result


def _on(grid: Grid, x: Tensor) -> Tensor:
    """(B, N, ...) as (B, frames, rows, columns, ...)."""
    return x.unflatten(1, (grid.frames, grid.height, grid.width))


def _gathered(x: Tensor, boxes: list[Box]) -> Tensor:
    """(B, frames, rows, columns, H, D) to (boxes * B, tokens of a box, H, D)."""
    return torch.cat([x[_index(box)].flatten(1, 3) for box in boxes])


def _scatter(whole: Tensor, part: Tensor, boxes: list[Box]) -> None:
    for box, rows in zip(boxes, part.split(whole.shape[0]), strict=True):
        place = whole[_index(box)]
        place.copy_(rows.reshape(place.shape))


def _index(box: Box) -> tuple[slice, ...]:
    return (slice(None), *(slice(*span) for span in box))


def _volume(box: Box) -> int:
    size = 1
    for start, stop in box:
        size *= stop - start
    return size
