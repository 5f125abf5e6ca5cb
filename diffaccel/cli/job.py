"""Making the videos of one command."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..ranks import Ranks, ranks, speaks
from .checks import fail, say
from .sharing import Elsewhere
from .show import Shower, counts_steps, out_console, print_report, progress_bar

if TYPE_CHECKING:
    from ..accel import Accel
    from ..run import Run


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished (or stopped) video: its JSON report, and what went wrong if something did."""

    report: dict[str, Any]
    idle: str | None = None
    interrupted: str | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """What all videos of one command have in common."""

    pipe: Any
    accel: "Accel"
    arguments: dict[str, Any]
    seed: int
    fps: float
    many: bool
    observe: bool = False
    profile: tuple[Path, int] | None = None  # the file of a trace, and how many blocks it is of
    devices: int = 1  # that share each video, of which the first process writes it

    @property
    def writes(self) -> bool:
        """Whether this process decodes and writes."""
        return self.devices == 1 or ranks().main

    def generate(self, prompts: Sequence[str], out: Path) -> list[Result]:
        """A video a prompt; stops after the first that is interrupted. Processes launched together share them."""
        files = [out]
        if self.many:
            out.mkdir(exist_ok=True)
            files = [out / f"{name}.mp4" for name in slugs(prompts)]
        results, who = [], ranks() if self.devices == 1 else Ranks()
        for number, prompt, file in who.share(list(zip(range(len(files)), prompts, files, strict=True))):
            results.append(self._one(prompt, file, traces=number == 0))
            if results[-1].interrupted:
                break
        return who.gather(results)

    def _one(self, prompt: str, file: Path, traces: bool) -> Result:
        from ..errors import NotEngagedError
        from ..video import VideoWriter

        idle = stopped = run = None
        writer = VideoWriter(file, self.fps) if self.writes else Elsewhere()
        try:
            timing = not self.arguments.get("graphs", False)
            observed = self.accel(self.pipe, timing=timing, observe=self.observe)
            with observed as run, self._traced(run, traces), writer, progress_bar(prompt) as show:
                if getattr(self.pipe, "block_causal", False):
                    self._stream(prompt, run, writer, show)
                else:  # a stock pipeline, which hands its frames over at the end, also where it cuts blocks
                    self._at_once(prompt, run, writer, show)
        except NotEngagedError as error:
            idle = str(error)
        except KeyboardInterrupt:
            kept = f"they are in '{file}'" if writer.frames else "nothing was written"
            stopped = f"interrupted after {writer.frames} of {self.arguments['num_frames']} frames; {kept}"
        done = {
            "file": str(file) if writer.frames else None,
            "prompt": prompt,
            "seed": self.seed,
            "fps_of_file": self.fps,
            "devices": self.devices,
        }
        settings = {name: value for name, value in self.arguments.items() if name != "image"}
        content: dict[str, Any] = {**done, "settings": settings, "interrupted": stopped is not None, "idle": idle}
        if run is not None:
            report = run.report()
            if self.arguments.get("graphs") and not run.replayed:
                say("note: no forward repeated an earlier block's, so none was replayed: --graphs needs FlashBlock's "
                     "reused steps, or SinkRecent over more blocks")  # fmt: skip
            content |= report.to_dict()
            if writer.frames:
                print_report(file, writer.frames, report)
        return Result(content, idle, stopped)

    @contextmanager
    def _traced(self, run: "Run", traces: bool) -> Iterator[None]:
        if self.profile is None or not traces:
            yield
            return
        from ..trace import traced

        path, blocks = self.profile
        with traced(run, self.pipe, path, blocks) as trace:
            yield
        out_console().print(f"{path}: a trace for chrome://tracing or ui.perfetto.dev", soft_wrap=True, markup=False)
        out_console().print(trace.table(), soft_wrap=True, markup=False)

    def _stream(self, prompt: str, run: "Run", writer: Any, show: "Shower") -> None:
        import torch

        stream = self.pipe.stream(
            prompt=[prompt],
            **self.arguments,
            generator=torch.Generator().manual_seed(self.seed),
            callback_on_step_end=counts_steps(show),
            overlap=self.pipe._execution_device.type == "cuda",
            **({} if self.writes else {"output_type": "latent"}),
        )
        with closing(stream):
            for chunk in stream:
                writer.append(chunk[0])
                show(None, None, run)

    def _at_once(self, prompt: str, run: "Run", writer: Any, show: "Shower") -> None:
        import torch

        from ..compare import generate as generate_once

        arguments = {**self.arguments, "prompt": prompt, "callback_on_step_end": counts_steps(show)}
        if not self.writes:
            generator = torch.Generator().manual_seed(self.seed)
            self.pipe(**arguments, generator=generator, output_type="latent")
            return
        writer.append(generate_once(self.pipe, run, self.seed, arguments).frames)

    def compare(self, prompt: str, folder: Path) -> Result:
        from ..compare import ARMS, compare

        try:
            with progress_bar(prompt) as show:

                def on_arm(name: str, number: int, count: int) -> None:
                    show(number, count, None, ARMS[name])

                result = compare(self.pipe, self.accel, prompt=prompt, seed=self.seed, on_arm=on_arm, **self.arguments)
        except KeyboardInterrupt:
            fail("interrupted; a comparison needs all its arms, so nothing was written", 130)
        files = result.write(folder, self.fps)
        console = out_console()
        print_report(files[1], len(result.accelerated), result.reports["free_running"])
        console.print(result.table(), highlight=False, soft_wrap=True)
        console.print(f"in {folder}: {', '.join(file.name for file in files)}", highlight=False, soft_wrap=True)
        return Result(result.to_dict(), result.idle)


def slugs(prompts: Sequence[str]) -> list[str]:
    """A file name for each prompt: its words with dashes, numbered where two are alike."""
    names: list[str] = []
    for prompt in prompts:
        base = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "video"
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def finish(results: Sequence[Result], *, asked: bool) -> None:
    """Say what went wrong and exit with its code; what a preset of no one's choice could not use is no mistake."""
    for result in results if speaks() else ():
        if result.idle:
            say(result.idle if asked else "note: of the preset, " + result.idle.removeprefix("asked for and "))
        if result.interrupted:
            say(result.interrupted)
    if any(result.interrupted for result in results):
        raise typer.Exit(130)
    if asked and any(result.idle for result in results):
        raise typer.Exit(1)
