"""InwardWindow: a window of the training size in frames larger than that (FreeSwim, arXiv 2511.14712)."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from math import log
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..cache.entries import Entries
from ..grid import Grid
from ..kernel.boxes import Boxes, Tile
from ..policy import Policy, Selector, knob
from ..site import Site

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class InwardWindow(Selector):
    """Every query reads as many rows and columns as the model was trained on, of all frames.

    The window is centred on the query and, near a border, shifted inward as a whole, so that every query reads equally
    many keys at offsets that training knew. A tile of queries shares the window centred on it, which is many times
    faster; a tile of one token is the paper's. What does not divide into tiles is left to the borders.

    Where the frame is no larger than the window along an axis it is read whole along that axis; where it is no larger
    along both, nothing is left out and the run says that the window never engaged.

    Differences from the paper: the rows and columns of a native frame of 30 x 52 tokens make a window of 31 x 53 there,
    the next odd numbers, and any numbers here; the factor on the logits follows from `ratio` and the window, not from
    constants.
    """

    slot: ClassVar[str] = "window"
    paper: ClassVar[str] = "FreeSwim, arXiv 2511.14712, section 3"
    summary: ClassVar[str] = "reads a window of the training size, shifted inward at the borders of a larger frame"
    exact: ClassVar[dict[str, Any]] = {"size": None}

    size: tuple[int, int] | None = knob(
        (31, 53), "rows and columns of tokens that a query reads, those of a frame in training; None reads all"
    )
    tile: tuple[int, int] = knob(
        (1, 1), "rows and columns of queries that share a window, no more than its own; (1, 1): one each, as published"
    )
    frames: int | None = knob(None, "latent frames that a query reads, its own in the middle, >= 1; None reads all")
    ratio: float = knob(
        2.0, "logits are multiplied by sqrt(log(ratio N) / log N), N the window's tokens a frame, >= 1; 1: by nothing"
    )
    field_pool: int = knob(
        1, "side of the squares of keys that a pass over the whole field reads as one mean each, >= 1; ours"
    )
    gather_mib: int = knob(1024, "MiB of keys and values gathered at a time, >= 1; a window at least is, in any case")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            self.require(len(self.size) == 2 and min(self.size) >= 1, "size is rows and columns >= 1", size=self.size)
        self.require(len(self.tile) == 2 and min(self.tile) >= 1, "tile is rows and columns >= 1", tile=self.tile)
        if self.size is not None:
            fits = self.tile[0] <= self.size[0] and self.tile[1] <= self.size[1]
            self.require(fits, "a tile is no larger than its window", tile=self.tile, size=self.size)
        self.require_frames("frames", 1, none="for all")
        self.require(self.ratio >= 1, "ratio is >= 1", ratio=self.ratio)
        self.require(self.field_pool >= 1, "field_pool is a number of tokens >= 1", field_pool=self.field_pool)
        self.require(self.gather_mib >= 1, "gather_mib is a number of MiB >= 1", gather_mib=self.gather_mib)

    def conflict(self, others: Iterable[Policy]) -> str | None:
        for other in others:
            if other.slot == "selection":
                return "a window gathers boxes of the frame, and a selection takes keys from all over it: leave one out"
            if other.slot == "cache" and not getattr(other, "keeps_frames_whole", False):
                name = type(other).__name__
                return f"a window needs whole frames in their order, and {name} keeps parts: use HostCache or none"
            if self.frames is not None and other.needs_blocks:
                name = type(other).__name__
                return f"a window over frames needs all of them in one piece, and {name} parts them: set frames=None"
        return None

    def plan(self, q: Tensor, entries: Entries, site: Site) -> Boxes | Entries | None:
        """The boxes of the grid that read each other, or means of keys; None where every query reads all."""
        if self.size is None or entries.frames is None:
            return None
        grid = site.grid
        keys = Grid(entries.count // grid.tokens_per_frame, grid.height, grid.width)
        if site.full_field:
            return None if self.field_pool == 1 else pooled(entries, keys, self.field_pool)
        first = site.start - int(entries.frames[0])
        return _boxes(self, grid, keys, first)

    def scale(self, site: Site) -> float:
        """The factor on the logits of a self-attention, also where the whole field is read to steer by."""
        if self.size is None or (site.grid.height <= self.size[0] and site.grid.width <= self.size[1]):
            return 1.0
        tokens = self.size[0] * self.size[1]
        return float((log(self.ratio * tokens) / log(tokens)) ** 0.5) if tokens > 1 else 1.0

    def why_idle(self, run: "Run") -> str:
        return (
            f"no frame had more than size={self.size} rows and columns of tokens, so a query reads all of it: "
            "make the frames larger or the window smaller"
        )


def pooled(entries: Entries, grid: Grid, side: int) -> Entries:
    """Means of squares of keys and values, each standing for its tokens; at far borders what is left of a square."""
    parts: dict[int, list[tuple[Tensor, ...]]] = {}
    for rows, columns in product(_squares(grid.height, side), _squares(grid.width, side)):
        size = rows[2] * columns[2]
        parts.setdefault(size, []).append(tuple(_means(x, grid, rows, columns) for x in (entries.k, entries.v)))
    k, v = (torch.cat([pair[i] for part in parts.values() for pair in part], 1) for i in range(2))
    sizes = tuple((sum(pair[0].shape[1] for pair in part), size) for size, part in parts.items())
    return Entries(k, v, multiplicity=sizes)


def _squares(length: int, side: int) -> list[tuple[int, int, int]]:
    """First token, the one behind the last, and the side of the squares along an axis: whole ones, and the rest."""
    whole = length // side * side
    found = [(0, whole, side)] if whole else []
    return [*found, (whole, length, length - whole)] if whole < length else found


def _means(x: Tensor, grid: Grid, rows: tuple[int, int, int], columns: tuple[int, int, int]) -> Tensor:
    """(B, N, H, D) to means (B, n, H, D) of the squares between those rows and columns."""
    x = x.unflatten(1, (grid.frames, grid.height, grid.width))[:, :, rows[0] : rows[1], columns[0] : columns[1]]
    x = x.unflatten(3, (-1, columns[2])).unflatten(2, (-1, rows[2]))
    return x.mean((3, 5)).flatten(1, 3)


@lru_cache(maxsize=64)
def _boxes(window: InwardWindow, grid: Grid, keys: Grid, first: int) -> Boxes | None:
    assert window.size is not None
    rows = spans(grid.height, window.tile[0], window.size[0])
    columns = spans(grid.width, window.tile[1], window.size[1])
    whole = [((0, grid.frames), (0, keys.frames))]
    frames = whole if window.frames is None else spans(grid.frames, 1, window.frames, first, keys.frames)
    if len(frames) == len(rows) == len(columns) == 1 and frames[0][1] == (0, keys.frames):
        return None
    return Boxes(grid, keys, tuple(frames), tuple(rows), tuple(columns), window.gather_mib << 20)


def spans(queries: int, tile: int, window: int, first: int = 0, keys: int | None = None) -> list[Tile]:
    """Along one axis: tiles of `queries` tokens, and the `window` of `keys` (all of them where it is larger) that each
    reads, centred on it and shifted inward. Query 0 is at key `first`. Neighbours that read the same are one tile."""
    keys = queries if keys is None else keys
    window = min(window, keys)
    tile = min(tile, queries)
    borders = sorted({0, *range(queries % tile // 2, queries + 1, tile), queries})
    found: list[Tile] = []
    for start, stop in pairwise(borders):
        left = min(max((2 * first + start + stop - window) // 2, 0), keys - window)
        read = (left, left + window)
        if found and found[-1][1] == read:
            found[-1] = ((found[-1][0][0], stop), read)
        else:
            found.append(((start, stop), read))
    return found
