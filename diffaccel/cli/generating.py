"""`diffaccel generate`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ..pipelines.loading import BUNDLED_MODELS, saved_setting
from ..ranks import ranks, speaks
from ..settings import describe_accel
from ..suggest import choose
from .asked import CHECKPOINT, COMPILE
from .checks import (
    accel_for,
    check_arguments,
    check_graphs,
    check_output,
    check_parent,
    check_preset,
    check_profile,
    default_preset,
    one_sentence,
    open_pipeline,
    parse_size,
    read_first_frame,
    read_prompts,
    replays,
    require,
    say,
)
from .job import Job, finish
from .sharing import check_sharing, share


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="what to show; quote each one")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help=".mp4, .gif, or a folder")] = Path("out.mp4"),
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="a text file, one prompt a line")] = None,
    model: Annotated[str | None, typer.Option(help=f"{CHECKPOINT}  [default: {BUNDLED_MODELS[0]}]")] = None,
    frames: Annotated[int | None, typer.Option(help="pixel frames, 1 + 4k")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="pixels, for example 832x480")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps (of each block)")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; 1 is none")] = None,
    seed: Annotated[int, typer.Option(help="of the noise; every prompt gets the same")] = 0,
    negative: Annotated[str | None, typer.Option(help="what not to show")] = None,
    image: Annotated[Path | None, typer.Option(help="the first frame")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="exact, balanced, fast, auto or a file  "
            "[default: what was saved with the model, else balanced, or exact for a stock pipeline]"
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SLOT[.KNOB]=VALUE", help="reuse.refresh=0,3,6  cache=none  kernel=sdpa"),
    ] = None,
    comparing: Annotated[bool, typer.Option("--compare", help="also generate densely and measure both")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")] = None,
    offload: Annotated[str, typer.Option(help="none, model or sequential")] = "none",
    pipeline: Annotated[str | None, typer.Option(help="causal or stock  [default: the checkpoint's own]")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="multistep, few_step or rolling  [default: the checkpoint's own]")
    ] = None,
    compiling: Annotated[str, typer.Option("--compile", help=COMPILE)] = "auto",
    graphs: Annotated[
        bool | None,
        typer.Option(
            "--graphs/--no-graphs",
            help="replay forwards that repeat as CUDA graphs; attention is not timed then  [default: with preset auto]",
        ),
    ] = None,
    ulysses: Annotated[
        int | None, typer.Option(metavar="N", help="share the heads of one video between the N processes of torchrun")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="frames a second of the file  [default: 16]")] = None,
    report: Annotated[Path | None, typer.Option(help="write what happened as JSON")] = None,
    plots: Annotated[Path | None, typer.Option(help="folder for pictures of the cache: length, recall, time")] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="TRACE.json", help="trace the first video's last blocks for chrome://tracing")
    ] = None,
    profile_blocks: Annotated[int, typer.Option(help="blocks to trace (steps where there are no blocks)")] = 2,
) -> None:
    """Generate a video for each prompt."""
    with one_sentence():
        texts = read_prompts(prompts or [], prompts_file)
        many = len(texts) > 1 or prompts_file is not None
        check_output(out, texts, many=many, comparing=comparing)
        if report is not None:
            check_parent(report)
        if plots is not None:
            from .. import backbone
            from ..accel import goes_by_blocks
            from ..plots import check_plots, plot_cache

            check_plots()
            check_parent(plots)
            require(not plots.exists() or plots.is_dir(), f"--plots names a folder, and '{plots}' is a file")
        if profile is not None:
            check_profile(profile, profile_blocks, comparing=comparing)
        if ulysses is not None:
            observing = plots is not None
            check_sharing(ulysses, texts, comparing=comparing, observing=observing, device=device, offload=offload)
        width, height = parse_size(size) if size else (None, None)
        require(steps is None or steps >= 1, f"--steps must be at least 1, got {steps}")
        require(fps is None or 0 < fps <= 240, f"--fps must lie in (0, 240], got {fps}")
        require(guidance is None or guidance >= 0, f"--guidance must be 0 or more, got {guidance}")
        own = saved_setting(model) if preset is None else None
        if own is not None:
            say(f"note: the setting saved with the model is used, '{own}'; --preset takes another")
            preset = str(own)
        check_preset(preset, changes or [])
        picture = read_first_frame(image) if image else None

        pipe, given = open_pipeline(model, pipeline, dtype, device, offload)
        from ..pipelines.compiling import MODES, compile_if, to_come  # imports diffusers, as what was opened did

        choose(compiling, MODES, "--compile")
        if ulysses is not None:
            share(pipe)
        if graphs:
            check_graphs(pipe, comparing=comparing, observing=plots is not None)
        require(
            plots is None or goes_by_blocks(pipe, backbone.find(pipe)[0]),
            f"--plots draws the cache of block-by-block generation, and {type(pipe).__name__} has none; leave it out",
        )
        wanted = {
            "width": given.width if width is None else width,
            "height": given.height if height is None else height,
            "num_frames": given.num_frames if frames is None else frames,
            "num_inference_steps": given.num_inference_steps if steps is None else steps,
            "guidance_scale": given.guidance_scale if guidance is None else guidance,
            "negative_prompt": negative,
            "image": picture,
            "sampler": sampler,
        }
        arguments = {name: value for name, value in wanted.items() if value is not None}
        accel = accel_for(pipe, preset, changes or [], arguments)
        check_arguments(pipe, accel, arguments, texts)
        fps = given.fps if fps is None else fps
        alone = preset == "auto" and not comparing and plots is None and profile is None
        if graphs or (graphs is None and alone and replays(pipe, accel)):
            arguments["graphs"] = True
        if sentence := compile_if(compiling, pipe, *to_come(pipe, arguments, len(texts) * (1 + comparing))):
            say(f"note: {sentence}")
        job = Job(pipe, accel, arguments, seed, fps, many=many, observe=plots is not None, devices=ulysses or 1)
        if profile is not None and job.writes:
            job = dataclasses.replace(job, profile=(profile, profile_blocks))
        require(ranks().count == 1 or not comparing, "--compare is for one process; diffaccel eval quality is for more")
        if speaks():
            typer.echo(f"preset {preset or default_preset(pipe)}: {describe_accel(accel)}")
        results = [job.compare(texts[0], out)] if comparing else job.generate(texts, out)
        if report is not None and speaks():
            from ..report import write_json

            content = results[0].report if len(results) == 1 else {"runs": [result.report for result in results]}
            write_json(report, content)
        if plots is not None and speaks():
            plots.mkdir(exist_ok=True)
            for number, result in enumerate(results):
                name = "cache.png" if len(results) == 1 else f"cache-{number + 1}.png"
                if result.report.get("blocks"):
                    typer.echo(f"plot: {plot_cache(result.report, plots / name)}")
                else:
                    typer.echo("no plot: no block was finished and kept, so there is nothing to draw")
        if ulysses is not None:
            ranks().wait()  # torchrun ends all once one exits with another code than 0
        finish(results, asked=(preset not in (None, "auto") and own is None) or bool(changes))
