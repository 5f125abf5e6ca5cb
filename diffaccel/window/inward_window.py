"""InwardWindow: a window of the training size in frames larger than that (FreeSwim, arXiv 2511.14712)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..cache.entries import Entries
from ..grid import Grid
from ..kernel.boxes import Boxes
from ..policy import Policy, Selector, knob
from ..site import Site
from .spans import spans

if TYPE_CHECKING:
    from torch import nn

    from ..backbone import Geometry
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
    gather_mib: int = knob(1024, "MiB of keys and values copied at a time, >= 1; those of one row of tiles always are")

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

    def refuses_model(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        if self.size is not None and any(geometry.coarse_past for geometry, _ in models):
            return "its older frames have fewer rows and columns than the window counts in: leave the window out"
        return None

    def plan(self, q: Tensor, entries: Entries, site: Site) -> Boxes | None:
        """The boxes of the grid that read each other; None where every query reads all."""
        if self.size is None or entries.frames is None or site.full_field:
            return None
        grid = site.grid
        keys = Grid(entries.count // grid.tokens_per_frame, grid.height, grid.width)
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
