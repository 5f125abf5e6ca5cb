"""Attention from boxes of queries to boxes of keys on a grid, by any dense kernel and with little copying.

The boxes are tiles along every axis, so those of one row of tiles (a strip) read the same rows of keys. A strip's keys
are copied once, with the axis along it outermost: what a tile reads is then one piece of memory, and what all tiles of
the strip read is a batch whose rows overlap, given to the kernel by its strides. Per box nothing is copied. Several
strips go together as more heads.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..grid import Grid
from .merge import Partial, nothing

if TYPE_CHECKING:
    from ..cache.entries import Entries

Span = tuple[int, int]
"""First token along an axis and the one behind the last."""
Tile = tuple[Span, Span]
"""A span of queries, and that of the keys which all of them read."""


@dataclass(frozen=True)
class Boxes:
    """Tiles along frames, rows and columns; each box of queries reads the box of keys that its three tiles read.

    The tiles of an axis cover its queries once, in order. `most_bytes` bounds the keys and values that are copied at a
    time; one strip's are, whatever they take.
    """

    queries: Grid
    keys: Grid
    frames: tuple[Tile, ...]
    rows: tuple[Tile, ...]
    columns: tuple[Tile, ...]
    most_bytes: int

    @property
    def keys_read(self) -> float:
        """Keys that a query reads on average."""
        pairs = prod(sum(_size(own) * _size(read) for own, read in axis) for axis in self.axes)
        return pairs / self.queries.tokens

    @cached_property
    def along_columns(self) -> bool:
        """Whether strips of tiles run along a row of the frame: the direction in which fewer keys are copied."""
        by_rows, by_columns = (sum(_size(read) for _, read in axis) for axis in (self.rows, self.columns))
        return by_rows * self.keys.width <= by_columns * self.keys.height

    @cached_property
    def strips(self) -> list[list[tuple[Tile, Tile]]]:
        """Tiles of frames and of the axis across the strips, those of equal sizes together."""
        alike: defaultdict[tuple[int, ...], list[tuple[Tile, Tile]]] = defaultdict(list)
        for strip in product(self.frames, self.rows if self.along_columns else self.columns):
            alike[tuple(_size(span) for tile in strip for span in tile)].append(strip)
        return list(alike.values())

    @cached_property
    def batches(self) -> list[list[Tile]]:
        """Tiles along a strip, those together whose sizes and distances are equal."""
        alike: defaultdict[tuple[int, int], list[Tile]] = defaultdict(list)
        for own, read in self.columns if self.along_columns else self.rows:
            alike[_size(own), _size(read)].append((own, read))
        return [batch for tiles in alike.values() for batch in _progressions(tiles)]

    @property
    def axes(self) -> tuple[tuple[Tile, ...], ...]:
        """Tiles along frames, rows and columns."""
        return self.frames, self.rows, self.columns


class Part(NamedTuple):
    """Every n-th token along the axes of two grids, and the boxes that these read each other in."""

    own: tuple[slice, slice, slice]
    read: tuple[slice, slice, slice]
    boxes: Boxes


@dataclass(frozen=True)
class Dilated:
    """Parts of a grid whose tokens lie apart and read none of the other parts; together they are all queries."""

    queries: Grid
    keys: Grid
    parts: tuple[Part, ...]

    @property
    def keys_read(self) -> float:
        """Keys that a query reads on average."""
        boxes = [part.boxes for part in self.parts]
        return sum(one.keys_read * one.queries.tokens for one in boxes) / self.queries.tokens


def over_boxes(kernel: ModuleType, q: Tensor, entries: "Entries", scale: float, boxes: Boxes | Dilated) -> Partial:
    """`kernel` over what each of the queries (B, S, H, D) may read of `entries`, whose tokens lie on `boxes.keys`."""
    if isinstance(boxes, Dilated):
        return _over_parts(kernel, q, entries, scale, boxes)
    result = nothing(q)
    q, out, lse = (_on(boxes.queries, x, boxes.along_columns) for x in (q, *result))
    k, v = (_on(boxes.keys, x, boxes.along_columns) for x in (entries.k, entries.v))
    for strips in boxes.strips:
        (_, frames), (_, across) = strips[0]
        bytes_each = 2 * _size(frames) * _size(across) * k[:, 0, 0].numel() * k.element_size()
        at_once = max(1, boxes.most_bytes // bytes_each)
        for first in range(0, len(strips), at_once):
            some = strips[first : first + at_once]
            owns = [(frames[0], across[0]) for frames, across in some]
            reads = [(frames[1], across[1]) for frames, across in some]
            queries, keys, values = _copied(q, owns), _copied(k, reads), _copied(v, reads)
            for batch in boxes.batches:
                own, read = [own for own, _ in batch], [read for _, read in batch]
                found = kernel.partial(_seen(queries, own), _seen(keys, read), _seen(values, read), scale=scale)
                for whole, part in zip((out, lse), found, strict=True):
                    _scatter(whole, part, owns, own)
    return result


def _over_parts(kernel: ModuleType, q: Tensor, entries: "Entries", scale: float, dilated: Dilated) -> Partial:
    """The same of a dilated grid, whose parts are copied to lie together."""
    result = nothing(q)
    q, out, lse = (_on(dilated.queries, x, True) for x in (q, *result))
    k, v = (_on(dilated.keys, x, True) for x in (entries.k, entries.v))
    for own, read, boxes in dilated.parts:
        some = replace(entries, k=k[:, *read].flatten(1, 3), v=v[:, *read].flatten(1, 3))
        found = over_boxes(kernel, q[:, *own].flatten(1, 3), some, scale, boxes)
        out[:, *own], lse[:, *own] = (_on(boxes.queries, x, True) for x in found)
    return result


def _on(grid: Grid, x: Tensor, along_columns: bool) -> Tensor:
    """(B, N, ...) as (B, frames, across, along, ...)."""
    x = x.unflatten(1, (grid.frames, grid.height, grid.width))
    return x if along_columns else x.transpose(2, 3)


def _copied(x: Tensor, strips: Sequence[tuple[Span, Span]]) -> Tensor:
    """Strips of (B, frames, across, along, H, D), as (along, frames, across, strips, B, H, D) in one piece."""
    (frames, across), (batch, *_, along, heads, dim) = strips[0], x.shape
    strip = x.new_empty(along, _size(frames), _size(across), len(strips), batch, heads, dim)
    for number, (frames, across) in enumerate(strips):
        part = x[:, slice(*frames), slice(*across)].permute(3, 1, 2, 0, 4, 5)
        _copy(strip[:, :, :, number], part)
    return strip


def _seen(strip: Tensor, spans: Sequence[Span]) -> Tensor:
    """Spans along a strip, equally long and far apart, as (spans, tokens, heads of all strips, D): no copy."""
    per, heads, dim = prod(strip.shape[1:3]), prod(strip.shape[3:6]), strip.shape[6]
    first, last = spans[0][0], spans[-1][0]
    step = (last - first) // max(1, len(spans) - 1)
    size, stride = (len(spans), _size(spans[0]) * per, heads, dim), (step * per * heads * dim, heads * dim, dim, 1)
    return strip.as_strided(size, stride, first * per * heads * dim)


def _scatter(whole: Tensor, part: Tensor, strips: Sequence[tuple[Span, Span]], along: Sequence[Span]) -> None:
    """What `_seen` of queries became, (spans, tokens, heads of all strips, ...), to its places in `whole`."""
    (frames, across), batch = strips[0], whole.shape[0]
    shape = (_size(along[0]), _size(frames), _size(across))
    part = part.unflatten(2, (len(strips), batch, -1)).unflatten(1, shape)
    joined = all(a[1] == b[0] for a, b in pairwise(along))
    for number, (frames, across) in enumerate(strips):
        found = part[:, :, :, :, number].movedim(4, 0).movedim((3, 4), (1, 2))  # (B, frames, across, spans, span, ..)
        place = whole[:, slice(*frames), slice(*across)]
        if joined:
            _copy(place[:, :, :, along[0][0] : along[-1][1]].unflatten(3, (len(along), -1)), found)
        else:
            for span, one in zip(along, found.unbind(3), strict=True):
                _copy(place[:, :, :, slice(*span)], one)


def _copy(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, on a GPU 16 bytes at a time where they lie together."""
    wide = target.shape[-1] * target.element_size() % 16 == 0
    if wide and target.is_cuda and target.stride(-1) == source.stride(-1) == 1:
        target, source = (x.view(torch.complex128) for x in (target, source))
    target.copy_(source)


def _progressions(tiles: Sequence[Tile]) -> list[list[Tile]]:
    """Tiles of equal sizes in groups that are equally far apart, of queries as of keys; the longest first."""
    rest, found = list(tiles), []
    while rest:
        steps = [(b[0][0] - a[0][0], b[1][0] - a[1][0]) for a, b in pairwise(rest)]
        start, longest = 0, slice(0, 1)
        for stop in range(2, len(rest) + 1):
            if stop - start > 2 and steps[stop - 2] != steps[stop - 3]:
                start = stop - 2
            if stop - start > longest.stop - longest.start:
                longest = slice(start, stop)
        found.append(rest[longest])
        del rest[longest]
    return found


def _size(span: Span) -> int:
    return span[1] - span[0]
