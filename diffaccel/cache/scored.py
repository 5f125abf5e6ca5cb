"""The skeleton of caches that keep what scores best: score x shares x protector x destination."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import KnobError
from ..grid import Grid
from ..kernel import KERNELS
from ..kernel.weighted import over_entries
from ..policy import CachePolicy, Policy, knob
from ..site import Site
from .budget import Extent, room_for
from .look import Look, probes
from .memory import Memory
from .ragged import ByHead, Counts, Ragged
from .remainder import REMAINDERS
from .share_out import share_out

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class Scored(CachePolicy):
    """Keep the tokens of the past that score best, of each layer and head its own.

    The first and the newest frames are protected: they stay in the exact tier. The tokens between them compete
    whenever a block is finished, those kept so far and those that are no longer new. A technique says what a token is
    worth (`score`), maybe how layers and heads share the budget (`shares`, `allocate`), and what it notes on tokens
    while they stay (`columns`, `observe`). What loses leaves, or goes where `dropped` says.

    Probes are queries of the clean pass, spread over the block: noisy passes give noisy scores.
    """

    exact: ClassVar[dict[str, Any]] = {"budget": None}
    columns: ClassVar[tuple[str, ...]] = ()
    """Names of what is noted on tokens, 0 for a new one."""

    budget: int | str | None = knob(
        "12 frames", 'tokens a layer keeps, mean over layers and heads: 40000, "12 frames" or "8GB"; None keeps all'
    )
    recent_frames: int = knob(3, "newest latent frames that are always kept, >= 0")
    sink_frames: int = knob(1, "first latent frames of the video that are always kept, >= 0")
    probes: int = knob(32, "queries of a finished block that say what it read, >= 1")
    dropped: str | None = knob(
        None,
        'what stays of what leaves: "mean", one key a head that stands for all of it; None: nothing',
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

    # -- what a technique says -------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, look: Look) -> Tensor:
        """What each entry is worth, (B, H, N); only the order within a head counts."""

    def observe(self, look: Look) -> dict[str, Tensor]:
        """New values (B, H, N) of `columns`, before anything is scored."""
        return {}

    def shares(self, look: Look) -> Tensor | None:
        """How much of the budget this layer's heads want, (B, H) relative to all others; None: all the same."""
        return None

    def allocate(self, shares: Sequence[Tensor | None], available: Sequence[Counts], capacity: int) -> Sequence[Counts]:
        """Entries that each layer, row and head keeps of those available, `capacity` on average."""
        if any(share is None for share in shares):
            return [tuple(tuple(min(n, capacity) for n in row) for row in counts) for counts in available]
        return share_out(torch.stack([share for share in shares if share is not None]), available, capacity)

    # -- the skeleton ----------------------------------------------------------------------------------------------

    @property
    def needs_queries(self) -> bool:
        return self.budget is not None

    def conflict(self, others: Iterable[Policy]) -> str | None:
        for other in others:
            if other.slot == "window" and not self.is_exact and not other.is_exact:
                return (
                    f"the heads keep different tokens, and {type(other).__name__} asks for places that all heads "
                    f"share: leave out one of them"
                )
            if getattr(other, "profile", None) is not None and other.slot == "reuse":
                return f"{type(other).__name__}(profile=...) reads head by head what is kept head by head: give refresh"
        return None

    def check(self, extent: Extent) -> None:
        """Refuse a budget that cannot hold the protected frames and a block."""
        if self.budget is None:
            return
        least = (self.sink_frames + self.recent_frames) * extent.block.tokens_per_frame
        if self._capacity(extent) < 1:
            raise KnobError(
                f"{type(self).__name__}: the budget must hold sink_frames + recent_frames = {least} tokens and more, "
                f"got budget={self.budget!r}: raise it, or protect fewer frames"
            )

    def _capacity(self, extent: Extent) -> int:
        """Tokens kept beside the protected ones."""
        assert self.budget is not None
        protected = (self.sink_frames + self.recent_frames) * extent.block.tokens_per_frame
        return room_for(self.budget, extent, protected, extent.bytes_per_token)

    def expected_tokens(self, video_tokens: int, block: Grid) -> int:
        """Room for the protected frames and a block at work."""
        if self.budget is None:
            return video_tokens
        return min(video_tokens, (self.sink_frames + self.recent_frames + block.frames) * block.tokens_per_frame)

    def sample(self, q: Tensor, site: Site) -> Tensor:
        """The probes (B, n, H, D)."""
        return q[:, probes(site.grid, self.probes).to(q.device)]

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Score everything anew, move what is no longer recent, drop what loses."""
        if self.budget is None:
            run.fired("cache")
            return
        assert run.extent is not None
        per_frame = site.grid.tokens_per_frame
        sink = self.sink_frames * per_frame
        leaving = max(0, memories[0].exact.count - sink - self.recent_frames * per_frame)
        notes = run.scratch("cache", site.branch)  # of each layer, the columns of what lies in the exact tier
        pools, shares = [], []
        for layer, memory in enumerate(memories):
            look = self._look(layer, memory, site, notes.get(str(layer), {}))
            look.columns.update(self.observe(look))
            pool = slice(sink, sink + look.k.shape[1] - memory.exact.count + leaving)
            notes[str(layer)] = {
                name: torch.cat([column[..., : pool.start], column[..., pool.stop :]], -1)
                for name, column in look.columns.items()
            }
            if leaving:
                columns = {name: column[..., pool] for name, column in look.columns.items()}
                pools.append((self.score(look)[..., pool], columns))
                shares.append(self.shares(look))
        if leaving:
            self._move(memories, pools, shares, slice(sink, sink + leaving), per_frame, self._capacity(run.extent))
            run.fired("cache", any(memory.count < memory.seen for memory in memories))

    def _move(
        self,
        memories: Sequence[Memory],
        pools: Sequence[tuple[Tensor, dict[str, Tensor]]],
        shares: Sequence[Tensor | None],
        leaving: slice,
        per_frame: int,
        capacity: int,
    ) -> None:
        available = []
        for memory, (score, _) in zip(memories, pools, strict=True):
            if not memory.older:
                memory.older.append(ByHead())
                if self.dropped is not None:
                    memory.older.append(REMAINDERS[self.dropped]())
            new = leaving.stop - leaving.start
            counts = _kept(memory).counts or ((0,) * score.shape[1],) * score.shape[0]
            available.append(tuple(tuple(count + new for count in row) for row in counts))
        for memory, (score, columns), counts in zip(
            memories, pools, self.allocate(shares, available, capacity), strict=True
        ):
            kept, past = _kept(memory), memory.exact.past().entries
            new = Ragged.whole(past.k[:, leaving], past.v[:, leaving], {})
            pool = new if kept.held is None else kept.held.then(new)
            stays, gone = replace(pool, columns=columns).split(score, counts)
            kept.hold(stays, per_frame)
            if self.dropped is not None and any(map(any, gone.counts)):
                memory.older[1].take(gone, per_frame)  # type: ignore[attr-defined]
            memory.exact.drop(leaving.start, leaving.stop)

    def _look(self, layer: int, memory: Memory, site: Site, noted: dict[str, Tensor]) -> Look:
        """All that is kept, in the order of time: sink, tokens that were chosen, newest frames with the block."""
        past, sink = memory.exact.past().entries, self.sink_frames * site.grid.tokens_per_frame
        assert past.frames is not None
        rows, count, heads, _ = past.k.shape
        tokens = past.frames * site.grid.tokens_per_frame + torch.arange(count) % site.grid.tokens_per_frame
        columns = {"token": tokens.to(past.k.device).expand(rows, heads, -1)}
        for name in self.columns:
            new = past.k.new_zeros(rows, heads, count, dtype=torch.float32)
            if name in noted:
                new[..., : noted[name].shape[-1]] = noted[name]
            columns[name] = new
        exact = Ragged.whole(past.k, past.v, columns)
        kept = _kept(memory).held if memory.older else None
        held = exact if kept is None else exact.part(0, sink).then(kept).then(exact.part(sink, count))
        beside = None
        if len(memory.older) > 1 and memory.older[1].count:
            scale, kernel = memory.queries.shape[-1] ** -0.5, KERNELS["reference"]
            beside = memory.older[1].partial(memory.queries, lambda q, e: over_entries(kernel, q, e, scale, None)).lse
        return Look(layer, memory.queries, held.k, held.v, held.columns, held.there, beside, site.grid, site.start)

    def describe(self, run: "Run") -> dict[str, Any]:
        """What the layers keep beside the protected frames, and the frames of the oldest of it."""
        kept = [tier.count for memory in run.all_memories() for tier in memory.older[:1]]
        return {"chosen_tokens_least": min(kept), "chosen_tokens_most": max(kept)} if kept else {}

    def why_idle(self, run: "Run") -> str:
        return f"the video never outgrew budget={self.budget!r}: generate more frames or keep fewer"


_SOME = Extent(1, Grid(1, 1, 1), 1, 1, 1, 1, 1, torch.float32)


def _kept(memory: Memory) -> ByHead:
    tier = memory.older[0]
    assert isinstance(tier, ByHead)
    return tier
