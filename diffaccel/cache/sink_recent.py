"""SinkRecent and RollingRebased: the newest frames and the first ones, nothing between."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..errors import UnsupportedError
from ..grid import Grid
from ..policy import CachePolicy, knob
from ..site import Site
from .entries import Entries
from .memory import Memory
from .summary import SUMMARIES, Summary

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class _SinkAndRecent(CachePolicy):
    """What both techniques do: drop the frames between the sink and the newest ones."""

    exact: ClassVar[dict[str, Any]] = {"recent_frames": None}

    recent_frames: int | None = knob(9, "newest latent frames that are kept, >= 1; None keeps all")
    sink_frames: int = knob(1, "first latent frames of the video that are kept, >= 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_frames("recent_frames", 1, none="to keep all")
        self.require_frames("sink_frames")

    def expected_tokens(self, video_tokens: int, block: Grid) -> int:
        """Room for what stays and a block at work."""
        if self.recent_frames is None:
            return video_tokens
        return min(video_tokens, (self.sink_frames + self.recent_frames + block.frames) * block.tokens_per_frame)

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Drop the frames between the sink and the newest ones; called once a finished block and branch."""
        if self.recent_frames is None:
            run.fired("cache")
            return
        per_frame = site.grid.tokens_per_frame
        sink = self.sink_frames * per_frame
        surplus = memories[0].exact.count - sink - self.recent_frames * per_frame
        if surplus <= 0:
            return
        for memory in memories:
            self._dropping(memory, slice(sink, sink + surplus), per_frame)
            memory.exact.drop(sink, sink + surplus)
        run.fired("cache", memories[0].count < memories[0].seen)

    def _dropping(self, memory: Memory, gone: slice, per_frame: int) -> None:
        """The entries `gone` of the exact tier, whole frames, are about to be dropped."""

    def why_idle(self, run: "Run") -> str:
        return (
            f"the video never outgrew recent_frames={self.recent_frames} plus sink_frames={self.sink_frames}: "
            "generate more frames or keep fewer"
        )


@dataclass(frozen=True)
class SinkRecent(_SinkAndRecent):
    """Forget what is neither among the first frames of the video nor among the newest.

    StreamingLLM's sinks (arXiv 2309.17453, section 3) with latent frames as units: Self-Forcing's `local_attn_size`
    with `sink_frames=0`, where `recent_frames` is that size less one block, since the block at work counts there;
    LongLive's frame sink with the sink of its first block. `FrameWindow` reads the same keys and keeps them all.

    With `summaries`, ours, what is dropped stays as means of keys and values, each weighted by the tokens it stands
    for: of constant size, and exact where these tokens are identical (`cache/summary.py`).
    """

    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453; LongLive, arXiv 2509.22622"
    summary: ClassVar[str] = "keeps the newest frames and a sink of first ones, and forgets the rest or sums it up"

    summaries: str | None = knob(
        None,
        'what stays of dropped frames: one mean for each of them, at most 64 ("frame"), or one for each place of the '
        'frame ("cell"); None: nothing',
        choices=tuple(SUMMARIES),
    )

    def _dropping(self, memory: Memory, gone: slice, per_frame: int) -> None:
        """Sum them up."""
        if self.summaries is None:
            return
        if not memory.older:
            memory.older.append(SUMMARIES[self.summaries]())
        past, tier = memory.exact.past().entries, memory.older[0]
        assert isinstance(tier, Summary)
        assert past.frames is not None
        tier.take(Entries(past.k[:, gone], past.v[:, gone], past.frames[gone]), per_frame)

    def describe(self, run: "Run") -> dict[str, Any]:
        """What was summed up, in all layers and branches together."""
        tiers = [tier for memory in run.all_memories() for tier in memory.older if isinstance(tier, Summary)]
        if not tiers:
            return {}
        return {
            "summary_entries": sum(tier.count for tier in tiers),
            "summarised_tokens": sum(tier.tokens for tier in tiers),
        }

    def why_idle(self, run: "Run") -> str:
        reason = super().why_idle(run)
        return f"{reason} (one frame summed up cell by cell is that frame)" if self.summaries == "cell" else reason


@dataclass(frozen=True)
class RollingRebased(_SinkAndRecent):
    """SinkRecent whose sink moves along: its keys are rotated to the frames just before the newest ones.

    A model never sees a distance between frames beyond sink + recent + one block, however long the video (the sink of
    Rolling Forcing, arXiv 2509.25161, and LongLive's infinite variant, which store keys without positions; here the
    rotated keys of the first frames are kept and turned by the number of frames forgotten, always from the originals,
    so that rounding does not add up).
    """

    paper: ClassVar[str] = "Rolling Forcing, arXiv 2509.25161"
    summary: ClassVar[str] = "SinkRecent whose sink is re-positioned right before the newest frames, for endless videos"

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Drop the middle, then move the sink up to it."""
        per_frame = site.grid.tokens_per_frame
        sink = self.sink_frames * per_frame
        super().commit(memories, site, run)
        if self.recent_frames is None or not sink or memories[0].exact.count <= sink:
            return
        frames = memories[0].exact.past().entries.frames
        assert frames is not None
        forgotten = int(frames[sink]) - int(frames[sink - 1]) - 1
        if not forgotten:
            return
        if run.later is None:
            raise UnsupportedError("RollingRebased moves keys in time, and this model's family does not say how")
        originals: list[Tensor] = run.scratch("cache", site.branch).setdefault("sink", [])
        if not originals:
            originals += [memory.exact.past().entries.k[:, :sink].clone() for memory in memories]
        for memory, original in zip(memories, originals, strict=True):
            memory.exact.past().entries.k[:, :sink] = run.later(original, forgotten)
