"""One report of folders of results: report.html, which opens offline, report.md and report.json.

from diffaccel.eval.report import write_report

write_report(["out"])
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..report import write_json
from .frontier import marked, way_shown
from .page import markdown, pictures, render, tables
from .page.clips import Clips, units
from .runs import DENSE_WAYS
from .speed import summarize_speed
from .store import EvalError, Store, ignore
from .summary import remarks, summarize, table

KINDS = ("quality", "frontier", "tune", "throughput")


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    max_mb: float = 64.0,
    note: Callable[[str], None] = ignore,
) -> list[Path]:
    """Write report.html, report.md and report.json about folders that `diffaccel eval` filled; gives the paths.

    Args:
        folders: one or more; each is a part of the report.
        out: folder to write into, which must exist; by default the only one of `folders`.
        max_mb: megabytes of video inside of the page; the rest stays beside it as files, and the page says so.
        note: told what a reader should know, such as a last line that was torn by a kill.

    Raises:
        EvalError: a folder holds no results or names videos outside of it, or `out` is needed and not given.
    """
    if out is None and len(folders) != 1:
        raise EvalError(f"a report on {len(folders)} folders belongs to none of them; name its own with -o")
    if max_mb < 0:
        raise EvalError(f"a page holds 0 or more megabytes of video, got {max_mb:g}")
    target = Path(folders[0] if out is None else out)
    if not target.is_dir():
        raise EvalError(f"the folder '{target}' does not exist; make it first or write elsewhere")
    read = [Folder(Path(folder), note) for folder in folders]
    clips = Clips(target, max_mb * 1e6)
    parts = [folder.page(clips) for folder in read]
    title = "diffaccel report: " + ", ".join(part["name"] for part in parts)
    html, text, data = (target / f"report.{kind}" for kind in ("html", "md", "json"))
    _write(html, render(title, parts, clips.embedded, bool(clips.beside)))
    _write(text, markdown.render(title, parts))
    write_json(data, {"folders": [folder.content() for folder in read]})
    if clips.beside:
        note(f"{clips.beside} videos are beside the page, not in it, because it holds at most {max_mb:g} MB of them")
    return [html, text, data]


@dataclass(frozen=True)
class Folder:
    """Results in one folder, read once."""

    path: Path
    note: Callable[[str], None] = ignore

    @cached_property
    def asked(self) -> list[dict[str, Any]]:
        """What was asked in it; one thing or several."""
        store = Store(self.path)
        found = [asked for kind in KINDS if (asked := store.asked(kind)) is not None]
        if not found:
            raise EvalError(f"'{self.path}' holds no results of diffaccel eval: there is no asked.json in it")
        return found

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        store = Store(self.path, note=self.note)
        return {name: store.rows(name) for name in ("quality", "throughput", "frontier")}

    @cached_property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for asked in self.asked for arm in asked["arms"]))

    @cached_property
    def summary(self) -> dict[str, Any]:
        return summarize(self.rows["quality"])

    @cached_property
    def speed(self) -> dict[str, Any]:
        return summarize_speed(self.rows["throughput"])

    @cached_property
    def frontier(self) -> dict[str, Any]:
        points = self.rows["frontier"]
        if not points:
            return {"points": [], "way": "free_running", "marked": {}}
        return {"points": points, "way": way_shown(points), "marked": marked(points)}

    @property
    def shown(self) -> list[str]:
        """The arms that charts have room for: those that nothing beats, then in the order they were asked for."""
        best = {p["arm"] for flags in self.frontier["marked"].values()
                for p, flag in zip(self.frontier["points"], flags, strict=True) if flag}  # fmt: skip
        chosen = sorted(self.arms, key=lambda arm: arm not in best)[: pictures.MOST_LINES]
        return [arm for arm in self.arms if arm in chosen]

    def content(self) -> dict[str, Any]:
        """The part of report.json."""
        return {
            "folder": self.name,
            "asked": self.asked,
            "quality": self.summary,
            "speed": self.speed,
            "frontier": self.frontier,
            "not_measured": self.gaps(),
        }

    def gaps(self) -> list[str]:
        """What was not measured and why, or what is incomplete."""
        said = remarks(self.summary)
        if not self.rows["quality"]:
            said.append("no quality was measured here: diffaccel eval quality")
        elif lacking := self._lacking():
            said.append(f"{lacking} rows of quality are not there yet: the same command goes on with them")
        if not self.rows["throughput"]:
            said.append("throughput against the length of the video was not measured: diffaccel eval throughput")
        if not self.rows["frontier"]:
            said.append("no knob was swept, so there is no frontier: diffaccel eval frontier")
        return said

    def _lacking(self) -> int:
        """Rows of quality that were asked for and are not there."""
        asked, ways = self.asked[0], {row["way"] for row in self.rows["quality"]}
        of_arms = len(asked["arms"]) * len(ways & {"free_running", "shared_history"})
        whole = len(asked["prompts"]) * len(asked["seeds"]) * (of_arms + len(DENSE_WAYS))
        return max(0, whole - len(self.rows["quality"]))

    def page(self, clips: Clips) -> dict[str, Any]:
        """What the page shows of it, and report.md."""
        quality, asked = self.rows["quality"], self.asked[0]
        found, shown = units(self.path, quality, tables.WAYS, clips), self.shown
        if clips.missing:
            self.note(f"{clips.missing} videos that the rows name are not there, and are left out")
        with_curves = list(dict.fromkeys((row["prompt"], row["seed"]) for row in quality))[: pictures.MOST_UNITS]
        height, width = asked["size"]
        headline = (
            [("Headline", tables.headline(self.arms, self.summary, self.speed, quality, asked["frames"]))]
            if quality
            else []
        )
        return {
            "name": self.name,
            "about": f"{asked['model'] or 'a pipeline'}, {asked['frames']} frames of {width}x{height}, "
            f"{asked['steps']} steps, guidance {asked['guidance']}; {len(asked['prompts'])} prompts, "
            f"{len(asked['seeds'])} seeds",
            "tables": [
                *headline,
                *([("All measures, mean (worst)", _plain(table(self.summary)))] if quality else []),
                *([("Throughput", made)] if (made := tables.speeds(self.speed)) else []),
                *([("Frontier", made)] if (made := tables.points(self.frontier)) else []),
            ],
            "units": found,
            "shown": len(shown),
            "curves": [
                pictures.curves([r for r in quality if (r["prompt"], r["seed"]) == unit], shown) for unit in with_curves
            ],
            "lengths": pictures.lengths(self.speed, shown),
            "frontier": pictures.frontier(self.frontier),
            "caches": pictures.caches(quality, shown),
            "layers": [(arm, maps) for arm in shown if (maps := pictures.layers(quality, arm))],
            "left_out": len(self.arms) - len(shown),
            "gaps": self.gaps(),
            "settings": [
                (arm, _settings(given))
                for arm, given in {k: v for one in self.asked for k, v in one["arms"].items()}.items()
            ],
            "commands": [asked["command"] for asked in self.asked if asked["command"]],
            "environment": [(k, str(v)) for k, v in {**asked["environment"], **asked["versions"]}.items()],
        }


def _settings(arm: dict[str, Any]) -> str:
    return (
        "; ".join(
            f"{slot} {given['method']}({', '.join(f'{name}={value!r}' for name, value in given['knobs'].items())})"
            for slot, given in arm["slots"].items()
        )
        or "dense everywhere"
    )


def _plain(lines: Sequence[Sequence[str]]) -> tables.Table:
    heading, *body = lines
    return tables.Table(heading, [[tables.Cell(cell) for cell in line] for line in body])


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
