"""The README's table of presets on the bundled model, from samples/evaluation/report.json (see scripts/evaluation).

python scripts/readme_figures.py            # writes it between its markers
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- scripts/readme_figures.py writes from here -->", "<!-- to here -->"
PARTS = ("attention", "denoise", "total")


def table(folder: dict[str, Any]) -> str:
    """A row a preset: speed-ups over dense and least PSNR, of one folder of a report. `?`: the rounds overlap."""
    asked, found = folder["asked"][0], folder["quality"]["arms"]
    [(frames, timed)] = folder["speed"]["lengths"].items()
    (height, width), where = asked["size"], asked["environment"]
    floor, other = (worst(found["dense"][way]) for way in ("noise_floor", "other_seed"))
    prompts, rounds = len(asked["prompts"]), timed["dense"]["rounds"]
    prompts, rounds = len(asked["prompts"]), timed["dense"]["rounds"]
    size = f"{frames} frames of {width}x{height}, {asked['steps']} steps, guidance {asked['guidance']}"
    lines = [
        f"The bundled model, {size}; {where['device']}, {where['dtype']};",
        f"medians of {rounds} rounds that alternate (`?`: those of the two overlap); the lowest PSNR of {prompts}",
        f"prompts, noise floor {floor}, another seed {other}",
        "([report](samples/evaluation/report.md), made by `scripts/evaluation`):",
        "",
        "| preset | attention | denoising | end to end (least to most) | PSNR: shared history / free-running |",
        "|---|---|---|---|---|",
        f"| dense | | | {seconds(timed['dense'])} | |",
    ]
    for arm in asked["arms"]:
        attention, denoise, total = (speedup(timed[arm]["speedup"][part]) for part in PARTS)
        ways = " / ".join(worst(found[arm][way]) for way in ("shared_history", "free_running"))
        lines.append(f"| `{arm}` | {attention} | {denoise} | {total}, {seconds(timed[arm])} | {ways} |")
    return "\n".join(lines)


def worst(group: dict[str, Any]) -> str:
    value = group["worst"]["psnr_pooled"]
    return "identical" if value is None else f"{value:.1f} dB"


def speedup(found: dict[str, Any]) -> str:
    return f"{found['ratio']:.2f}x" + ("" if found["clear"] else "?")


def seconds(arm: dict[str, Any]) -> str:
    spread = arm["seconds"]["total"]
    return f"{spread['median']:.1f} s ({spread['least']:.1f} to {spread['most']:.1f})"


def written(readme: str, report: dict[str, Any]) -> str:
    """The README with its table as the report has it."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(report['folders'][0])}\n{END}{rest.split(END)[1]}"


def main() -> None:
    report = json.loads((ROOT / "samples" / "evaluation" / "report.json").read_text("utf-8"))
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text("utf-8"), report), "utf-8")


if __name__ == "__main__":
    main()
