"""Throughput: frames a second and memory of every arm against the length of the video, dense attention beside."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from ..compare import run_arm, run_briefly
from .arms import Setup, cache_bytes, peak_bytes
from .measure import Measures
from .runs import Progress, run_quality
from .store import EvalError, Store, differing

PARTS = {"attention": "attention", "denoise": "denoising", "decode": "decoding", "total": "end to end"}
"""Parts of a generation's seconds, and what they are called."""


def run_throughput(
    setup: Setup,
    frames: Sequence[int],
    rounds: int,
    *,
    measures: Measures | None = None,
    timing: bool = True,
    restart: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time every arm and dense attention at every length, alternating, and give all rows of `throughput.jsonl`.

    The first prompt and seed are generated `rounds` times at each of `frames`, after short generations that are not
    timed. A speed without what it costs is not given: where the folder has no quality, that of the first prompt is
    measured at the greatest length. `timing` off leaves attention untimed.

    Raises `EvalError` where the folder's quality is that of something else, or was not measured for an arm.
    """
    progress, lengths = progress or Progress(), sorted(set(frames))
    if not lengths or rounds < 1:
        raise EvalError(f"throughput needs at least one length and one round, got {len(lengths)} and {rounds}")
    store = Store(setup.out, note=progress.note)
    if restart:
        store.clear()
    one = replace(setup, prompts=setup.prompts[:1], seeds=setup.seeds[:1])
    _ensure_quality(one, lengths[-1], store, measures or Measures(), progress)
    asked = {**one.asked("throughput"), "frames": lengths[0], "lengths": lengths, "rounds": rounds}
    store.ask(asked)
    _time(one, lengths, rounds, timing, store, progress)
    return store.rows("throughput")


def _ensure_quality(setup: Setup, frames: int, store: Store, measures: Measures, progress: Progress) -> None:
    """Rows of quality for every arm of the setup: those of the folder, or new ones of one prompt."""
    held = store.asked("quality") or store.asked("frontier")
    one = replace(setup, arguments={**setup.arguments, "num_frames": frames})
    here = {**one.asked("quality"), "measures": measures.to_dict()}
    if held is None or not differing(here, held):
        what = "quality" if held is None else held["what"]
        run_quality(one, measures, what=what, progress=progress)  # begins it, or goes on with it
        return
    differ = [name for name in ("model", "size", "steps", "guidance") if here[name] != held[name]]
    differ += [
        name
        for name, arm in here["arms"].items()
        if any(held["arms"].get(name, arm)[part] != arm[part] for part in ("slots", "kernel"))
    ]
    if differ:
        raise EvalError(
            f"the quality in '{store.folder}' is that of something else ({', '.join(differ)} differ), and a speed is "
            "not given without its own; name another folder, or ask for the same"
        )
    measured = {row["arm"] for row in store.rows("quality") if row["way"] == "free_running"}
    lacking = [arm for arm in setup.arms if arm not in measured]
    if lacking:
        raise EvalError(
            f"'{store.folder}' has no row of quality for {', '.join(lacking)}, and a speed is not given without one; "
            "finish diffaccel eval quality there with these arms, or name a new folder"
        )


def _time(setup: Setup, lengths: Sequence[int], rounds: int, timing: bool, store: Store, progress: Progress) -> None:
    accels = {"dense": setup.dense, **{name: arm.accel for name, arm in setup.arms.items()}}
    done = {row["key"] for row in store.rows("throughput")}
    todo = [
        (length, number, arm)
        for length in lengths
        for number in range(rounds)
        for arm in accels
        if _key(length, number, arm) not in done
    ]
    warm = None
    for index, (length, number, arm) in enumerate(todo):
        arguments = {**setup.arguments, "prompt": setup.prompts[0], "num_frames": length}
        if warm != length:
            progress.arm(f"{length} frames: warming up", index, len(todo))
            run_briefly(setup.pipe, list(accels.values()), setup.seeds[0], arguments)
            warm = length
        progress.arm(f"{length} frames, round {number + 1}: {arm}", index, len(todo))
        way = "dense" if arm == "dense" else "free_running"
        made = run_arm(setup.pipe, way, accels[arm], setup.seeds[0], arguments, timing=timing)
        seconds, count = made.report.seconds, len(made.frames)
        row = {
            "key": _key(length, number, arm),
            "arm": arm,
            "frames": count,
            "round": number,
            "seconds": seconds,
            "fps": {"denoise": _rate(count, seconds["denoise"]), "end_to_end": _rate(count, seconds["total"])},
            "peak_bytes": peak_bytes(setup.device, made.report),
            "cache_bytes": cache_bytes(made.report),
            "tokens": made.latents.shape[2] * made.report.cache["tokens_per_frame"],
        }
        store.append("throughput", row)
    store.merge("throughput")


def _key(length: int, number: int, arm: str) -> str:
    return f"f{length:05d} r{number:02d} {arm}"


def _rate(frames: int, seconds: float | None) -> float | None:
    return frames / seconds if seconds else None


def summarize_speed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows in short, for strict JSON.

    `lengths`: for each number of frames and arm the median, least and most `seconds` of every part, frames a second,
    memory, and `speedup` over dense by medians, with `clear` where the rounds of the two do not overlap. `break_even`:
    for each arm and part the length from which on it is no slower than dense, or a sentence.
    """
    lengths: dict[int, dict[str, dict[str, Any]]] = {}
    for frames in sorted({row["frames"] for row in rows}):
        here: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(rows, key=lambda row: bool(row["arm"] != "dense")):
            if row["frames"] == frames:
                here.setdefault(row["arm"], []).append(row)
        lengths[frames] = {arm: _arm(found) for arm, found in here.items()}
        dense = lengths[frames].get("dense")
        for arm, found in lengths[frames].items():
            if dense is not None and arm != "dense":
                found["speedup"] = {part: _speedup(dense["seconds"][part], found["seconds"][part]) for part in PARTS}
    arms = dict.fromkeys(row["arm"] for row in rows if row["arm"] != "dense")
    even = {arm: {part: break_even(_ratios(lengths, arm, part)) for part in PARTS if part != "decode"} for arm in arms}
    return {"lengths": lengths, "break_even": even}


def break_even(ratios: Sequence[tuple[int, float]]) -> float | str | None:
    """The length from which on a speed-up stays at 1 or more, between the measured ones by a straight line.

    `ratios` are (frames, speed-up), ascending. A sentence where it never or always does; None where nothing is known.
    """
    if not ratios:
        return None
    first, last = ratios[0][0], ratios[-1][0]
    where = f"at {first} frames" if first == last else f"from {first} to {last} frames"
    below = [index for index, (_, ratio) in enumerate(ratios) if ratio < 1]
    if not below:
        return f"faster than dense at all that was measured, {where}"
    if below[-1] == len(ratios) - 1:
        return f"never in the range measured, {where}"
    (x0, y0), (x1, y1) = ratios[below[-1]], ratios[below[-1] + 1]
    return x0 + (1 - y0) / (y1 - y0) * (x1 - x0)


def _arm(rows: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = {part: _spread([row["seconds"][part] for row in rows]) for part in PARTS}
    frames, total, denoise = rows[0]["frames"], seconds["total"], seconds["denoise"]
    return {
        "rounds": len(rows),
        "tokens": rows[0]["tokens"],
        "seconds": seconds,
        "fps": {
            "denoise": denoise and _rate(frames, denoise["median"]),
            "end_to_end": total and _rate(frames, total["median"]),
        },
        **{name: max((row[name] for row in rows if row[name] is not None), default=None) for name in _MEMORY},
    }


_MEMORY = ("peak_bytes", "cache_bytes")


def _spread(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"median": median(known), "least": min(known), "most": max(known)}


def _speedup(dense: dict[str, float] | None, arm: dict[str, float] | None) -> dict[str, Any] | None:
    if dense is None or arm is None or not arm["median"]:
        return None
    clear = dense["least"] > arm["most"] or dense["most"] < arm["least"]
    return {"ratio": dense["median"] / arm["median"], "clear": clear}


def _ratios(lengths: dict[int, dict[str, dict[str, Any]]], arm: str, part: str) -> list[tuple[int, float]]:
    found = [(frames, arms.get(arm, {}).get("speedup", {}).get(part)) for frames, arms in lengths.items()]
    return [(frames, speedup["ratio"]) for frames, speedup in found if speedup is not None]
