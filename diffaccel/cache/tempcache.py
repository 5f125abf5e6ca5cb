"""TempCache: near-duplicate keys of past frames are merged (FAST-AR, arXiv 2602.01801, section 5.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..ann import Flat
from ..policy import CachePolicy, knob
from ..site import Site
from .entries import Entries
from .memory import Memory
from .tiers import RowTier

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class TempCache(CachePolicy):
    """Keep one entry for a patch that stays alike over time, and count how often it was seen.

    When a block is finished, the frames that are no longer recent leave the exact cache. Each of their tokens is
    compared with its match in the frame before; above `threshold` it joins that token's entry, else it becomes an
    entry of its own. An entry that stands for m tokens gets log m added to its score (Lemma 5.1), which is exact
    where the tokens are identical.

    Similarity is 1 - |a - b|^2 / (2 mean |k|^2) between the rotated keys of all heads together, the mean taken over
    every layer of the first block: cosine for keys of average length, and one scale for all layers, because what a
    merge changes is the difference of scores and that grows with the keys' length.

    Differences from the paper: it merges newest-key-wins at the newest position (`representative="last"`) and does
    not say how it treats rotary positions; here the default is the mean of the rotated keys, measured to be far closer
    to dense attention (samples/RESULTS.md), and the newest frames stay unmerged.
    """

    paper: ClassVar[str] = "FAST-AR, arXiv 2602.01801, section 5.2"
    summary: ClassVar[str] = "merges near-duplicate keys of past frames, so that the KV cache grows with what changes"
    exact: ClassVar[dict[str, Any]] = {"threshold": None}

    threshold: float | None = knob(0.9, "similarity from which keys merge, in [0, 1]; None never merges")
    match: str = knob(
        "cell",
        "which token of the previous frame a token is compared with: the one at its place, or the nearest key",
        choices=("cell", "nearest"),
    )
    representative: str = knob(
        "mean", "key of a merged entry: mean of its members, or the last one (the paper's)", choices=("mean", "last")
    )
    sink_frames: int = knob(0, "first latent frames of the video that are never merged")
    recent_frames: int | None = knob(None, "newest latent frames that stay unmerged; None: the newest block")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.threshold is None or 0 <= self.threshold <= 1,
            "threshold is a similarity in [0, 1], or None to never merge",
            threshold=self.threshold,
        )
        self.require(
            self.sink_frames >= 0, "sink_frames is a number of latent frames >= 0", sink_frames=self.sink_frames
        )
        self.require(
            self.recent_frames is None or self.recent_frames >= 0,
            "recent_frames is a number of latent frames >= 0, or None for the newest block",
            recent_frames=self.recent_frames,
        )

    def expected_tokens(self, video_tokens: int) -> int:
        """Tokens the exact tier should make room for at once."""
        return video_tokens if self.threshold is None else 0

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Move what is no longer recent into the merged tier of each layer; called once a finished block."""
        if self.threshold is None:
            run.fired("cache")
            return
        scratch = run.scratch("cache", site.branch)
        if "key_scale" not in scratch:
            keys = (memory.exact.past().entries.k for memory in memories)
            scratch["key_scale"] = torch.stack([_squared(k).mean() for k in keys]).mean()
        per_frame = site.grid.tokens_per_frame
        recent = site.grid.frames if self.recent_frames is None else self.recent_frames
        merged = 0
        for memory in memories:
            leaving = memory.exact.count - recent * per_frame
            if leaving <= 0:
                continue
            oldest = memory.exact.take_oldest(leaving)
            if not memory.older:
                memory.older.append(_MergedTier.empty_like(oldest))
            tier = memory.older[0]
            assert isinstance(tier, _MergedTier)
            merged += tier.absorb(oldest, per_frame, self, scratch)
        run.fired("cache", merged)

    def why_idle(self, run: "Run") -> str:
        best = max((float(s["best"]) for s in run.all_scratch("cache") if "best" in s), default=None)
        if best is None:
            return (
                "no frame ever left the recent ones, so nothing could merge: generate more frames, "
                f"or lower recent_frames (now {self.recent_frames})"
            )
        return f"no pair of keys reached threshold={self.threshold}; the most alike had {best:.4f}: lower the threshold"


@dataclass
class _Row:
    """Merging state of one batch row."""

    k: Tensor  # (n, H, D)
    v: Tensor
    count: Tensor  # (n,) tokens each entry stands for
    frame: Tensor  # (n,) newest latent frame among them
    owner: Tensor  # (T,) entry that holds each token of the newest absorbed frame
    newest: Tensor  # (T, H, D) keys of that frame

    def absorb(self, k: Tensor, v: Tensor, frame: int, policy: TempCache, scratch: dict[str, Any]) -> int:
        """Take one frame, (T, H, D), and return how many of its tokens joined an older entry."""
        tokens = k.shape[0]
        joins = torch.zeros(tokens, dtype=torch.bool, device=k.device)
        target = torch.zeros(tokens, dtype=torch.int64, device=k.device)
        if self.owner.numel() and frame > policy.sink_frames:  # the first frame after the sink has no match it may join
            nearest = torch.arange(tokens, device=k.device)
            if policy.match == "nearest":
                ids, _ = Flat(metric="l2").fit(self.newest.flatten(1).float()).search(k.flatten(1).float(), 1)
                nearest = ids.squeeze(-1)
            similarity = 1 - _squared(k - self.newest[nearest]) / (2 * scratch["key_scale"])
            scratch["best"] = torch.maximum(scratch.get("best", similarity.new_tensor(-1.0)), similarity.max())
            joins, target = similarity >= policy.threshold, self.owner[nearest]
        joined, to = joins.nonzero().squeeze(1), target[joins]
        if joined.numel():
            before = self.count.clone()
            self.count.index_add_(0, to, torch.ones_like(to))
            share = (before / self.count).to(torch.float32)
            self.v = _running_mean(self.v, share, v[joined], to, self.count)
            if policy.representative == "mean":
                self.k = _running_mean(self.k, share, k[joined], to, self.count)
            else:
                self.k[to] = k[joined]
            self.frame[to] = frame
        fresh = (~joins).nonzero().squeeze(1)
        owner = target.clone()
        owner[fresh] = torch.arange(self.k.shape[0], self.k.shape[0] + fresh.numel(), device=k.device)
        self.k, self.v = torch.cat([self.k, k[fresh]]), torch.cat([self.v, v[fresh]])
        self.count = torch.cat([self.count, torch.ones_like(fresh)])
        self.frame = torch.cat([self.frame, torch.full_like(fresh, frame)])
        self.owner, self.newest = owner, k
        return joined.numel()

    def entries(self) -> Entries:
        """The row as attention reads it, entries of equal multiplicity kept together."""
        order = torch.argsort(self.count, stable=True)
        self.k, self.v, self.count, self.frame = (x[order] for x in (self.k, self.v, self.count, self.frame))
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        self.owner = place[self.owner]
        tokens, entries = torch.unique_consecutive(self.count, return_counts=True)
        multiplicity = tuple(zip(entries.tolist(), tokens.tolist(), strict=True))
        return Entries(self.k[None], self.v[None], self.frame.cpu(), multiplicity)


@dataclass
class _MergedTier(RowTier):
    state: list[_Row] = field(default_factory=list)

    @classmethod
    def empty_like(cls, entries: Entries) -> "_MergedTier":
        shape = entries.k.shape[2:]
        none = torch.empty(0, dtype=torch.int64, device=entries.k.device)
        state = [
            _Row(entries.k.new_empty(0, *shape), entries.v.new_empty(0, *shape), none, none, none, none)
            for _ in range(entries.k.shape[0])
        ]
        return cls(state=state)

    def absorb(self, entries: Entries, per_frame: int, policy: TempCache, scratch: dict[str, Any]) -> int:
        assert entries.frames is not None
        merged = 0
        for row, state in enumerate(self.state):
            for start in range(0, entries.count, per_frame):
                tokens = slice(start, start + per_frame)
                frame = int(entries.frames[start])
                merged += state.absorb(entries.k[row, tokens], entries.v[row, tokens], frame, policy, scratch)
        self.rows = [state.entries() for state in self.state]
        return merged


def _squared(k_NHD: Tensor) -> Tensor:
    """Squared length of the keys, all heads together, fp32."""
    return k_NHD.float().square().sum(dim=(-2, -1))


def _running_mean(old: Tensor, share: Tensor, new: Tensor, to: Tensor, count: Tensor) -> Tensor:
    """Means over members after `new` rows joined the entries `to`; `share` is each entry's old count over its new."""
    mean = old.float() * share[:, None, None]
    mean.index_add_(0, to, new.float() / count[to][:, None, None])
    return mean.to(old.dtype)
