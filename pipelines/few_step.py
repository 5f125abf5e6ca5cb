"""A step of few-step sampling: predict the clean block and add fresh noise at the next level, waiting for nothing.

It is `FlowMatchEulerDiscreteScheduler.step` with `stochastic_sampling`, bit for bit. That one sends noise of a
generator on the host, which gives the same video on every device, by a copy that waits until the GPU has done all it
was given.
"""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffaccel.sent import sent


def fits(scheduler: Any) -> bool:
    """Whether a scheduler takes such steps."""
    return type(scheduler) is FlowMatchEulerDiscreteScheduler and bool(scheduler.config.stochastic_sampling)


def step(scheduler: Any, velocity: Tensor, t: Tensor, latents: Tensor, generator: Any) -> Tensor:
    """The latents (B, C, n, h, w) at the scheduler's next level."""
    if scheduler.step_index is None:
        scheduler._init_step_index(t)
    now, following = scheduler.sigmas[scheduler.step_index], scheduler.sigmas[scheduler.step_index + 1]
    scheduler._step_index += 1
    return renoised(latents, velocity, now, following, generator)


def renoised(latents: Tensor, velocity: Tensor, now: Tensor, following: Tensor, generator: Any) -> Tensor:
    """The clean latents (B, C, n, h, w) that a velocity leads to from level `now`, with fresh noise at `following`.

    Levels in [0, 1], one for all or (n, 1, 1).
    """
    sample = latents.float()
    clean = sample - now * velocity
    return ((1.0 - following) * clean + following * _noise(sample, generator)).to(velocity.dtype)


def _noise(like: Tensor, generator: Any) -> Tensor:
    some = generator[0] if isinstance(generator, list) else generator
    if like.device.type != "cuda" or some is None or some.device.type != "cpu":
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return sent(
        randn_tensor(like.shape, generator=generator, device=torch.device("cpu"), dtype=like.dtype), like.device
    )
