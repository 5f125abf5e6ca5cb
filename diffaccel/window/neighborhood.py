"""NeighborhoodAttention: windows with stride, dilation and causal axes (GNA, arXiv 2504.16922)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..cache.entries import Entries
from ..grid import Grid
from ..kernel.boxes import Boxes, Dilated, Part, Tile
from ..policy import Policy, Selector, knob
from ..site import Site
from .spans import strided

if TYPE_CHECKING:
    from torch import nn

    from ..backbone import Geometry
    from ..run import Run


@dataclass(frozen=True)
class NeighborhoodAttention(Selector):
    """Every query reads a window around it, along frames, rows and columns each in its own way.

    `stride` queries share the window of the one in their middle: 1 is a sliding window (`InwardWindow` with tiles of
    one token reads the same keys), the whole window is attention in blocks, which no longer moves with the query. What
    a kernel works on at a time is then full where sizes match (`count_tiles`). With a `dilation` of d a query reads
    every d-th token. On a `causal` axis a window ends at the query.

    Masks are those of NATTEN, where axes longer than the grid are refused; here they read all of it. Leaders count
    from the first frame that is kept. The paper rearranges tokens so that tiles are compact pieces of the video for one
    kernel; here a box of the grid at a time goes to any dense kernel. Logits are not scaled, as they are in FreeSwim.
    """

    slot: ClassVar[str] = "window"
    paper: ClassVar[str] = "Generalized Neighborhood Attention, arXiv 2504.16922"
    summary: ClassVar[str] = "reads windows along frames, rows and columns, sliding or in strides"
    exact: ClassVar[dict[str, Any]] = {"kernel": None}

    kernel: tuple[int, int, int] | None = knob(
        (0, 24, 24), "frames, rows and columns of tokens that a query reads; 0: all along that axis; None: all"
    )
    stride: tuple[int, int, int] = knob(
        (1, 8, 8), "queries along each axis that share a window, >= 1 and no more than its length"
    )
    dilation: tuple[int, int, int] = knob((1, 1, 1), "steps between the tokens of a window, >= 1")
    causal: tuple[bool, bool, bool] = knob((False, False, False), "axes along which nothing later is read")
    gather_mib: int = knob(1024, "MiB of keys and values copied at a time, >= 1; those of one row of tiles always are")

    def __post_init__(self) -> None:
        super().__post_init__()
        kernel = self.kernel if self.kernel is not None else (0, 0, 0)
        self.require(_three(kernel) and min(kernel) >= 0, "kernel is three lengths >= 0", kernel=self.kernel)
        self.require(_three(self.stride) and min(self.stride) >= 1, "stride is three steps >= 1", stride=self.stride)
        fits = all(window == 0 or step <= window for window, step in zip(kernel, self.stride, strict=True))
        self.require(fits, "a stride is no longer than its window", stride=self.stride, kernel=self.kernel)
        self.require(
            _three(self.dilation) and min(self.dilation) >= 1, "dilation is three steps >= 1", dilation=self.dilation
        )
        booleans = _three(self.causal) and all(isinstance(one, bool) for one in self.causal)
        self.require(booleans, "causal is True or False for three axes", causal=self.causal)
        self.require(self.gather_mib >= 1, "gather_mib is a number of MiB >= 1", gather_mib=self.gather_mib)

    def conflict(self, others: Iterable[Policy]) -> str | None:
        frames = self.kernel is not None and (self.kernel[0] > 0 or self.causal[0] or self.dilation[0] > 1)
        for other in others:
            name = type(other).__name__
            if other.slot == "selection":
                return "a window gathers boxes of the frame, and a selection takes keys from all over it: leave one out"
            if other.slot == "cache" and not getattr(other, "keeps_frames_whole", False):
                return f"a window needs whole frames in their order, and {name} keeps parts: use HostCache or none"
            if frames and other.needs_blocks:
                return (
                    f"a window over frames needs all of them in one piece, and {name} parts them: make frames 0 in "
                    "kernel, False in causal and 1 in dilation"
                )
        return None

    def refuses_model(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        if self.kernel is not None and any(geometry.coarse_past for geometry, _ in models):
            return "its older frames have fewer rows and columns than the window counts in: leave the window out"
        return None

    def plan(self, q: Tensor, entries: Entries, site: Site) -> Boxes | Dilated | None:
        """The boxes of the grid that read each other; None where every query reads all."""
        if self.kernel is None or entries.frames is None or site.full_field:
            return None
        keys = Grid(entries.count // site.grid.tokens_per_frame, site.grid.height, site.grid.width)
        return _boxes(self, site.grid, keys, site.start - int(entries.frames[0]))

    def why_idle(self, run: "Run") -> str:
        return (
            f"no axis was longer than kernel={self.kernel}, so a query reads all of it: make the video larger or the "
            "window smaller"
        )


@lru_cache(maxsize=64)
def _boxes(window: NeighborhoodAttention, grid: Grid, keys: Grid, first: int) -> Boxes | Dilated | None:
    parts = []
    for turns in product(*map(range, window.dilation)):  # of all the tokens that lie `dilation` apart
        along = [_along(window, axis, turn, grid, keys, first) for axis, turn in enumerate(turns)]
        (frames, own_f, read_f), (rows, own_r, read_r), (columns, own_c, read_c) = along
        if frames and rows and columns:
            own, read = (own_f, own_r, own_c), (read_f, read_r, read_c)
            boxes = Boxes(_cut(grid, own), _cut(keys, read), frames, rows, columns, window.gather_mib << 20)
            parts.append(Part(own, read, boxes))
    if window.dilation != (1, 1, 1):
        return Dilated(grid, keys, tuple(parts))
    boxes = parts[0].boxes
    whole = all(read == (0, length) for axis, length in zip(boxes.axes, _size(keys), strict=True) for _, read in axis)
    return None if whole else boxes


def _along(
    window: NeighborhoodAttention, axis: int, turn: int, grid: Grid, keys: Grid, first: int
) -> tuple[tuple[Tile, ...], slice, slice]:
    """Tiles along one axis of the tokens that a dilation takes in their `turn`; which queries and keys these are."""
    assert window.kernel is not None
    step, start = window.dilation[axis], first if axis == 0 else 0
    own, read = (turn - start) % step, turn
    queries, length = (len(range(at, _size(of)[axis], step)) for at, of in ((own, grid), (read, keys)))
    size, before = window.kernel[axis] or length, (start + own - turn) // step  # keys in this turn before query 0
    tiles = strided(queries, window.stride[axis], size, window.causal[axis], before, length) if queries else []
    return tuple(tiles), slice(own, None, step), slice(read, None, step)


def _cut(grid: Grid, part: tuple[slice, ...]) -> Grid:
    return Grid(*(len(range(length)[cut]) for length, cut in zip(_size(grid), part, strict=True)))


def _size(grid: Grid) -> tuple[int, int, int]:
    return grid.frames, grid.height, grid.width


def _three(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) == 3
