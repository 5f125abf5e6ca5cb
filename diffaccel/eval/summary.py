"""Rows of quality in short: the mean and the worst of every measure, for every arm and way."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..report import write_json
from .measure import OWN, SCORES

WAYS = {
    "free_running": "free-running",
    "shared_history": "shared history",
    "noise_floor": "noise floor",
    "other_seed": "another seed",
}
"""What each way is called in a table, in its order."""

_HIGHER = ("psnr_pooled", "psnr_worst", "ssim", "ms_ssim", "drift_similarity", "text")
_COLUMNS = {
    "psnr_pooled": ("PSNR dB", 1),
    "ssim": ("SSIM", 4),
    "ms_ssim": ("MS-SSIM", 4),
    "lpips": ("LPIPS", 4),
    "warp_error": ("warp error", 5),
    "flicker": ("flicker", 4),
    "seam": ("seam", 2),
    "drift_colour": ("colour drift", 2),
    "drift_sharpness": ("sharpness", 2),
    "drift_similarity": ("likeness", 3),
    "text": ("text", 2),
}  # heading and digits


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows in short, for strict JSON.

    `arms`: for each arm and way the number of `rows`, how many were `identical` to dense, `mean` and `worst` of every
    measure over the rows that have it (None where none has), the `worst_row` by PSNR, mean `seconds`, and what was
    `idle`. `dense`: means of the dense videos themselves. `unmeasured`: for each measure its reasons, with the number
    of rows.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        groups.setdefault(row["arm"], {}).setdefault(row["way"], []).append(row)
        for name, reason in row["unmeasured"].items():
            reasons.setdefault(name, Counter())[reason] += 1
    once = {(row["prompt"], row["seed"]): row for row in rows}
    order = sorted(groups, key=lambda arm: arm == "dense")
    return {
        "arms": {arm: {way: _group(groups[arm][way]) for way in WAYS if way in groups[arm]} for arm in order},
        "dense": {name: _mean([row["reference"][name] for row in once.values()]) for name in OWN},
        "unmeasured": {name: dict(found) for name, found in sorted(reasons.items())},
    }


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    means: dict[str, float | None] = {}
    worst: dict[str, float | None] = {}
    for name in SCORES:
        values = [row["scores"][name] for row in rows if row["scores"].get(name) is not None]
        means[name] = _mean(values)
        worst[name] = _worst(name, values) if values else None
    scored = [row for row in rows if row["scores"]["psnr_pooled"] is not None]
    parts = {part: [row["seconds"].get(part) for row in rows] for part in rows[0]["seconds"]}
    return {
        "rows": len(rows),
        "identical": sum(row["unmeasured"].get("psnr_pooled") == "identical" for row in rows),
        "mean": means,
        "worst": worst,
        "worst_row": min(scored, key=lambda row: row["scores"]["psnr_pooled"])["key"] if scored else None,
        "seconds": {part: None if None in values else mean(values) for part, values in parts.items()},
        "idle_rows": sum(row["idle"] is not None for row in rows),
        "idle": sorted({row["idle"] for row in rows if row["idle"]}),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _worst(name: str, values: list[float]) -> float:
    if name == "drift_sharpness":
        return max(values, key=lambda value: abs(value - 1))
    return min(values) if name in _HIGHER else max(values)


def table(summary: dict[str, Any]) -> list[list[str]]:
    """Rows of text with a heading: "mean (worst)" of every measure that any row has."""
    groups = [(arm, way, group) for arm, ways in summary["arms"].items() for way, group in ways.items()]
    shown = [
        name
        for name in _COLUMNS
        if any(
            group["mean"][name] is not None or (name == "psnr_pooled" and group["identical"]) for *_, group in groups
        )
    ]
    lines = [["arm", "way", "rows", *(_COLUMNS[name][0] for name in shown)]]
    own = ["-" if (value := summary["dense"].get(name)) is None else _number(name, value) for name in shown]
    lines.append(["dense", "itself", "", *own])
    for arm, way, group in groups:
        lines.append([arm, WAYS[way], str(group["rows"]), *(_cell(group, name) for name in shown)])
    return lines


def _cell(group: dict[str, Any], name: str) -> str:
    if group["mean"][name] is None:
        return "identical" if name == "psnr_pooled" and group["identical"] else "-"
    return f"{_number(name, group['mean'][name])} ({_number(name, group['worst'][name])})"


def _number(name: str, value: float) -> str:
    return f"{value:.{_COLUMNS[name][1]}f}"


def remarks(summary: dict[str, Any]) -> list[str]:
    """What the table does not say: what was not measured and why, and what never engaged."""
    lines = []
    for name, reasons in summary["unmeasured"].items():
        for reason, count in reasons.items():
            if reason != "identical":
                lines.append(f"{name} was not measured in {count} rows: {reason}")
    for arm, ways in summary["arms"].items():
        lines += [f"{arm}: {sentence}" for sentence in sorted({s for group in ways.values() for s in group["idle"]})]
        count = sum(group["identical"] for group in ways.values())
        if count:
            lines.append(f"{arm}: {count} videos are identical to the dense one, and left out of the means of PSNR")
    return lines


def write_summary(folder: Path, rows: Sequence[dict[str, Any]], asked: dict[str, Any]) -> dict[str, Any]:
    """Write summary.json and summary.md beside the rows, and give the summary."""
    summary = summarize(rows)
    write_json(folder / "summary.json", summary)
    heading, *body = table(summary)
    width, height = asked["size"][1], asked["size"][0]
    about = (
        f"{len(asked['prompts'])} prompts, {len(asked['seeds'])} seeds; {asked['model'] or 'a pipeline'}, "
        f"{asked['frames']} frames of {width}x{height}, {asked['steps']} steps, guidance {asked['guidance']}; "
        f"{', '.join(f'{k} {v}' for k, v in {**asked['environment'], **asked['versions']}.items())}"
    )
    lines = [_line(heading), "|" + " --- |" * len(heading), *(_line(row) for row in body)]
    text = ["# Quality", "", about, "", "Mean, and the worst row in brackets.", "", *lines, ""]
    text += [f"- {remark}" for remark in remarks(summary)]
    (folder / "summary.md").write_text("\n".join(text).rstrip() + "\n", "utf-8")
    return summary


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
