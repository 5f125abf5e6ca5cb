"""FlashBlock: attention outside the block is computed once and reused over steps (arXiv 2602.05305)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from ..policy import Answer, Policy, ReusePolicy, knob
from ..profile import Profile
from ..site import Site
from .schedule import Schedule, by_share, by_thresholds

if TYPE_CHECKING:
    from torch import nn

    from ..backbone import Geometry
    from ..run import Run

TABLES = ("cos", "lse", "error")


@dataclass(frozen=True)
class FlashBlock(ReusePolicy):
    """Split softmax at the border of the block; recompute the outside at some steps and reuse it at the others.

    The keys outside the block do not change while it is denoised and its queries change little, so the partial
    attention to them hardly moves from step to step. Step 0 always computes it.

    When it is computed: at fixed steps for all heads (`refresh`); or, with a `profile` that `diffaccel calibrate
    --method flashblock` makes, head by head: where a head's outside moved, by the paper's thresholds on cosine and
    log-sum-exp; or at a `share` of all heads' steps, those for which the calibrated drift is least in total, which is
    ours. `extrapolate`, ours too, continues what the last two computations of a head show, damped.

    With `residual` and a selection beside it, what is selected is computed at every step, and what is not selected is
    reused (the paper's Table 2); otherwise what is selected is what is reused.

    Differences from the paper: there the clean pass, which writes the block's keys into the cache, reuses as well;
    here it is computed by default, because its error would stay in the cache. The paper reuses from the second block
    on; here the past must be `min_past` times as long as the block, because a short past moves most and saves least.
    """

    paper: ClassVar[str] = "FlashBlock, arXiv 2602.05305, section 3"
    summary: ClassVar[str] = "computes attention to earlier blocks at some denoising steps and reuses it at the others"
    exact: ClassVar[dict[str, Any]] = {"refresh": 1}

    refresh: int | tuple[int, ...] = knob(3, "n: recompute the outside every n-th step; a tuple: at those steps")
    clean_pass: str = knob(
        "compute", "what the pass that writes the cache does with the outside", choices=("compute", "reuse")
    )
    min_past: float = knob(2.0, "reuse only where the past has at least this many times the block's frames, >= 0")
    extrapolate: float = knob(0.0, "how far to follow what the last two computations show, in [0, 1]; 0: reuse as is")
    residual: bool = knob(False, "with a selection: compute what it selects at every step, reuse the rest")
    profile: str | None = knob(
        None, "file that diffaccel calibrate wrote for this model: heads are refreshed one by one, not at fixed steps"
    )
    share: float | None = knob(None, "share of the heads' steps to compute, where drift is largest; with a profile")
    cos: float | tuple[float, ...] = knob(
        0.85, "a head is refreshed below this cosine since it last was; a tuple: at steps 1, 2, ...; with a profile"
    )
    lse: float = knob(0.05, "a head is refreshed if its log-sum-exp moved further than this; with a profile")

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = (self.refresh,) if isinstance(self.refresh, int) else self.refresh
        lowest = 1 if isinstance(self.refresh, int) else 0
        self.require(
            len(steps) > 0 and all(isinstance(step, int) and step >= lowest for step in steps),
            "refresh is a number of steps >= 1, or the steps (counted from 0) at which to compute",
            refresh=self.refresh,
        )
        self.require(self.min_past >= 0, "min_past is a ratio >= 0", min_past=self.min_past)
        self.require(0 <= self.extrapolate <= 1, "extrapolate is a damping in [0, 1]", extrapolate=self.extrapolate)
        self.require(isinstance(self.residual, bool), "residual is True or False", residual=self.residual)
        cosines = self.cos if isinstance(self.cos, tuple) else (self.cos,)
        self.require(
            len(cosines) > 0 and all(-1 <= cos <= 1 for cos in cosines), "cos is a cosine in [-1, 1]", cos=self.cos
        )
        self.require(self.lse >= 0, "lse is a distance >= 0", lse=self.lse)
        self.require(self.share is None or 0 < self.share <= 1, "share is in (0, 1]", share=self.share)
        defaults = self.defaults()
        for name in ("share", "cos", "lse"):
            self.require(
                self.profile is not None or getattr(self, name) == defaults[name],
                f"{name} goes with a profile, which tells heads apart: make one with diffaccel calibrate",
                **{name: getattr(self, name)},
            )
        self.require(
            self.share is None or (self.cos, self.lse) == (defaults["cos"], defaults["lse"]),
            "share and thresholds (cos, lse) are two rules, pass one",
            share=self.share,
            cos=self.cos,
            lse=self.lse,
        )
        self.require(
            self.profile is None or self.refresh == defaults["refresh"],
            "refresh and profile both say when heads are refreshed, pass one",
            refresh=self.refresh,
            profile=self.profile,
        )
        _ = self._profile  # a file that is no profile is refused now

    @cached_property
    def _profile(self) -> Profile | None:
        if self.profile is None:
            return None
        return Profile.load(self.profile, "FlashBlock", axes=("step", "gap"), tables=TABLES)

    @property
    def is_exact(self) -> bool:
        return self.refresh == 1 and self.profile is None and self.clean_pass == "compute"

    def refuses_model(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        return None if self._profile is None else self._profile.mismatch(models)

    def conflict(self, others: "Iterable[Policy]") -> str | None:
        others = list(others)
        selections = [other for other in others if other.slot == "selection"]
        per_head = [other for other in others if getattr(other, "heads", "") == "per_head"]
        if self.profile is not None and (selections or per_head):
            with_it = (selections or per_head)[0]
            return f"a profile refreshes single heads, and {type(with_it).__name__} holds all in one: use refresh"
        if not self.residual:
            return None
        if not selections:
            return "residual reuses what a selection leaves out, and there is no selection"
        if getattr(selections[0], "summaries", False):
            return "residual reuses what means would stand for: set selection.summaries=False"
        return None

    def answer(self, site: Site) -> Answer:
        """What to do at this call: read everything together, compute the outside apart and store it, compute some
        heads and reuse the others, or reuse it."""
        if site.start < self.min_past * site.grid.frames:
            return "together"
        if self._profile is not None:
            heads = self._heads(site.layer, site.step, site.steps)
            return heads if len(heads) < self._profile.model.heads else "store"
        if not self._computes(site.step, site.steps):
            return "reuse"
        last = site.step >= site.steps
        return "together" if last or (self._computes(site.step + 1, site.steps) and not self.extrapolate) else "store"

    def _computes(self, step: int, steps: int) -> bool:
        if step >= steps:
            return self.clean_pass == "compute"
        if isinstance(self.refresh, int):
            return step % self.refresh == 0
        return step == 0 or step in self.refresh

    def _heads(self, layer: int, step: int, steps: int) -> tuple[int, ...]:
        """Heads that are computed."""
        assert self._profile is not None
        if step >= steps and self.clean_pass == "compute":
            return tuple(range(self._profile.model.heads))
        cosines = self.cos if isinstance(self.cos, tuple) else (self.cos,)
        schedule = _schedule(self._profile, steps, self.share, cosines, self.lse)
        return tuple(schedule[step, layer].nonzero()[0].tolist())

    def why_idle(self, run: "Run") -> str:
        if run.blocks < 2:
            return "the video has one block, so there is nothing outside it: generate more frames or use smaller blocks"
        if run.longest_past < self.min_past:
            return (
                f"no block had a past of min_past={self.min_past} times its own length, the longest was "
                f"{run.longest_past:.2g} times: generate more frames or lower min_past"
            )
        if self.profile is not None:
            return f"every head is refreshed at every one of the {run.steps} steps: lower share or cos, or raise lse"
        return f"every one of the {run.steps} steps is a refresh step with refresh={self.refresh!r}: refresh less often"


@lru_cache(maxsize=64)
def _schedule(profile: Profile, steps: int, share: float | None, cos: tuple[float, ...], lse: float) -> Schedule:
    return by_thresholds(profile, steps, cos, lse) if share is None else by_share(profile, steps, share)
