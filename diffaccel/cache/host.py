"""HostCache: every token of the past, the older ones in the host's memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..grid import Grid
from ..kernel.merge import Partial, merge
from ..policy import CachePolicy, knob
from ..site import Site
from .entries import Entries, Reader
from .memory import Memory
from .shuttle import InTurn, Shuttle, host_like

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class HostCache(CachePolicy):
    """Keep everything, and what is no longer recent in (page-locked) host memory: for pasts larger than the GPU.

    Older frames come back a piece at a time while the piece before is being read, and the first piece of the next layer
    while this one computes; the pieces' partial attentions merge exactly. A read costs what the copy costs, so
    this saves memory and not time. Offloaded caches of language models do the same (FlexGen, arXiv 2303.06865).
    """

    paper: ClassVar[str] = "FlexGen, arXiv 2303.06865"
    summary: ClassVar[str] = "keeps every token, those of older frames in host memory: lossless, saves GPU memory"
    exact: ClassVar[dict[str, Any]] = {}
    keeps_frames_whole: ClassVar[bool] = True

    recent_frames: int | None = knob(None, "newest latent frames that stay on the device; None: the newest block")
    piece_frames: int = knob(16, "latent frames that are brought back at once, >= 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_frames("recent_frames", none="for the newest block")
        self.require_frames("piece_frames", 1)

    def expected_tokens(self, video_tokens: int, block: Grid) -> int:
        """Room for the recent frames and a block at work."""
        recent = block.frames if self.recent_frames is None else self.recent_frames
        return min(video_tokens, (recent + block.frames) * block.tokens_per_frame)

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Move what is no longer recent to the host; called once a finished block and branch."""
        per_frame = site.grid.tokens_per_frame
        recent = site.grid.frames if self.recent_frames is None else self.recent_frames
        leaving = memories[0].exact.count - recent * per_frame
        if leaving <= 0:
            return
        if not memories[0].older:
            shuttle = Shuttle()
            tiers = [HostTier(self.piece_frames * per_frame, shuttle) for _ in memories]
            for number, (memory, tier) in enumerate(zip(memories, tiers, strict=True)):
                tier.following = tiers[(number + 1) % len(tiers)]
                memory.older.append(tier)
        for memory in memories:
            older = memory.older[0]
            assert isinstance(older, HostTier)
            older.append(memory.exact.oldest(leaving))
            memory.exact.drop(0, leaving)
        run.fired("cache")

    def describe(self, run: "Run") -> dict[str, Any]:
        """How much lies in the host's memory."""
        tiers = [tier for memory in run.all_memories() for tier in memory.older if isinstance(tier, HostTier)]
        return {"host_bytes": sum(tier.host_bytes for tier in tiers)}

    def why_idle(self, run: "Run") -> str:
        return "no frame ever left the recent ones, so nothing moved to the host: generate more frames"


class HostTier(InTurn):
    """Entries (B, N, H, D) in pieces on the host; a read brings one after the other to the queries' device."""

    def __init__(self, piece: int, shuttle: Shuttle) -> None:
        self.piece, self.shuttle = piece, shuttle
        self._k: list[Tensor] = []
        self._v: list[Tensor] = []
        self._frames = torch.empty(0, dtype=torch.int64)

    @property
    def count(self) -> int:
        return self._frames.shape[0]

    @property
    def bytes(self) -> int:
        """On the device: nothing stays there."""
        return 0

    @property
    def host_bytes(self) -> int:
        return sum(2 * k.numel() * k.element_size() for k in self._k)

    def append(self, entries: Entries) -> None:
        """Copy entries; the last piece is filled up first."""
        assert entries.frames is not None
        done = 0
        while done < entries.count:
            filled = self.count % self.piece
            if not filled:
                for held, like in ((self._k, entries.k), (self._v, entries.v)):
                    held.append(host_like(like[:, :1].expand(-1, self.piece, -1, -1)))
            n = min(self.piece - filled, entries.count - done)
            for held, new in ((self._k, entries.k), (self._v, entries.v)):
                self.shuttle.send(new[:, done : done + n], held[-1][:, filled : filled + n])
            self._frames = torch.cat([self._frames, entries.frames[done : done + n]])
            done += n
        self.shuttle.drop()

    def fetch(self, number: int, device: torch.device) -> None:
        """Start to bring a piece to the device, beside what runs there."""
        self.shuttle.fetch(self, number, self._piece(number), device)

    def partial(self, q: Tensor, read: Reader) -> Partial:
        result: Partial | None = None
        for number in range(len(self._k)):
            k, v = self.shuttle.take(self, number, self._piece(number), q.device)
            if number + 1 < len(self._k):
                self.fetch(number + 1, q.device)
            elif (following := self.following) is not None and following.count:
                following.fetch(0, q.device)
            frames = self._frames[number * self.piece : number * self.piece + k.shape[1]]
            found = read(q, Entries(k, v, frames))
            result = found if result is None else merge([result, found])
        assert result is not None
        return result

    def frames(self) -> list[Tensor]:
        return [self._frames]

    def _piece(self, number: int) -> tuple[Tensor, Tensor]:
        filled = min(self.piece, self.count - number * self.piece)
        return self._k[number][:, :filled], self._v[number][:, :filled]
