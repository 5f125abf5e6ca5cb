"""A folder of results that survives a kill: rows are appended, and what was asked is checked before any is added."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DiffaccelError
from ..report import write_json

_ASKED = ("model", "size", "frames", "steps", "guidance", "prompts", "seeds", "arms", "measures", "lengths")
"""What makes two runs the same one; the command, the versions and the machine may differ."""


class EvalError(DiffaccelError):
    """What was asked cannot be evaluated, or not in that folder."""


def ignore(sentence: str) -> None:
    """Notes that nobody asked for."""


def differing(asked: dict[str, Any], held: dict[str, Any]) -> list[str]:
    """The names in which what is asked differs from what was."""
    asked, held = (json.loads(json.dumps(content)) for content in (asked, held))  # as after writing: no tuples
    return [name for name in _ASKED if asked.get(name) != held.get(name)]


class Store:
    """Rows in `NAME.jsonl` of a folder, each with a `key`; every rank of a launch appends to a file of its own.

    A line that was torn by a kill is left out with a note and cut off before the next is written. Rows of one key count
    once, the last one read.
    """

    def __init__(self, folder: str | Path, rank: int = 0, note: Callable[[str], None] = ignore) -> None:
        self.folder, self.rank, self.note = Path(folder), rank, note

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All rows of that name, of every rank, in the order of their keys."""
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(self.folder.glob(f"{name}*.jsonl")):
            for row in self._read(file):
                found[row["key"]] = row
        return [found[key] for key in sorted(found)]

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a row, on the disk when this returns."""
        rank = f".rank{self.rank}" if self.rank else ""
        file = self.folder / f"{name}{rank}.jsonl"
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with file.open("ab+") as opened:
            end = opened.seek(0, os.SEEK_END)
            if end and not _ends_whole(opened):
                opened.truncate(_last_line(file))
            opened.write(line)
            opened.flush()
            os.fsync(opened.fileno())

    def merge(self, name: str) -> None:
        """One file in the order of the keys; for one process, when no other writes any more."""
        files = sorted(self.folder.glob(f"{name}*.jsonl"))
        if not files:
            return
        whole, partial = self.folder / f"{name}.jsonl", self.folder / f".{name}.jsonl.partial-{os.getpid()}"
        partial.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows(name)), "utf-8")
        os.replace(partial, whole)
        for file in files:
            if file != whole:
                file.unlink()

    def asked(self, what: str) -> dict[str, Any] | None:
        """What was asked of that kind in this folder; of a second kind it has a file of its own."""
        for file in (self.folder / "asked.json", self.folder / f"asked.{what}.json"):
            if file.is_file():
                held = self._asked_in(file)
                if held.get("what") == what:
                    return held
        return None

    def ask(self, asked: dict[str, Any], *, restart: bool = False) -> None:
        """Write what is asked, or check that it is what the folder holds results of.

        `restart` throws them away first. Raises `EvalError` where something else was asked, naming what differs.
        """
        what = asked["what"]
        if restart:
            self.clear()
        self.folder.mkdir(exist_ok=True)
        held = self.asked(what)
        if held is None:
            main = self.folder / "asked.json"
            write_json(self.folder / f"asked.{what}.json" if main.is_file() else main, asked)
            return
        if differ := differing(asked, held):
            first = differ[0]
            raise EvalError(
                f"'{self.folder}' holds results of something else: {', '.join(differ)} differ ({first} there: "
                f"{_short(held.get(first))}; here: {_short(asked.get(first))}); name another folder, or add --restart "
                "to throw these results away"
            )
        elsewhere = {k: v for k, v in asked["environment"].items() if held["environment"].get(k) != v}
        if elsewhere:
            there = ", ".join(f"{k} {held['environment'].get(k)} there and {v} here" for k, v in elsewhere.items())
            self.note(f"the results in '{self.folder}' were begun elsewhere: {there}; seconds may not compare")

    def sweep(self) -> None:
        """Delete the unfinished files of processes that were killed; for one process, before any other writes."""
        for file in self.folder.rglob(".*.partial-*"):
            file.unlink()

    def clear(self) -> None:
        """Delete all results, but nothing that is not one."""
        for pattern in ("*.jsonl", "asked*.json", "summary.*"):
            for file in self.folder.glob(pattern):
                file.unlink()
        for name in ("videos", "latents"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _asked_in(self, file: Path) -> dict[str, Any]:
        try:
            held = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise EvalError(f"'{file}' is damaged ({error}); name another folder, or add --restart") from error
        if not isinstance(held, dict) or "environment" not in held:
            raise EvalError(f"'{file}' is not what an evaluation writes; name another folder")
        return held

    def _read(self, file: Path) -> list[dict[str, Any]]:
        lines, rows = file.read_bytes().split(b"\n"), []
        for number, line in enumerate(lines):
            if not line:
                continue
            torn = number == len(lines) - 1  # without the newline that ends a whole one
            try:
                row = json.loads(line)
                whole = isinstance(row, dict) and "key" in row
            except ValueError:
                whole = False
            if whole and not torn:
                rows.append(row)
            elif torn:
                self.note(f"the last line of '{file}' was torn by a kill; what it held is done again")
            else:
                raise EvalError(f"line {number + 1} of '{file}' is damaged; delete that line, or add --restart")
        return rows


def _ends_whole(opened: Any) -> bool:
    opened.seek(-1, os.SEEK_END)
    return bool(opened.read(1) == b"\n")


def _last_line(file: Path) -> int:
    """Where the last, torn line of a file begins."""
    return file.read_bytes().rfind(b"\n") + 1


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
