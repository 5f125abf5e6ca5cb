"""Tables of a report, the same for the page and for report.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from ..frontier import memory
from ..speed import PARTS


@dataclass(frozen=True)
class Cell:
    """What stands in a table: `text`, `below` it something smaller, and a class of page.css."""

    text: str
    below: str = ""
    css: str = ""


@dataclass(frozen=True)
class Table:
    heading: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=list)


NOTHING = Cell("-", css="none")
WAYS = {
    "free_running": "free-running",
    "shared_history": "shared history",
    "noise_floor": "noise floor",
    "other_seed": "another seed",
}


def headline(
    arms: Sequence[str],
    summary: Mapping[str, Any],
    speed: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    frames: int,
) -> Table:
    """Dense attention, the arms in that order, and the scale: distance to dense, speed, memory.

    Speeds are medians of timed rounds at that number of frames; where there are none, those of the runs that were
    measured for quality, each of which ran once.
    """
    timed = speed["lengths"].get(frames) or _timed_once(rows)
    ways = [way for way in ("shared_history", "free_running") if any(way in arm for arm in summary["arms"].values())]
    measures = [name for name in ("ssim", "lpips", "text") if _any(summary, name)]
    heading = [
        "",
        *(f"PSNR, {WAYS[way]}" for way in ways),
        *({"ssim": "SSIM", "lpips": "LPIPS"}.get(m, m) for m in measures),
    ]
    heading += [PARTS[part] for part in ("total", "denoise", "attention")] + ["memory"]
    lines = [
        [
            Cell("dense", css="dense"),
            *(Cell("reference", css="none") for _ in ways),
            *(_number(summary["dense"].get(name)) for name in measures),
            *_speeds("dense", timed),
        ]
    ]
    for arm in arms:
        if arm not in summary["arms"]:
            continue
        groups = summary["arms"][arm]
        best = groups.get("shared_history") or groups["free_running"]
        lines.append(
            [
                Cell(arm, css="arm"),
                *(_psnr(groups.get(way)) for way in ways),
                *(_number(best["mean"].get(name)) for name in measures),
                *_speeds(arm, timed),
            ]
        )
    for way in ("noise_floor", "other_seed"):
        group = summary["arms"].get("dense", {}).get(way)
        if group:
            cells = [_psnr(group) if name == "free_running" or len(ways) == 1 else NOTHING for name in ways]
            cells += [_number(group["mean"].get(name)) for name in measures]
            lines.append([Cell(WAYS[way], css="scale"), *cells, *[NOTHING] * 4])
    notes = [
        f"PSNR in dB to the dense video of the same noise: mean of {_count(summary)} videos, the worst frame beneath."
    ]
    if "shared_history" in ways:
        notes.append(
            "A generation that feeds on its own output amplifies rounding: free-running says how far two videos part, "
            "shared history how far one block is from the dense one. The noise floor and another seed are the scale."
        )
        if measures:
            notes.append("Other measures of an arm are those with shared history.")
    if frames in speed["lengths"]:
        notes.append(f"Seconds are medians at {frames} frames; x is dense over the arm, with ? where rounds overlap.")
    else:
        notes.append("x is dense over the arm, each run once beside its quality, not in rounds: a hint, no benchmark.")
    return Table(heading, lines, notes)


def speeds(speed: Mapping[str, Any]) -> Table | None:
    """Every length and arm: median seconds, least to most, frames a second, memory."""
    if not speed["lengths"]:
        return None
    lines = []
    for frames, arms in speed["lengths"].items():
        for arm, found in arms.items():
            rates = [found["fps"][name] for name in ("denoise", "end_to_end")]
            cells = [_seconds(found["seconds"][part], (found.get("speedup") or {}).get(part)) for part in PARTS]
            lines.append(
                [Cell(str(frames)), Cell(arm, css="arm"), *cells, *(_number(rate, 2) for rate in rates), _memory(found)]
            )
    heading = ["frames", "arm", *(f"{name}, s" for name in PARTS.values())]
    return Table([*heading, "frames/s, denoising", "frames/s, end to end", "memory"], lines, _break_even(speed))


def _break_even(speed: Mapping[str, Any]) -> list[str]:
    said: list[str] = []
    if len(speed["lengths"]) < 2:
        return said
    for arm, parts in speed["break_even"].items():
        for part, where in parts.items():
            if where is None:
                continue
            here = [arms.get(arm, {}).get("speedup", {}).get(part) for arms in speed["lengths"].values()]
            doubt = "" if any(s and s["clear"] for s in here) else "; but the rounds overlap at every length"
            text = where if isinstance(where, str) else f"breaks even with dense at about {where:.0f} frames"
            said.append(f"{arm}, {PARTS[part]}: {text}{doubt}")
    return said


def points(found: Mapping[str, Any]) -> Table | None:
    """Every setting of a frontier, numbered as in its charts."""
    if not found["points"]:
        return None
    lines = []
    for number, point in enumerate(found["points"]):
        dense = point["arm"] == "dense"
        group = point["quality"]["noise_floor" if dense else found["way"]]
        total, ratio = point["speed"]["seconds"]["total"], (point["speed"]["speedup"] or {}).get("total")
        best = [name for name, flags in found["marked"].items() if flags[number]]
        lines.append(
            [
                Cell("" if dense else str(number)),
                Cell(point["arm"], css="arm"),
                Cell("identical") if group["psnr_pooled"] is None else _number(group["psnr_pooled"], 1),
                _number(group["ssim"]),
                _number(total, 2),
                _ratio(ratio),
                _memory(point),
                Cell(" and ".join(best), css="good") if best else NOTHING,
            ]
        )
    heading = [
        "number",
        "setting",
        "PSNR dB",
        "SSIM",
        "end to end, s",
        "against dense",
        "memory",
        "nothing beats it in",
    ]
    return Table(heading, lines, [f"Quality: {WAYS[found['way']]}; of dense, its noise floor."])


def _timed_once(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean seconds of the runs of quality, as `summarize_speed` has medians."""
    runs: dict[str, dict[Any, Mapping[str, Any]]] = {}
    for row in rows:
        if row["way"] == "free_running":
            runs.setdefault(row["arm"], {})[row["prompt"], row["seed"]] = row
    shared = set.intersection(*map(set, runs.values())) if runs else set()  # a run that goes on has more of some arms
    if not shared:
        return {}
    timed: dict[str, Any] = {}
    for arm, by_unit in runs.items():
        found = [by_unit[unit] for unit in shared]
        timed[arm] = {"seconds": {}, "speedup": {}, **{m: _most(r[m] for r in found) for m in _MEMORY}}
        dense = timed.setdefault("dense", {"seconds": {}, **dict.fromkeys(_MEMORY)})
        for part in PARTS:
            own, of_dense = ([r[name][part] for r in found] for name in ("seconds", "dense_seconds"))
            if None in own or None in of_dense or not sum(own):
                timed[arm]["seconds"][part] = dense["seconds"][part] = timed[arm]["speedup"][part] = None
                continue
            timed[arm]["seconds"][part], dense["seconds"][part] = ({"median": mean(s)} for s in (own, of_dense))
            timed[arm]["speedup"][part] = {"ratio": sum(of_dense) / sum(own), "clear": True}
    timed["dense"] |= {m: _most(r[m] for r in rows if r["arm"] == "dense") for m in _MEMORY}
    return timed


_MEMORY = ("peak_bytes", "cache_bytes")


def _most(values: Any) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _speeds(arm: str, timed: Mapping[str, Any]) -> list[Cell]:
    found = timed.get(arm)
    if found is None:
        return [NOTHING] * 4
    cells = []
    for part in ("total", "denoise", "attention"):
        seconds, ratio = found["seconds"][part], (found.get("speedup") or {}).get(part)
        said = "" if seconds is None else f"{seconds['median']:.2f} s"
        cells.append(_ratio(ratio, said) if ratio else Cell(said) if said else NOTHING)
    return [*cells, _memory(found)]


def _ratio(found: Mapping[str, Any] | None, below: str = "") -> Cell:
    if found is None:
        return NOTHING
    slower = found["ratio"] < 1
    said = f"{found['ratio']:.2f}x" + (" slower" if slower else "") + ("" if found["clear"] else " ?")
    return Cell(said, below, "bad" if slower else "good" if found["clear"] else "")


def _seconds(spread: Mapping[str, Any] | None, ratio: Mapping[str, Any] | None) -> Cell:
    if spread is None:
        return NOTHING
    against, between = _ratio(ratio), f"{spread['least']:.2f} to {spread['most']:.2f}"
    said = between if ratio is None else f"{between}, {against.text}"
    return Cell(f"{spread['median']:.2f}", said, against.css if ratio else "")


def _psnr(group: Mapping[str, Any] | None) -> Cell:
    if group is None:
        return NOTHING
    value, worst = group["mean"]["psnr_pooled"], group["worst"]["psnr_worst"]
    if value is None:
        return Cell("identical") if group["identical"] else NOTHING
    return Cell(f"{value:.1f}", "" if worst is None else f"worst {worst:.1f}")


def _memory(found: Mapping[str, Any]) -> Cell:
    held = memory(found)
    if held is None:
        return NOTHING
    size = f"{held / 2**30:.2f} GiB" if held >= 2**30 else f"{held / 2**20:.1f} MiB"
    return Cell(size, "" if found["peak_bytes"] is not None else "in caches")


def _number(value: float | None, digits: int = 3) -> Cell:
    return NOTHING if value is None else Cell(f"{value:.{digits}f}")


def _any(summary: Mapping[str, Any], name: str) -> bool:
    return any(group["mean"].get(name) is not None for arm in summary["arms"].values() for group in arm.values())


def _count(summary: Mapping[str, Any]) -> int:
    return max((group["rows"] for arm in summary["arms"].values() for group in arm.values()), default=0)
