"""`diffaccel upscale`."""

import dataclasses
import re
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..pipelines.loading import BUNDLED_MODELS
from ..suggest import choose
from .asked import CHECKPOINT, COMPILE
from .checks import check_arguments, check_parent, one_sentence, open_pipeline, parse_size, require, say
from .show import counts_steps, print_report, progress_bar, readable

if TYPE_CHECKING:
    from ..run import Run


def upscale(
    what: Annotated[str, typer.Argument(metavar="VIDEO|PROMPT", help="a .mp4 or .gif, or what to show; quote it")],
    out: Annotated[Path, typer.Option("-o", "--out", help=".mp4, .gif, or a folder")] = Path("out.mp4"),
    prompt: Annotated[str | None, typer.Option(help="what VIDEO shows")] = None,
    scale: Annotated[float | None, typer.Option(help="times the size of VIDEO, or of the model")] = None,
    height: Annotated[int | None, typer.Option(help="pixels, in place of --scale")] = None,
    width: Annotated[int | None, typer.Option(help="pixels, in place of --scale")] = None,
    model: Annotated[str | None, typer.Option(help=f"{CHECKPOINT}  [default: {BUNDLED_MODELS[0]}]")] = None,
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
    compiling: Annotated[str, typer.Option("--compile", help=COMPILE)] = "auto",
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
