"""FlowCache: a step that hardly changed a block's input takes the model's output of the step before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..policy import Answer, ReusePolicy, knob
from ..site import Site

if TYPE_CHECKING:
    from ..run import Run

FEWEST_STEPS = 10
"""Denoising steps below which no step resembles the one before: in few-step checkpoints every one is another."""


@dataclass
class _Kept:
    """Of one guidance branch: what the last step was given, and what the last forward that was made gave."""

    of: tuple[int, int, int | None]  # block, versions of its past, number of its prompt
    step: int
    latents: Tensor
    drift: Tensor  # (B,), since that forward
    output: Any = None


@dataclass(frozen=True)
class FlowCache(ReusePolicy):
    """Add up how far a block's latents move from step to step; while the sum is small, reuse the model's output.

    FlowCache (arXiv 2602.10825): the blocks of a video are at noise levels of their own, so each has a sum of its own,
    where TeaCache has one for the whole video. From step to step it grows by mean |x - x before| / mean |x before|.
    Below `threshold` the forward is not made; else it is, and the sum begins anew. The first steps of a block, its last
    one and the clean pass, which writes its keys, are always computed, and nothing is taken over from a past or a
    prompt that changed. In a batch the video that moved most decides.

    Differences from the authors' code: it compares latents after the patch embedding, a linear map, here before it; it
    adds the residual of all layers to the new input, here the output is reused, which needs nothing of a model's
    inside. Thresholds there: 0.01 and 0.015 for MAGI-1 (64 steps), 0.1 and 0.15 for SkyReels-V2 (50 steps, TeaCache's
    polynomial of the change), both after 5 steps. Its eviction is `RKV`.
    """

    paper: ClassVar[str] = "FlowCache, arXiv 2602.10825"
    summary: ClassVar[str] = "reuses the model's output at steps that hardly changed a block's latents"
    exact: ClassVar[dict[str, Any]] = {"threshold": 0.0}
    least_steps: ClassVar[int] = FEWEST_STEPS

    threshold: float = knob(0.1, "relative change of the latents, added up, below which a step is not computed, >= 0")
    warmup: int = knob(5, "first denoising steps of each block that are always computed, >= 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.threshold >= 0, "threshold is a relative change >= 0", threshold=self.threshold)
        self.require(self.warmup >= 1, "warmup is a number of steps >= 1", warmup=self.warmup)

    def answer(self, site: Site) -> Answer:
        return "together"

    def forward(self, latents: Tensor, site: Site, run: "Run", compute: Callable[[], Any]) -> Any:
        if self.is_exact:
            return compute()
        if site.steps < FEWEST_STEPS:
            raise UnsupportedError(
                f"FlowCache skips steps that resemble the one before, and among fewer than {FEWEST_STEPS} none do; "
                f"got {site.steps}: take FlashBlock, which skips a part of a step, or more steps"
            )
        notes, of = run.scratch("reuse", site.branch), (site.block, run.versions, run.prompt_number)
        kept: _Kept | None = notes.get("kept")
        if kept is None or (kept.of, kept.step + 1, kept.latents.shape) != (of, site.step, latents.shape):
            kept = notes["kept"] = _Kept(of, site.step, latents, latents.new_zeros(len(latents), dtype=torch.float32))
        else:
            kept.drift = kept.drift + change(kept.latents, latents)
            kept.step, kept.latents = site.step, latents
            if self.warmup <= site.step < site.steps - 1:
                most = float(kept.drift.max())
                notes["least"] = min(most, notes.get("least", most))
                if most < self.threshold:
                    run.skip()
                    return kept.output
        kept.drift, kept.output = torch.zeros_like(kept.drift), compute()
        return kept.output

    def bytes_held(self, run: "Run") -> int:
        kept = [notes["kept"] for notes in run.all_scratch("reuse") if "kept" in notes]
        held = [x for one in kept for x in (one.latents, one.output[0]) if x is not None]  # a clean pass may give none
        return sum(x.numel() * x.element_size() for x in held)

    def why_idle(self, run: "Run") -> str:
        least = min((notes["least"] for notes in run.all_scratch("reuse") if "least" in notes), default=None)
        if least is None:
            return f"with warmup={self.warmup} and the last one, all of {run.steps} steps are computed: lower it"
        return (
            f"no step changed its latents by less than {least:.3g}, and threshold={self.threshold} is below: raise it"
        )


def change(before: Tensor, now: Tensor) -> Tensor:
    """Mean |now - before| / mean |before| of each video, (B,) fp32."""
    before, now = before.flatten(1).float(), now.flatten(1).float()
    return (now - before).abs().mean(1) / before.abs().mean(1)
