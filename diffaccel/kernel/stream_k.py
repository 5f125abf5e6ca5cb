"""Lean Attention's split of the keys (arXiv 2405.10480): equal work for every worker, whatever the heads hold.

Few queries over many keys fill a GPU only if the keys of a head are split. Flash-decoding splits each head into the
same number of parts, and the last wave of parts leaves workers idle. Here the tiles of all heads form one line, which
is cut into equal stretches: a worker may end one head and begin the next, and a head's partials merge. Heads may hold
different numbers of keys, as caches that choose head by head leave them.

A planner, what its plans take, and attention by a plan, worker by worker in PyTorch. There is no fused kernel for it:
`partial` shows that the split is exact and is not a fast path.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KnobError
from . import sdpa
from .merge import Partial, merge, nothing


class Piece(NamedTuple):
    """Keys `start` to `stop` of one lane, a pair of batch row and head of keys: lane = row * heads + head."""

    lane: int
    start: int
    stop: int


Schedule = list[list[Piece]]
"""What each worker reads, in its order."""


def stream_k(lengths: Sequence[int], tile: int, workers: int) -> Schedule:
    """Equal stretches of the tiles of all lanes; `lengths` are the keys of each lane, in tiles of `tile` keys.

    No worker gets more than ceil(tiles / workers) tiles. Raises `KnobError` for sizes below 1 or a negative length.
    """
    _check(lengths, tile=tile, workers=workers)
    tiles = [Piece(lane, at, min(at + tile, n)) for lane, n in enumerate(lengths) for at in range(0, n, tile)]
    each = ceil(len(tiles) / workers)
    return [_joined(tiles[worker * each : (worker + 1) * each]) for worker in range(workers)]


def fixed_split(lengths: Sequence[int], tile: int, workers: int, parts: int) -> Schedule:
    """Flash-decoding's: each lane in up to `parts` parts, each part to the worker that is free first."""
    _check(lengths, tile=tile, workers=workers, parts=parts)
    schedule: Schedule = [[] for _ in range(workers)]
    busy = [0] * workers
    for lane, length in enumerate(lengths):
        size = tile * ceil(ceil(length / tile) / parts)
        for start in range(0, length, max(1, size)):
            piece = Piece(lane, start, min(start + size, length))
            free = busy.index(min(busy))
            schedule[free].append(piece)
            busy[free] += _tiles(piece, tile)
    return schedule


def makespan(schedule: Schedule, tile: int, overhead: float = 0.0) -> float:
    """When the last worker is done, in times of one tile; `overhead` is that of starting a piece and merging it."""
    return max(sum(_tiles(piece, tile) + overhead for piece in pieces) for pieces in schedule)


def occupancy(schedule: Schedule, tile: int) -> float:
    """Share of the workers' time in which they work, in (0, 1]; 0 without keys."""
    work = [sum(_tiles(piece, tile) for piece in pieces) for pieces in schedule]
    return sum(work) / (len(work) * max(work)) if max(work) else 0.0


def partial(
    q_BSHD: Tensor,
    k_BNGD: Tensor,
    v_BNGD: Tensor,
    *,
    scale: float,
    workers: int,
    tile: int = 128,
    lengths: Sequence[int] | None = None,
) -> Partial:
    """Attention (B, S, H, D) by the schedule of `stream_k`; H / G neighbouring heads share a key.

    `lengths` are the keys that each lane has, of the N there, row by row; all of them where left out. Raises
    `KnobError` where they are not one for each lane, or more than N.
    """
    (b, s, h, d), (n, g) = q_BSHD.shape, k_BNGD.shape[1:3]
    lengths = [n] * (b * g) if lengths is None else list(lengths)
    if len(lengths) != b * g or max(lengths) > n:
        raise KnobError(
            f"lengths are one for each of {b} rows x {g} heads of keys and at most {n}, got {len(lengths)} of them, up "
            f"to {max(lengths, default=0)}: count the keys of every row and head"
        )
    lanes = q_BSHD.reshape(b, s, g, h // g, d).permute(0, 2, 1, 3, 4).reshape(b * g, s * (h // g), 1, d)
    parts: list[list[Partial]] = [[] for _ in lengths]
    for pieces in stream_k(lengths, tile, workers):
        for lane, start, stop in pieces:
            (row, head), keys = divmod(lane, g), slice(start, stop)
            k, v = (x[row : row + 1, keys, head : head + 1] for x in (k_BNGD, v_BNGD))
            parts[lane].append(sdpa.partial(lanes[lane : lane + 1], k, v, scale=scale))
    found = [merge(part) if part else nothing(q) for part, q in zip(parts, lanes.split(1), strict=True)]
    out, lse = (torch.cat(same) for same in zip(*found, strict=True))
    out = out.reshape(b, g, s, h // g, d).transpose(1, 2).reshape(b, s, h, d)
    return Partial(out, lse.reshape(b, g, s, h // g).transpose(1, 2).reshape(b, s, h))


def _tiles(piece: Piece, tile: int) -> int:
    return ceil((piece.stop - piece.start) / tile)


def _joined(tiles: Sequence[Piece]) -> list[Piece]:
    """Neighbouring tiles of one lane as one piece."""
    pieces: list[Piece] = []
    for one in tiles:
        if pieces and pieces[-1].lane == one.lane:
            pieces[-1] = pieces[-1]._replace(stop=one.stop)
        else:
            pieces.append(one)
    return pieces


def _check(lengths: Sequence[int], **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise KnobError(f"{name} is a number >= 1, got {size}")
    if not lengths or min(lengths) < 0:
        raise KnobError(f"lengths are numbers of keys >= 0, at least one, got {list(lengths)}")
