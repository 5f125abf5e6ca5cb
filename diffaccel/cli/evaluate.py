"""`diffaccel eval`: many prompts and settings against dense attention, in folders that survive a kill."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..pipelines.loading import BUNDLED_MODELS
from ..settings import UsageError, build_accel
from ..suggest import choose
from .checks import (
    check_arguments,
    check_parent,
    fail,
    one_sentence,
    open_pipeline,
    parse_size,
    read_prompts,
    require,
    say,
)
from .eval_show import finish, run_vbench, show_frontier, show_quality, show_speed, write_page
from .show import counts_steps, progress_bar

if TYPE_CHECKING:
    from ..eval.arms import Arm, Setup
    from ..eval.measure import Measures
    from ..eval.runs import Progress
    from ..ranks import Ranks

app = typer.Typer(
    name="eval",
    help="Measure many prompts and settings against dense attention: quality, speed, and what one costs of the other.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_MODEL = f"folder or hub name of a diffusers checkpoint, or a bundled one: {', '.join(BUNDLED_MODELS)}"
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
Model = Annotated[str | None, typer.Option(help=f"{_MODEL}  [default: {BUNDLED_MODELS[0]}]")]
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
Sampler = Annotated[str | None, typer.Option(help="multistep or few_step  [default: the checkpoint's own]")]
Compiling = Annotated[str, typer.Option("--compile", help="the transformer's blocks: on, off, or auto")]
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


@app.command()
def quality(
    out: Out,
    texts: Texts = None,
    prompts_file: PromptsFile = None,
    presets: Presets = None,
    changes: Changes = None,
    seeds: Seeds = "0",
    model: Model = None,
    frames: Frames = None,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    lpips_weights: LpipsWeights = None,
    clip: Clip = None,
    judge: Judge = None,
    vbench: Annotated[bool, typer.Option("--vbench", help="also VBench, where it is installed")] = False,
    vbench_long: Annotated[bool, typer.Option("--vbench-long", help="also VBench-Long, of the same package")] = False,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    pipeline: Kind = None,
    sampler: Sampler = None,
    compiling: Compiling = "auto",
    fps: Fps = 16.0,
    restart: Restart = False,
) -> None:
    """Measure presets against dense attention on the same noise, over prompts and seeds."""
    with one_sentence():
        arms = _preset_arms(presets, changes or [])
        call = _Call(frames, size, steps, guidance, negative, sampler)
        given = _prompts(texts, prompts_file)
        setup, ranks = _open(out, arms, given, _seeds(seeds), call, model, pipeline, dtype, device, offload, fps)
        measures = _measures(setup, lpips_weights, clip, judge)
        _compile(compiling, setup, len(setup.prompts) * len(setup.seeds) * (3 + 2 * len(setup.arms)))
        from ..eval.runs import run_quality

        with _working(setup, "quality") as (setup, progress):
            rows = run_quality(setup, measures, restart=restart, progress=progress, ranks=ranks)
        if ranks.main:
            summary = show_quality(out, rows)
            for long in [long for long, asked in ((False, vbench), (True, vbench_long)) if asked]:
                run_vbench(out, rows, setup, ranks, long)
            write_page(out)
        ranks.wait()  # nobody leaves with an error while another still writes
        if ranks.main:
            finish(summary)


@app.command()
def throughput(
    out: Out,
    prompt: Annotated[str | None, typer.Argument(help="what to show; quote it")] = None,
    lengths: Annotated[str, typer.Option("--frames", help="pixel frames, 1 + 4k, with commas between")] = "33,81,161",
    rounds: Rounds = 3,
    presets: Presets = None,
    changes: Changes = None,
    seed: Seed = 0,
    model: Model = None,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    lpips_weights: LpipsWeights = None,
    clip: Clip = None,
    judge: Judge = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    pipeline: Kind = None,
    sampler: Sampler = None,
    compiling: Compiling = "auto",
    timing: Annotated[bool, typer.Option("--attention/--no-attention", help="time attention apart")] = True,
    fps: Fps = 16.0,
    restart: Restart = False,
) -> None:
    """Time presets and dense attention against the length of the video; from which length on do they pay?"""
    with one_sentence():
        from ..eval.runs import DEFAULT_PROMPT
        from ..eval.speed import run_throughput, summarize_speed

        asked = _whole_numbers("--frames", lengths)
        arms = _preset_arms(presets, changes or [])
        call = _Call(max(asked), size, steps, guidance, negative, sampler)
        texts = [prompt or DEFAULT_PROMPT]
        setup, ranks = _open(out, arms, texts, [seed], call, model, pipeline, dtype, device, offload, fps)
        _check_lengths(setup, asked)
        measures = _measures(setup, lpips_weights, clip, judge)
        _compile(compiling, setup, len(asked) * rounds * (1 + len(setup.arms)))
        if ranks.main:
            with _working(setup, "throughput") as (setup, progress):
                rows = run_throughput(
                    setup, asked, rounds, measures=measures, timing=timing, restart=restart, progress=progress
                )
            summary = show_quality(out)
            show_speed(summarize_speed(rows))
            write_page(out)
        ranks.wait()
        if ranks.main:
            finish(summary)


@app.command()
def frontier(
    out: Out,
    texts: Texts = None,
    prompts_file: PromptsFile = None,
    preset: Annotated[str, typer.Option(help="exact, balanced or fast: where every point starts from")] = "balanced",
    sweeps: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="SLOT.KNOB=A,B,C", help="values; with semicolons where they hold commas"),
    ] = None,
    most: Annotated[int | None, typer.Option("--max-points", help="of the grid, drawn at random")] = None,
    changes: Changes = None,
    rounds: Rounds = 2,
    seeds: Seeds = "0",
    model: Model = None,
    frames: Frames = None,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    lpips_weights: LpipsWeights = None,
    clip: Clip = None,
    judge: Judge = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    pipeline: Kind = None,
    sampler: Sampler = None,
    compiling: Compiling = "auto",
    plotting: Annotated[bool, typer.Option("--plot/--no-plot", help="draw frontier.png (extra: plots)")] = True,
    fps: Fps = 16.0,
    restart: Restart = False,
) -> None:
    """Sweep knobs of a preset: quality against time and memory, with the settings that nothing beats."""
    with one_sentence():
        from ..eval.frontier import parse_sweep, plot, run_frontier, sweep_arms
        from ..eval.runs import DEFAULT_PROMPT

        choose(preset, _preset_names(), "preset")
        parsed = [parse_sweep(text) for text in sweeps or []]
        knobs = [knob for knob, _ in parsed]
        require(len(set(knobs)) == len(knobs), "--sweep names one knob twice; give all its values at once")
        arms = sweep_arms(preset, changes or [], dict(parsed), most)
        if plotting:
            from ..plots import check_plots

            check_plots()
        given = _prompts(texts, prompts_file) if texts or prompts_file else [DEFAULT_PROMPT]
        call = _Call(frames, size, steps, guidance, negative, sampler)
        asked = _seeds(seeds)
        setup, ranks = _open(out, lambda _: arms, given, asked, call, model, pipeline, dtype, device, offload, fps)
        measures = _measures(setup, lpips_weights, clip, judge)
        _compile(compiling, setup, len(given) * len(setup.seeds) * (3 + 2 * len(arms)) + rounds * len(arms))
        with _working(setup, "frontier") as (setup, progress):
            points = run_frontier(setup, measures, rounds=rounds, restart=restart, progress=progress, ranks=ranks)
        if ranks.main:
            show_quality(out)
            show_frontier(points)
            if plotting:
                typer.echo(f"plot: {plot(points, out / 'frontier.png')}")
            write_page(out)


@app.command()
def videos(
    reference: Annotated[Path, typer.Argument(metavar="A", help="a .mp4, .gif or folder of PNG frames")],
    other: Annotated[Path, typer.Argument(metavar="B", help="what is held against it")],
    prompt: Annotated[str, typer.Option(help="what they show, for --clip and --judge")] = "",
    lpips_weights: LpipsWeights = None,
    clip: Clip = None,
    judge: Judge = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Hold one video on the disk against another of its size and length."""
    with one_sentence():
        import json

        from ..quality import Clip as Frames
        from ..video import read_video

        clips: list[Frames] = [read_video(path) for path in (reference, other)]
        require(bool(prompt) or not (clip or judge), "--clip and --judge need --prompt, which says what to look for")
        sizes = [f"{len(c)} frames of {c.shape[2]}x{c.shape[1]}" for c in clips]
        require(
            clips[0].shape == clips[1].shape,
            f"videos are compared frame by frame: '{reference}' has {sizes[0]}, and '{other}' has {sizes[1]}; cut or "
            "resize one of them first",
        )
        scored = _measures(None, lpips_weights, clip, judge).against(clips[0], (), prompt).score(clips[1])
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(scored), indent=2, allow_nan=False))
            return
        typer.echo(f"'{other}' against '{reference}': {sizes[0]}")
        for name, value in scored.scores.items():
            beside = scored.reference.get(name)
            of = "" if beside is None else f"  (reference: {beside:.5g})"
            typer.echo(f"  {name}: {scored.unmeasured[name] if value is None else f'{value:.5g}{of}'}")


# -- what is asked -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
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


def _open(
    out: Path,
    arms_of: "Callable[[bool], dict[str, Arm]]",
    prompts: list[str],
    seeds: list[int],
    call: _Call,
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


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
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


def _preset_names() -> list[str]:
    from ..pipelines.presets import PRESETS

    return list(PRESETS)


def _preset_arms(presets: str | None, changes: Sequence[str]) -> "Callable[[bool], dict[str, Arm]]":
    """The arms of a pipeline that is causal (True) or not: those that were asked for, which are settings, or usual."""
    from ..eval.arms import Arm

    def of(text: str) -> "dict[str, Arm]":
        return {name: Arm(build_accel(name, changes), name, asked) for name in _presets(text)}

    asked = dict(change.split("=", 1) for change in changes if "=" in change)
    found = of("balanced,fast" if presets is None else presets)  # mistakes are found before anything is opened
    return lambda causal: found if causal or presets is not None else of("exact")


def _presets(presets: str) -> list[str]:
    names = [name.strip() for name in presets.split(",") if name.strip()]
    require(bool(names), f"--presets names none; choose of {', '.join(_preset_names())}")
    require(len(set(names)) == len(names), f"--presets names one twice: {presets}")
    for name in names:
        choose(name, _preset_names(), "preset")
    return names


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise UsageError(f"{option} takes whole numbers with commas between, got '{text}'") from None
    require(bool(found), f"{option} takes whole numbers with commas between, got '{text}'")
    require(len(set(found)) == len(found), f"{option} has a number twice: {text}")
    return found


def _seeds(text: str) -> list[int]:
    found = _whole_numbers("--seeds", text)
    require(min(found) >= 0, f"--seeds must be 0 or more, got {text}")
    return found


def _check_lengths(setup: "Setup", lengths: Sequence[int]) -> None:
    from ..pipelines.inputs import check_frames

    for length in lengths:
        check_frames("--frames", length, setup.pipe.vae_scale_factor_temporal)


def _measures(setup: "Setup | None", lpips_weights: str | None, clip: str | None, judge: str | None) -> "Measures":
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


def _compile(mode: str, setup: "Setup", videos: int) -> None:
    from ..pipelines.compiling import MODES, compile_if, to_come

    choose(mode, MODES, "--compile")
    if sentence := compile_if(mode, setup.pipe, *to_come(setup.pipe, dict(setup.arguments), videos)):
        say(f"note: {sentence}")


@contextmanager
def _working(setup: "Setup", name: str) -> "Iterator[tuple[Setup, Progress]]":
    """The setup with a progress bar, and what tells it where the run is; Ctrl-C says what is kept."""
    from ..eval.runs import Progress
    from ..eval.store import Store

    try:
        with progress_bar(name) as show:

            def on_arm(label: str, done: int, total: int) -> None:
                show(None, None, None, f"{done + 1 if total else 0} of {total} {label}")

            def note(sentence: str) -> None:
                say(f"note: {sentence}")

            arguments = {**setup.arguments, "callback_on_step_end": counts_steps(show)}
            yield dataclasses.replace(setup, arguments=arguments), Progress(on_arm, note)
    except KeyboardInterrupt:
        kept = {kind: len(Store(setup.out).rows(kind)) for kind in ("quality", "throughput")}
        held = " and ".join(f"{count} rows of {kind}" for kind, count in kept.items() if count) or "nothing"
        fail(f"interrupted; '{setup.out}' keeps {held}, and the same command goes on from there", 130)
