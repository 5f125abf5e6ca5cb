"""`diffaccel eval`: many prompts and settings against dense attention, in folders that survive a kill."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .asked import (
    Call,
    Changes,
    Clip,
    Compiling,
    Device,
    Dtype,
    Fps,
    Frames,
    Guidance,
    Judge,
    Kind,
    LpipsWeights,
    Model,
    Negative,
    Offload,
    Out,
    Presets,
    PromptsFile,
    Restart,
    Rounds,
    Sampler,
    Seed,
    Seeds,
    Size,
    Steps,
    Texts,
    check_lengths,
    compile_blocks,
    measures_of,
    open_setup,
    preset_arms,
    read_seeds,
    unique_prompts,
    whole_numbers,
    working,
)
from .checks import check_preset, one_sentence, require
from .eval_show import finish, run_vbench, show_frontier, show_quality, show_speed, write_page

app = typer.Typer(
    name="eval",
    help="Measure many prompts and settings against dense attention: quality, speed, and what one costs of the other.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


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
        arms = preset_arms(presets, changes or [])
        call = Call(frames, size, steps, guidance, negative, sampler)
        given = unique_prompts(texts, prompts_file)
        setup, ranks = open_setup(
            out, arms, given, read_seeds(seeds), call, model, pipeline, dtype, device, offload, fps
        )
        measures = measures_of(setup, lpips_weights, clip, judge)
        compile_blocks(compiling, setup, len(setup.prompts) * len(setup.seeds) * (3 + 2 * len(setup.arms)))
        from ..eval.runs import run_quality

        with working(setup, "quality") as (setup, progress):
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

        asked = whole_numbers("--frames", lengths)
        arms = preset_arms(presets, changes or [])
        call = Call(max(asked), size, steps, guidance, negative, sampler)
        texts = [prompt or DEFAULT_PROMPT]
        setup, ranks = open_setup(out, arms, texts, [seed], call, model, pipeline, dtype, device, offload, fps)
        check_lengths(setup, asked)
        measures = measures_of(setup, lpips_weights, clip, judge)
        compile_blocks(compiling, setup, len(asked) * rounds * (1 + len(setup.arms)))
        if ranks.main:
            with working(setup, "throughput") as (setup, progress):
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
    preset: Annotated[str, typer.Option(help="exact, balanced, fast or a file: where every point starts")] = "balanced",
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

        check_preset(preset, changes or [])
        parsed = [parse_sweep(text) for text in sweeps or []]
        knobs = [knob for knob, _ in parsed]
        require(len(set(knobs)) == len(knobs), "--sweep names one knob twice; give all its values at once")
        arms = sweep_arms(preset, changes or [], dict(parsed), most)
        if plotting:
            from ..plots import check_plots

            check_plots()
        given = unique_prompts(texts, prompts_file) if texts or prompts_file else [DEFAULT_PROMPT]
        call = Call(frames, size, steps, guidance, negative, sampler)
        asked = read_seeds(seeds)
        setup, ranks = open_setup(out, lambda _: arms, given, asked, call, model, pipeline, dtype, device, offload, fps)
        measures = measures_of(setup, lpips_weights, clip, judge)
        compile_blocks(compiling, setup, len(given) * len(setup.seeds) * (3 + 2 * len(arms)) + rounds * len(arms))
        with working(setup, "frontier") as (setup, progress):
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
        scored = measures_of(None, lpips_weights, clip, judge).against(clips[0], (), prompt).score(clips[1])
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(scored), indent=2, allow_nan=False))
            return
        typer.echo(f"'{other}' against '{reference}': {sizes[0]}")
        for name, value in scored.scores.items():
            beside = scored.reference.get(name)
            of = "" if beside is None else f"  (reference: {beside:.5g})"
            typer.echo(f"  {name}: {scored.unmeasured[name] if value is None else f'{value:.5g}{of}'}")
