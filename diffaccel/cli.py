"""The `diffaccel` command: generate, compare, list what there is, and say what is wrong in one sentence.

Exit codes: 0 done; 1 a technique asked for by --preset or --set never engaged (the video is kept), or `doctor` found
the kernel in use to be wrong; 2 a mistake in what was asked, found before anything was computed; 130 interrupted (the
frames so far are kept).
"""

import dataclasses
import json
import logging
import os
import re
import signal
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .pipelines.loading import BUNDLED_MODELS, BUNDLED_TEXT_MODEL
from .settings import UsageError, build_accel, describe_accel, describe_slots, describe_technique
from .suggest import choose

if TYPE_CHECKING:
    from rich.console import Console

    from .accel import Accel
    from .report import Report
    from .run import Run

app = typer.Typer(
    name="diffaccel",
    help="Faster video diffusion without training: the same video in less time and memory, with proof and a price.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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
        str | None, typer.Option(help="exact, balanced or fast  [default: balanced, or exact for a stock pipeline]")
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
    sampler: Annotated[str | None, typer.Option(help="multistep or few_step  [default: the checkpoint's own]")] = None,
    compiling: Annotated[
        str, typer.Option("--compile", help="the transformer's blocks: on, off, or auto, where it pays on a GPU")
    ] = "auto",
    graphs: Annotated[
        bool, typer.Option("--graphs", help="replay forwards that repeat as CUDA graphs; attention is not timed then")
    ] = False,
    fps: Annotated[float | None, typer.Option(help="frames a second of the file  [default: 16]")] = None,
    report: Annotated[Path | None, typer.Option(help="write what happened as JSON")] = None,
    plots: Annotated[Path | None, typer.Option(help="folder for pictures of the cache: length, recall, time")] = None,
) -> None:
    """Generate a video for each prompt."""
    with _one_sentence():
        texts = _read_prompts(prompts or [], prompts_file)
        many = len(texts) > 1 or prompts_file is not None
        _check_output(out, texts, many=many, comparing=comparing)
        if report is not None:
            _check_parent(report)
        if plots is not None:
            from .plots import check_plots, plot_cache

            check_plots()
            _check_parent(plots)
            _require(not plots.exists() or plots.is_dir(), f"--plots names a folder, and '{plots}' is a file")
        width, height = _parse_size(size) if size else (None, None)
        _require(steps is None or steps >= 1, f"--steps must be at least 1, got {steps}")
        _require(fps is None or 0 < fps <= 240, f"--fps must lie in (0, 240], got {fps}")
        _require(guidance is None or guidance >= 0, f"--guidance must be 0 or more, got {guidance}")
        build_accel(preset or "balanced", changes or [])
        picture = _read_first_frame(image) if image else None

        pipe, given = _open(model, pipeline, dtype, device, offload)
        from .pipelines.compiling import MODES, compile_if  # imports diffusers, as what was opened did

        choose(compiling, MODES, "--compile")
        if graphs:
            _check_graphs(pipe, comparing=comparing, observing=plots is not None)
        accel = build_accel(preset or _default_preset(pipe), changes or [])
        _require(
            plots is None or getattr(pipe, "block_causal", False),
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
        _check_arguments(pipe, accel, arguments, texts)
        fps = given.fps if fps is None else fps
        if graphs:
            arguments["graphs"] = True
        if sentence := compile_if(compiling, pipe, arguments, len(texts) * (1 + comparing)):
            _say(f"note: {sentence}")
        job = _Job(pipe, accel, arguments, seed, fps, many=many, observe=plots is not None)
        typer.echo(f"preset {preset or _default_preset(pipe)}: {describe_accel(accel)}")
        results = [job.compare(texts[0], out)] if comparing else job.generate(texts, out)
        if report is not None:
            from .report import write_json

            content = results[0].report if len(results) == 1 else {"runs": [result.report for result in results]}
            write_json(report, content)
        if plots is not None:
            plots.mkdir(exist_ok=True)
            for number, result in enumerate(results):
                name = "cache.png" if len(results) == 1 else f"cache-{number + 1}.png"
                if result.report.get("blocks"):
                    typer.echo(f"plot: {plot_cache(result.report, plots / name)}")
                else:
                    typer.echo("no plot: no block was finished and kept, so there is nothing to draw")
        _finish(results, asked=preset is not None or bool(changes))


@app.command()
def calibrate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="usual ones  [default for a bundled model: two of its own]"),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="the profile  [default: METHOD.json]")] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="a text file, one prompt a line")] = None,
    method: Annotated[str, typer.Option(help="what the profile is for: annsa or flashblock")] = "annsa",
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
    """Measure where a method serves a model best, for --set selection.profile=FILE or --set reuse.profile=FILE.

    Makes a dense video of each prompt and writes, for every step, layer and head, the recall of attention mass at every
    density (annsa), or how far attention to the outside moved since earlier steps (flashblock).
    """
    with _one_sentence():
        from .calibrate import METHODS, PROMPTS, check, frames_wanted, summary
        from .calibrate import calibrate as measure

        kind = METHODS[choose(method, tuple(METHODS), "method to calibrate")]
        out = Path(f"{method}.json") if out is None else out
        ours = model in (None, *BUNDLED_MODELS) and not prompts and prompts_file is None
        texts = list(PROMPTS) if ours else _read_prompts(prompts or [], prompts_file)
        _require(out.suffix.lower() == ".json" and not out.is_dir(), f"-o must name a .json file, got '{out}'")
        _check_parent(out)
        asked = _parse_size(size) if size else None
        _require(steps is None or steps >= 1, f"--steps must be at least 1, got {steps}")
        for change in changes or []:
            _require(change.startswith(f"{kind.slot}."), f"--set takes {kind.slot}.KNOB=VALUE here, got '{change}'")
        accel = build_accel("exact", ["prompt=none", f"{kind.slot}={kind.__name__}", *(changes or [])])
        policy: Any = getattr(accel, kind.slot)
        shares = _parse_shares(densities)
        check(policy, shares)

        pipe, given = _open(model, None, dtype, device, "none")
        width, height = asked or (given.width, given.height)
        wanted = {
            "width": width,
            "height": height,
            "num_frames": frames_wanted(pipe, policy, given.num_frames) if frames is None else frames,
            "num_inference_steps": given.num_inference_steps if steps is None else steps,
            "guidance_scale": given.guidance_scale,
        }
        arguments = {name: value for name, value in wanted.items() if value is not None}
        _check_arguments(pipe, accel, arguments, texts)
        with _progress(texts[0]) as show:
            profile = measure(
                pipe,
                policy,
                prompts=texts,
                densities=shares,
                seed=seed,
                on_prompt=lambda number: show(0, None, None, f"{number + 1} of {len(texts)}: {texts[number][:32]}"),
                callback_on_step_end=_counts_steps(show),
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
    with _one_sentence():
        import transformers.utils.logging as transformers_logging

        from .report import write_json
        from .text import build_reuse, check_prompt, compare, load, to_report, unread, write

        _require(bool(prompt.strip()), "the prompt is empty; say what the text should go on from")
        if report is not None:
            _check_parent(report)
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
            _say(f"warning: {sentence}")
        tokens = len(opened.tokenizer(prompt)["input_ids"]) + writer.max_tokens
        how = build_reuse(preset, changes or [], tokens)
        if preset == "auto" and how[0] is None:
            _say(f"note: exact, because a text of at most {tokens} tokens is too short for reuse to be sure to pay")
        comparison = compare(opened, prompt, writer, *how) if comparing else None
        written = write(opened, prompt, writer, *how) if comparison is None else comparison.arms["asked"]
        typer.echo(written.text)
        typer.echo("\n".join(comparison.lines()) if comparison else written.about())
        if report is not None:
            write_json(report, to_report(opened, prompt, writer, written, comparison))
        if written.idle:
            _fail(written.idle, 1)


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
    fps: Annotated[float | None, typer.Option(help="frames a second of the file  [default: 16]")] = None,
    report: Annotated[Path | None, typer.Option(help="write what happened as JSON")] = None,
) -> None:
    """Make a video larger than the model was trained for (FreeSwim)."""
    with _one_sentence():
        import torch

        from .upscale import check_memory, estimate
        from .video import check_output, read_video, write_video

        check_output(out)
        if report is not None:
            _check_parent(report)
        _require(scale is None or (height is None and width is None), "--scale, or --height and --width, got both")
        _require((height is None) == (width is None), "--height and --width go together; or use --scale")
        _require(scale is not None or height is not None, "--scale, or --height and --width, says how large")
        _require(steps is None or steps >= 1, f"--steps must be at least 1, got {steps}")
        _require(fps is None or 0 < fps <= 240, f"--fps must lie in (0, 240], got {fps}")
        _require(guidance is None or guidance >= 0, f"--guidance must be 0 or more, got {guidance}")
        _require(guide_every >= 1, f"--guide-every is at least 1, got {guide_every}")
        cut = re.fullmatch(r"(\d+)[xX](\d+)", tile) if tile else None
        _require(tile is None or cut is not None, f"--tile takes rows x columns of tokens, such as 17x20, got '{tile}'")
        of_file = Path(what).suffix.lower() in (".mp4", ".gif")
        video = read_video(what) if of_file else None
        _require(not of_file or prompt is not None, "--prompt says what the video shows; it is missing")
        text = prompt if of_file else what
        if video is not None and frames is not None:
            _require(frames <= len(video), f"--frames {frames} is more than the {len(video)} of '{what}'")
            video = video[:frames]

        pipe, given = _open(model, pipeline, dtype, device, offload)
        from .pipelines import FreeSwimPipeline  # imports diffusers, which the rules above need not wait for

        base = _parse_size(native) if native else (given.width, given.height)
        start = base if video is None else (video.shape[2], video.shape[1])
        if scale is not None:
            width, height = (round(side * scale) for side in start)
        assert height is not None
        assert width is not None
        if abs(width / height / (start[0] / start[1]) - 1) > 0.02:
            _say(f"note: {start[0]}x{start[1]} and {width}x{height} differ in shape, so the picture is stretched")
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
        _check_arguments(pipe, big.accel, settings, [text or ""])
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
            f"{expected.seconds:.0f} s of denoising, {_bytes(expected.kept_bytes)} kept to guide"
        )
        runs: list[Run] = []
        with _progress(text or what) as show:
            made = big(
                text or "",
                video,
                **settings,
                generator=torch.Generator().manual_seed(seed),
                vae_tiling=vae_tiling,
                callback_on_step_end=_counts_steps(show),
                on_run=runs.append,
            ).frames[0]
        write_video(out, made, given.fps if fps is None else fps)
        found = runs[0].report()
        _print_report(out, len(made), found)
        if report is not None:
            from .report import write_json

            about = {"file": str(out), "prompt": text, "seed": seed, "settings": settings}
            write_json(report, {**about, "estimate": dataclasses.asdict(expected), **found.to_dict()})


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """List every technique: its slot, paper, knobs with defaults, and the setting at which it is dense attention."""
    from .kernel import CHOICES
    from .pipelines.presets import PRESETS
    from .techniques import TECHNIQUES

    if as_json:
        content = {
            "techniques": [describe_technique(technique) for technique in TECHNIQUES],
            "presets": {name: describe_slots(preset()) for name, preset in PRESETS.items()},
            "kernels": list(CHOICES),
        }
        typer.echo(json.dumps(content, indent=2))
        return
    lines = []
    for technique in TECHNIQUES:
        about = describe_technique(technique)
        lines += [f"{about['name']}  (slot {about['slot']})", f"  {about['summary']}", f"  {about['paper']}"]
        slot = about["slot"]
        exact = "".join(f" --set {slot}.{name}={value}" for name, value in about["exact"].items())
        lines.append(f"  exact: --set {slot}={about['name']}{exact or ', always (lossless)'}")
        for knob in about["knobs"]:
            lines.append(f"    {about['slot']}.{knob['name']} = {knob['default']!r}  {knob['help']}")
        lines.append("")
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
    with _one_sentence():
        asked = _parse_size(size) if size else None
        pipe, given = _open(model, pipeline, None, "cpu", "none")
        from .accel import Accel

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
    with _one_sentence():
        width, height = _parse_size(size) if size else (None, None)
        from .doctor import examine, lines

        found = examine(model, width=width, height=height, frames=frames, dtype=dtype, device=device)
        content = json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else "\n".join(lines(found))
        typer.echo(content)
        if not found.healthy:
            raise typer.Exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .version import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    pass


# -- what is asked, checked before anything is computed --------------------------------------------------------------


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Users' mistakes end as one sentence on stderr and exit code 2; programming errors keep their traceback."""
    import torch

    from .errors import DiffaccelError

    try:
        yield
    except (UsageError, DiffaccelError) as error:
        _fail(str(error), 2)
    except torch.OutOfMemoryError as error:
        _fail(f"{error}; use --offload model, a smaller --size or fewer --frames", 2)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)


def _say(sentence: str) -> None:
    typer.echo("diffaccel: " + " ".join(sentence.split()), err=True)


def _fail(sentence: str, code: int) -> NoReturn:
    _say(sentence)
    raise typer.Exit(code)


def _require(ok: bool, sentence: str) -> None:
    if not ok:
        raise UsageError(sentence)


def _read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the prompts file '{file}' cannot be read as text: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        _require(bool(found), f"the prompts file '{file}' is empty; write one prompt a line")
        prompts += found
    _require(bool(prompts), "no prompt was given; write one in quotes, or name a file with --prompts")
    _require(all(text.strip() for text in prompts), "a prompt is empty; say what the video should show")
    return prompts


def _check_output(out: Path, prompts: Sequence[str], *, many: bool, comparing: bool) -> None:
    from .video import SUFFIXES, check_output

    if comparing:
        _require(len(prompts) == 1, f"--compare takes one prompt, got {len(prompts)}; quote a prompt of several words")
    if not (many or comparing):
        check_output(out)
        return
    why = "--compare writes several files" if comparing else f"{len(prompts)} prompts make as many videos"
    hint = "" if comparing else " (a prompt of several words goes in quotes)"
    is_folder = out.is_dir() or (out.suffix.lower() not in SUFFIXES and not out.exists())
    _require(is_folder, f"{why}, so -o must name a folder, got '{out}'{hint}")
    _check_parent(out)
    _require(not out.is_dir() or os.access(out, os.W_OK), f"the folder '{out}' is not writable; write elsewhere")


def _check_parent(path: Path) -> None:
    parent = path.absolute().parent
    _require(parent.is_dir(), f"the folder '{parent}' does not exist; create it first or write elsewhere")
    _require(os.access(parent, os.W_OK | os.X_OK), f"the folder '{parent}' is not writable; write elsewhere")


def _parse_size(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", size.strip())
    if match is None:
        raise UsageError(f"--size takes width x height in pixels, such as 832x480, got '{size}'")
    return int(match[1]), int(match[2])


def _parse_shares(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",") if share.strip()]
    except ValueError:
        raise UsageError(f"--densities takes shares with commas between, such as 0.1,0.3, got '{text}'") from None


def _read_first_frame(path: Path) -> Any:
    from .video import read_image

    return read_image(path).astype("float32") / 255.0


def _open(
    model: str | None, pipeline: str | None, dtype: str | None, device: str | None, offload: str
) -> tuple[Any, Any]:
    """The pipeline and the checkpoint's defaults, without the loaders' own progress bars."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    from .pipelines.loading import defaults, load

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.getLogger("diffaccel.pipelines.causal_wan").setLevel(logging.ERROR)  # `_check_arguments` says it once
    pipe = load(
        model,
        pipeline=typing.cast(Any, pipeline),
        dtype=dtype,
        device=device,
        offload=typing.cast(Any, offload),
    )
    return pipe, defaults(pipe, model)


def _default_preset(pipe: Any) -> str:
    return "balanced" if getattr(pipe, "block_causal", False) else "exact"


def _check_arguments(pipe: Any, accel: "Accel", arguments: dict[str, Any], prompts: Sequence[str]) -> None:
    """Rules that depend on the pipeline; says what of the prompts the model will not read."""
    import inspect
    from math import lcm

    from . import backbone
    from .errors import UnsupportedError
    from .pipelines.inputs import SAMPLERS, check_frames, check_size, unread

    causal = bool(getattr(pipe, "block_causal", False))
    family, denoisers = backbone.find(pipe)
    patch = family.geometry(denoisers[0]).patch
    check_frames("--frames", arguments["num_frames"], pipe.vae_scale_factor_temporal)
    for name, side in (("width", patch[2]), ("height", patch[1])):
        check_size(f"the {name} in --size", arguments[name], lcm(16, pipe.vae_scale_factor_spatial * side))
    if "sampler" in arguments:
        choose(arguments["sampler"], SAMPLERS, "sampler")
    for name in ("image", "sampler"):
        if name in arguments and not causal:
            raise UsageError(
                f"--{name} is for block-by-block generation, and {type(pipe).__name__} makes the whole video at once; "
                "leave it out, or use --pipeline causal with a causal checkpoint"
            )
    sampler = arguments.get("sampler", pipe.config.get("sampler"))
    guidance = arguments.get("guidance_scale", 1 if sampler == "few_step" else None)
    if "negative_prompt" in arguments and guidance is not None and guidance <= 1:
        raise UsageError(
            f"--negative acts through guidance, which is {guidance:g}; pass --guidance above 1 or leave --negative out"
        )
    if "negative_prompt" in arguments and "true_cfg_scale" in inspect.signature(pipe.__call__).parameters:
        raise UsageError(
            f"--negative acts through the true_cfg_scale of {type(pipe).__name__}, which has no option here; "
            "call the pipeline in Python, or leave --negative out"
        )
    if "image" in arguments and arguments["num_frames"] <= 1:
        raise UsageError(
            "--image gives the first frame and the video needs more than that one; pass --frames 5 or more"
        )
    try:
        accel.apply(pipe).remove(check=False)
    except UnsupportedError as error:
        refused = accel.describe(pipe)[0]["refuses"]
        slots = [slot for slot, policy in accel.policies().items() if refused.get(type(policy).__name__)]
        flags = " ".join(f"--set {slot}=none" for slot in slots)
        other = "" if "prompt" in slots else "--preset exact, or "  # which has a prompt technique
        remedy = f" (here: {other}{flags})" if flags else ""
        raise UsageError(f"{error}{remedy}") from error
    if causal and accel.cache is not None:
        branches = 1 if guidance is not None and guidance <= 1 else 2
        accel.cache.check(pipe.extent(arguments["num_frames"], arguments["height"], arguments["width"], branches))
    texts = [*prompts, *([arguments["negative_prompt"]] if "negative_prompt" in arguments else [])]
    for sentence in unread(pipe.tokenizer, texts, _prompt_length(pipe)):
        _say(f"warning: {sentence}")


def _check_graphs(pipe: Any, *, comparing: bool, observing: bool) -> None:
    """Rules of --graphs, which captures nothing while attention is timed or observed."""
    from .pipelines.graphed import unfit

    _require(not comparing, "--graphs captures nothing while --compare times attention; leave one of the two out")
    _require(not observing, "--graphs captures nothing while --plots looks at the cache; leave one of the two out")
    _require(
        getattr(pipe, "block_causal", False),
        f"--graphs replays what repeats from block to block, and {type(pipe).__name__} has one; leave it out",
    )
    why = unfit(pipe.transformer)
    _require(why is None, f"--graphs captures forwards of weights that stay on a GPU, and {why}")


def _prompt_length(pipe: Any) -> int:
    import inspect

    return int(inspect.signature(pipe.__call__).parameters["max_sequence_length"].default)


# -- doing it --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Result:
    """One finished (or stopped) video: its JSON report, and what went wrong if something did."""

    report: dict[str, Any]
    idle: str | None = None
    interrupted: str | None = None


@dataclasses.dataclass(frozen=True)
class _Job:
    """What all videos of one command have in common."""

    pipe: Any
    accel: "Accel"
    arguments: dict[str, Any]
    seed: int
    fps: float
    many: bool
    observe: bool = False

    def generate(self, prompts: Sequence[str], out: Path) -> list[_Result]:
        """A video a prompt; stops after the first that is interrupted."""
        files = [out]
        if self.many:
            out.mkdir(exist_ok=True)
            files = [out / f"{name}.mp4" for name in _slugs(prompts)]
        results = []
        for prompt, file in zip(prompts, files, strict=True):
            results.append(self._one(prompt, file))
            if results[-1].interrupted:
                break
        return results

    def _one(self, prompt: str, file: Path) -> _Result:
        from .errors import NotEngagedError
        from .video import VideoWriter

        idle = stopped = run = None
        writer = VideoWriter(file, self.fps)
        try:
            timing = not self.arguments.get("graphs", False)
            observed = self.accel(self.pipe, timing=timing, observe=self.observe)
            with observed as run, writer, _progress(prompt) as show:
                if run.causal:
                    self._stream(prompt, run, writer, show)
                else:
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
        }
        settings = {name: value for name, value in self.arguments.items() if name != "image"}
        content: dict[str, Any] = {**done, "settings": settings, "interrupted": stopped is not None, "idle": idle}
        if run is not None:
            report = run.report()
            if self.arguments.get("graphs") and not run.replayed:
                _say("note: no forward repeated an earlier block's, so none was replayed: --graphs needs FlashBlock's "
                     "reused steps, or SinkRecent over more blocks")  # fmt: skip
            content |= report.to_dict()
            if writer.frames:
                _print_report(file, writer.frames, report)
        return _Result(content, idle, stopped)

    def _stream(self, prompt: str, run: "Run", writer: Any, show: "_Shower") -> None:
        import torch

        stream = self.pipe.stream(
            prompt=[prompt],
            **self.arguments,
            generator=torch.Generator().manual_seed(self.seed),
            callback_on_step_end=_counts_steps(show),
            overlap=self.pipe._execution_device.type == "cuda",
        )
        with closing(stream):
            for chunk in stream:
                writer.append(chunk[0])
                show(None, None, run)

    def _at_once(self, prompt: str, run: "Run", writer: Any, show: "_Shower") -> None:
        from .compare import generate as generate_once

        arguments = {**self.arguments, "prompt": prompt, "callback_on_step_end": _counts_steps(show)}
        writer.append(generate_once(self.pipe, run, self.seed, arguments).frames)

    def compare(self, prompt: str, folder: Path) -> _Result:
        from .compare import ARMS, compare

        try:
            with _progress(prompt) as show:

                def on_arm(name: str, number: int, count: int) -> None:
                    show(number, count, None, ARMS[name])

                result = compare(self.pipe, self.accel, prompt=prompt, seed=self.seed, on_arm=on_arm, **self.arguments)
        except KeyboardInterrupt:
            _fail("interrupted; a comparison needs all its arms, so nothing was written", 130)
        files = result.write(folder, self.fps)
        console = _out_console()
        _print_report(files[1], len(result.accelerated), result.reports["free_running"])
        console.print(result.table(), highlight=False, soft_wrap=True)
        console.print(f"in {folder}: {', '.join(file.name for file in files)}", highlight=False, soft_wrap=True)
        return _Result(result.to_dict(), result.idle)


def _slugs(prompts: Sequence[str]) -> list[str]:
    """A file name for each prompt: its words with dashes, numbered where two are alike."""
    names: list[str] = []
    for prompt in prompts:
        base = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "video"
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _finish(results: Sequence[_Result], *, asked: bool) -> None:
    """Say what went wrong and exit with its code; what the default preset could not use here was nobody's mistake."""
    for result in results:
        if result.idle:
            _say(result.idle if asked else "note: of the default preset, " + result.idle.removeprefix("asked for and "))
        if result.interrupted:
            _say(result.interrupted)
    if any(result.interrupted for result in results):
        raise typer.Exit(130)
    if asked and any(result.idle for result in results):
        raise typer.Exit(1)


# -- what is shown ---------------------------------------------------------------------------------------------------


_Shower = Callable[..., None]


def _out_console() -> "Console":
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
def _progress(prompt: str) -> Iterator[_Shower]:
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
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
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
                progress.update(task, speed=f"{frames} frames, {rate}{_bytes(peak)}")

        yield show


def _counts_steps(show: _Shower) -> Callable[..., dict[str, Any]]:
    """A pipeline's `callback_on_step_end`."""

    def on_step(pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        show(step + 1, pipe.num_timesteps, None)
        return {}

    return on_step


def _print_report(file: Path, frames: int, report: "Report") -> None:
    """File, frames, seconds, memory, and a row a slot: did it engage, and what share of the keys was read."""
    from rich.table import Table

    seconds = ", ".join(
        f"{name} {'not measured' if value is None else f'{value:.2f} s'}" for name, value in report.seconds.items()
    )
    console = _out_console()
    console.print(f"{file}: {frames} frames", soft_wrap=True, markup=False)
    console.print(f"  {seconds}", soft_wrap=True)
    speed = "" if report.fps is None else f"{report.fps:.2f} frames/s, "
    console.print(f"  {speed}peak memory {_bytes(report.peak_memory_bytes)}, kernel {report.kernel}", soft_wrap=True)
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


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
