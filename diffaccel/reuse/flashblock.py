"""FlashBlock: attention outside the block is computed once and reused over steps (arXiv 2602.05305)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..policy import ReusePolicy, knob
from ..site import Site

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class FlashBlock(ReusePolicy):
    """Split softmax at the border of the block; recompute the outside at some steps and reuse it at the others.

    The keys outside the block do not change while it is denoised and its queries change little, so the partial
    attention to them hardly moves from step to step. Step 0 always computes it.

    Differences from the paper: there the clean pass, which writes the block's keys into the cache, reuses as well;
    here it is computed by default, because its error would stay in the cache. The paper refreshes heads by a
    calibrated drift; here refresh steps are fixed and the same for all heads. The paper reuses from the second block
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

    @property
    def is_exact(self) -> bool:
        return self.refresh == 1 and self.clean_pass == "compute"

    def answer(self, site: Site) -> Literal["together", "store", "reuse"]:
        """What to do at this call: read everything together, compute the outside apart and store it, or reuse it."""
        if site.start < self.min_past * site.grid.frames:
            return "together"
        if not self._computes(site.step, site.steps):
            return "reuse"
        last = site.step >= site.steps
        return "together" if last or self._computes(site.step + 1, site.steps) else "store"

    def _computes(self, step: int, steps: int) -> bool:
        if step >= steps:
            return self.clean_pass == "compute"
        if isinstance(self.refresh, int):
            return step % self.refresh == 0
        return step == 0 or step in self.refresh

    def why_idle(self, run: "Run") -> str:
        if run.blocks < 2:
            return "the video has one block, so there is nothing outside it: generate more frames or use smaller blocks"
        if run.longest_past < self.min_past:
            return (
                f"no block had a past of min_past={self.min_past} times its own length, the longest was "
                f"{run.longest_past:.2g} times: generate more frames or lower min_past"
            )
        return f"every one of the {run.steps} steps is a refresh step with refresh={self.refresh!r}: refresh less often"
