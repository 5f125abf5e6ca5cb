"""What `diffaccel eval` shows when it is done: tables, and what they do not say."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .checks import say
from .show import readable

if TYPE_CHECKING:
    from ..eval.arms import Setup
    from ..ranks import Ranks


def _print_table(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def show_quality(out: Path, rows: "list[dict[str, Any]] | None" = None) -> dict[str, Any]:
    from ..eval.store import Store
    from ..eval.summary import remarks, table, write_summary

    store = Store(out)
    asked = store.asked("quality") or store.asked("frontier")
    assert asked is not None
    summary = write_summary(out, store.rows("quality") if rows is None else rows, asked)
    typer.echo(f"quality, mean (worst) over {len(asked['prompts'])} prompts x {len(asked['seeds'])} seeds:")
    _print_table(table(summary))
    typer.echo("\n".join([*remarks(summary), f"in {out}: quality.jsonl, summary.json, summary.md, videos"]))
    return summary


def finish(summary: dict[str, Any]) -> None:
    """Exit code 1 where an arm never engaged, on no prompt; why is said already."""
    for arm, ways in summary["arms"].items():
        if arm != "dense" and ways["free_running"]["idle_rows"] == ways["free_running"]["rows"]:
            raise typer.Exit(1)


def show_speed(summary: dict[str, Any]) -> None:
    from ..eval.speed import PARTS

    heading = ["frames", "tokens", "arm", *(f"{name}, s" for name in PARTS.values()), "frames/s", "memory"]
    lines = [heading]
    for frames, arms in summary["lengths"].items():
        for arm, found in arms.items():
            cells = []
            for part in PARTS:
                spread, speedup = found["seconds"][part], (found.get("speedup") or {}).get(part)
                cell = (
                    "-" if spread is None else f"{spread['median']:.2f} ({spread['least']:.2f} to {spread['most']:.2f})"
                )
                if speedup is not None:
                    cell += f" {speedup['ratio']:.2f}x" + ("" if speedup["clear"] else "?")
                cells.append(cell)
            rate, peak, held = found["fps"]["end_to_end"], found["peak_bytes"], found["cache_bytes"]
            memory = readable(peak) if peak is not None else "-" if held is None else f"{readable(held)} in caches"
            lines.append([str(frames), str(found["tokens"]), arm, *cells, f"{rate:.2f}" if rate else "-", memory])
    typer.echo("speed, median (least to most); x: against dense, with ? where the rounds overlap:")
    _print_table(lines)
    for arm, parts in summary["break_even"].items():
        for part, where in parts.items():
            if where is not None:
                said = where if isinstance(where, str) else f"breaks even at about {where:.0f} frames"
                speedups = [arms[arm]["speedup"][part] for arms in summary["lengths"].values()]
                doubt = "" if any(s and s["clear"] for s in speedups) else "; but the rounds overlap at every length"
                typer.echo(f"{arm}, {PARTS[part]}: {said}{doubt}")


def show_frontier(points: Sequence[dict[str, Any]]) -> None:
    from ..eval.frontier import marked, memory, way_shown

    way, best = way_shown(points), marked(points)
    lines = [["setting", "PSNR dB", "SSIM", "end to end, s", "against dense", "memory", "nothing beats it in"]]
    for index, point in enumerate(points):
        values = point["quality"]["noise_floor" if point["arm"] == "dense" else way]
        psnr, total, ratio = values["psnr_pooled"], point["speed"]["seconds"]["total"], point["speed"]["speedup"]
        held = memory(point)
        lines.append(
            [
                point["arm"],
                "identical" if psnr is None else f"{psnr:.1f}",
                f"{values['ssim']:.4f}",
                f"{total:.2f}",
                f"{ratio['total']['ratio']:.2f}x" if ratio and ratio["total"] else "-",
                "-" if held is None else readable(held),
                " and ".join(name for name, flags in best.items() if flags[index]) or "-",
            ]
        )
    typer.echo(f"frontier ({way.replace('_', ' ')}; dense: its noise floor):")
    _print_table(lines)


def write_page(out: Path) -> None:
    from ..eval.report import write_report

    page, *_ = write_report([out], note=lambda sentence: say(f"note: {sentence}"))
    typer.echo(f"report: {page}")


def run_vbench(out: Path, rows: list[dict[str, Any]], setup: "Setup", ranks: "Ranks", long: bool) -> None:
    from ..eval import vbench

    places = vbench.lay_out(out, rows, setup.seeds)
    why = vbench.missing(long)
    if why is None and ranks.count > 1:
        why = "VBench is run by one process: ask the same without the launcher; the videos are laid out for it"
    if why is not None:
        say(why)
        for place in () if long else places.values():
            prompts = place.parent / f"{place.name}.prompts.json"
            asked = ["--mode=custom_input", "--videos_path", str(place), "--prompt_file", str(prompts)]
            typer.echo(shlex.join(["vbench", "evaluate", *asked, "--dimension", vbench.CUSTOM[0]]))
        return
    scores = vbench.evaluate(places, out / ("vbench-long" if long else "vbench-scores"), device=setup.device, long=long)
    dimensions = list(next(iter(scores.values())))
    lines = [["arm", *dimensions], *([arm, *(f"{found[d]:.4f}" for d in dimensions)] for arm, found in scores.items())]
    typer.echo("VBench-Long:" if long else "VBench:")
    _print_table(lines)
