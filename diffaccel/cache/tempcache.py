"""TempCache: near-duplicate keys of past frames are merged (FAST-AR, arXiv 2602.01801, section 5.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ann import Flat
from ..grid import Grid
from ..kernel.weighted import spare
from ..policy import CachePolicy, knob
from ..rotary import unrotate
from ..site import Site
from .budget import Extent, parse_budget, readable, room_for
from .memory import Memory
from .merged import EXTRA_BYTES, SPARE, Drift, MergedTier, MergedTokens, Row
from .shuttle import Shuttle
from .store import BITS, row_of, store_bytes

if TYPE_CHECKING:
    from ..run import Run
    from ..spread import Spread


@dataclass(frozen=True)
class TempCache(CachePolicy):
    """Keep one entry for a patch that stays alike over time, and count how often it was seen.

    An entry that stands for m tokens gets log m added to its score (Lemma 5.1), which is exact where the tokens are
    identical. Tokens join the past once their frame is no longer recent. `variant` says what is alike:

    "paper": each token is matched with one of the frame before, proposed by queries, and joins its entry if the cosine
    of the un-rotated keys, all heads together, reaches `threshold`. The newest member's key stands for the entry, at
    its own position.

    "phase", ours: entries that follow each other in time at one place of the frame merge, the most alike ones first,
    where alike is 1 - |k - k'| |v - v'| / (2 |k| |v|). To first order a merge changes attention's output by the
    difference of scores times the difference of values, so it costs nothing where either vanishes. Keys are compared
    and averaged as attention reads them, rotated: a key moved to another position answers other queries. |k| and |v|
    are root mean squares over the first block, |k| over every layer, as scores of all layers have one scale. It is far
    closer to dense attention at the same size (samples/RESULTS.md).

    `match` and `representative` override the variant's.

    Also ours: the newest frames stay unmerged, and `budget` is a hard cap on what attention may read in a layer, the
    block at work included. Over it, pairs less alike than `threshold` merge too, by the measure of "phase" and as many
    as it takes, or entries go: `overflow` says which. With room for a frame or two beside sink, recent frames and
    block, merging everything else into it costs more than forgetting it: `SinkRecent` is closer to dense there.
    """

    paper: ClassVar[str] = "FAST-AR, arXiv 2602.01801, section 5.2"
    summary: ClassVar[str] = "merges near-duplicate keys of past frames, so that the KV cache grows with what changes"
    exact: ClassVar[dict[str, Any]] = {"threshold": None, "budget": None, "bits": None}

    threshold: float | tuple[float, ...] | None = knob(
        0.9,
        "similarity in [0, 1] from which tokens merge, or one for each layer; None merges only what the budget demands",
    )
    budget: int | str | None = knob(
        None, 'most a layer holds: tokens (40000), "32 frames" or "8GB" of all layers; None: no limit'
    )
    variant: str = knob(
        "phase",
        'what is alike: keys as they are read and values ("phase") or un-rotated keys ("paper")',
        choices=("phase", "paper"),
    )
    match: str | None = knob(
        None,
        'what a token may merge with: the entry before it at its place ("entry"), or the entry of one token of the '
        'frame before: at its place ("cell"), with the nearest key ("key"), or the key its query reads most ("query"); '
        "None: entry for phase, query for paper",
        choices=("entry", "cell", "key", "query"),
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
    overflow: str | None = knob(
        None,
        'what gives way over the budget: the most alike entries "merge" on, or those go that have the fewest tokens x '
        'recency ("recency") or the least attention mass under the newest queries ("mass"); None: merge for phase, '
        "recency for paper",
        choices=("merge", "recency", "mass"),
    )
    overflow_threshold: float | None = knob(
        None, "similarity below which nothing merges to fit the budget, and entries go instead; None: no such bound"
    )
    max_multiplicity: int | None = knob(None, "most tokens an entry stands for, >= 1; None: no limit")
    bits: int | None = knob(None, "8, 4 or 2: hold older frames quantised, which saves memory, not time; None: as is")
    hold: str = knob(
        "device",
        "where merged entries lie: device, or host: page-locked memory, brought back layer by layer as they are read, "
        "the next one while this one computes, which saves memory of the device, not time",
        choices=("device", "host"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        each = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        self.require(
            bool(each) and all(t is None or 0 <= t <= 1 for t in each),
            "threshold is a similarity in [0, 1], or a tuple of one for each layer, or None to merge only for a budget",
            threshold=self.threshold,
        )
        self.require(
            self.overflow_threshold is None or (-1 <= self.overflow_threshold <= 1 and self._overflow == "merge"),
            'overflow_threshold is a similarity in [-1, 1], of overflow="merge"',
            overflow_threshold=self.overflow_threshold,
            overflow=self._overflow,
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
        self.require(
            self.hold == "device" or not self.is_exact,
            'hold="host" is where merged entries lie, so it wants a threshold, a budget or bits; HostCache holds every '
            "token there",
            threshold=self.threshold,
            budget=self.budget,
            bits=self.bits,
        )
        if self.budget is not None:
            parse_budget(self.budget)

    @property
    def matching(self) -> str:
        return self.match or ("entry" if self.variant == "phase" else "query")

    @property
    def _overflow(self) -> str:
        return self.overflow or ("merge" if self.variant == "phase" else "recency")

    @property
    def needs_queries(self) -> bool:
        matched = self.matching == "query" and self.threshold is not None
        return matched or (self._overflow == "mass" and self.budget is not None)

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
        exact, moving = (recent + block) * per_frame, (self.sink_frames + block) * per_frame + SPARE
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
        past, per_frame = memories[0].exact.past().entries, site.grid.tokens_per_frame
        leaving = past.count - self._recent(site.grid) * per_frame
        if leaving <= 0:
            return
        assert state.scale is not None
        assert past.frames is not None
        frames = past.frames[:leaving:per_frame].tolist()
        each, batch = len(state.scale) // len(memories), len(past.k)  # rows of a layer, and videos
        # On the device all layers merge at once; to and from the host each goes by itself.
        groups = [memories] if self.hold == "device" else [[memory] for memory in memories]
        settled: list[Row] = []
        for number, group in enumerate(groups):
            merged = self._merge(state, number, group, frames, site, run)
            rows = merged.settle()
            if merged.shuttle is not None:
                merged.park()
            held, parked = merged.bytes // len(group), merged.host_bytes // len(group)
            for layer, memory in enumerate(group):
                own = rows[layer * each : (layer + 1) * each]
                memory.older = [MergedTier(own, held, parked, heads=each // batch)]
            settled += rows
        for frame in frames:
            state.links.pop(frame, None)
        for row, following in pairwise([*settled, settled[0]]):
            row.following = following
        taken = sum(merged.absorbed * merged.rows for merged in state.merged)
        run.fired("cache", self.bits or self.hold == "host" or taken - sum(row.count for row in settled))

    def _merge(
        self, state: "_State", number: int, group: Sequence[Memory], frames: list[int], site: Site, run: "Run"
    ) -> MergedTokens:
        """Move the oldest `frames` of these layers into their buffers, and keep those within the budget."""
        per_frame = site.grid.tokens_per_frame
        leaving = len(frames) * per_frame
        oldest = [memory.exact.oldest(leaving) for memory in group]
        k, v = (self._rows(torch.cat([getattr(entries, name) for entries in oldest])) for name in ("k", "v"))
        for memory in group:
            memory.exact.drop(0, leaving)
        limit = None
        if self.budget is not None:
            assert run.extent is not None
            limit = self._room(run.extent)
        if number == len(state.merged):
            room = leaving if limit is None or run.extent is None else limit + max(leaving, run.extent.block.tokens)
            representative = self.representative or _REPRESENTATIVES[self.variant]
            shuttle = state.shuttle if self.hold == "host" else None
            state.merged.append(
                MergedTokens(k[:, :per_frame], v[:, :per_frame], room, representative, self.bits, shuttle, run.spread)
            )
        merged, rows = state.merged[number], slice(number * len(k), (number + 1) * len(k))
        merged.unpark()
        for following in state.merged[number + 1 : number + 2]:
            following.fetch()
        assert state.scale is not None
        assert state.bar is not None
        scale, bar = state.scale[rows], state.bar[rows]
        for frame, new_k, new_v in zip(frames, k.split(per_frame, 1), v.split(per_frame, 1), strict=True):
            if self.matching == "entry" or self.threshold is None:
                merged.add(new_k, new_v, frame)
                continue
            match, similarity = (link[rows] for link in state.links[frame])
            # the first frame after the sink may join nothing, so the sink stays as it is
            joins = (similarity >= bar) & (frame > self.sink_frames)
            merged.absorb(new_k, new_v, frame, joins, match, similarity, self.max_multiplicity)
        over = limit is not None and merged.bound > limit
        folds, overflows = self.matching == "entry" and self.threshold is not None, over and self._overflow == "merge"
        if folds or overflows:
            floor = -inf if self.overflow_threshold is None else self.overflow_threshold
            most = limit if overflows else None
            merged.fold(bar if folds else None, most, scale, self.sink_frames, self.max_multiplicity, leaving, floor)
        if over:
            assert limit is not None
            merged.evict(limit, self._worth(merged, group, site), self.sink_frames)
        return merged

    def describe(self, run: "Run") -> dict[str, Any]:
        """What was merged and evicted, for the report; waits for the device."""
        states = [s["state"] for s in run.all_scratch("cache") if "state" in s]
        found = [merged for state in states for merged in state.merged]
        if not found:
            return {}
        counts = torch.cat([merged.count[merged.count > 0] for merged in found])
        powers = torch.bincount(counts.float().log2().floor().long()).tolist()
        return {
            "merged_entries": counts.numel(),
            "merged_tokens": int(counts.sum()),
            "evicted_tokens": sum(int(merged.evicted) for merged in found),
            "least_similarity": least if (least := min(round(float(m.least), 4) for m in found)) < inf else None,
            "multiplicity": {f"{2**i}-{2 ** (i + 1) - 1}" if i else "1": n for i, n in enumerate(powers)},
            "drift": Drift.of([merged.drift for merged in states[0].merged]),
        } | ({"host_bytes": held} if (held := sum(merged.host_bytes for merged in found)) else {})

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
        by_entry = self.matching == "entry"
        best = max(float(x.best) for state in states for x in (state.merged if by_entry else [state]))
        return (
            f"no pair of tokens reached threshold={self.threshold}; the most alike had {best:.4f}{limit}: "
            "lower the threshold"
        )

    def _room(self, extent: Extent) -> int:
        """Merged entries that the budget leaves room for beside the recent frames and the block at work."""
        assert self.budget is not None
        exact = (self._recent(extent.block) + extent.block.frames) * extent.block.tokens_per_frame
        return room_for(self.budget, extent, exact, self._bytes_per_entry(extent), SPARE)

    def _bytes_per_entry(self, extent: Extent) -> int:
        """What a merged entry takes in all layers, rows and branches."""
        # a GPU may want some channels more; counted everywhere, so that a budget is the same number of entries
        more = spare(extent.head_dim) if self.hold == "device" and extent.dtype == torch.bfloat16 else None
        of = extent.heads, extent.head_dim, self.bits, extent.dtype.itemsize
        key, value = (store_bytes(*of, channels) for channels in more or (0, 0))
        mean = value if self.representative == "medoid" else 0  # of the keys, kept beside the medoid
        extra = EXTRA_BYTES * (extent.heads if self.heads == "per_head" else 1)
        return extent.vectors * (key + value + mean + extra)

    def _recent(self, block: Grid) -> int:
        return block.frames if self.recent_frames is None else self.recent_frames

    def _worth(self, merged: MergedTokens, memories: Sequence[Memory], site: Site) -> Tensor:
        """What decides which entries (R, C) stay when the budget is full."""
        if self._overflow != "mass":
            return merged.count / (1.0 + site.start - merged.frame)
        picks = torch.linspace(0, site.grid.tokens - 1, min(_QUERIES, site.grid.tokens)).long()
        queries = self._rows(torch.cat([memory.queries for memory in memories])[:, picks.to(merged.count.device)])
        exact = self._rows(torch.cat([memory.exact.past().entries.k for memory in memories]))
        worth = []
        for number in range(merged.rows):
            q = queries[number].float() * queries.shape[-1] ** -0.5
            beside = torch.einsum("shd,nhd->shn", q, exact[number].float()).logsumexp(-1)
            scores = torch.einsum("shd,nhd->shn", q, row_of(merged.k, number, merged.capacity)[0].float())
            scores = scores + merged.count[number].float().log()  # -inf where there is no entry
            total = torch.logaddexp(beside, scores.logsumexp(-1))
            worth.append((scores - total[..., None]).exp().sum(dim=(0, 1)))
        return torch.stack(worth)

    def _thresholds(self, scale: Tensor, layers: int) -> Tensor:
        """One for each row, (R, 1) as `scale`; above any similarity in a layer that never merges."""
        each = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * layers
        found = torch.tensor([torch.inf if t is None else t for t in each], device=scale.device)
        return found.repeat_interleave(len(scale) // layers)[:, None]

    def _link(self, state: "_State", memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Match and similarity (R, T) of every token of the finished block with the frame before it."""
        per_frame, tokens = site.grid.tokens_per_frame, site.grid.tokens
        blocks = [memory.exact.past().entries for memory in memories]
        if state.scale is None:
            k_new, v_new = ([getattr(e, name)[:, -tokens:] for e in blocks] for name in ("k", "v"))
            state.scale = self._scale(k_new, v_new, run.spread)
            state.bar = self._thresholds(state.scale, len(memories))
        if self.matching == "entry" or self.threshold is None:
            return
        for number in range(site.grid.frames):
            part = slice(number * per_frame, (number + 1) * per_frame)
            k, v = (torch.cat([getattr(e, name)[:, -tokens:][:, part] for e in blocks]) for name in ("k", "v"))
            alike = k
            if self.variant == "paper" and run.rotary is not None:
                alike = unrotate(k, *(table[:, part] for table in run.rotary))
            new = _Frame(self._rows(k), self._rows(v), self._rows(alike))
            match = torch.arange(per_frame, device=k.device).expand(len(new.k), -1)
            similarity = torch.full(match.shape, -1.0, device=k.device)
            if state.newest is not None:
                if self.matching == "query":
                    q = self._rows(torch.cat([memory.queries[:, part] for memory in memories]))
                    match = _nearest(q, state.newest.k, "ip")
                elif self.matching == "key":
                    metric = "l2" if self.variant == "phase" else "cosine"
                    match = _nearest(new.alike, state.newest.alike, metric)
                similarity = self._similarity(new, state.newest.at(match), state.scale)
                if site.start + number > self.sink_frames:
                    state.best = torch.maximum(state.best.to(similarity), similarity.max())
            state.links[site.start + number] = match, similarity
            state.newest = new

    def _rows(self, x_RTHD: Tensor) -> Tensor:
        """Vectors that are matched and merged as one: of all heads (R, T, H, D), or of each (R * H, T, 1, D)."""
        return x_RTHD if self.heads == "shared" else x_RTHD.transpose(1, 2).flatten(0, 1).unsqueeze(2)

    def _scale(self, k: list[Tensor], v: list[Tensor], spread: "Spread | None" = None) -> Tensor:
        """|k| |v| of every row, (R, 1): root mean squares over tokens (B, T, H, D), of keys over all layers too."""
        keys, values = (torch.stack([_squared(self._rows(x)).mean(1) for x in vectors]) for vectors in (k, v))
        if self.heads == "per_head":
            keys = keys.unflatten(1, (len(k[0]), -1)).mean(2, keepdim=True)
            keys = keys if spread is None else spread.mean(keys)
            keys = keys.expand(-1, -1, k[0].shape[2]).flatten(1)
        return (keys.mean(0) * values).sqrt().flatten()[:, None]

    def _similarity(self, a: "_Frame", b: "_Frame", scale: Tensor) -> Tensor:
        """Of tokens, (R, T)."""
        if self.variant == "paper":
            return torch.cosine_similarity(a.alike.flatten(2).float(), b.alike.flatten(2).float(), dim=2)
        return 1 - (_squared(a.k - b.k) * _squared(a.v - b.v)).sqrt() / (2 * scale)


_QUERIES = 16  # of the newest block, sampled to tell attention mass

_REPRESENTATIVES = {"phase": "mean", "paper": "last"}


class _Frame(NamedTuple):
    """Tokens (R, T, H, D) of one frame: keys as read, values, keys as compared."""

    k: Tensor
    v: Tensor
    alike: Tensor

    def at(self, index_RT: Tensor) -> "_Frame":
        return _Frame(*(x.gather(1, index_RT[..., None, None].expand_as(x)) for x in self))


@dataclass
class _State:
    """What one branch of a generation knows: links of the frames that are still recent, and the merged entries."""

    merged: list[MergedTokens] = field(default_factory=list)  # all layers in one, or one for each
    shuttle: Shuttle = field(default_factory=Shuttle)
    scale: Tensor | None = None  # what differences are measured by, for each row (R, 1)
    bar: Tensor | None = None  # threshold of each row (R, 1)
    newest: _Frame | None = None
    links: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    best: Tensor = field(default_factory=lambda: torch.tensor(-1.0))


def _squared(k_RTHD: Tensor) -> Tensor:
    """Squared length of the keys, all heads together, fp32."""
    return k_RTHD.float().square().sum(dim=(-2, -1))


def _nearest(queries_RTHD: Tensor, points_RTHD: Tensor, metric: str) -> Tensor:
    """Nearest point of each query, (R, T); some rows at a time, as R x T x T distances are many."""
    pairs = zip(queries_RTHD.flatten(2).split(16), points_RTHD.flatten(2).split(16), strict=True)
    return torch.cat([Flat(metric=metric).fit(points).search(queries, 1)[0].squeeze(-1) for queries, points in pairs])
