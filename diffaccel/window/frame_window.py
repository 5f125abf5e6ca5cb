"""FrameWindow: a sliding window over latent frames, with a sink."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..cache.entries import Entries
from ..plan import Plan
from ..policy import Selector, knob
from ..site import Site

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class FrameWindow(Selector):
    """Read the newest latent frames of the past and, as an anchor, the first ones of the video.

    The window of Self-Forcing's `local_attn_size` and LongLive's sink, as a reading rule: what lies outside stays in
    the cache and is not read.
    """

    slot: ClassVar[str] = "window"
    paper: ClassVar[str] = "Self-Forcing, arXiv 2506.08009; LongLive, arXiv 2509.22622"
    summary: ClassVar[str] = "reads the newest frames of the past and a sink of first frames"
    exact: ClassVar[dict[str, Any]] = {"frames": None}
    needs_blocks: ClassVar[bool] = True

    frames: int | None = knob(9, "latent frames before the block that are read, >= 0; None reads all")
    sink_frames: int = knob(1, "first latent frames of the video that are always read, >= 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_frames("frames", none="for all")
        self.require_frames("sink_frames")

    def plan(self, q: Tensor, entries: Entries, site: Site) -> Plan | None:
        """The entries inside the window; None where that is all of them."""
        if self.frames is None or entries.frames is None:
            return None
        kept = (entries.frames >= site.start - self.frames) | (entries.frames < self.sink_frames)
        return None if bool(kept.all()) else Plan.columns(kept, queries=q.shape[1])

    def why_idle(self, run: "Run") -> str:
        return (
            f"no past was ever longer than frames={self.frames} plus sink_frames={self.sink_frames}: "
            "generate more frames or use a smaller window"
        )
