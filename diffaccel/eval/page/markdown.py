"""A report as Markdown: the tables, what was not measured, and how to make it again."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .tables import Cell, Table


def render(title: str, folders: Sequence[Mapping[str, Any]]) -> str:
    """The text of report.md on `folders` (`report.Folder.page`). What people wrote is shown as they wrote it."""
    lines = [f"# {escaped(title)}", ""]
    for folder in folders:
        lines += [f"## {escaped(folder['name'])}", "", escaped(folder["about"]), ""]
        for heading, table in folder["tables"]:
            lines += [f"### {heading}", "", *_table(table), "", *(f"- {escaped(note)}" for note in table.notes), ""]
        lines += ["### What was not measured, and why", "", *(f"- {escaped(said)}" for said in folder["gaps"]), ""]
        lines += [
            "### Settings",
            "",
            *(f"- **{escaped(arm)}**: {escaped(said)}" for arm, said in folder["settings"]),
            "",
        ]
        lines += ["### Again", "", *(f"    {' '.join(command.split())}" for command in folder["commands"]), ""]
        lines += ["### Environment", "", *(f"- {escaped(k)}: {escaped(v)}" for k, v in folder["environment"]), ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&!])", r"\\\1", " ".join(str(text).split()))


def _table(table: Table) -> list[str]:
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    heading = [escaped(name) for name in table.heading]
    return [_line(heading), _line(["---"] * len(heading)), *map(_line, rows)]


def _cell(cell: Cell) -> str:
    return escaped(f"{cell.text} ({cell.below})" if cell.below else cell.text)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
