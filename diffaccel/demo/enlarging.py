"""Making a video larger than its model was trained for, beside the native one enlarged as pixels."""

from typing import Any

import numpy as np

from ..accel import Accel
from ..cli.checks import check_arguments
from ..cli.show import readable
from ..pipelines import FreeSwimPipeline
from ..pipelines.free_swim import enlarge
from ..pipelines.inputs import check_frames, check_size
from ..run import Run
from ..settings import UsageError
from ..upscale import check_memory, estimate
from .asked import Larger, Limits
from .making import chunks, steps
from .models import VideoModel, generator
from .result import Result, final, live, techniques
from .worker import Ticket


def size_of(asked: Larger, model: VideoModel) -> tuple[int, int]:
    """Width and height in pixels of what is asked for."""
    return round(model.usual.width * asked.scale), round(model.usual.height * asked.scale)


def check_larger(asked: Larger, model: VideoModel, limits: Limits) -> None:
    """What can be refused at once. Raises `UsageError` or `KnobError`."""
    asked.check(limits)
    check_frames("frames", asked.frames, model.pipe.vae_scale_factor_temporal)
    width, height = size_of(asked, model)
    for name, pixels in (("width", width), ("height", height)):
        if pixels > limits.side:
            raise UsageError(f"the {name} would be {pixels} pixels, and at most {limits.side} are allowed here")
        check_size(f"the {name} of {asked.scale:g} times the model's size", pixels, 16)
    _free_swim(asked, model).check(height, width, asked.strength)


def make_larger(asked: Larger, model: VideoModel, result: Result, ticket: Ticket) -> None:
    """The work of a ticket."""
    pipe, big, noise = model.pipe, _free_swim(asked, model), generator(asked.seed)
    width, height = size_of(asked, model)
    usual: dict[str, Any] = {"num_inference_steps": asked.steps, "guidance_scale": asked.guidance}
    native = {**usual, "width": model.usual.width, "height": model.usual.height, "num_frames": asked.frames}
    check_arguments(pipe, big.accel, {**native, "width": width, "height": height}, [asked.prompt])
    check_memory(big, height, width, asked.frames, branches=2 if asked.guidance > 1 else 1)
    expected = estimate(
        big, height, width, asked.frames, steps=asked.steps, strength=asked.strength, guidance=asked.guidance
    )
    result.notes.append(
        f"{model.usual.width}x{model.usual.height} to {width}x{height}: a window reads {expected.share:.0%} of a "
        f"frame; {expected.forwards} forwards, {expected.passes} of them over the whole field; estimated "
        f"{expected.seconds:.0f} s of denoising, {readable(expected.kept_bytes)} kept to guide."
    )
    result.fps = model.usual.fps
    result.figures = {"native": {}, "FreeSwim": {}}
    frames = []
    small = result.clip("enlarged", "Native, enlarged as pixels")
    with Accel()(pipe) as run:
        for chunk in chunks(model, run, asked.prompt, noise, native, steps("Native size", result, ticket)):
            frames.append(chunk)
            small.append(enlarge(chunk, height, width))
            result.figures["native"] = live(run, pipe)
    result.figures["native"] = final(run.report(), pipe)
    small.finish(result.file_of(small), result.fps)

    large = result.clip("larger", "FreeSwim")
    runs: list[Run] = []
    made = big(
        asked.prompt,
        np.concatenate(frames),
        **usual,
        width=width,
        height=height,
        strength=asked.strength,
        generator=noise,
        callback_on_step_end=steps("Larger", result, ticket),
        on_run=runs.append,
    ).frames[0]
    large.append(made)
    large.finish(result.file_of(large), result.fps)
    report = runs[0].report()
    result.figures["FreeSwim"] = final(report, pipe)
    result.techniques += techniques(report)
    result.reports["larger"] = report.to_dict()


def _free_swim(asked: Larger, model: VideoModel) -> FreeSwimPipeline:
    native = (model.usual.height, model.usual.width)
    return FreeSwimPipeline(model.pipe, native=native, guide_every=2 if asked.guide else None)
