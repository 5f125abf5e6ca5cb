"""What came of a request so far: what the page shows of it, as plain data."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cli.show import readable
from ..report import Report
from ..run import Run
from .asked import Asked, to_json
from .clips import Clip
from .worker import Ticket, Worker

Figures = dict[str, str]


@dataclass
class Result:
    """Written by the thread of a worker, read by those of the pages."""

    asked: Asked
    name: str  # of its files, without a suffix
    key: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    doing: str = ""
    """What is being done, as a few words."""
    done: int = 0
    total: int = 0
    """Steps, of what is being done."""
    clips: list[Clip] = field(default_factory=list)
    texts: list[dict[str, str]] = field(default_factory=list)
    figures: dict[str, Figures] = field(default_factory=dict)
    """For each arm what was measured, by name."""
    techniques: list[list[str]] = field(default_factory=list)
    verdict: str = ""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fps: float = 16.0
    reports: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def at(self, doing: str, done: int = 0, total: int = 0) -> None:
        self.doing, self.done, self.total = doing, done, total

    def clip(self, name: str, label: str) -> Clip:
        """A new clip that the page will show."""
        made = Clip(name, label)
        self.clips.append(made)
        return made

    def file_of(self, clip: Clip) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.name}-{clip.name}.mp4"

    def state(self, ticket: Ticket, worker: Worker) -> dict[str, Any]:
        """What the page shows: numbers, and texts that it puts in as texts."""
        return {
            "key": self.key,
            "settings": to_json(self.asked),
            "state": ticket.state,
            "headline": self._headline(ticket, worker),
            "done": self.done if ticket.state == "running" else 0,
            "total": self.total if ticket.state == "running" else 0,
            "error": ticket.problem,
            "clips": [
                {
                    "name": clip.name,
                    "label": clip.label,
                    "size": clip.size,
                    "parts": list(clip.parts),
                    "file": clip.file is not None,
                }
                for clip in list(self.clips)
                if clip.parts
            ],
            "texts": list(self.texts),
            "fps": self.fps,
            "figures": _table(dict(self.figures)),
            "techniques": list(self.techniques),
            "verdict": self.verdict,
            "notes": [*self.notes, *([OVERLAP] if ticket.overlapped else [])],
            "warnings": list(self.warnings),
            "report": bool(self.reports),
        }

    def _headline(self, ticket: Ticket, worker: Worker) -> str:
        if ticket.state == "waiting":
            ahead = worker.ahead(ticket)
            return f"Waiting for {worker.name}: {ahead} ahead of you" if ahead else "Starting"
        if ticket.state == "running":
            return f"{self.doing}, step {self.done} of {self.total}" if self.total else self.doing or "Starting"
        return {"done": "Done", "cancelled": "Cancelled; what was made so far is kept", "failed": "Not made"}[
            ticket.state
        ]


UNEVEN = 1.3
OVERLAP = "Another model was at work on this machine meanwhile, so these times are longer than they would be alone."


def problem(sentence: str) -> dict[str, Any]:
    """The state of a page whose request was refused before it could wait."""
    return {"key": "", "state": "failed", "headline": "Not made", "error": sentence}


def live(run: Run, pipe: Any) -> Figures:
    """What is known of a run while it goes on, without waiting for the device."""
    frames, fps, peak = run.speed()
    found = {"frames/s": "" if fps is None else f"{fps:.2f}", "frames": str(frames)}
    if (held := run.held()) is not None:
        tokens, size = held
        found |= {"cache, tokens a layer": f"{tokens:,}", "cache, memory": readable(size)}
    return found | {_peak(pipe): readable(peak)}


def final(report: Report, pipe: Any) -> Figures:
    """What was measured of a run that is over."""
    seconds = {name: value for name, value in report.seconds.items() if value is not None}
    found = {
        "frames/s": "" if report.fps is None else f"{report.fps:.2f}",
        "frames": str(report.frames),
        "seconds": f"{seconds['total']:.2f}",
    }
    if seconds["decode"]:  # else not measured apart
        found |= {"of it denoising": f"{seconds['denoise']:.2f}", "of it decoding": f"{seconds['decode']:.2f}"}
    if report.blocks:
        last = report.blocks[-1]
        found |= {"cache, tokens a layer": f"{last['tokens']:,}", "cache, memory": readable(last["bytes"])}
    return found | {_peak(pipe): readable(report.peak_memory_bytes), "kernel": report.kernel}


def techniques(report: Report) -> list[list[str]]:
    """A row a slot: technique, whether it engaged, and the share of the keys that was read."""
    rows = []
    for slot, counts in report.slots.items():
        read = f"{counts.keys_read / counts.keys_total:.1%}" if counts.keys_total else "-"
        rows.append([slot, counts.method, "yes" if counts.engaged else "NO", f"{counts.skipped:g}", read])
    return rows


def verdict(fast: Report, dense: Report) -> str:
    """How many times as fast, from one run of each; says so where it is slower."""
    sentences = []
    for what, part in (("end to end", "total"), ("denoising", "denoise")):
        a, b = fast.seconds[part], dense.seconds[part]
        if a and b:
            slower = "slower here, " if a > b else ""
            sentences.append(f"{what} {slower}{b / a:.2f}x as fast as dense ({a:.2f} s against {b:.2f} s)")
    return f"Accelerated: {'; '.join(sentences)}. One run each, so small differences are scatter."


def disturbed(fast: Report, dense: Report) -> str | None:
    """A sentence where decoding, the same work in both, took so differently that the machine must have been busy."""
    a, b = fast.seconds["decode"], dense.seconds["decode"]
    if not (a and b) or max(a, b) < UNEVEN * min(a, b):
        return None
    return (
        f"Decoding is the same work in both and took {a:.2f} s and {b:.2f} s: something else kept this machine busy, "
        "so the comparison of speeds says little."
    )


def _peak(pipe: Any) -> str:
    return "peak memory" if pipe._execution_device.type == "cuda" else "peak memory of the process so far"


def _table(figures: dict[str, Figures]) -> dict[str, Sequence[Any]]:
    """Columns are the arms; a row for every figure that one of them has."""
    names = list(dict.fromkeys(name for arm in figures.values() for name in arm))
    rows = [[name, *(arm.get(name, "") for arm in figures.values())] for name in names]
    return {"columns": list(figures), "rows": rows}
