"""TempCache: near-duplicate keys of past frames are merged (FAST-AR, arXiv 2602.01801, section 5.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..ann import Flat
from ..grid import Grid
from ..policy import CachePolicy, knob
from ..rotary import unrotate
from ..site import Site
from .budget import Extent, parse_budget, readable, room_for
from .memory import Memory
from .merged import EXTRA_BYTES, MergedTier, MergedTokens
from .store import BITS, store_bytes

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class TempCache(CachePolicy):
    """Keep one entry for a patch that stays alike over time, and count how often it was seen.

    When a block is finished, each of its tokens is matched with a token of the frame before. Once its frame is no
    longer recent it joins the entry of its match, if the two are at least `threshold` alike, else it becomes an entry
    of its own. An entry that stands for m tokens gets log m added to its score (Lemma 5.1), which is exact where the
    tokens are identical.

    `variant` says how alike is meant. "paper": cosine of un-rotated keys, all heads together; matches are proposed by
    queries, and the newest member's key stands for the entry, at its own position. "phase": the distance of rotated
    keys a, b at the same place, as 1 - |a - b|^2 / (2 mean |k|^2), the mean taken over every layer of the first block:
    cosine for keys of average length, and one scale for all layers, because what a merge changes is the difference of
    scores and that grows with the keys' length; the mean of the rotated keys stands for the entry. It is far closer to
    dense attention at the same size (samples/RESULTS.md). `match` and `representative` override the variant's.

    Ours, not the paper's: the newest frames stay unmerged, and `budget`, a hard cap on what attention may read in a
    layer, the block at work included. Over it, the entries with the least tokens x 1 / (1 + age in frames) go, or with
    `evict="mass"` those that sampled queries of the newest block read least.
    """

    paper: ClassVar[str] = "FAST-AR, arXiv 2602.01801, section 5.2"
    summary: ClassVar[str] = "merges near-duplicate keys of past frames, so that the KV cache grows with what changes"
    exact: ClassVar[dict[str, Any]] = {"threshold": None, "budget": None, "bits": None}

    threshold: float | tuple[float, ...] | None = knob(
        0.9, "similarity in [0, 1] from which keys merge, or one for each layer; None never merges"
    )
    budget: int | str | None = knob(
        None, 'most a layer holds: tokens (40000), "32 frames" or "8GB" of all layers; None: no limit'
    )
    variant: str = knob(
        "phase", 'which keys are alike: rotated ones ("phase") or un-rotated ones ("paper")', choices=("phase", "paper")
    )
    match: str | None = knob(
        None,
        'token of the frame before a token is compared with: at its place ("cell"), the nearest key ("key"), or the '
        'key its query reads most ("query"); None: cell for phase, query for paper',
        choices=("cell", "key", "query"),
    )
    representative: str | None = knob(
        None,
        "key of a merged entry: mean of its members, the last one, or the medoid; None: mean for phase, last for paper",
        choices=("mean", "last", "medoid"),
    )
    heads: str = knob(
        "shared",
        "one set of entries for all heads of a layer, or one for each head, which merges more and reads head by head",
        choices=("shared", "per_head"),
    )
    sink_frames: int = knob(0, "first latent frames of the video, never merged and never evicted")
    recent_frames: int | None = knob(None, "newest latent frames that stay unmerged; None: the newest block")
    evict: str = knob(
        "recency",
        "what stays when the budget is full: most tokens x recency, or most attention mass under the newest block's "
        "queries",
        choices=("recency", "mass"),
    )
    max_multiplicity: int | None = knob(None, "most tokens an entry stands for, >= 1; None: no limit")
    bits: int | None = knob(None, "8, 4 or 2: hold older frames quantised, which saves memory, not time; None: as is")

    def __post_init__(self) -> None:
        super().__post_init__()
        each = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        self.require(
            bool(each) and all(t is None or 0 <= t <= 1 for t in each),
            "threshold is a similarity in [0, 1], or a tuple of one for each layer, or None to never merge",
            threshold=self.threshold,
        )
        self.require_frames("sink_frames")
        self.require_frames("recent_frames", none="for the newest block")
        self.require(
            self.max_multiplicity is None or self.max_multiplicity >= 1,
            "max_multiplicity is a number of tokens >= 1, or None for no limit",
            max_multiplicity=self.max_multiplicity,
        )
        self.require(
            self.bits is None or self.bits in BITS, "bits is 8, 4 or 2, or None to quantise nothing", bits=self.bits
        )
        if self.budget is not None:
            parse_budget(self.budget)

    @property
    def matching(self) -> str:
        return self.match or ("cell" if self.variant == "phase" else "query")

    @property
    def needs_queries(self) -> bool:
        matched = self.matching == "query" and self.threshold is not None
        return matched or (self.evict == "mass" and self.budget is not None)

    def check(self, extent: Extent) -> None:
        """Refuse a generation that the knobs do not fit, before anything is computed."""
        if isinstance(self.threshold, tuple):
            self.require(
                len(self.threshold) == extent.layers,
                f"threshold has one value for each of the {extent.layers} layers",
                threshold=self.threshold,
            )
        if self.budget is None:
            return
        per_frame, block = extent.block.tokens_per_frame, extent.block.frames
        recent, room = self._recent(extent.block), self._room(extent)
        exact, moving = (recent + block) * per_frame, (self.sink_frames + block) * per_frame
        size = exact * extent.bytes_per_token + moving * self._bytes_per_entry(extent)
        self.require(
            room >= self.sink_frames * per_frame,
            f"budget must hold {self.sink_frames} sink frames, {recent} recent ones and the {block} of the block at "
            f"work: ({self.sink_frames} + {recent} + {block}) x {per_frame} = {self.sink_frames * per_frame + exact} "
            f"tokens, or {readable(size)} of buffers in all layers",
            budget=self.budget,
        )

    def expected_tokens(self, video_tokens: int, block: Grid) -> int:
        """Tokens the exact tier should make room for: the recent ones and a block at work."""
        if self.is_exact:
            return video_tokens
        return (self._recent(block) + block.frames) * block.tokens_per_frame

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Match the finished block, move what is no longer recent into the merged tier; once a block and branch."""
        if self.is_exact:
            run.fired("cache")
            return
        scratch = run.scratch("cache", site.branch)
        state: _State = scratch.setdefault("state", _State())
        self._link(state, memories, site, run)
        per_frame, sizes = site.grid.tokens_per_frame, [memory.exact.count for memory in memories]
        leaving = sizes[0] - self._recent(site.grid) * per_frame
        if leaving <= 0:
            return
        taken = [memory.exact.take_oldest(leaving) for memory in memories]
        k, v = (torch.cat([getattr(entries, name) for entries in taken]) for name in ("k", "v"))
        limit = None
        if self.budget is not None:
            assert run.extent is not None
            limit = self._room(run.extent)
        k, v = self._rows(k), self._rows(v)
        if state.merged is None:
            room = leaving if limit is None or run.extent is None else limit + max(leaving, run.extent.block.tokens)
            representative = self.representative or _REPRESENTATIVES[self.variant]
            state.merged = MergedTokens(k[:, :per_frame], v[:, :per_frame], room, representative, self.bits)
        frames = taken[0].frames
        assert frames is not None
        for start in range(0, leaving, per_frame):
            part, frame = slice(start, start + per_frame), int(frames[start])
            match, similarity = state.links.pop(frame)
            joins = self._joins(similarity, frame, len(memories))
            state.merged.absorb(k[:, part], v[:, part], frame, joins, match, similarity, self.max_multiplicity)
        if limit is not None and state.merged.bound > limit:
            state.merged.evict(limit, self._worth(state.merged, memories, site), self.sink_frames)
        rows = state.merged.settle()
        each, held = len(rows) // len(memories), state.merged.bytes // len(memories)
        heads = each // len(taken[0].k)
        for layer, memory in enumerate(memories):
            memory.older = [MergedTier(rows[layer * each : (layer + 1) * each], held, heads)]
        run.fired("cache", self.bits or state.merged.absorbed * len(rows) - sum(row.count for row in rows))

    def describe(self, run: "Run") -> dict[str, Any]:
        """What was merged and evicted, for the report; waits for the device."""
        states = [s["state"] for s in run.all_scratch("cache") if "state" in s]
        found = [state.merged for state in states if state.merged is not None]
        if not found:
            return {}
        counts = torch.cat([merged.count[merged.count > 0] for merged in found])
        powers = torch.bincount(counts.float().log2().floor().long()).tolist()
        return {
            "merged_entries": counts.numel(),
            "merged_tokens": int(counts.sum()),
            "evicted_tokens": sum(int(merged.evicted) for merged in found),
            "multiplicity": {f"{2**i}-{2 ** (i + 1) - 1}" if i else "1": n for i, n in enumerate(powers)},
            "drift": found[0].drift.to_dict(),
        }

    def why_idle(self, run: "Run") -> str:
        states = [s["state"] for s in run.all_scratch("cache") if "state" in s]
        if not any(state.merged for state in states):
            return (
                "no frame ever left the recent ones, so nothing could merge: generate more frames, "
                f"or lower recent_frames (now {self.recent_frames})"
            )
        limit = "" if self.budget is None else f", and the past never outgrew budget={self.budget!r}"
        if self.threshold is None:
            return f"threshold=None never merges{limit}"
        best = max(float(state.best) for state in states)
        return (
            f"no pair of keys reached threshold={self.threshold}; the most alike had {best:.4f}{limit}: "
            "lower the threshold"
        )

    def _room(self, extent: Extent) -> int:
        """Merged entries that the budget leaves room for beside the recent frames and the block at work."""
        assert self.budget is not None
        exact = (self._recent(extent.block) + extent.block.frames) * extent.block.tokens_per_frame
        return room_for(self.budget, extent, exact, self._bytes_per_entry(extent))

    def _bytes_per_entry(self, extent: Extent) -> int:
        """What a merged entry takes in all layers, rows and branches."""
        vector = store_bytes(extent.heads, extent.head_dim, self.bits, extent.dtype.itemsize)
        extra = EXTRA_BYTES * (extent.heads if self.heads == "per_head" else 1)
        vectors = 3 if self.representative == "medoid" else 2  # it keeps the mean of the keys beside the medoid
        return extent.vectors * (vectors * vector + extra)

    def _recent(self, block: Grid) -> int:
        return block.frames if self.recent_frames is None else self.recent_frames

    def _worth(self, merged: MergedTokens, memories: Sequence[Memory], site: Site) -> Tensor:
        """What decides which entries (R, C) stay when the budget is full."""
        if self.evict == "recency":
            return merged.count / (1.0 + site.start - merged.frame)
        picks = torch.linspace(0, site.grid.tokens - 1, min(_QUERIES, site.grid.tokens)).long()
        queries = self._rows(torch.cat([memory.queries for memory in memories])[:, picks.to(merged.count.device)])
        exact = self._rows(torch.cat([memory.exact.past().entries.k for memory in memories]))
        worth = []
        for number in range(merged.rows):
            q = queries[number].float() * queries.shape[-1] ** -0.5
            beside = torch.einsum("shd,nhd->shn", q, exact[number].float()).logsumexp(-1)
            scores = torch.einsum("shd,nhd->shn", q, merged.k.rows(number, merged.capacity)[0].float())
            scores = scores + merged.count[number].float().log()  # -inf where there is no entry
            total = torch.logaddexp(beside, scores.logsumexp(-1))
            worth.append((scores - total[..., None]).exp().sum(dim=(0, 1)))
        return torch.stack(worth)

    def _joins(self, similarity: Tensor, frame: int, layers: int) -> Tensor:
        """Which tokens (R, T) may join; the first frame after the sink may join nothing, so the sink stays as it is."""
        if self.threshold is None or frame <= self.sink_frames:
            return torch.zeros_like(similarity, dtype=torch.bool)
        if not isinstance(self.threshold, tuple):
            return similarity >= self.threshold
        each = torch.tensor(self.threshold, device=similarity.device)
        return similarity >= each.repeat_interleave(len(similarity) // layers)[:, None]

    def _link(self, state: "_State", memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Match and similarity (R, T) of every token of the finished block with the frame before it."""
        per_frame, tokens = site.grid.tokens_per_frame, site.grid.tokens
        blocks = [memory.exact.past().entries.k[:, -tokens:] for memory in memories]
        if state.scale is None:
            each = torch.stack([_squared(k).mean(dim=1) for k in blocks]).mean(dim=0)  # of each batch row
            heads = blocks[0].shape[2] if self.heads == "per_head" else 1
            state.scale = (each / heads).repeat_interleave(heads).repeat(len(blocks))[:, None]
        for number in range(site.grid.frames):
            part = slice(number * per_frame, (number + 1) * per_frame)
            k = torch.cat([block[:, part] for block in blocks])
            alike = k
            if self.variant == "paper" and run.rotary is not None:
                alike = unrotate(k, *(table[:, part] for table in run.rotary))
            k, alike = self._rows(k), self._rows(alike)
            match = torch.arange(per_frame, device=k.device).expand(len(k), -1)
            similarity = torch.full(match.shape, -1.0, device=k.device)
            if state.newest is not None and self.threshold is not None:
                previous, previous_alike = state.newest
                if self.matching == "query":
                    q = self._rows(torch.cat([memory.queries[:, part] for memory in memories]))
                    match = _nearest(q, previous, "ip")
                elif self.matching == "key":
                    match = _nearest(alike, previous_alike, "l2" if self.variant == "phase" else "cosine")
                other = previous_alike.gather(1, match[..., None, None].expand_as(previous_alike))
                similarity = self._similarity(alike, other, state.scale)
                if site.start + number > self.sink_frames:
                    state.best = torch.maximum(state.best.to(similarity), similarity.max())
            state.links[site.start + number] = match, similarity
            state.newest = k, alike

    def _rows(self, x_RTHD: Tensor) -> Tensor:
        """Vectors that are matched and merged as one: of all heads (R, T, H, D), or of each (R * H, T, 1, D)."""
        return x_RTHD if self.heads == "shared" else x_RTHD.transpose(1, 2).flatten(0, 1).unsqueeze(2)

    def _similarity(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """Of keys (R, T, H, D), all heads together, (R, T)."""
        if self.variant == "paper":
            return torch.cosine_similarity(a.flatten(2).float(), b.flatten(2).float(), dim=2)
        return 1 - _squared(a - b) / (2 * scale)


_QUERIES = 16  # of the newest block, sampled to tell attention mass

_REPRESENTATIVES = {"phase": "mean", "paper": "last"}


@dataclass
class _State:
    """What one branch of a generation knows: links of the frames that are still recent, and the merged entries."""

    merged: MergedTokens | None = None
    scale: Tensor | None = None  # mean squared key length of the first block, for each row (R, 1)
    newest: tuple[Tensor, Tensor] | None = None  # keys of the newest frame, as read and as compared
    links: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    best: Tensor = field(default_factory=lambda: torch.tensor(-1.0))


def _squared(k_RTHD: Tensor) -> Tensor:
    """Squared length of the keys, all heads together, fp32."""
    return k_RTHD.float().square().sum(dim=(-2, -1))


def _nearest(queries_RTHD: Tensor, points_RTHD: Tensor, metric: str) -> Tensor:
    """Nearest point of each query, (R, T); some rows at a time, as R x T x T distances are many."""
    pairs = zip(queries_RTHD.flatten(2).split(16), points_RTHD.flatten(2).split(16), strict=True)
    return torch.cat([Flat(metric=metric).fit(points).search(queries, 1)[0].squeeze(-1) for queries, points in pairs])
