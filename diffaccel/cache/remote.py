"""RemoteCache: older frames live on another device, which answers queries itself."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..grid import Grid
from ..kernel.merge import Partial
from ..policy import CachePolicy, knob
from ..site import Site
from .budget import Extent
from .entries import Reader
from .memory import Memory
from .tiers import ExactTier

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class RemoteCache(CachePolicy):
    """Keep everything, what is no longer recent on another device: queries go there, partial attention comes back.

    Attention offloading (Lamina, arXiv 2405.01814) and attention over distributed caches (DistAttention of
    Infinite-LLM, arXiv 2401.02669) are this one exchange; the schedulers of both serve many requests and have no place
    here.

    What to ship: a read sends S queries and brings back as many vectors, 2 S D numbers a head; `HostCache` brings the
    keys and values instead, 2 N D. So queries travel lighter where S < N, but then the device that holds the keys
    computes, S N D multiplications a head. With the thousands of queries of a block of video, that takes a second
    accelerator ("cuda:1"); a CPU is far too slow for them, and host memory is read by pulling (`HostCache`). With a
    few queries, as in text, queries go to the keys wherever these are. `describe` says what both would move.

    A read waits for its answer before the local part begins.
    """

    paper: ClassVar[str] = "Lamina, arXiv 2405.01814; Infinite-LLM, arXiv 2401.02669"
    summary: ClassVar[str] = "keeps every token, older frames on another device, which attends to them: lossless"
    exact: ClassVar[dict[str, Any]] = {}
    keeps_frames_whole: ClassVar[bool] = True

    device: str = knob("cuda:1", 'where older frames live: "cuda:1", "cpu"')
    recent_frames: int | None = knob(None, "newest latent frames that stay on the device; None: the newest block")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            known = torch.device(self.device).type in ("cuda", "cpu")
        except (RuntimeError, TypeError):
            known = False
        self.require(known, 'device is a device of torch, "cuda:1" or "cpu"', device=self.device)
        self.require_frames("recent_frames", none="for the newest block")

    def check(self, extent: Extent) -> None:
        """Refuse a device that is not here."""
        device, found = torch.device(self.device), torch.cuda.device_count()
        self.require(
            device.type == "cpu" or (device.index or 0) < found,
            f"device is one of this machine, which has {found} CUDA devices; name another, or take HostCache",
            device=self.device,
        )

    def expected_tokens(self, video_tokens: int, block: Grid) -> int:
        """Room for the recent frames and a block at work."""
        recent = block.frames if self.recent_frames is None else self.recent_frames
        return min(video_tokens, (recent + block.frames) * block.tokens_per_frame)

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Move what is no longer recent."""
        recent = site.grid.frames if self.recent_frames is None else self.recent_frames
        leaving = memories[0].exact.count - recent * site.grid.tokens_per_frame
        if leaving <= 0:
            return
        for memory in memories:
            if not memory.older:
                memory.older.append(RemoteTier(torch.device(self.device)))
            older = memory.older[0]
            assert isinstance(older, RemoteTier)
            past = memory.exact.oldest(leaving)
            assert past.frames is not None
            older.add(past.k, past.v, past.frames)
            memory.exact.drop(0, leaving)
        run.fired("cache")

    def describe(self, run: "Run") -> dict[str, Any]:
        """Bytes that live there; that went over the link for reads, and what fetching keys and values would have."""
        tiers = [tier for memory in run.all_memories() for tier in memory.older if isinstance(tier, RemoteTier)]
        return {
            "remote_bytes": sum(tier.remote_bytes for tier in tiers),
            "link_bytes": sum(tier.link_bytes for tier in tiers),
            "link_bytes_of_keys": sum(tier.link_bytes_of_keys for tier in tiers),
        }

    def why_idle(self, run: "Run") -> str:
        return "no frame ever left the recent ones, so nothing moved to the other device: generate more frames"


class RemoteTier:
    """Entries (B, N, H, D) on a device of their own, which answers; counts what goes over the link as if it were
    another than the queries'."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._held = device, ExactTier()
        self.link_bytes = self.link_bytes_of_keys = 0

    @property
    def count(self) -> int:
        return self._held.count

    @property
    def bytes(self) -> int:
        """On the queries' device: nothing stays there."""
        return 0

    @property
    def remote_bytes(self) -> int:
        return self._held.bytes

    def add(self, k: Tensor, v: Tensor, frames: Tensor) -> None:
        """Copy entries behind the present ones."""
        self._held.place(k.to(self.device), v.to(self.device), frames)
        self._held.keep_placed()

    def partial(self, q: Tensor, read: Reader) -> Partial:
        past = self._held.past()
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            # a copy to the host is waited for: read before it is there, it would be of anything
            out, lse = past.partial(q.to(self.device, non_blocking=self.device.type == "cuda"), read)
        self.link_bytes += q.nbytes + out.nbytes + lse.nbytes
        self.link_bytes_of_keys += past.bytes
        return Partial(out.to(q.device), lse.to(q.device))

    def frames(self) -> list[Tensor]:
        return self._held.past().frames()
