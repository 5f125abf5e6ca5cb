"""Caches that keep what scores best: score x shares x destination."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import KnobError
from ..grid import Grid
from ..policy import knob
from .budget import Extent, room_for
from .ragged import ByHead
from .remainder import REMAINDERS, Remainder
from .sorting import Sorting

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class Scored(Sorting):
    """Keep as many of the tokens that score best as a budget holds; what loses leaves, or goes where `dropped` says."""

    exact: ClassVar[dict[str, Any]] = {"budget": None}

    budget: int | str | None = knob(
        "12 frames", 'tokens a layer keeps, mean over layers and heads: 40000, "12 frames" or "8GB"; None keeps all'
    )
    recent_frames: int = knob(3, "newest latent frames that are always kept, >= 0")
    sink_frames: int = knob(1, "first latent frames of the video that are always kept, >= 0")
    probes: int = knob(32, "queries of a finished block that say what it read, >= 1")
    dropped: str | None = knob(
        None,
        'what becomes of what leaves: "mean": one key a head stands for all of it; "centroids": means of near tokens, '
        'at most a frame of them; "bits4", "bits2": all of it, quantised; "host": all of it, in the host\'s memory; '
        "None: it is gone",
        choices=tuple(REMAINDERS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_frames("recent_frames")
        self.require_frames("sink_frames")
        self.require(self.probes >= 1, "probes is a number of queries >= 1", probes=self.probes)
        if self.budget is not None:
            room_for(self.budget, _SOME, 0, 1)  # refuses what is no budget

    def require_odd(self, name: str) -> None:
        """Refuse a knob that is no width around a token."""
        value = getattr(self, name)
        self.require(value >= 1 and value % 2 == 1, f"{name} is an odd number >= 1", **{name: value})

    def check(self, extent: Extent) -> None:
        """Refuse a budget that cannot hold the protected frames and a block."""
        if self.budget is None:
            return
        least = (self.sink_frames + self.recent_frames) * extent.block.tokens_per_frame
        if self.capacity(extent, 0) < 1:
            raise KnobError(
                f"{type(self).__name__}: the budget must hold sink_frames + recent_frames = {least} tokens and more, "
                f"got budget={self.budget!r}: raise it, or protect fewer frames"
            )

    def capacity(self, extent: Extent, middle: int) -> int:
        """What the budget leaves beside the protected ones."""
        assert self.budget is not None
        protected = (self.sink_frames + self.recent_frames) * extent.block.tokens_per_frame
        return room_for(self.budget, extent, protected, extent.bytes_per_token)

    def expected_tokens(self, video_tokens: int, block: Grid) -> int:
        """Room for the protected frames and a block at work."""
        if self.budget is None:
            return video_tokens
        return min(video_tokens, (self.sink_frames + self.recent_frames + block.frames) * block.tokens_per_frame)

    def tiers(self, layers: int) -> Sequence[tuple[ByHead, *tuple[Remainder, ...]]]:
        if self.dropped is None:
            return [(ByHead(),) for _ in range(layers)]
        return [(ByHead(), remainder) for remainder in REMAINDERS[self.dropped](layers)]

    def describe(self, run: "Run") -> dict[str, Any]:
        """Tokens that the layers keep beside the protected frames, least and most, and bytes on the host."""
        older = [memory.older for memory in run.all_memories() if memory.older]
        kept = [tiers[0].count for tiers in older]
        host = sum(getattr(tier, "host_bytes", 0) for tiers in older for tier in tiers)
        found = {"chosen_tokens_least": min(kept), "chosen_tokens_most": max(kept)} if kept else {}
        return found | ({"host_bytes": host} if host else {})

    def why_idle(self, run: "Run") -> str:
        return f"the video never outgrew budget={self.budget!r}: generate more frames or keep fewer"


_SOME = Extent(1, Grid(1, 1, 1), 1, 1, 1, 1, 1, torch.float32)
