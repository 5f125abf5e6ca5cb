"""Rolling Forcing's joint window: blocks at rising noise levels are denoised together (arXiv 2509.25161).

A window has as many blocks as there are steps, each one level noisier than the one before it. They see each other in
both directions, and the clean blocks before the window. One forward takes every block a level down: the oldest is
finished, leaves and is committed, and one of pure noise enters. The first windows grow from one block, the last ones
shrink. N blocks in W steps take N + W - 1 forwards, and a clean pass for each block that another one follows.
"""

from typing import Any

import torch
from torch import Tensor

from diffaccel.accel import Accel
from diffaccel.errors import UnsupportedError
from diffaccel.run import Run

from . import callbacks, conditions, few_step
from .inputs import Rollout


def refuse(accel: Accel) -> None:
    """Raises `UnsupportedError` where a technique goes by the steps of one block over one past."""
    reuse = accel.reuse
    if reuse is not None and not reuse.is_exact:
        raise UnsupportedError(
            f"{type(reuse).__name__} (slot reuse) keeps attention from step to step of a block, and in a rolling "
            "window the past and the blocks at work are others at every forward: leave reuse out, or take "
            "sampler='few_step'"
        )


def finish_block(pipe: Any, rollout: Rollout, run: Run, index: int, bar: Any) -> Tensor:
    """Denoises the windows whose oldest block is `index`, until that is finished; its latents (B, C, n, h, w).

    Before the first block is finished the window grows, so that is one forward a step; then it is one.
    """
    schedule, last = rollout.scheduler, rollout.steps - 1
    for step in range(last + 1) if index == rollout.given else (last,):
        if pipe.interrupt:
            break
        window = rollout.blocks[index : index + step + 1]
        newest = index + len(window) - 1
        conditions.ask(pipe, rollout, run, newest, finished=index)
        latents = rollout.latents[:, :, window[0].start : window[-1].stop]
        t = pipe._current_timestep = schedule.timesteps[step]

        def by_frame(values: Tensor, step: int = step, window: list[range] = window) -> Tensor:
            """Of each latent frame, (n,), where the oldest block takes the value of `step`."""
            return torch.cat([values[step - i].expand(len(block)) for i, block in enumerate(window)])

        velocity = pipe._predict(rollout, run, index, latents, by_frame(schedule.timesteps), step, "denoise", newest)
        now, following = (by_frame(levels)[:, None, None] for levels in (schedule.sigmas, schedule.sigmas[1:]))
        done = few_step.renoised(latents, velocity, now, following, rollout.call.generator)
        latents.copy_(callbacks.end_step(pipe, rollout, index - rollout.given + step, t, done))
        bar.update()
    pipe._current_timestep = None
    frames = rollout.blocks[index]
    return rollout.latents[:, :, frames.start : frames.stop]
