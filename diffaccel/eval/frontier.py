"""Many settings of one preset: what each costs in quality and gains in time and memory, with dense attention beside."""

import itertools
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..preset_file import given_preset
from ..ranks import Ranks
from ..settings import UsageError, build_accel
from .arms import Arm, Setup
from .measure import Measures
from .runs import Progress, run_quality
from .speed import PARTS, run_throughput, summarize_speed
from .store import Store
from .summary import summarize


def parse_sweep(text: str) -> tuple[str, list[str]]:
    """`slot.knob=A,B,C` as the knob and its values; values that hold commas themselves are parted by semicolons."""
    knob, equals, values = (part.strip() for part in text.partition("="))
    found = [value.strip() for value in values.split(";" if ";" in values else ",") if value.strip()]
    if not (knob and equals and found):
        raise UsageError(f"--sweep takes slot.knob=VALUE,VALUE,..., such as cache.threshold=0.8,0.9, got '{text}'")
    twice = [value for value in found if found.count(value) > 1]
    if twice:
        raise UsageError(f"--sweep {knob} has the value {twice[0]} twice; leave one out")
    return knob, found


def sweep_arms(
    preset: str, changes: Sequence[str], sweeps: Mapping[str, Sequence[str]], most: int | None = None, seed: int = 0
) -> dict[str, Arm]:
    """An arm for each point of the grid, named by what is swept; `most` of them, drawn by `seed`, if there are more.

    `preset` is a name or a file. Raises `UsageError` or `KnobError` for a point that is no setting.
    """
    if not sweeps:
        raise UsageError("a frontier needs something to sweep; add --sweep slot.knob=VALUE,VALUE")
    if most is not None and most < 1:
        raise UsageError(f"--max-points must be at least 1, got {most}")
    grid = list(itertools.product(*([(knob, value) for value in values] for knob, values in sweeps.items())))
    if most is not None and len(grid) > most:
        grid = [grid[index] for index in sorted(random.Random(seed).sample(range(len(grid)), most))]
    arms, start = {}, given_preset(preset)
    for point in grid:
        swept = [f"{knob}={value}" for knob, value in point]
        asked = dict(change.split("=", 1) for change in changes) | dict(point)
        arms[" ".join(swept)] = Arm(build_accel(start, [*changes, *swept]), preset, asked)
    return arms


def run_frontier(
    setup: Setup,
    measures: Measures,
    *,
    rounds: int = 2,
    timing: bool = True,
    restart: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Quality of every arm over all prompts and seeds, then its time, alternating; rows of `frontier.jsonl`.

    Goes on where it was stopped. Processes that share the work share the quality; the first one times.
    """
    progress, ranks = progress or Progress(), ranks or Ranks()
    rows = run_quality(setup, measures, what="frontier", restart=restart, progress=progress, ranks=ranks)
    if ranks.main:
        run_throughput(
            setup, [setup.argument("num_frames")], rounds, measures=measures, timing=timing, progress=progress
        )
    ranks.wait()
    store = Store(setup.out)
    points = frontier_points(rows, store.rows("throughput"), setup)
    if ranks.main:
        _write(setup.out / "frontier.jsonl", points)
    return points


def frontier_points(
    quality: Sequence[dict[str, Any]], throughput: Sequence[dict[str, Any]], setup: Setup
) -> list[dict[str, Any]]:
    """One point an arm: mean `quality` of every way, and median `speed`. Dense has the noise floor and another seed."""
    found = summarize(quality)["arms"]
    (timed,) = summarize_speed(throughput)["lengths"].values()
    points = []
    for name, speed in timed.items():
        arm = setup.arms[name].to_dict() if name in setup.arms else Arm(setup.dense).to_dict()
        seconds = {part: speed["seconds"][part] and speed["seconds"][part]["median"] for part in PARTS}
        points.append(
            {
                "key": name,
                "arm": name,
                "set": arm["set"],
                "slots": arm["slots"],
                "quality": {way: group["mean"] for way, group in found[name].items()},
                "worst": {way: group["worst"] for way, group in found[name].items()},
                "speed": {"seconds": seconds, "fps": speed["fps"], "speedup": speed.get("speedup")},
                "peak_bytes": speed["peak_bytes"],
                "cache_bytes": speed["cache_bytes"],
            }
        )
    return points


def way_shown(points: Sequence[dict[str, Any]]) -> str:
    """The way whose quality is plotted: with shared history where it was measured, since that is not chaotic."""
    return "shared_history" if all("shared_history" in p["quality"] for p in points if p["arm"] != "dense") else (
        "free_running"
    )  # fmt: skip


def memory(point: Mapping[str, Any]) -> int | None:
    """Peak memory on a GPU, else what the caches held."""
    return point["peak_bytes"] if point["peak_bytes"] is not None else point["cache_bytes"]


def pareto(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Which of (cost, quality) no other point beats in one and equals or beats in the other; None is never one."""

    def beaten(cost: float, quality: float) -> bool:
        return any(
            other[0] <= cost and other[1] >= quality and (other[0] < cost or other[1] > quality)
            for other in points
            if other is not None
        )

    return [point is not None and not beaten(*point) for point in points]


def marked(points: Sequence[dict[str, Any]], metric: str = "psnr_pooled") -> dict[str, list[bool]]:
    """Which arms are Pareto settings in "time" (end to end) and in "memory". Dense is one of them by definition, and
    beats what costs more than it does.

    A quality that is None because the clips are identical counts as the best there is.
    """
    way = way_shown(points)

    def against(cost: float | None, point: dict[str, Any]) -> tuple[float, float] | None:
        if cost is None:
            return None
        value = None if point["arm"] == "dense" else point["quality"][way][metric]
        return cost, float("inf") if value is None else value

    return {
        "time": pareto([against(point["speed"]["seconds"]["total"], point) for point in points]),
        "memory": pareto([against(memory(point), point) for point in points]),
    }


def _write(file: Path, points: Sequence[dict[str, Any]]) -> None:
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    partial.write_text("".join(json.dumps(point, allow_nan=False) + "\n" for point in points), "utf-8")
    os.replace(partial, file)


def plot(points: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw PSNR to dense against end-to-end seconds and against memory, with Pareto settings joined.

    What dense costs is a line across, as is another seed's PSNR. Raises `PlotError` without matplotlib.
    """
    from ..plots import check_plots

    check_plots()
    from matplotlib.figure import Figure

    way, chosen = way_shown(points), marked(points)
    figure = Figure(figsize=(12, 5), layout="constrained")
    arms = [point for point in points if point["arm"] != "dense"]
    dense = next(point for point in points if point["arm"] == "dense")
    peak = dense["peak_bytes"] is not None
    panels = {
        "time": ("end to end, s (median)", lambda point: point["speed"]["seconds"]["total"]),
        "memory": (
            f"{'peak memory' if peak else 'held by the caches'}, MiB",
            lambda point: None if (held := memory(point)) is None else held / 2**20,
        ),
    }
    for axis, (name, (label, cost)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        best = {point["arm"] for point, is_best in zip(points, chosen[name], strict=True) if is_best}
        shown = [
            (cost(p), p["quality"][way]["psnr_pooled"], p["arm"])
            for p in arms
            if cost(p) is not None and p["quality"][way]["psnr_pooled"] is not None
        ]
        others = [s for s in shown if s[2] not in best]
        axis.plot([s[0] for s in others], [s[1] for s in others], "o", color="0.6", label="others")
        line, middle = sorted(s for s in shown if s[2] in best), float(np.mean([s[0] for s in shown] or [0]))
        axis.plot([s[0] for s in line], [s[1] for s in line], "o-", color="C0", label="Pareto settings")
        for x, y, text in line:
            side = "left" if x < middle else "right"
            name, at = text.replace(" ", "\n"), (5 if side == "left" else -5, 5)
            axis.annotate(name, (x, y), fontsize=7, xytext=at, textcoords="offset points", ha=side)
        floor, other = (dense["quality"][w]["psnr_pooled"] for w in ("noise_floor", "other_seed"))
        if cost(dense) is not None:  # a line, as its own noise floor may lie far above everything else
            floor_said = "" if floor is None else f", noise floor {floor:.1f} dB"
            axis.axvline(cost(dense), color="C1", label=f"dense{floor_said}")
        if other is not None:
            axis.axhline(other, linestyle="--", color="0.5", label="another seed")
        axis.set(xlabel=label, ylabel=f"PSNR to dense, dB ({way.replace('_', ' ')})")
        axis.margins(0.12)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path
