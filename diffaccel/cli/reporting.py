"""`diffaccel report`: one page about folders of results."""

from pathlib import Path
from typing import Annotated

import typer

from .checks import one_sentence, say


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="what diffaccel eval wrote")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="folder for the report  [default: the only DIR]")
    ] = None,
    max_mb: Annotated[
        float, typer.Option("--max-mb", help="megabytes of video inside the page; the rest stays beside it")
    ] = 64.0,
) -> None:
    """Write report.html, which opens offline, report.md and report.json about results of diffaccel eval."""
    with one_sentence():
        from ..eval.report import write_report

        written = write_report(folders, out, max_mb=max_mb, note=lambda sentence: say(f"note: {sentence}"))
        typer.echo(f"report: {', '.join(map(str, written))}")
