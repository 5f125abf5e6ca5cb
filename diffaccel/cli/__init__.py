"""The `diffaccel` command: generate, compare, list what there is, and say what is wrong in one sentence.

Exit codes: 0 done; 1 a technique asked for by --preset or --set never engaged (the video is kept), `doctor` found the
kernel in use to be wrong, or nothing that `tune` tried reached the target; 2 a mistake in what was asked, found before
anything was computed; 130 interrupted (the frames so far are kept).
"""

import dataclasses
import json
import re
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..pipelines.loading import BUNDLED_MODELS, BUNDLED_TEXT_MODEL, saved_setting
from ..ranks import ranks, speaks
from ..settings import build_accel, describe_accel, describe_slots, describe_technique
from ..suggest import choose
from .checks import (
    accel_for,
    check_arguments,
    check_graphs,
    check_output,
    check_parent,
    check_preset,
    check_profile,
    default_preset,
    fail,
    one_sentence,
    open_pipeline,
    parse_shares,
    parse_size,
    read_first_frame,
    read_prompts,
    replays,
    require,
    say,
)
from .demo import demo
from .evaluate import app as evaluation
from .job import Job, finish
from .reporting import report as write_report
from .sharing import check_sharing, share
from .show import counts_steps, print_report, progress_bar, readable
from .tuning import tune

if TYPE_CHECKING:
    from ..run import Run

app = typer.Typer(
    name="diffaccel",
    help="Faster video diffusion without training: the same video in less time and memory, with proof and a price.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(evaluation)

_COMPILE = "the transformer's blocks: on, off, or auto, where it pays on a GPU"
_MODEL = f"folder or hub name of a diffusers checkpoint, or a bundled one: {', '.join(BUNDLED_MODELS)}"


def main() -> None:
    """Entry point of the `diffaccel` command."""
    app()


# -- commands ------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="what to show; quote each one")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help=".mp4, .gif, or a folder")] = Path("out.mp4"),
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="a text file, one prompt a line")] = None,
    model: Annotated[str | None, typer.Option(help=f"{_MODEL}  [default: {BUNDLED_MODELS[0]}]")] = None,
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
    compiling: Annotated[str, typer.Option("--compile", help=_COMPILE)] = "auto",
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


@app.command()
def calibrate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="usual ones  [default for a bundled model: two of its own]"),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="the profile  [default: METHOD.json]")] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="a text file, one prompt a line")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="annsa, flashblock, triattention, razorattention, duoattention, compresskv, hylra or lycheedecode"
        ),
    ] = "annsa",
    model: Annotated[str | None, typer.Option(help=f"{_MODEL}  [default: {BUNDLED_MODELS[0]}]")] = None,
    frames: Annotated[
        int | None, typer.Option(help="pixel frames, 1 + 4k  [default: the model's, or what min_past takes]")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="pixels, for example 832x480")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps (of each block)")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="SLOT.KNOB=VALUE", help="as the profile will be used with")
    ] = None,
    densities: Annotated[str, typer.Option(help="of annsa: shares of the keys to measure at")] = "0.1,0.2,0.3,0.5",
    seed: Annotated[int, typer.Option(help="of the noise; every prompt gets the same")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")] = None,
) -> None:
    """Measure where a method serves a model best, for --set SLOT.profile=FILE.

    Makes a dense video of each prompt and writes, for every step, layer and head, the recall of attention mass at every
    density (annsa), or how far attention to the outside moved since earlier steps (flashblock). For caches: what their
    heads do in clean passes, of every layer and head.
    """
    with one_sentence():
        from ..accel import Accel
        from ..calibrate import METHODS, PROMPTS, check, frames_wanted, summary
        from ..calibrate import calibrate as measure

        kind = METHODS[choose(method, tuple(METHODS), "method to calibrate")]
        out = Path(f"{method}.json") if out is None else out
        ours = model in (None, *BUNDLED_MODELS) and not prompts and prompts_file is None
        texts = list(PROMPTS) if ours else read_prompts(prompts or [], prompts_file)
        require(out.suffix.lower() == ".json" and not out.is_dir(), f"-o must name a .json file, got '{out}'")
        check_parent(out)
        asked = parse_size(size) if size else None
        require(steps is None or steps >= 1, f"--steps must be at least 1, got {steps}")
        for change in changes or []:
            require(change.startswith(f"{kind.slot}."), f"--set takes {kind.slot}.KNOB=VALUE here, got '{change}'")
        accel = build_accel("exact", ["prompt=none", f"{kind.slot}={kind.__name__}", *(changes or [])])
        policy: Any = getattr(accel, kind.slot)
        shares = parse_shares(densities)
        check(policy, shares)

        pipe, given = open_pipeline(model, None, dtype, device, "none")
        width, height = asked or (given.width, given.height)
        wanted = {
            "width": width,
            "height": height,
            "num_frames": frames_wanted(pipe, policy, given.num_frames) if frames is None else frames,
            "num_inference_steps": given.num_inference_steps if steps is None else steps,
            "guidance_scale": given.guidance_scale,
        }
        arguments = {name: value for name, value in wanted.items() if value is not None}
        exact = kind.exact if kind.needs == "calibration" else {}  # what needs a profile has none yet
        fits = Accel(**{kind.slot: dataclasses.replace(policy, **exact)})
        check_arguments(pipe, fits, arguments, texts)
        with progress_bar(texts[0]) as show:
            profile = measure(
                pipe,
                policy,
                prompts=texts,
                densities=shares,
                seed=seed,
                on_prompt=lambda number: show(0, None, None, f"{number + 1} of {len(texts)}: {texts[number][:32]}"),
                callback_on_step_end=counts_steps(show),
                **arguments,
            )
        profile.save(out)
        typer.echo(f"{out}: {kind.__name__}, {profile.about()}")
        typer.echo("\n".join(summary(profile)))


@app.command()
def text(
    prompt: Annotated[str, typer.Argument(help="what to go on from; quote it")],
    model: Annotated[
        str | None,
        typer.Option(
            help=f"folder or hub name of a block-diffusion language model  [default: the bundled {BUNDLED_TEXT_MODEL}]"
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="exact, auto or fast")] = "exact",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="SLOT[.KNOB]=VALUE", help="reuse.tau=3  kernel=sdpa")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="tokens to write  [default: the model's, or 128]")] = None,
    block: Annotated[int | None, typer.Option(help="tokens of a block  [default: the model's]")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps of a block, at most")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="confidence that unmasks a token; above 1: evenly over the steps")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="of the sampling; 0 takes the likeliest token")] = None,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    comparing: Annotated[bool, typer.Option("--compare", help="also write densely, and compare")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")] = None,
    report: Annotated[Path | None, typer.Option(help="write what happened as JSON")] = None,
) -> None:
    """Write text with a block-diffusion language model."""
    with one_sentence():
        import transformers.utils.logging as transformers_logging

        from ..report import write_json
        from ..text import build_reuse, check_prompt, compare, load, to_report, unread, write

        require(bool(prompt.strip()), "the prompt is empty; say what the text should go on from")
        if report is not None:
            check_parent(report)
        build_reuse(preset, changes or [])
        transformers_logging.disable_progress_bar()
        opened = load(model, dtype, device)
        writer = opened.writer(
            max_tokens=max_tokens,
            block_length=block,
            num_inference_steps=steps,
            threshold=threshold,
            temperature=temperature,
            seed=seed,
        )
        check_prompt(opened, prompt)
        for sentence in unread(opened, prompt, writer):
            say(f"warning: {sentence}")
        tokens = len(opened.tokenizer(prompt)["input_ids"]) + writer.max_tokens
        how = build_reuse(preset, changes or [], tokens)
        if preset == "auto" and how[0] is None:
            say(f"note: exact, because a text of at most {tokens} tokens is too short for reuse to be sure to pay")
        comparison = compare(opened, prompt, writer, *how) if comparing else None
        written = write(opened, prompt, writer, *how) if comparison is None else comparison.arms["asked"]
        typer.echo(written.text)
        typer.echo("\n".join(comparison.lines()) if comparison else written.about())
        if report is not None:
            write_json(report, to_report(opened, prompt, writer, written, comparison))
        if written.idle:
            fail(written.idle, 1)


@app.command()
def upscale(
    what: Annotated[str, typer.Argument(metavar="VIDEO|PROMPT", help="a .mp4 or .gif, or what to show; quote it")],
    out: Annotated[Path, typer.Option("-o", "--out", help=".mp4, .gif, or a folder")] = Path("out.mp4"),
    prompt: Annotated[str | None, typer.Option(help="what VIDEO shows")] = None,
    scale: Annotated[float | None, typer.Option(help="times the size of VIDEO, or of the model")] = None,
    height: Annotated[int | None, typer.Option(help="pixels, in place of --scale")] = None,
    width: Annotated[int | None, typer.Option(help="pixels, in place of --scale")] = None,
    model: Annotated[str | None, typer.Option(help=f"{_MODEL}  [default: {BUNDLED_MODELS[0]}]")] = None,
    native: Annotated[
        str | None, typer.Option(metavar="WxH", help="what the model was trained on  [default: the model's size]")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="pixel frames, 1 + 4k; of VIDEO the first ones")] = None,
    tile: Annotated[
        str | None,
        typer.Option(metavar="RxC", help="rows x columns of tokens that share a window  [default: a quarter]"),
    ] = None,
    guide_every: Annotated[int, typer.Option(help="steps between passes over the whole frame")] = 2,
    guide_field: Annotated[
        str, typer.Option(help="these passes see it at the native size, or token by token (native or whole)")
    ] = "native",
    no_guide: Annotated[bool, typer.Option("--no-guide", help="windows alone")] = False,
    hold: Annotated[str, typer.Option(help="where what guides is kept: device, int8 or host")] = "device",
    strength: Annotated[float, typer.Option(help="share of the steps that are run again, in (0, 1]")] = 0.7,
    steps: Annotated[int | None, typer.Option(help="denoising steps (of each block)")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; 1 is none")] = None,
    negative: Annotated[str | None, typer.Option(help="what not to show")] = None,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")] = None,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="encode and decode in tiles: less memory")] = False,
    offload: Annotated[str, typer.Option(help="none, model or sequential")] = "none",
    pipeline: Annotated[str | None, typer.Option(help="causal or stock  [default: the checkpoint's own]")] = None,
    compiling: Annotated[str, typer.Option("--compile", help=_COMPILE)] = "auto",
    fps: Annotated[float | None, typer.Option(help="frames a second of the file  [default: 16]")] = None,
    report: Annotated[Path | None, typer.Option(help="write what happened as JSON")] = None,
) -> None:
    """Make a video larger than the model was trained for (FreeSwim)."""
    with one_sentence():
        import torch

        from ..upscale import check_memory, estimate
        from ..video import check_output, read_video, write_video

        check_output(out)
        if report is not None:
            check_parent(report)
        require(scale is None or (height is None and width is None), "--scale, or --height and --width, got both")
        require((height is None) == (width is None), "--height and --width go together; or use --scale")
        require(scale is not None or height is not None, "--scale, or --height and --width, says how large")
        require(steps is None or steps >= 1, f"--steps must be at least 1, got {steps}")
        require(fps is None or 0 < fps <= 240, f"--fps must lie in (0, 240], got {fps}")
        require(guidance is None or guidance >= 0, f"--guidance must be 0 or more, got {guidance}")
        require(guide_every >= 1, f"--guide-every is at least 1, got {guide_every}")
        cut = re.fullmatch(r"(\d+)[xX](\d+)", tile) if tile else None
        require(tile is None or cut is not None, f"--tile takes rows x columns of tokens, such as 17x20, got '{tile}'")
        of_file = Path(what).suffix.lower() in (".mp4", ".gif")
        video = read_video(what) if of_file else None
        require(not of_file or prompt is not None, "--prompt says what the video shows; it is missing")
        text = prompt if of_file else what
        if video is not None and frames is not None:
            require(frames <= len(video), f"--frames {frames} is more than the {len(video)} of '{what}'")
            video = video[:frames]

        pipe, given = open_pipeline(model, pipeline, dtype, device, offload)
        from ..pipelines import FreeSwimPipeline  # imports diffusers, which the rules above need not wait for
        from ..pipelines.compiling import MODES, compile_if

        choose(compiling, MODES, "--compile")
        base = parse_size(native) if native else (given.width, given.height)
        start = base if video is None else (video.shape[2], video.shape[1])
        if scale is not None:
            width, height = (round(side * scale) for side in start)
        assert height is not None
        assert width is not None
        if abs(width / height / (start[0] / start[1]) - 1) > 0.02:
            say(f"note: {start[0]}x{start[1]} and {width}x{height} differ in shape, so the picture is stretched")
        big = FreeSwimPipeline(
            pipe,
            native=(base[1], base[0]),
            tile=None if cut is None else (int(cut[1]), int(cut[2])),
            guide_every=None if no_guide else guide_every,
            guide_field=guide_field,
            hold=hold,
        )
        big.check(height, width, strength)
        count = len(video) if video is not None else given.num_frames if frames is None else frames
        wanted = {
            "height": height,
            "width": width,
            "num_frames": count,
            "strength": strength,
            "num_inference_steps": given.num_inference_steps if steps is None else steps,
            "guidance_scale": given.guidance_scale if guidance is None else guidance,
            "negative_prompt": negative,
        }
        settings: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        check_arguments(pipe, big.accel, settings, [text or ""])
        expected = estimate(
            big,
            height,
            width,
            count,
            steps=settings.get("num_inference_steps", 50),
            strength=strength,
            guidance=settings.get("guidance_scale", 5.0),
        )
        check_memory(big, height, width, count, branches=2 if settings.get("guidance_scale", 5.0) > 1 else 1)
        typer.echo(
            f"{start[0]}x{start[1]} to {width}x{height}: a window reads {expected.share:.0%} of a frame; "
            f"{expected.forwards} forwards, {expected.passes} of them over the whole field; about "
            f"{expected.seconds:.0f} s of denoising, {readable(expected.kept_bytes)} kept to guide"
        )
        tokens = big.frames_at_once(count) * prod(big.tokens(height, width))
        if sentence := compile_if(compiling, pipe, expected.forwards, tokens):
            say(f"note: {sentence}")
        runs: list[Run] = []
        with progress_bar(text or what) as show:
            made = big(
                text or "",
                video,
                **settings,
                generator=torch.Generator().manual_seed(seed),
                vae_tiling=vae_tiling,
                callback_on_step_end=counts_steps(show),
                on_run=runs.append,
            ).frames[0]
        write_video(out, made, given.fps if fps is None else fps)
        found = runs[0].report()
        print_report(out, len(made), found)
        if report is not None:
            from ..report import write_json

            about = {"file": str(out), "prompt": text, "seed": seed, "settings": settings}
            write_json(report, {**about, "estimate": dataclasses.asdict(expected), **found.to_dict()})


@app.command()
def methods(
    pipeline: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="say instead which of them a family of pipelines takes")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """List every technique: its slot, paper, knobs with defaults, and the setting at which it is dense attention.

    Behind them come the layers that are trained in place of attention.
    """
    from ..kernel import CHOICES
    from ..mixers import MIXERS
    from ..pipelines.presets import PRESETS
    from ..support import support_of
    from ..techniques import TECHNIQUES

    if pipeline is not None:
        with one_sentence():
            taken = support_of(pipeline)
        lines = [f"{name}: {', '.join(filter(None, row.values()))}" for name, row in taken.items()]
        typer.echo(json.dumps(taken, indent=2) if as_json else "\n".join(lines))
        return
    if as_json:
        content = {
            "techniques": [describe_technique(technique) for technique in TECHNIQUES],
            "mixers": [
                {"name": mixer.__name__, "paper": mixer.paper, "summary": mixer.summary, "needs": mixer.needs}
                for mixer in MIXERS
            ],
            "presets": {name: describe_slots(preset()) for name, preset in PRESETS.items()},
            "kernels": list(CHOICES),
        }
        typer.echo(json.dumps(content, indent=2))
        return
    lines = []
    for technique in TECHNIQUES:
        about = describe_technique(technique)
        lines += [f"{about['name']}  (slot {about['slot']})", f"  {about['summary']}", f"  {about['paper']}"]
        pipelines = "causal" if about["needs_blocks"] else "any"
        lines.append(f"  needs {about['needs']} before, goes with {pipelines} pipelines")
        slot = about["slot"]
        exact = "".join(f" --set {slot}.{name}={value}" for name, value in about["exact"].items())
        lines.append(f"  exact: --set {slot}={about['name']}{exact or ', always (lossless)'}")
        for knob in about["knobs"]:
            lines.append(f"    {about['slot']}.{knob['name']} = {knob['default']!r}  {knob['help']}")
        lines.append("")
    for mixer in MIXERS:
        lines += [f"{mixer.__name__}  (diffaccel.mixers)", f"  {mixer.summary}", f"  {mixer.paper}"]
        lines += [f"  needs {mixer.needs} before", ""]
    lines += [f"preset {name}: {describe_accel(preset())}" for name, preset in PRESETS.items()]
    lines.append(f"kernels: {', '.join(CHOICES)}")
    typer.echo("\n".join(lines))


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="PIPELINE", help=f"{_MODEL}; default: {BUNDLED_MODELS[0]}")
    ] = None,
    pipeline: Annotated[str | None, typer.Option(help="causal or stock")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="for the tokens of a frame")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Show what would be patched in a pipeline, and which techniques it can take."""
    with one_sentence():
        asked = parse_size(size) if size else None
        pipe, given = open_pipeline(model, pipeline, None, "cpu", "none")
        from ..accel import Accel

        width, height = asked or (given.width, given.height)
        rows = Accel().describe(pipe)
        for row in rows:
            unit = [pipe.vae_scale_factor_spatial * side for side in row["patch"][1:]]
            row["tokens_per_frame"] = (height // unit[0]) * (width // unit[1])
            row["size"] = f"{width}x{height}"
            row["pipeline"] = type(pipe).__name__
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
            return
        for row in rows:
            kind = "block by block, with a cache" if row["causal"] else "the whole video at once"
            typer.echo(f"{row['pipeline']}: {row['backbone']}, generates {kind}")
            typer.echo(f"  {row['layers']} layers x {' and '.join(row['parts'])} attention would be patched")
            typer.echo(
                f"  {row['heads']} heads of {row['head_dim']} channels; patch {'x'.join(map(str, row['patch']))}"
            )
            typer.echo(f"  {row['tokens_per_frame']} tokens a latent frame at {row['size']}")
            for technique, reason in row["refuses"].items():
                typer.echo(f"  {technique}: {'yes' if reason is None else 'no: ' + reason}")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help=f"{_MODEL}  [default: {BUNDLED_MODELS[0]}]")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="pixels  [default: the model's]")] = None,
    frames: Annotated[int | None, typer.Option(help="pixel frames, 1 + 4k  [default: the model's]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Say what is installed, and whether every kernel is right and fast on a model's own shape.

    Exit code 1 if the kernel that "auto" chooses is wrong or does not run.
    """
    with one_sentence():
        width, height = parse_size(size) if size else (None, None)
        from ..doctor import examine, lines

        found = examine(model, width=width, height=height, frames=frames, dtype=dtype, device=device)
        content = json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else "\n".join(lines(found))
        typer.echo(content)
        if not found.healthy:
            raise typer.Exit(1)


app.command()(demo)
app.command("report")(write_report)
app.command()(tune)


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
