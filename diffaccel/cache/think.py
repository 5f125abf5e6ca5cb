"""ThinK: keys without the channels that queries hardly use."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..grid import Grid
from ..policy import CachePolicy, Policy, knob
from ..site import Site
from .look import probes
from .memory import Memory
from .ragged import Ragged
from .store import Plain
from .stored import Make, Stored

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class ThinK(CachePolicy):
    """Keep every token; of the keys no longer new, each head keeps the channels that score highest for its queries.

    ThinK (arXiv 2407.21018): channel c is worth |q_c| |k_c|, over some queries and all keys; the choice is made once,
    when the first keys leave the newest frames. Values stay whole. Beside the authors' code: queries are spread over
    the block instead of its last 32; channels go in the pairs that rotary positions turn together, as a pair moves its
    size from one channel to the other with the position.

    A dropped channel counts as zero, and scores are scaled by the root of all channels. Keys are opened for a read, so
    that every kernel takes them: saves memory, not time.
    """

    paper: ClassVar[str] = "ThinK, arXiv 2407.21018"
    summary: ClassVar[str] = "drops channels of older keys that queries hardly use: saves memory"
    exact: ClassVar[dict[str, Any]] = {"keep": 1.0}

    keep: float = knob(0.6, "share of a key's channels that is kept, in (0, 1]")
    recent_frames: int = knob(3, "newest latent frames whose keys stay whole, >= 0")
    sink_frames: int = knob(1, "first latent frames of the video whose keys stay whole, >= 0")
    probes: int = knob(32, "queries of a finished block that say which channels count, >= 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.keep <= 1, "keep is a share in (0, 1]", keep=self.keep)
        self.require_frames("recent_frames")
        self.require_frames("sink_frames")
        self.require(self.probes >= 1, "probes is a number of queries >= 1", probes=self.probes)

    @property
    def needs_queries(self) -> bool:
        return not self.is_exact

    def sample(self, q: Tensor, site: Site) -> Tensor:
        """The probes (B, n, H, D)."""
        return q[:, probes(site.grid, self.probes).to(q.device)]

    def conflict(self, others: Iterable[Policy]) -> str | None:
        for other in others:
            if other.slot == "window" and not self.is_exact and not other.is_exact:
                return f"older keys are read whole, and {type(other).__name__} leaves some out: leave out one of them"
        return None

    def expected_tokens(self, video_tokens: int, block: Grid) -> int:
        """Room for the frames that stay whole and a block at work."""
        if self.is_exact:
            return video_tokens
        return min(video_tokens, (self.sink_frames + self.recent_frames + block.frames) * block.tokens_per_frame)

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Move what is no longer recent into keys of fewer channels."""
        per_frame = site.grid.tokens_per_frame
        start = self.sink_frames * per_frame
        stop = memories[0].exact.count - self.recent_frames * per_frame
        if self.is_exact or stop <= start:
            run.fired("cache", self.is_exact)
            return
        for memory in memories:
            past = memory.exact.past().entries
            assert past.frames is not None
            leaving = Ragged.whole(past.k[:, start:stop], past.v[:, start:stop], {})
            frames = past.frames[start:stop].to(past.k.device)
            leaving.columns["token"] = (frames * per_frame).expand(leaving.there.shape)
            if not memory.older:
                memory.older.append(Stored(self._make(memory.queries)))
            older = memory.older[0]
            assert isinstance(older, Stored)
            older.take(leaving, per_frame)
            memory.exact.drop(start, stop)
        run.fired("cache")

    def _make(self, q: Tensor) -> Make:
        energy = q.float().square().sum(1).flatten(0, 1)  # (R, D)
        return lambda k, v, places: (Narrow(k, places, best_pairs(energy, k[:, :, 0], self.keep)), Plain(v, places))

    def why_idle(self, run: "Run") -> str:
        return "no frame ever left the first and the newest ones, so no channel was dropped: generate more frames"


def best_pairs(energy: Tensor, k: Tensor, keep: float) -> Tensor:
    """Channels (R, D') to keep of keys (R, T, D), ascending, whole pairs: those with the largest sum over the pair of
    `energy` (R, D), the queries' squares, times the keys'."""
    worth = (energy * k.float().square().sum(1)).unflatten(1, (-1, 2)).sum(2)
    pairs = worth.topk(max(1, round(keep * worth.shape[1])), dim=1).indices.sort(1).values
    return torch.stack([2 * pairs, 2 * pairs + 1], 2).flatten(1)


class Narrow:
    """Keys of which each row keeps some `channels` (R, D'); the others are read as zeros."""

    def __init__(self, like_RTHD: Tensor, capacity: int, channels: Tensor) -> None:
        self._channels, self._dim = channels, like_RTHD.shape[3]
        self.parts = [like_RTHD.new_zeros(len(channels), capacity, channels.shape[1])]

    def write(self, where: Tensor, vectors: Tensor) -> None:
        held = self.parts[0]
        held.flatten(0, 1)[where] = vectors.gather(1, self._channels[where // held.shape[1]])

    def every(self, parts: Sequence[Tensor], count: int) -> Tensor:
        held = parts[0][:, :count]
        at = self._channels[:, None].expand_as(held)
        return held.new_zeros(*held.shape[:2], self._dim).scatter_(2, at, held)[:, :, None]
