"""`tune` on a pipeline: its measurements, and the finalists' own, from which the setting to keep is chosen."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import backbone
from ..accel import Accel
from ..compare import run_arm, run_briefly
from ..quality import compare_clips
from .arms import Arm, Setup, cache_bytes, peak_bytes
from .frontier import run_frontier
from .goal import Final, Goal, best, final_of
from .measure import Measures
from .runs import Progress, Unit, UnitRun
from .space import Space
from .speed import summarize_speed
from .store import Store, differing
from .summary import summarize
from .tune import ROUNDS, Candidate


def space_of(setup: Setup, goal: Goal, fixed: Sequence[str]) -> Space:
    """What can be chosen for the pipeline and the length of its videos."""
    pipe, frames = setup.pipe, setup.argument("num_frames")
    family, denoisers = backbone.find(pipe)
    return Space(
        layers=sum(family.geometry(denoiser).layers for denoiser in denoisers),
        frames=1 + (frames - 1) // pipe.vae_scale_factor_temporal,
        block=pipe.config.frames_per_block if setup.causal else 1,
        causal=setup.causal,
        memory=goal.kind == "memory",
        cuda=setup.device.type == "cuda",
        fixed=tuple(fixed),
    )


class Generations:
    """Measures settings by generating: with shared history on a causal pipeline, freely on another; alternating with
    dense for its time. Dense videos are made once and lie in the folder of the setup, for the finalists as well."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.way = "shared_history" if setup.causal else "free_running"
        self.units: dict[int, UnitRun] = {}
        self.warm: set[Accel] = set()

    def quality(self, accel: Accel, prompt: int) -> dict[str, Any]:
        setup, unit = self.setup, self._unit(prompt)
        made = run_arm(setup.pipe, self.way, accel, unit.unit.seed, unit.arguments, unit.latents)
        scores = compare_clips(unit.reference.dense, made.frames)
        held = peak_bytes(setup.device, made.report)
        return {
            "psnr": None if scores.identical else float(scores.psnr_pooled),
            "bytes": cache_bytes(made.report) if held is None else held,
            "idle": made.idle,
        }

    def timing(self, accel: Accel, number: int) -> dict[str, Any]:
        setup = self.setup
        arguments = {**setup.arguments, "prompt": setup.prompts[0]}
        cold = [one for one in (setup.dense, accel) if one not in self.warm]
        run_briefly(setup.pipe, cold, setup.seeds[0], arguments)
        self.warm.update(cold)
        return {"dense": self._denoise(setup.dense, arguments), "arm": self._denoise(accel, arguments)}

    def _denoise(self, accel: Accel, arguments: dict[str, Any]) -> float:
        """Seconds of one generation that is not decoded."""
        run = accel.apply(self.setup.pipe)
        try:
            generator = torch.Generator().manual_seed(self.setup.seeds[0])
            self.setup.pipe(**arguments, generator=generator, output_type="latent")
            seconds = run.report().seconds["denoise"]
            assert seconds is not None  # denoising is always timed
            return seconds
        finally:
            run.remove(check=False)  # what never engaged is said of its quality

    def _unit(self, prompt: int) -> UnitRun:
        if prompt not in self.units:
            unit = Unit(prompt, self.setup.prompts[prompt], self.setup.seeds[0])
            self.units[prompt] = UnitRun(self.setup, Measures(), unit)
        return self.units[prompt]


def generations_kept(prompts: int, finalists: int) -> int:
    """How many generations `measure_finalists` makes, about."""
    return prompts * (3 + 2 * finalists) + ROUNDS * (1 + finalists)


def measure_finalists(
    setup: Setup, finalists: Sequence[Candidate], measures: Measures, progress: Progress
) -> list[tuple[Candidate, Final]]:
    """Measure settings anew, as `eval frontier` does, into the folder of `setup`, and give what was found.

    A folder that has other finalists, of a shorter search, is written anew.
    """
    given = {f"tuned-{number + 1}": candidate for number, candidate in enumerate(finalists)}
    arms = {
        name: Arm(one.accel, "exact", dict(change.split("=", 1) for change in one.changes))
        for name, one in given.items()
    }
    setup = replace(setup, arms=arms)
    held = Store(setup.out).asked("frontier")
    asked = {**setup.asked("frontier"), "measures": measures.to_dict()}
    restart = held is not None and differing(asked, held) == ["arms"]
    points = run_frontier(setup, measures, rounds=ROUNDS, timing=False, restart=restart, progress=progress)
    store = Store(setup.out)
    (speed,) = summarize_speed(store.rows("throughput"))["lengths"].values()
    found, way = summarize(store.rows("quality"))["arms"], "shared_history" if setup.causal else "free_running"
    return [
        (given[name], final_of(point, way, speed, found[name][way]["identical"] == found[name][way]["rows"]))
        for name, point in ((point["arm"], point) for point in points if point["arm"] in given)
    ]


def chosen(goal: Goal, measured: Sequence[tuple[Candidate, Final]]) -> tuple[Candidate, Final] | None:
    """The finalist to keep with its figures, or None."""
    kept = best(goal, [final for _, final in measured])
    return None if kept is None else next(pair for pair in measured if pair[1] is kept)
