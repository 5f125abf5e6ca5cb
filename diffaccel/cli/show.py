"""What is shown while a command works, and when it is done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..ranks import speaks

if TYPE_CHECKING:
    from rich.console import Console

    from ..report import Report
    from ..run import Run

Shower = Callable[..., None]


def out_console() -> "Console":
    import shutil

    from rich.console import Console

    # tables are not cut to the 80 columns rich assumes of a pipe or a file
    return Console(highlight=False, width=max(shutil.get_terminal_size().columns, 120))


@contextmanager
def _keeps_interrupt() -> Iterator[Callable[[], None]]:
    """What it yields raises `KeyboardInterrupt` if Ctrl-C was pressed inside, even where that was swallowed: Python
    drops an exception that is raised in a finaliser or in a callback of a weak reference."""
    pressed = False

    def on_interrupt(*_: Any) -> NoReturn:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
        yield check
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress_bar(prompt: str) -> Iterator[Shower]:
    """A bar on a terminal's stderr: steps done, frames a second and memory. `show(done, total, run, label)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    bar = Progress(*columns, console=console, disable=not (console.is_terminal and speaks()), transient=True)
    with _keeps_interrupt() as check, bar as progress:
        task = progress.add_task(prompt[:40].replace("[", "("), total=None, speed="")

        def show(done: int | None, total: int | None, run: "Run | None", label: str | None = None) -> None:
            check()
            if done is not None:
                progress.update(task, completed=done, total=total)
            if label is not None:
                progress.update(task, description=label)
            if run is not None:
                frames, fps, peak = run.speed()
                rate = "" if fps is None else f"{fps:.2f} frames/s, "
                progress.update(task, speed=f"{frames} frames, {rate}{readable(peak)}")

        yield show


def counts_steps(show: Shower) -> Callable[..., dict[str, Any]]:
    """A pipeline's `callback_on_step_end`."""

    def on_step(pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        show(step + 1, pipe.num_timesteps, None)
        return {}

    return on_step


def print_report(file: Path, frames: int, report: "Report") -> None:
    """File, frames, seconds, memory, and a row a slot: did it engage, and what share of the keys was read."""
    from rich.table import Table

    seconds = ", ".join(
        f"{name} {'not measured' if value is None else f'{value:.2f} s'}" for name, value in report.seconds.items()
    )
    console = out_console()
    console.print(f"{file}: {frames} frames", soft_wrap=True, markup=False)
    console.print(f"  {seconds}", soft_wrap=True)
    speed = "" if report.fps is None else f"{report.fps:.2f} frames/s, "
    console.print(f"  {speed}peak memory {readable(report.peak_memory_bytes)}, kernel {report.kernel}", soft_wrap=True)
    table = Table(
        "slot", "method", "engaged", "calls", "skipped", "keys kept", "keys read", box=None, padding=(0, 2, 0, 2)
    )
    for slot, counts in report.slots.items():
        of = counts.keys_total
        kept, read = (f"{n / of:.1%}" if of else "-" for n in (counts.keys_kept, counts.keys_read))
        engaged = "yes" if counts.engaged else "NO"
        table.add_row(slot, counts.method, engaged, str(counts.calls), f"{counts.skipped:g}", kept, read)
    if report.slots:
        console.print(table)
    else:
        console.print("  no technique was asked for: dense attention")


def readable(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
