"""Options that commands share, checked, and what is opened for `diffaccel eval` and `diffaccel tune`."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..pipelines.loading import BUNDLED_MODELS
from ..preset_file import given_preset, is_preset_file
from ..settings import UsageError, build_accel
from ..suggest import choose
from .checks import check_arguments, check_parent, fail, open_pipeline, parse_size, read_prompts, require, say
from .show import counts_steps, progress_bar

if TYPE_CHECKING:
    from ..eval.arms import Arm, Setup
    from ..eval.measure import Measures
    from ..eval.runs import Progress
    from ..ranks import Ranks

CHECKPOINT = f"folder or hub name of a diffusers checkpoint, or a bundled one: {', '.join(BUNDLED_MODELS)}"
COMPILE = "the transformer's blocks: on, off, or auto, where it pays on a GPU"
Out = Annotated[Path, typer.Option("-o", "--out", help="folder of the results; asked again, a run goes on in it")]
Texts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="what to show; quote each one")]
PromptsFile = Annotated[Path | None, typer.Option("--prompts", help="a text file, one prompt a line")]
Presets = Annotated[
    str | None,
    typer.Option("--presets", help="with commas between  [default: balanced,fast, or exact for a stock pipeline]"),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="SLOT[.KNOB]=VALUE", help="of every preset, as in generate")
]
Model = Annotated[str | None, typer.Option(help=f"{CHECKPOINT}  [default: {BUNDLED_MODELS[0]}]")]
Frames = Annotated[int | None, typer.Option(help="pixel frames, 1 + 4k")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="pixels, for example 832x480")]
Steps = Annotated[int | None, typer.Option(help="denoising steps (of each block)")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale; 1 is none")]
Negative = Annotated[str | None, typer.Option(help="what not to show")]
Seeds = Annotated[str, typer.Option(help="of the noise, with commas between")]
Seed = Annotated[int, typer.Option(help="of the noise")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")]
Offload = Annotated[str, typer.Option(help="none, model or sequential")]
Kind = Annotated[str | None, typer.Option("--pipeline", help="causal or stock  [default: the checkpoint's own]")]
Sampler = Annotated[str | None, typer.Option(help="multistep, few_step or rolling  [default: the checkpoint's own]")]
Compiling = Annotated[str, typer.Option("--compile", help=COMPILE)]
LpipsWeights = Annotated[
    str | None,
    typer.Option("--lpips-weights", metavar="FILE|download", help="AlexNet's  [default: those in torch's cache]"),
]
Clip = Annotated[str | None, typer.Option("--clip", help="folder or hub name of a CLIP that judges the text")]
Judge = Annotated[
    str | None,
    typer.Option("--judge", metavar="MODULE:FUNCTION", help="in place of --clip: function(clip, prompt) -> score"),
]
Restart = Annotated[bool, typer.Option("--restart", help="throw away what the folder holds")]
Fps = Annotated[float, typer.Option(help="frames a second of the videos")]
Rounds = Annotated[int, typer.Option(help="timed runs of every arm, alternating")]


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of the pipeline's call; None is the checkpoint's own."""

    frames: int | None
    size: str | None
    steps: int | None
    guidance: float | None
    negative: str | None
    sampler: str | None

    def arguments(self, given: Any) -> dict[str, Any]:
        require(self.steps is None or self.steps >= 1, f"--steps must be at least 1, got {self.steps}")
        require(self.guidance is None or self.guidance >= 0, f"--guidance must be 0 or more, got {self.guidance}")
        width, height = parse_size(self.size) if self.size else (given.width, given.height)
        wanted = {
            "width": width,
            "height": height,
            "num_frames": given.num_frames if self.frames is None else self.frames,
            "num_inference_steps": given.num_inference_steps if self.steps is None else self.steps,
            "guidance_scale": given.guidance_scale if self.guidance is None else self.guidance,
            "negative_prompt": self.negative,
            "sampler": self.sampler,
        }
        return {name: value for name, value in wanted.items() if value is not None}


def open_setup(
    out: Path,
    arms_of: "Callable[[bool], dict[str, Arm]]",
    prompts: list[str],
    seeds: list[int],
    call: Call,
    model: str | None,
    pipeline: str | None,
    dtype: str | None,
    device: str | None,
    offload: str,
    fps: float,
) -> "tuple[Setup, Ranks]":
    """The pipeline and what is evaluated on it, all checked, and who this process is."""
    require(not out.exists() or out.is_dir(), f"-o names the folder of the results, and '{out}' is a file")
    require(0 < fps <= 240, f"--fps must lie in (0, 240], got {fps}")
    check_parent(out)
    from ..eval.arms import Setup
    from ..ranks import ranks

    pipe, given = open_pipeline(model, pipeline, dtype, device, offload)
    arguments = call.arguments(given)
    arms = arms_of(bool(getattr(pipe, "block_causal", False)))
    for number, arm in enumerate(arms.values()):
        check_arguments(pipe, arm.accel, arguments, prompts if number == 0 else [])
    command = shlex.join(["diffaccel", *sys.argv[1:]])
    return Setup(pipe, arms, out, prompts, seeds, arguments, model or BUNDLED_MODELS[0], command, fps), ranks()


def unique_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """All prompts, each once; says what was left out of the file."""
    found = read_prompts(given or [], file)
    if file is not None:
        blank = sum(not line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        if blank:
            say(f"note: {blank} blank line{'s' if blank > 1 else ''} of '{file}' left out")
    unique = list(dict.fromkeys(found))
    if len(unique) < len(found):
        twice = next(text for text in unique if found.count(text) > 1)
        say(f"note: {len(found) - len(unique)} repeated prompt(s) left out, first '{twice}'; --seeds repeats a prompt")
    return unique


def preset_arms(presets: str | None, changes: Sequence[str]) -> "Callable[[bool], dict[str, Arm]]":
    """The arms of a pipeline that is causal (True) or not: those that were asked for, which are settings, or usual."""
    from ..eval.arms import Arm

    def of(text: str) -> "dict[str, Arm]":
        named = _presets(text)
        return {arm: Arm(build_accel(given_preset(name), changes), name, asked) for arm, name in named.items()}

    asked = dict(change.split("=", 1) for change in changes if "=" in change)
    found = of("balanced,fast" if presets is None else presets)  # mistakes are found before anything is opened
    return lambda causal: found if causal or presets is not None else of("exact")


def _presets(presets: str) -> dict[str, str]:
    """Presets and files of them, by the name of their arm: a file's without its ending."""
    from ..pipelines.presets import PRESETS

    names = [name.strip() for name in presets.split(",") if name.strip()]
    require(bool(names), f"--presets names none; choose of {', '.join(PRESETS)}, or name a .toml file")
    for name in names:
        if not is_preset_file(name):
            choose(name, PRESETS, "preset")
    arms = {Path(name).stem if is_preset_file(name) else name: name for name in names}
    require(len(arms) == len(names), f"--presets names one twice: {presets}")
    return arms


def whole_numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise UsageError(f"{option} takes whole numbers with commas between, got '{text}'") from None
    require(bool(found), f"{option} takes whole numbers with commas between, got '{text}'")
    require(len(set(found)) == len(found), f"{option} has a number twice: {text}")
    return found


def read_seeds(text: str) -> list[int]:
    found = whole_numbers("--seeds", text)
    require(min(found) >= 0, f"--seeds must be 0 or more, got {text}")
    return found


def check_lengths(setup: "Setup", lengths: Sequence[int]) -> None:
    from ..pipelines.inputs import check_frames

    for length in lengths:
        check_frames("--frames", length, setup.pipe.vae_scale_factor_temporal)


def measures_of(setup: "Setup | None", lpips_weights: str | None, clip: str | None, judge: str | None) -> "Measures":
    """LPIPS and the judge of text, or why not. What was named and cannot be had is a mistake, not a gap."""
    from ..eval.measure import Measures, load_judge
    from ..quality import ClipScore, Lpips, MetricError

    require(clip is None or judge is None, "--clip and --judge both judge the text; leave one of the two out")
    device = "cpu" if setup is None else setup.device
    weights = Lpips.download() if lpips_weights == "download" else lpips_weights
    lpips: Lpips | str
    try:
        lpips = Lpips(weights).to(device)
    except MetricError as error:
        if lpips_weights is not None:
            raise
        lpips = str(error)
    if clip is not None:
        return Measures(lpips, ClipScore(clip, device))
    return Measures(lpips) if judge is None else Measures(lpips, load_judge(judge))


def compile_blocks(mode: str, setup: "Setup", videos: int) -> None:
    from ..pipelines.compiling import MODES, compile_if, to_come

    choose(mode, MODES, "--compile")
    if sentence := compile_if(mode, setup.pipe, *to_come(setup.pipe, dict(setup.arguments), videos)):
        say(f"note: {sentence}")


@contextmanager
def working(setup: "Setup", name: str) -> "Iterator[tuple[Setup, Progress]]":
    """The setup with a progress bar, and what tells it where the run is; Ctrl-C says what is kept."""
    from ..eval.runs import Progress
    from ..eval.store import Store

    try:
        with progress_bar(name) as show:

            def on_arm(label: str, done: int, total: int) -> None:
                show(None, None, None, f"{done + 1} of {total} {label}" if total else label)

            def note(sentence: str) -> None:
                say(f"note: {sentence}")

            arguments = {**setup.arguments, "callback_on_step_end": counts_steps(show)}
            yield dataclasses.replace(setup, arguments=arguments), Progress(on_arm, note)
    except KeyboardInterrupt:
        places = {"tune": setup.out / "search", "quality": setup.out, "throughput": setup.out}
        kept = {kind: len(Store(folder).rows(kind)) for kind, folder in places.items()}
        held = " and ".join(f"{count} rows of {kind}" for kind, count in kept.items() if count) or "nothing"
        fail(f"interrupted; '{setup.out}' keeps {held}, and the same command goes on from there", 130)
