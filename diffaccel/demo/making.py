"""Making a video, while the page looks on: accelerated, densely, or both on the same noise."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch

from ..accel import Accel
from ..cli.checks import check_arguments, prompt_length
from ..errors import NotEngagedError
from ..pipelines.inputs import check_frames, check_size, unread
from ..report import Report
from ..settings import build_accel
from .asked import Limits, Video
from .clips import Clip
from .models import VideoModel, generator
from .result import Result, disturbed, final, live, techniques, verdict
from .worker import Ticket

OnStep = Callable[..., dict[str, Any]]
DENSE = "dense"


def check_video(asked: Video, model: VideoModel, limits: Limits) -> None:
    """What can be refused at once, before the request waits. Raises `UsageError` or `KnobError`."""
    asked.check(limits)
    check_frames("frames", asked.frames, model.pipe.vae_scale_factor_temporal)
    for name in ("width", "height"):
        check_size(name, getattr(asked, name), 16)
    build_accel(asked.preset, asked.set)


def make_video(asked: Video, model: VideoModel, result: Result, ticket: Ticket) -> None:
    """The work of a ticket."""
    pipe, accel = model.pipe, build_accel(asked.preset, asked.set)
    arguments: dict[str, Any] = {
        "width": asked.width,
        "height": asked.height,
        "num_frames": asked.frames,
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance,
    }
    if asked.negative:
        arguments["negative_prompt"] = asked.negative
    check_arguments(pipe, accel, arguments, [asked.prompt])
    result.notes += unread(pipe.tokenizer, [asked.prompt], prompt_length(pipe))
    result.fps = model.usual.fps
    arms = {name: Accel(kernel=accel.kernel) if name == DENSE else accel for name in Video.ARMS[asked.arms]}
    reports: dict[str, Report] = {}
    in_order = sorted(arms, key=lambda name: name != DENSE)  # dense on the left
    clips = {name: result.clip(name, name.capitalize()) for name in in_order}
    result.figures = {name: {} for name in in_order}
    for arm in arms.values():
        warm_up(model, arm, arguments, result, ticket)
    for name, arm in arms.items():
        reports[name] = one(clips[name], arm, generator(asked.seed), model, arguments, result, ticket)
        result.reports[name] = reports[name].to_dict()
    if len(reports) == 2:
        result.verdict = verdict(reports["accelerated"], reports[DENSE])
        on_cpu = pipe._execution_device.type == "cpu"  # on a GPU blocks are decoded beside others that are denoised
        if on_cpu and (doubt := disturbed(reports["accelerated"], reports[DENSE])) is not None:
            result.warnings.append(doubt)


def one(
    clip: Clip,
    accel: Accel,
    noise: torch.Generator,
    model: VideoModel,
    arguments: dict[str, Any],
    result: Result,
    ticket: Ticket,
) -> Report:
    """Fills a clip. The sentence about techniques that never engaged becomes a warning."""
    on_step = steps(clip.label, result, ticket)
    try:
        with accel(model.pipe) as run:
            try:
                for chunk in chunks(model, run, result.asked.prompt, noise, arguments, on_step):
                    clip.append(chunk)
                    result.figures[clip.name] = live(run, model.pipe)
            finally:
                clip.finish(result.file_of(clip), result.fps)
    except NotEngagedError as error:
        result.warnings.append(str(error))
    report = run.report()
    result.figures[clip.name] = final(report, model.pipe)
    result.techniques += techniques(report)
    return report


def chunks(
    model: VideoModel, run: Any, prompt: str, noise: torch.Generator, arguments: dict[str, Any], on_step: OnStep
) -> Iterator[Any]:
    """Frames (F, H, W, 3) as they are made: block by block, or all at once where the pipeline knows no blocks."""
    pipe = model.pipe
    given = {**arguments, "prompt": [prompt], "generator": noise, "callback_on_step_end": on_step}
    if not model.causal:
        frames = pipe(**given, output_type="np").frames[0]
        run.produced(len(frames))
        yield frames
        return
    with closing(pipe.stream(**given, overlap=pipe._execution_device.type == "cuda")) as stream:
        for chunk in stream:
            yield chunk[0]


def steps(doing: str, result: Result, ticket: Ticket) -> OnStep:
    """A pipeline's `callback_on_step_end`, which ends the generation where the ticket was cancelled."""

    def on_step(pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        result.at(doing, step + 1, pipe.num_timesteps)
        ticket.check()
        return {}

    return on_step


def warm_up(model: VideoModel, accel: Accel, arguments: dict[str, Any], result: Result, ticket: Ticket) -> None:
    """Two steps of two blocks that are not timed, once for every technique and size."""
    kind = (accel, arguments["width"], arguments["height"])
    if kind in model.warm:
        return
    short = {**arguments, "num_inference_steps": 2 if model.causal else 1}
    if model.causal:
        blocks = 2 * model.pipe.config.frames_per_block
        short["num_frames"] = min(arguments["num_frames"], 1 + model.pipe.vae_scale_factor_temporal * (blocks - 1))
    run = accel.apply(model.pipe)
    try:
        on_step = steps("Warming up", result, ticket)
        for _ in chunks(model, run, result.asked.prompt, generator(0), short, on_step):
            ticket.check()
    finally:
        run.remove(check=False)
    model.warm.add(kind)
