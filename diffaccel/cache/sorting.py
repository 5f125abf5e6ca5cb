"""The skeleton of caches that put the tokens of the past in order by a score, and into tiers by that order."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..kernel.weighted import read_plainly
from ..policy import CachePolicy, Policy
from ..site import Site
from .budget import Extent
from .look import Look, probes
from .memory import Memory
from .ragged import ByHead, Counts, Ragged
from .remainder import Remainder
from .share_out import share_out

if TYPE_CHECKING:
    from ..run import Run


class Looking(CachePolicy):
    """Looks at all that is kept, whenever a block is finished, with a few queries of its clean pass.

    These probes are spread over the block. Noisy passes would give noisy scores.
    """

    exact: ClassVar[dict[str, Any]] = {}
    columns: ClassVar[tuple[str, ...]] = ()
    """Names of what is noted on tokens, 0 for a new one."""

    sink_frames: int
    probes: int

    @property
    def needs_queries(self) -> bool:
        return True

    def sample(self, q: Tensor, site: Site) -> Tensor:
        """The probes (B, n, H, D)."""
        return q[:, probes(site.grid, self.probes).to(q.device)]

    def look(self, layer: int, memory: Memory, site: Site, run: "Run", noted: dict[str, Tensor]) -> Look:
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
            beside = memory.older[1].partial(memory.queries, read_plainly).lse
        return Look(
            layer,
            memory.queries,
            held.k,
            held.v,
            held.columns,
            held.there,
            beside,
            site.grid,
            site.start,
            run.rotary,
            run.later,
        )


class Sorting(Looking):
    """Sort the tokens of the past by a score, of each layer and head its own.

    The first and the newest frames are protected: they stay in the exact tier. The tokens between them compete
    whenever a block is finished, those of the first of `tiers` and those that are no longer new. The best stay in that
    tier or come into it, the others go to the second for good, or are dropped if there is none. A technique says what
    a token is worth (`score`), how many stay (`capacity`, `shares`, `allocate`), and what it notes on tokens while they
    stay (`columns`, `observe`).
    """

    recent_frames: int

    # -- what a technique says -------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, look: Look) -> Tensor:
        """What each entry is worth, (B, H, N); only the order within a head counts."""

    @abstractmethod
    def tiers(self, layers: int) -> Sequence[tuple[ByHead, *tuple[Remainder, ...]]]:
        """Of each layer, empty: what holds the best, and what takes the others, if anything does."""

    @abstractmethod
    def capacity(self, extent: Extent, middle: int) -> int:
        """Tokens that the first tier holds, of `middle` that came and are not protected."""

    def observe(self, look: Look) -> dict[str, Tensor]:
        """New values (B, H, N) of `columns`, before anything is scored."""
        return {}

    def shares(self, look: Look) -> Tensor | None:
        """How much of the capacity this layer's heads want, (B, H) relative to all others; None: all the same."""
        return None

    def allocate(self, shares: Sequence[Tensor | None], available: Sequence[Counts], capacity: int) -> Sequence[Counts]:
        """Entries that each layer, row and head keeps of those available, `capacity` on average."""
        if any(share is None for share in shares):
            return [tuple(tuple(min(n, capacity) for n in row) for row in counts) for counts in available]
        return share_out(torch.stack([share for share in shares if share is not None]), available, capacity)

    # -- the skeleton ----------------------------------------------------------------------------------------------

    @property
    def needs_queries(self) -> bool:
        return not self.is_exact

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

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Score everything anew, move what is no longer recent, drop what loses."""
        if self.is_exact:
            run.fired("cache")
            return
        assert run.extent is not None
        per_frame = site.grid.tokens_per_frame
        sink = self.sink_frames * per_frame
        leaving = max(0, memories[0].exact.count - sink - self.recent_frames * per_frame)
        notes = run.scratch("cache", site.branch)  # of each layer, the columns of what lies in the exact tier
        pools, shares = [], []
        for layer, memory in enumerate(memories):
            look = self.look(layer, memory, site, run, notes.get(str(layer), {}))
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
            middle = memories[0].seen - memories[0].exact.count + leaving
            capacity = self.capacity(run.extent, middle)
            self._move(memories, pools, shares, slice(sink, sink + leaving), per_frame, capacity)
            run.fired("cache", any(_kept(memory).count < middle for memory in memories))

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
        if not memories[0].older:
            for memory, tiers in zip(memories, self.tiers(len(memories)), strict=True):
                memory.older += tiers
        for memory, (score, _) in zip(memories, pools, strict=True):
            new = leaving.stop - leaving.start
            counts = _kept(memory).counts or ((0,) * score.shape[1],) * score.shape[0]
            available.append(tuple(tuple(count + new for count in row) for row in counts))
        for memory, (score, columns), counts in zip(
            memories, pools, self.allocate(shares, available, capacity), strict=True
        ):
            kept, past = _kept(memory), memory.exact.past().entries
            new, held = Ragged.whole(past.k[:, leaving], past.v[:, leaving], {}), kept.held  # which it opens each time
            pool = new if held is None else held.then(new)
            stays, gone = replace(pool, columns=columns).split(score, counts)
            kept.hold(stays, per_frame)
            if len(memory.older) > 1 and any(map(any, gone.counts)):
                memory.older[1].take(gone, per_frame)  # type: ignore[attr-defined]
            memory.exact.drop(leaving.start, leaving.stop)


def _kept(memory: Memory) -> ByHead:
    tier = memory.older[0]
    assert isinstance(tier, ByHead)
    return tier
