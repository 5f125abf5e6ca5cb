"""The skeleton of selectors that let blocks of near queries read blocks of keys: order x rank x lists."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from math import ceil, inf
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..cache.host import HostCache
from ..policy import Policy, Selector, knob
from ..site import Site
from .asked import Asked
from .blocks import Chosen, KeyBlocks, block_for
from .places import keeps_frames

if TYPE_CHECKING:
    from torch import nn

    from ..backbone import Geometry
    from ..cache.entries import Entries
    from ..run import Run


@dataclass(frozen=True)
class Choosing(Selector):
    """Choose blocks of the past for blocks of queries, head by head; a technique says which (`choose`).

    It may say what makes tokens near, so that they share a block (`sorting`, `key_buckets`, `query_buckets`), and for
    how long a choice stands (`stands`). In block-by-block generation only the past is chosen from; the block at work is
    always read. A finished block is put in behind the past, once for all steps of the next. This holds a copy of keys
    and values.
    """

    slot: ClassVar[str] = "selection"
    across_heads: ClassVar[str] = ""
    """Why heads of a layer cannot be asked apart, where they cannot."""

    _: KW_ONLY
    summaries: bool = knob(True, "read the mean of a block in place of a block that is not read")
    min_past: float = knob(4.0, "choose only from a past of at least so many keys a query, >= 0")
    refresh: str = knob(
        "block",
        'when the keys to read are chosen anew: at every "step", or once a "block" (of the video), at the first step '
        "that chooses, which saves the choosing at the others",
        choices=("step", "block"),
    )
    every: int = knob(1, 'with refresh="step": choose at every n-th step, >= 1')
    dense_steps: float = knob(0.3, "share of the denoising steps, the first ones, that read everything, in [0, 1)")
    clean_pass: str = knob("dense", "whether the pass that writes the cache chooses too", choices=("dense", "sparse"))
    sink_frames: int = knob(1, "first latent frames of the video that every query reads")
    recent_frames: int = knob(0, "newest latent frames of the past that every query reads")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.dense_steps < 1, "dense_steps is a share in [0, 1)", dense_steps=self.dense_steps)
        self.require(self.min_past >= 0, "min_past is a number of keys a query >= 0", min_past=self.min_past)
        self.require(isinstance(self.summaries, bool), "summaries is True or False", summaries=self.summaries)
        self.require(
            self.every >= 1 and (self.every == 1 or self.refresh == "step"),
            'every is a number of steps >= 1, and goes with refresh="step"',
            every=self.every,
            refresh=self.refresh,
        )
        self.require_frames("sink_frames")
        self.require_frames("recent_frames")

    # -- what a technique says -------------------------------------------------------------------------------------

    @abstractmethod
    def choose(self, asked: Asked) -> None:
        """Set the lists of `asked.keys`."""

    def take(self, keys: int, free: int, blocks: int, site: Site) -> int:
        """How many of `blocks` blocks, in which `free` of all `keys` entries lie, a query reads. All: it is dense."""
        return 0

    def block(self, free: int) -> int:
        """Tokens of a block of keys, where so many may be chosen."""
        return block_for(free, 24)

    def sorting(self) -> str:
        """What makes tokens near, as in `KeyBlocks`."""
        return "place"

    def resorts(self) -> float:
        """The whole past is sorted anew when it has grown so many times since; inf where content does not sort it."""
        return inf

    def key_buckets(self, entries: "Entries", site: Site) -> Tensor | None:
        """Numbers (B, H, N) by which the entries are sorted; None: they stay as they lie."""
        return None

    def query_buckets(self, q: Tensor, entries: "Entries", site: Site) -> Tensor | None:
        """The same of queries (B, S, H, D), as (B, H, S)."""
        return None

    def whole_frames(self) -> str:
        """Why it can only read whole frames, the same in all layers; "": it reads any entries."""
        return ""

    def stands(self, keys: KeyBlocks, q: Tensor, site: Site) -> bool:
        """Whether what was chosen last is read again."""
        if keys.chosen_at is None or keys.chosen_at[:3] != (site.block, q.shape[1], keys.count):
            return False
        since = site.step - keys.chosen_at[3]
        return 0 < since < self.every if self.refresh == "step" else since >= 0

    # -- the skeleton ----------------------------------------------------------------------------------------------

    def conflict(self, others: Iterable[Policy]) -> str | None:
        for other in others:
            if other.slot == "window":
                return "which keys are near is found among all of them: leave the window out, or lower density instead"
            if other.slot == "cache" and (isinstance(other, HostCache) or getattr(other, "hold", "device") == "host"):
                return "it keeps a sorted copy of the past on the device, which the cache is to keep out of there"
            if self.whole_frames() and other.slot == "cache" and not keeps_frames(other):
                name = type(other).__name__
                return f"{self.whole_frames()}, and {name} keeps parts of frames: use SinkRecent, or no cache"
            if self.across_heads and other.slot == "reuse" and getattr(other, "profile", None) is not None:
                return f"{self.across_heads}, and reuse with a profile asks for some heads apart: give refresh"
        return None

    def refuses_model(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        if self.whole_frames() and any(geometry.coarse_past for geometry, _ in models):
            return f"{self.whole_frames()}, and its older frames have fewer tokens: use AnnSA"
        return None

    def apart(self, site: Site) -> bool:
        """Whether this call chooses; then past and block at work are read apart."""
        if self.is_exact:
            return False
        if site.phase == "clean":
            return self.clean_pass == "sparse"
        return site.step >= ceil(self.dense_steps * site.steps)

    def plan(self, q: Tensor, entries: "Entries", site: Site) -> Chosen | None:
        """What is read of `entries`; None for all: the block at work, and a past too short to choose from."""
        short = site.start > 0 and entries.count < self.min_past * q.shape[1]  # at 0 a whole video reads itself
        if entries.at_work or short or not self.apart(site):
            return None
        keys = self._keys(q, entries, site)
        if keys is None:
            return None
        take = self.take(entries.count, keys.choices * keys.block, keys.choices, site)
        if take == keys.choices:
            return None
        if not self.stands(keys, q, site):
            again = keys.chosen_at is not None and keys.chosen_at[0] == site.block
            blocks = keys.arrange(q, again, self.query_buckets(q, entries, site))
            self.choose(Asked(blocks, q, keys, take, site, entries.lasting))
            keys.chosen_at = (site.block, q.shape[1], keys.count, site.step)
        return None if keys.read == keys.choices else keys.chosen(self.summaries)

    def _keys(self, q: Tensor, entries: "Entries", site: Site) -> KeyBlocks | None:
        """The entries in blocks, what was added since the last call among them; None where they are too few."""
        notes, at = entries.lasting.notes, (entries.lasting.version, entries.count, site.start)
        keys: KeyBlocks | None = notes.get(self)
        if keys is not None and keys.at == at:
            return keys
        always = torch.zeros(entries.count, dtype=torch.bool)
        if entries.frames is not None:
            always |= entries.frames < self.sink_frames
            always |= (entries.frames >= site.start - self.recent_frames) & (entries.frames < site.start)
        free = entries.count - int(always.sum())
        block = self.block(free)
        if free < 2 * block:
            return None
        buckets = self.key_buckets(entries, site)
        was, still = None, self.resorts() == inf
        if keys is not None and keys.block == block and free < self.resorts() * keys.together:
            was = keys.at
        if keys is not None and was is not None and was[0] == at[0]:
            keys.take(entries, always, buckets)
        elif keys is not None and was is not None and was[1:] == at[1:] and (still or self.stands(keys, q, site)):
            keys.refill(entries)
        else:
            keys = notes[self] = KeyBlocks(self.sorting(), block, keys)
            keys.take(entries, always, buckets)
        keys.at = at
        return keys

    def why_idle(self, run: "Run") -> str:
        first = ceil(self.dense_steps * run.steps)
        if first >= run.steps:
            return (
                f"dense_steps={self.dense_steps} reads everything in the first {first} of {run.steps} steps: lower it"
            )
        return (
            f"no past was ever long enough to choose from (min_past={self.min_past} times the block at work, and two "
            f"blocks of 8 tokens beside sink_frames and recent_frames, of which {self._what_leaves_some()} must leave "
            "some out): generate more frames or lower min_past"
        )

    @abstractmethod
    def _what_leaves_some(self) -> str:
        """The knob that says how much is read, with its value."""


@dataclass(frozen=True)
class Ranked(Choosing):
    """Read as many blocks as `density` says, those of the highest `rank`."""

    exact: ClassVar[dict[str, Any]] = {"density": 1.0}
    remembers: ClassVar[str] = ""
    """Why one video of a batch cannot choose anew while the choice of another stands."""

    density: float = knob(0.3, "share of the keys a query reads where it chooses, in (0, 1]")
    _: KW_ONLY
    similarity: float | None = knob(
        None,
        "choose anew within a block of the video when its mean query has less than this cosine to that of then, in "
        "[-1, 1]; None: when refresh says",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.density <= 1, "density is a share in (0, 1]", density=self.density)
        self.require(
            self.similarity is None or (-1 <= self.similarity <= 1 and self.refresh == "block"),
            'similarity is a cosine in [-1, 1], and goes with refresh="block"',
            similarity=self.similarity,
            refresh=self.refresh,
        )
        rule = f"{self.remembers}, so no choice stands by its queries: leave similarity out"
        self.require(self.similarity is None or not self.remembers, rule, similarity=self.similarity)

    @abstractmethod
    def rank(self, asked: Asked) -> Tensor:
        """What each block of keys is worth to each block of queries, (B, H or 1, QB or 1, KB); the order counts."""

    def choose(self, asked: Asked) -> None:
        keys, before = asked.keys, asked.keys.lists
        known = self.similarity is not None and super().stands(keys, asked.given, asked.site) and before is not None
        similar = self._similar(keys, asked.given) if known else None
        rank = self.rank(asked)
        keys.read_best(rank.expand(*asked.q.shape[:3], -1), asked.take, asked.query_block)
        if self.similarity is None:
            return
        mean = _mean(asked.given)
        if similar is not None and before is not None and keys.lists is not None:  # a video goes by its own queries
            keys.lists.lists[similar] = before.lists[similar]
            mean[similar] = keys.kept["query"][similar]
        keys.kept["query"] = mean

    def stands(self, keys: KeyBlocks, q: Tensor, site: Site) -> bool:
        known = super().stands(keys, q, site)
        return known and (self.similarity is None or bool(self._similar(keys, q).all()))

    def _similar(self, keys: KeyBlocks, q: Tensor) -> Tensor:
        """Of which videos what was chosen stands, bool (B,)."""
        assert self.similarity is not None
        return torch.cosine_similarity(_mean(q), keys.kept["query"]) >= self.similarity

    def take(self, keys: int, free: int, blocks: int, site: Site) -> int:
        block = free // blocks
        return min(blocks, max(1, round((self.density * keys - (keys - free)) / block)))

    def block(self, free: int) -> int:
        return block_for(int(self.density * free), 24)

    def _what_leaves_some(self) -> str:
        return f"density={self.density}"


def _mean(q: Tensor) -> Tensor:
    """Over tokens, of all heads, (B, H * D)."""
    return q.mean(1, dtype=torch.float32).flatten(1)
