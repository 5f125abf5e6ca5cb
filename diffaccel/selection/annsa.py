"""AnnSA: queries read the keys near them (FAST-AR, arXiv 2602.01801, section 5.4)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, floor
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..policy import Policy, knob
from ..profile import Profile
from ..site import Site
from .asked import Asked
from .prompt_buckets import PromptBuckets
from .ranked import Ranked

if TYPE_CHECKING:
    from torch import nn

    from ..backbone import Geometry
    from ..cache.entries import Entries, Lasting
    from ..run import Run


@dataclass(frozen=True)
class AnnSA(Ranked):
    """Sort queries and keys into buckets of near ones, and let each bucket of queries read the keys that matter to it.

    The paper lets a query read the keys that share its bucket. Here buckets are blocks of equal size, as many of which
    are read as `density` says, best first: so what is read is known beforehand, and no bucket is empty or everything.
    Which are best is estimated from the blocks' means and variances, for means of near queries (`asked.py`).

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

    paper: ClassVar[str] = "FAST-AR, arXiv 2602.01801, section 5.4"
    summary: ClassVar[str] = "lets near queries read the keys near them, and a mean in place of the rest"

    groups: str = knob(
        "kmeans",
        'what makes tokens near: clusters ("kmeans"), signs of projections ("hash"), the prompt token nearest to them '
        'in cross-attention, as in the paper ("prompt"), or their place in the frame ("place")',
        choices=("kmeans", "hash", "prompt", "place"),
    )
    resort: float = knob(
        1.25,
        "sort the whole past anew when it has grown so many times since, not only what is new, >= 1; 1: at every block",
    )
    layers: tuple[int, ...] | None = knob(None, "layers that choose, counted from 0; None: all")
    profile: str | None = knob(
        None, "file that diffaccel calibrate wrote for this model; at each step it says which layers choose"
    )
    sparse_layers: float = knob(
        0.7, "share of the layers that choose, those of highest recall in the profile, in (0, 1]; only with a profile"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.groups == "prompt" and any(geometry.coarse_past for geometry, _ in models):
            return "groups='prompt' goes by the tokens of the past as they were, and it makes them anew: use 'kmeans'"
        if self.layers is not None and max(self.layers) >= count:
            return f"it has the layers 0 to {count - 1}, and layers={self.layers} names {max(self.layers)}"
        return None if self._profile is None else self._profile.mismatch(models)

    def conflict(self, others: "Iterable[Policy]") -> str | None:
        others = tuple(others)
        if self.groups == "prompt" and any(other.slot == "cache" for other in others):
            return "groups='prompt' goes by the tokens of the past as they were: leave the cache out, or other groups"
        return super().conflict(others)

    def apart(self, site: Site) -> bool:
        """Whether this call chooses; then past and block at work are read apart."""
        return super().apart(site) and self._sparse_at(site.layer, site.step, site.steps)

    def sorting(self) -> str:
        return self.groups

    def resorts(self) -> float:
        return self.resort

    def rank(self, asked: Asked) -> Tensor:
        return asked.mass()

    def key_buckets(self, entries: "Entries", site: Site) -> Tensor | None:
        if self.groups != "prompt":
            return None
        known = _buckets(entries.lasting)
        return known.of_past(site.start) if site.start else known.of_queries(site.block)

    def query_buckets(self, q: Tensor, entries: "Entries", site: Site) -> Tensor | None:
        return None if self.groups != "prompt" else _buckets(entries.lasting).of_queries(site.block)

    def see_prompt(self, q: Tensor, prompt: "Entries", site: Site, lasting: "Lasting") -> None:
        soon = site.phase == "clean" or site.step + 1 >= ceil(self.dense_steps * site.steps)
        if self.groups == "prompt" and soon and not self.is_exact:
            _buckets(lasting).see(q, prompt, site)

    def why_idle(self, run: "Run") -> str:
        if self._profile is not None and not _best_layers(self._profile, self.density, self.sparse_layers, 0, 1):
            return f"sparse_layers={self.sparse_layers} of {self._profile.model.layers} layers is none: raise it"
        return super().why_idle(run)


@lru_cache(maxsize=4096)
def _best_layers(profile: Profile, density: float, share: float, step: int, steps: int) -> frozenset[int]:
    """The `share` of the layers whose calibrated recall at this density and step, over all heads, is highest."""
    recall = profile.at("recall", density=density, step=profile.place(step, steps)).mean(1)
    return frozenset((-recall).argsort(kind="stable")[: floor(share * len(recall) + 0.5)].tolist())


def _buckets(lasting: "Lasting") -> PromptBuckets:
    found: PromptBuckets = lasting.notes.setdefault("prompt", PromptBuckets())
    return found
