"""`diffaccel methods`, `info` and `doctor`: what there is, what a pipeline takes, what runs here."""

import json
from typing import Annotated

import typer

from ..pipelines.loading import BUNDLED_MODELS
from ..settings import describe_accel, describe_slots, describe_technique
from .asked import CHECKPOINT
from .checks import one_sentence, open_pipeline, parse_size


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


def info(
    model: Annotated[
        str | None, typer.Argument(metavar="PIPELINE", help=f"{CHECKPOINT}; default: {BUNDLED_MODELS[0]}")
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


def doctor(
    model: Annotated[str | None, typer.Option(help=f"{CHECKPOINT}  [default: {BUNDLED_MODELS[0]}]")] = None,
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
