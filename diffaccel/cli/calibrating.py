"""`diffaccel calibrate`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ..pipelines.loading import BUNDLED_MODELS
from ..settings import build_accel
from ..suggest import choose
from .asked import CHECKPOINT
from .checks import (
    check_arguments,
    check_parent,
    one_sentence,
    open_pipeline,
    parse_shares,
    parse_size,
    read_prompts,
    require,
)
from .show import counts_steps, progress_bar


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
    model: Annotated[str | None, typer.Option(help=f"{CHECKPOINT}  [default: {BUNDLED_MODELS[0]}]")] = None,
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
