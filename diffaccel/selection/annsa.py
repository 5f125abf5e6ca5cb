"""AnnSA: queries read the keys near them (FAST-AR, arXiv 2602.01801, section 5.4)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, floor
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..cache.host import HostCache
from ..policy import Policy, Selector, knob
from ..profile import Profile
from ..site import Site
from .blocks import Chosen, KeyBlocks, block_for
from .prompt_buckets import PromptBuckets

if TYPE_CHECKING:
    from torch import nn

    from ..backbone import Geometry
    from ..cache.entries import Entries, Lasting
    from ..run import Run


@dataclass(frozen=True)
class AnnSA(Selector):
    """Sort queries and keys into buckets of near ones, and let each bucket of queries read the keys that matter to it.

    The paper lets a query read the keys that share its bucket. Here buckets are blocks of equal size, as many of which
    are read as `density` says, best first: so what is read is known beforehand, and no bucket is empty or everything.
    Which are best is estimated from the blocks' means and variances, for means of near queries (`blocks.py`).

    With `summaries`, ours, blocks that are not read count as one key each: their mean key and mean value, log(tokens)
    added to the score. On the bundled model's own queries and keys that makes the error four times smaller at equal
    density, for one more key a block (samples/RESULTS.md).

    The paper does so in the layers that are sparse, about 70 % of them. With a `profile`, which `diffaccel calibrate`
    makes, it is done in the `sparse_layers` of them that have the highest recall at this density and step.

    In block-by-block generation only the past is chosen from; the block at work is always read. A finished block is
    sorted in behind the past, once for all steps of the next, and all of it anew whenever it has grown by a quarter
    (`resort`): near keys of blocks far apart then lie together. This holds a sorted copy of keys and values. The first
    `dense_steps` of the steps, which lay the video out, read everything; so does the clean pass, whose error would stay
    in the cache.
    """

    slot: ClassVar[str] = "selection"
    paper: ClassVar[str] = "FAST-AR, arXiv 2602.01801, section 5.4"
    summary: ClassVar[str] = "lets near queries read the keys near them, and a mean in place of the rest"
    exact: ClassVar[dict[str, Any]] = {"density": 1.0}

    density: float = knob(0.3, "share of the keys a query reads where it chooses, in (0, 1]")
    groups: str = knob(
        "kmeans",
        'what makes tokens near: clusters ("kmeans"), signs of projections ("hash"), the prompt token nearest to them '
        'in cross-attention, as in the paper ("prompt"), or their place in the frame ("place")',
        choices=("kmeans", "hash", "prompt", "place"),
    )
    summaries: bool = knob(True, "read the mean of a block in place of a block that is not read")
    min_past: float = knob(4.0, "choose only from a past of at least so many keys a query, >= 0")
    refresh: str = knob(
        "block",
        'when the keys to read are chosen anew: at every "step", or once a "block" (of the video), at the first step '
        "that chooses, which saves the choosing at the others",
        choices=("step", "block"),
    )
    resort: float = knob(
        1.25,
        "sort the whole past anew when it has grown so many times since, not only what is new, >= 1; 1: at every block",
    )
    dense_steps: float = knob(0.3, "share of the denoising steps, the first ones, that read everything, in [0, 1)")
    clean_pass: str = knob("dense", "whether the pass that writes the cache chooses too", choices=("dense", "sparse"))
    sink_frames: int = knob(1, "first latent frames of the video that every query reads")
    recent_frames: int = knob(0, "newest latent frames of the past that every query reads")
    layers: tuple[int, ...] | None = knob(None, "layers that choose, counted from 0; None: all")
    profile: str | None = knob(
        None, "file that diffaccel calibrate wrote for this model; at each step it says which layers choose"
    )
    sparse_layers: float = knob(
        0.7, "share of the layers that choose, those of highest recall in the profile, in (0, 1]; only with a profile"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.density <= 1, "density is a share in (0, 1]", density=self.density)
        self.require(0 <= self.dense_steps < 1, "dense_steps is a share in [0, 1)", dense_steps=self.dense_steps)
        self.require(
            self.layers is None or (len(self.layers) > 0 and min(self.layers) >= 0),
            "layers are numbers of layers >= 0, at least one, or None for all",
            layers=self.layers,
        )
        self.require(
            self.profile is None or self.layers is None,
            "profile and layers both say which layers choose, pass one",
            profile=self.profile,
            layers=self.layers,
        )
        self.require(
            0 < self.sparse_layers <= 1
            and (self.profile is not None or self.sparse_layers == type(self).sparse_layers),
            "sparse_layers is a share in (0, 1], and goes with a profile",
            sparse_layers=self.sparse_layers,
            profile=self.profile,
        )
        found = None if self._profile is None else self._profile.knobs.get("groups")
        self.require(
            found in (None, self.groups),
            f"groups must be {found!r}, as while the profile was measured, or calibrate again",
            groups=self.groups,
        )
        self.require(self.resort >= 1, "resort is a factor >= 1", resort=self.resort)
        self.require(self.min_past >= 0, "min_past is a number of keys a query >= 0", min_past=self.min_past)
        self.require(isinstance(self.summaries, bool), "summaries is True or False", summaries=self.summaries)
        self.require_frames("sink_frames")
        self.require_frames("recent_frames")

    @cached_property
    def _profile(self) -> Profile | None:
        if self.profile is None:
            return None
        return Profile.load(self.profile, "AnnSA", axes=("density", "step"), tables=("recall",))

    def _sparse_at(self, layer: int, step: int, steps: int) -> bool:
        """Whether `layer` is one that chooses at this step."""
        if self._profile is not None:
            return layer in _best_layers(self._profile, self.density, self.sparse_layers, step, steps)
        return self.layers is None or layer in self.layers

    def refuses_model(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        count = sum(geometry.layers for geometry, _ in models)
        if self.groups == "prompt" and not all("cross" in geometry.parts for geometry, _ in models):
            return "groups='prompt' goes by cross-attention, which it has not: use groups='kmeans'"
        if self.layers is not None and max(self.layers) >= count:
            return f"it has the layers 0 to {count - 1}, and layers={self.layers} names {max(self.layers)}"
        return None if self._profile is None else self._profile.mismatch(models)

    def conflict(self, others: "Iterable[Policy]") -> str | None:
        for other in others:
            if other.slot == "window":
                return "which keys are near is found among all of them: leave the window out, or lower density instead"
            if other.slot == "cache" and self.groups == "prompt":
                return (
                    "groups='prompt' goes by the tokens of the past as they were: leave the cache out, or other groups"
                )
            if other.slot == "cache" and (isinstance(other, HostCache) or getattr(other, "hold", "device") == "host"):
                return "it keeps a sorted copy of the past on the device, which the cache is to keep out of there"
        return None

    def apart(self, site: Site) -> bool:
        """Whether this call chooses; then past and block at work are read apart."""
        if self.is_exact or not self._sparse_at(site.layer, site.step, site.steps):
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
        always = entries.count - keys.choices * keys.block
        take = min(keys.choices, max(1, round((self.density * entries.count - always) / keys.block)))
        if take == keys.choices:
            return None
        if not self._stands(keys, q, site):
            again = keys.chosen_at is not None and keys.chosen_at[0] == site.block
            buckets = _buckets(entries.lasting) if self.groups == "prompt" else None
            keys.choose(q, take, again, None if buckets is None else buckets.of_queries(site.block))
            keys.chosen_at = (site.block, q.shape[1], site.step)
        return keys.chosen(self.summaries)

    def see_prompt(self, q: Tensor, prompt: "Entries", site: Site, lasting: "Lasting") -> None:
        soon = site.phase == "clean" or site.step + 1 >= ceil(self.dense_steps * site.steps)
        if self.groups == "prompt" and soon and not self.is_exact:
            _buckets(lasting).see(q, prompt, site)

    def _stands(self, keys: KeyBlocks, q: Tensor, site: Site) -> bool:
        """Whether what was chosen last is read again."""
        if self.refresh == "step" or keys.chosen_at is None:
            return False
        block, queries, step = keys.chosen_at
        return (block, queries) == (site.block, q.shape[1]) and site.step >= step

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
        block = block_for(int(self.density * free), 24)
        if free < 2 * block:
            return None
        buckets = None
        if self.groups == "prompt":
            known = _buckets(entries.lasting)
            buckets = known.of_past(site.start) if site.start else known.of_queries(site.block)
        was = None
        if keys is not None and keys.block == block and free < self.resort * keys.together:
            was = keys.at
        if keys is not None and was is not None and was[0] == at[0]:
            keys.take(entries, always, buckets)
        elif keys is not None and was is not None and was[1:] == at[1:] and self._stands(keys, q, site):
            keys.refill(entries)
        else:
            keys = notes[self] = KeyBlocks(self.groups, block, keys)
            keys.take(entries, always, buckets)
        keys.at = at
        return keys

    def why_idle(self, run: "Run") -> str:
        if self._profile is not None and not _best_layers(self._profile, self.density, self.sparse_layers, 0, 1):
            return f"sparse_layers={self.sparse_layers} of {self._profile.model.layers} layers is none: raise it"
        first = ceil(self.dense_steps * run.steps)
        if first >= run.steps:
            return (
                f"dense_steps={self.dense_steps} reads everything in the first {first} of {run.steps} steps: lower it"
            )
        return (
            f"no past was ever long enough to choose from (min_past={self.min_past} times the block at work, and two "
            f"blocks of 8 tokens beside sink_frames and recent_frames, of which density={self.density} must leave some "
            "out): generate more frames or lower min_past"
        )


@lru_cache(maxsize=4096)
def _best_layers(profile: Profile, density: float, share: float, step: int, steps: int) -> frozenset[int]:
    """The `share` of the layers whose calibrated recall at this density and step, over all heads, is highest."""
    recall = profile.at("recall", density=density, step=profile.place(step, steps)).mean(1)
    return frozenset((-recall).argsort(kind="stable")[: floor(share * len(recall) + 0.5)].tolist())


def _buckets(lasting: "Lasting") -> PromptBuckets:
    found: PromptBuckets = lasting.notes.setdefault("prompt", PromptBuckets())
    return found
