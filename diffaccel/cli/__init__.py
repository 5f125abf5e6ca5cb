"""The `diffaccel` command: generate, compare, list what there is, and say what is wrong in one sentence.

Exit codes: 0 done; 1 a technique asked for by --preset or --set never engaged (the video is kept), `doctor` found the
kernel in use to be wrong, or nothing that `tune` tried reached the target; 2 a mistake in what was asked, found before
anything was computed; 130 interrupted (the frames so far are kept).
"""

from typing import Annotated

import typer

from .calibrating import calibrate
from .demo import demo
from .evaluate import app as evaluation
from .generating import generate
from .listing import doctor, info, methods
from .reporting import report
from .tuning import tune
from .upscaling import upscale
from .writing import text

app = typer.Typer(
    name="diffaccel",
    help="Faster video diffusion without training: the same video in less time and memory, with proof and a price.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(evaluation)
for command in (generate, calibrate, text, upscale, methods, info, doctor, demo, report, tune):
    app.command()(command)


def main() -> None:
    """Entry point of the `diffaccel` command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from ..version import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    pass
