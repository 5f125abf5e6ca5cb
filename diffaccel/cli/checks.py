"""What is asked, checked before anything is computed; a mistake is one sentence."""

import logging
import os
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from ..preset_file import given_preset, is_preset_file
from ..ranks import ranks, speaks
from ..settings import UsageError, build_accel
from ..suggest import choose

if TYPE_CHECKING:
    from ..accel import Accel


@contextmanager
def one_sentence() -> Iterator[None]:
    """Users' mistakes end as one sentence on stderr and exit code 2; programming errors keep their traceback."""
    import torch

    from ..errors import DiffaccelError

    try:
        yield
    except (UsageError, DiffaccelError) as error:
        fail(str(error), 2)
    except torch.OutOfMemoryError as error:
        fail(f"{error}; use --offload model, a smaller --size or fewer --frames", 2)
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", 130)


def say(sentence: str) -> None:
    """One sentence on stderr; of several processes the first alone gives notes and warnings."""
    if not speaks() and sentence.startswith(("note:", "warning:")):
        return
    typer.echo("diffaccel: " + " ".join(sentence.split()), err=True)


def fail(sentence: str, code: int) -> NoReturn:
    say(sentence)
    raise typer.Exit(code)


def require(ok: bool, sentence: str) -> None:
    if not ok:
        raise UsageError(sentence)


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the prompts file '{file}' cannot be read as text: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        require(bool(found), f"the prompts file '{file}' is empty; write one prompt a line")
        prompts += found
    require(bool(prompts), "no prompt was given; write one in quotes, or name a file with --prompts")
    require(all(text.strip() for text in prompts), "a prompt is empty; say what the video should show")
    return prompts


def check_output(out: Path, prompts: Sequence[str], *, many: bool, comparing: bool) -> None:
    from ..video import SUFFIXES, check_output

    if comparing:
        require(len(prompts) == 1, f"--compare takes one prompt, got {len(prompts)}; quote a prompt of several words")
    if not (many or comparing):
        check_output(out)
        return
    why = "--compare writes several files" if comparing else f"{len(prompts)} prompts make as many videos"
    hint = "" if comparing else " (a prompt of several words goes in quotes)"
    is_folder = out.is_dir() or (out.suffix.lower() not in SUFFIXES and not out.exists())
    require(is_folder, f"{why}, so -o must name a folder, got '{out}'{hint}")
    check_parent(out)
    require(not out.is_dir() or os.access(out, os.W_OK), f"the folder '{out}' is not writable; write elsewhere")


def check_parent(path: Path) -> None:
    parent = path.absolute().parent
    require(parent.is_dir(), f"the folder '{parent}' does not exist; create it first or write elsewhere")
    require(os.access(parent, os.W_OK | os.X_OK), f"the folder '{parent}' is not writable; write elsewhere")


def parse_size(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", size.strip())
    if match is None:
        raise UsageError(f"--size takes width x height in pixels, such as 832x480, got '{size}'")
    return int(match[1]), int(match[2])


def parse_shares(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",") if share.strip()]
    except ValueError:
        raise UsageError(f"--densities takes shares with commas between, such as 0.1,0.3, got '{text}'") from None


def read_first_frame(path: Path) -> Any:
    from ..video import read_image

    return read_image(path).astype("float32") / 255.0


def open_pipeline(
    model: str | None, pipeline: str | None, dtype: str | None, device: str | None, offload: str
) -> tuple[Any, Any]:
    """The pipeline and the checkpoint's defaults, without the loaders' own progress bars.

    Processes that were launched together take a device each.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    from ..pipelines.loading import defaults, load

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.getLogger("diffaccel.pipelines.causal_wan").setLevel(logging.ERROR)  # `check_arguments` says it once
    pipe = load(
        model,
        pipeline=typing.cast(Any, pipeline),
        dtype=dtype,
        device=device or ranks().device,
        offload=typing.cast(Any, offload),
    )
    return pipe, defaults(pipe, model)


def default_preset(pipe: Any) -> str:
    return "balanced" if getattr(pipe, "block_causal", False) else "exact"


def check_preset(preset: str | None, changes: Sequence[str]) -> None:
    """That there is such a preset or file and that changes fit it, as far as can be said without a pipeline."""
    from ..pipelines.presets import PRESETS

    if preset is not None and not is_preset_file(preset):
        choose(preset, (*PRESETS, "auto"), "preset")
    build_accel("balanced" if preset is None or preset == "auto" else given_preset(preset), changes)


def accel_for(pipe: Any, preset: str | None, changes: Sequence[str], arguments: dict[str, Any]) -> "Accel":
    """The preset with its changes, for a call of the pipeline with these arguments; "auto" says what it is."""
    from ..pipelines.presets import auto

    if preset is None and _sampler(pipe, arguments) == "rolling":
        say("note: under the sampler rolling the preset is balanced without reuse, which has no place there")
        return build_accel(replace(build_accel("balanced"), reuse=None), changes)
    if preset != "auto":
        return build_accel(given_preset(preset or default_preset(pipe)), changes)
    chosen, why = auto(pipe, *(arguments[name] for name in ("num_frames", "height", "width")))
    say(f"note: preset auto is {why}")
    return build_accel(chosen, changes)


def _sampler(pipe: Any, arguments: dict[str, Any]) -> Any:
    """None for a pipeline that has none."""
    return arguments.get("sampler", pipe.config.get("sampler"))


def check_arguments(pipe: Any, accel: "Accel", arguments: dict[str, Any], prompts: Sequence[str]) -> None:
    """Rules that depend on the pipeline; says what of the prompts the model will not read."""
    import inspect
    from math import lcm

    from .. import backbone
    from ..errors import UnsupportedError
    from ..pipelines import rolling
    from ..pipelines.inputs import DEFAULT_GUIDANCE, SAMPLERS, check_frames, check_size, unread

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
    sampler = _sampler(pipe, arguments)
    if sampler == "rolling":
        rolling.refuse(accel)
    guidance = arguments.get("guidance_scale", DEFAULT_GUIDANCE.get(sampler))
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
    for sentence in unread(pipe.tokenizer, texts, prompt_length(pipe)):
        say(f"warning: {sentence}")


def check_graphs(pipe: Any, *, comparing: bool, observing: bool) -> None:
    """Rules of --graphs, which captures nothing while attention is timed or observed."""
    from ..pipelines.graphed import unfit

    require(not comparing, "--graphs captures nothing while --compare times attention; leave one of the two out")
    require(not observing, "--graphs captures nothing while --plots looks at the cache; leave one of the two out")
    require(
        getattr(pipe, "block_causal", False),
        f"--graphs is for pipelines that stream block by block, and {type(pipe).__name__} does not; leave it out",
    )
    why = unfit(pipe.transformer)
    require(why is None, f"--graphs captures forwards of weights that stay on a GPU, and {why}")


def replays(pipe: Any, accel: "Accel") -> bool:
    """Whether forwards of the pipeline under techniques can be replayed as CUDA graphs."""
    from ..pipelines.graphed import unfit

    return bool(accel.policies()) and getattr(pipe, "block_causal", False) and unfit(pipe.transformer) is None


def check_profile(trace: Path, blocks: int, *, comparing: bool) -> None:
    """Rules of --profile."""
    require(not comparing, "--profile traces one generation, and --compare makes several; leave one of the two out")
    require(trace.suffix.lower() == ".json" and not trace.is_dir(), f"--profile names a .json file, got '{trace}'")
    require(blocks >= 1, f"--profile-blocks must be at least 1, got {blocks}")
    check_parent(trace)


def prompt_length(pipe: Any) -> int:
    import inspect

    return int(inspect.signature(pipe.__call__).parameters["max_sequence_length"].default)
