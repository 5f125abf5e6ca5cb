"""Quality: every arm against dense attention, on the same noise, one row a generation."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..accel import Accel
from ..compare import ARMS, Made, chunk_starts, decode, run_arm, run_briefly
from ..ranks import Ranks
from ..video import to_uint8, write_video
from .arms import Arm, Setup, cache_bytes, file_name, peak_bytes
from .measure import Measures, Reference
from .store import Store, ignore

DEFAULT_PROMPT = "a large red circle moves left over a teal checkerboard"
"""What is shown where no prompt was given, in the words of the bundled model."""

DENSE_WAYS = ("noise_floor", "other_seed")
"""Generations of dense attention that are the scale for the others."""


@dataclass(frozen=True)
class Unit:
    """One prompt and one seed: what shares a dense video."""

    prompt: int
    text: str
    seed: int

    @property
    def name(self) -> str:
        return f"p{self.prompt:03d}-s{self.seed}"


@dataclass
class Progress:
    """What is told while it runs: `arm(label, done, total)` before a generation, `note(sentence)`."""

    arm: Callable[[str, int, int], None] = lambda label, done, total: None
    note: Callable[[str], None] = ignore


def quality(
    pipe: Any,
    arms: Mapping[str, Arm | Accel],
    out: str | Path,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    measures: Measures | None = None,
    model: str = "",
    command: str = "",
    fps: float = 16.0,
    restart: bool = False,
    progress: Progress | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Measure each arm on each prompt and seed against the dense video of the same noise; rows go into `out`.

    Four ways, as in `diffaccel.compare`: free-running, with shared history (causal pipelines), the noise floor and
    another seed. A run that was stopped or killed goes on where it was when it is asked again.

    Args:
        pipe: a pipeline `Accel` can take, not accelerated now.
        arms: settings by name.
        out: folder for rows, videos and the dense runs' latents; made where it is not there.
        prompts, seeds: every prompt with every seed, each once.
        measures: LPIPS and the judge of text; by default neither, and the rows say so.
        model, command: noted in `asked.json`.
        fps: of the videos.
        restart: throw away what the folder holds.
        arguments: of the pipeline's call: `height`, `width`, `num_frames`, `num_inference_steps`, ...

    Returns:
        All rows of the folder, in the order of their keys.

    Raises:
        EvalError: the folder holds results of something else, or the arms cannot be evaluated together.
        UnsupportedError: the pipeline cannot take an arm.
    """
    wrapped = {name: arm if isinstance(arm, Arm) else Arm(arm) for name, arm in arms.items()}
    setup = Setup(pipe, wrapped, Path(out), list(prompts), list(seeds), arguments, model, command, fps)
    return run_quality(setup, measures or Measures(), restart=restart, progress=progress or Progress())


def run_quality(
    setup: Setup,
    measures: Measures,
    *,
    what: str = "quality",
    restart: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """`quality` of a setup, which several processes may share; `what` is noted in `asked.json`."""
    progress, ranks = progress or Progress(), ranks or Ranks()
    for asked in setup.arms.values():
        asked.accel.apply(setup.pipe).remove(check=False)  # refused before anything is computed
    store = Store(setup.out, ranks.rank, progress.note)
    if ranks.main:
        store.ask({**setup.asked(what), "measures": measures.to_dict()}, restart=restart)
        store.sweep()
    ranks.wait()
    done = {row["key"] for row in store.rows("quality")}
    units = [
        Unit(number, text, seed) for number, text in enumerate(setup.prompts) for seed in setup.seeds
    ]  # fmt: skip
    missing = {unit: [todo for todo in _generations(setup) if _key(unit, *todo) not in done] for unit in units}
    ranks.wait()  # all have read before any writes
    mine = ranks.share([unit for unit in units if missing[unit]])
    total, number = sum(len(missing[unit]) for unit in mine), 0
    if mine:
        progress.arm("warming up", 0, total)
        text = {**setup.arguments, "prompt": mine[0].text}
        run_briefly(setup.pipe, [setup.dense, *(arm.accel for arm in setup.arms.values())], mine[0].seed, text)
    for unit in mine:
        progress.arm(f"{unit.name} dense", number, total)
        one = UnitRun(setup, measures, unit)
        for arm, way in missing[unit]:
            progress.arm(
                f"{unit.name} {arm}: {ARMS[way]}" if arm != "dense" else f"{unit.name} {ARMS[way]}", number, total
            )
            store.append("quality", {"key": _key(unit, arm, way), **one.row(arm, way)})
            number += 1
    ranks.wait()
    if ranks.main:
        store.merge("quality")
    ranks.wait()
    return store.rows("quality")


def _generations(setup: Setup) -> Iterator[tuple[str, str]]:
    """Arm and way of every row of one prompt and seed."""
    for arm in setup.arms:
        yield arm, "free_running"
        if setup.causal:
            yield arm, "shared_history"
    for way in DENSE_WAYS:
        yield "dense", way


def _key(unit: Unit, arm: str, way: str) -> str:
    return f"{unit.name} {arm} {way}"


class UnitRun:
    """One prompt and seed: its dense video, and rows of others against it."""

    def __init__(self, setup: Setup, measures: Measures, unit: Unit) -> None:
        self.setup, self.unit = setup, unit
        self.folder = setup.out / "videos" / unit.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.arguments = {**setup.arguments, "prompt": unit.text}
        self.latents, self.seconds, frames = self._dense()
        borders = chunk_starts(setup.pipe, frames, self.arguments)
        self.reference: Reference = measures.against(frames, borders, unit.text)

    def _dense(self) -> tuple[torch.Tensor, dict[str, Any], Any]:
        """Latents, seconds and frames of the dense run: from the last time if it got that far, else anew."""
        file = self.setup.out / "latents" / f"{self.unit.name}.pt"
        video = self.folder / "dense.mp4"
        if file.is_file() and video.is_file():
            held = torch.load(file, map_location=self.setup.device, weights_only=True)
            return held["latents"], held["seconds"], decode(self.setup.pipe, held["latents"])
        made = run_arm(self.setup.pipe, "dense", self.setup.dense, self.unit.seed, self.arguments)
        write_video(video, made.frames, self.setup.fps)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
        torch.save({"latents": made.latents.cpu(), "seconds": made.report.seconds}, partial)
        os.replace(partial, file)
        return made.latents, made.report.seconds, made.frames

    def row(self, arm: str, way: str) -> dict[str, Any]:
        """Generate and measure; the video is written first, so that a row's always exists."""
        setup, unit = self.setup, self.unit
        accel = setup.dense if arm == "dense" else setup.arms[arm].accel
        seed = unit.seed + 1 if way == "other_seed" else unit.seed
        made: Made = run_arm(setup.pipe, way, accel, seed, self.arguments, self.latents)
        file = self.folder / (f"{way}.mp4" if arm == "dense" else f"{file_name(arm)}-{way}.mp4")
        write_video(file, to_uint8(made.frames), setup.fps)
        scored, report = self.reference.score(made.frames), made.report.to_dict()
        return {
            "prompt": unit.prompt,
            "text": unit.text,
            "seed": unit.seed,
            "arm": arm,
            "way": way,
            **vars(scored),
            "seconds": report["seconds"],
            "dense_seconds": self.seconds,
            "peak_bytes": peak_bytes(setup.device, made.report),
            "cache_bytes": cache_bytes(made.report),
            "idle": made.idle,
            **{name: report[name] for name in ("slots", "kernel", "cache", "blocks", "layers")},
            "video": str(file.relative_to(setup.out)),
            "dense": str((self.folder / "dense.mp4").relative_to(setup.out)),
        }
