"""What a causal pipeline is given, checked and brought into its form before the first step."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import lcm
from types import SimpleNamespace
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_wan import WanPipeline, prompt_clean
from torch import Tensor

from diffaccel.errors import KnobError
from diffaccel.suggest import choose

Sampler = Literal["multistep", "few_step", "rolling"]
PromptChange = Literal["keep", "recompute", "flush"]
SAMPLERS = ("multistep", "few_step", "rolling")
OUTPUT_TYPES = ("np", "pt", "pil", "latent")
DEFAULT_STEPS = {"multistep": 50, "few_step": 4, "rolling": 5}
DEFAULT_GUIDANCE = {"multistep": 5.0, "few_step": 1.0, "rolling": 1.0}
FEW_STEP_SHIFT = 5.0  # the shift Self-Forcing, LongLive, Rolling Forcing and others were distilled with


@dataclass
class Rollout:
    """What one call has settled before its first step."""

    embeds: dict[str, Tensor]  # branch ("cond", under guidance "uncond") to (B, T, C)
    latents: Tensor  # (B, C, L, h, w) fp32: the noise, in which finished blocks take their place
    history: Tensor | None  # (B, C, L, h, w): what is committed instead of `latents`
    blocks: list[range]  # latent frames of every block
    given: int  # how many of the blocks come from the condition
    scheduler: Any  # its steps are set; every block starts from a copy
    call: SimpleNamespace  # the arguments of the call; the prompt is the one that holds now
    rolling: bool = False  # whether blocks are denoised together
    condition: Callable[[int, int, Any], Mapping[str, Any] | None] | None = None  # asked for what each block is under
    asked: int = 0  # the first block it was not asked for
    extra: dict[int, dict[str, Any]] = field(default_factory=dict)  # what the model is given more, block by block
    cached: Tensor | None = None  # the prompt that the cache was last brought in line with
    forward: Callable[..., Tensor] | None = None  # latents, time and prompt to a velocity

    def extra_of(self, block: int) -> dict[str, Any]:
        """What the model is given for a block beside latents, time and prompt."""
        return self.extra.get(block, {"attention_kwargs": self.call.attention_kwargs})

    @property
    def steps(self) -> int:
        return len(self.scheduler.timesteps)

    @cached_property
    def noise(self) -> list[float]:
        """Noise level of every step in [0, 1], then that of the clean pass."""
        return [t / self.scheduler.config.num_train_timesteps for t in self.scheduler.timesteps.tolist()] + [0.0]


def block_ranges(start: int, stop: int, size: int) -> list[range]:
    """Cuts latent frames `start .. stop - 1` into blocks of `size`; the first block takes the remainder.

    >>> block_ranges(0, 7, 3)
    [range(0, 1), range(1, 4), range(4, 7)]
    """
    first = start + ((stop - start) % size or size)
    return [range(a, b) for a, b in pairwise([start, *range(first, stop + 1, size)])]


def check(pipe: WanPipeline, call: SimpleNamespace, sampler: str, frames_per_block: int) -> None:
    """Refuses arguments that break a rule, before anything is computed."""
    choose(sampler, SAMPLERS, "sampler")
    choose(call.output_type, OUTPUT_TYPES, "output_type")
    choose(call.on_prompt_change, get_args(PromptChange), "on_prompt_change")
    check_frames("num_frames", call.num_frames, pipe.vae_scale_factor_temporal)
    patch = pipe.transformer.config.patch_size
    check_size("height", call.height, lcm(16, pipe.vae_scale_factor_spatial * patch[1]))
    check_size("width", call.width, lcm(16, pipe.vae_scale_factor_spatial * patch[2]))
    if frames_per_block < 1:
        raise KnobError(f"frames_per_block is at least 1, got {frames_per_block}")
    if call.num_videos_per_prompt < 1:
        raise KnobError(f"num_videos_per_prompt is at least 1, got {call.num_videos_per_prompt}")
    if isinstance(call.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
        call.callback_on_step_end_tensor_inputs = call.callback_on_step_end.tensor_inputs
    pipe.check_inputs(
        *(call.prompt, call.negative_prompt, call.height, call.width),
        *(call.prompt_embeds, call.negative_prompt_embeds, call.callback_on_step_end_tensor_inputs),
    )
    if call.prompt is not None and not (call.prompt and all(text.strip() for text in as_list(call.prompt))):
        raise KnobError(f"a prompt says what to generate and may not be empty, got {call.prompt!r}")


def check_frames(name: str, frames: int, stride: int) -> None:
    """Refuses a count of pixel frames that is not 1 + stride * k."""
    if frames < 1 or (frames - 1) % stride:
        below = 1 + max(frames - 1, 0) // stride * stride
        raise KnobError(
            f"{name} is 1 + {stride}k, because the VAE makes one latent frame of the first frame and of every {stride}"
            f" after it; got {frames}, the nearest valid values are {below} and {below + stride}"
        )


def check_size(name: str, pixels: int, multiple: int) -> None:
    """Refuses a height or width that is not a positive multiple of VAE stride times patch."""
    if pixels < multiple or pixels % multiple:
        below = max(pixels // multiple, 1) * multiple
        raise KnobError(
            f"{name} is a multiple of {multiple} (VAE stride times patch); got {pixels}, the nearest valid values are"
            f" {below} and {below + multiple}"
        )


def as_list(texts: str | list[str] | None) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or ())


def prompt_count(call: SimpleNamespace) -> int:
    return call.prompt_embeds.shape[0] if call.prompt is None else len(as_list(call.prompt))


def draw_noise(pipe: WanPipeline, call: SimpleNamespace, device: torch.device) -> Tensor:
    """The noise of the whole video (B, C, L, h, w) fp32, in one draw, so that no policy can change it."""
    batch, channels = prompt_count(call) * call.num_videos_per_prompt, pipe.transformer.config.in_channels
    scale, frames = pipe.vae_scale_factor_spatial, 1 + (call.num_frames - 1) // pipe.vae_scale_factor_temporal
    shape = (batch, channels, frames, call.height // scale, call.width // scale)
    for name in ("latents", "history"):
        given = getattr(call, name)
        if given is not None and tuple(given.shape) != shape:
            raise KnobError(
                f"{name} has shape (batch, channels, latent frames, height, width) = {shape} for this call, got"
                f" {tuple(given.shape)}"
            )
    latents = pipe.prepare_latents(
        *(batch, channels, call.height, call.width, call.num_frames, torch.float32, device),
        *(call.generator, call.latents),
    )
    return latents.clone() if latents is call.latents else latents  # the caller's tensor is not ours to write to


def unread(tokenizer: Any, texts: list[str], max_length: int) -> list[str]:
    """One sentence for every text of which the model reads less than was written: unknown words, a cut end.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: prompts as the user wrote them.
        max_length: tokens that are read, the closing token included.
    """
    sentences = []
    for number, text in enumerate(map(prompt_clean, texts), 1):
        which = f'prompt {number} of {len(texts)} ("{text[:40]}")' if len(texts) > 1 else "the prompt"
        fast = getattr(tokenizer, "is_fast", False)
        tokens = tokenizer(text, return_offsets_mapping=True) if fast else tokenizer(text)
        ids, unknown = tokens["input_ids"], getattr(tokenizer, "unk_token_id", None)
        if unknown is not None and unknown in ids:
            if fast:
                spans = tokens["offset_mapping"]
                words = [text[a:b].strip() for i, (a, b) in zip(ids, spans, strict=True) if i == unknown]
            else:
                words = [word for word in text.split() if unknown in tokenizer(word)["input_ids"]]
            named = ", ".join(f'"{word}"' for word in dict.fromkeys(words))
            sentences.append(f"{which} has words the tokenizer does not know, so the model cannot read them: {named}")
        if len(ids) > max_length:
            closing = int(ids[-1] == getattr(tokenizer, "eos_token_id", None))  # kept when the text is cut
            lost = tokenizer.decode(ids[max_length - closing : len(ids) - closing])
            sentences.append(
                f'{which} is {len(ids)} tokens long and max_sequence_length is {max_length}; this was cut: "{lost}"'
            )
    return sentences


def condition_pixels(pipe: WanPipeline, call: SimpleNamespace) -> Tensor | None:
    """The given image or video in any of its forms to pixels (1 or prompts, 3, F, H, W) in [-1, 1], at the call's size.

    Raises:
        KnobError: both are given, their number is not that of the prompts, the VAE cannot encode so many frames, or
            they leave nothing to generate.
        ValueError: the form is none diffusers' processors know.
    """
    if call.image is None and call.video is None:
        return None
    if call.image is not None and call.video is not None:
        raise KnobError("image and video are both conditions for the first frames, got both; pass one of them")
    process, size = pipe.video_processor, {"height": call.height, "width": call.width}
    if call.image is not None:
        pixels = process.preprocess(_unit_range(call.image), **size).unsqueeze(2)
    else:
        pixels = process.preprocess_video(_unit_range(call.video), **size)
    rows, frames, stride = pixels.shape[0], pixels.shape[2], pipe.vae_scale_factor_temporal
    if rows not in (1, prompt_count(call)):
        raise KnobError(
            f"the image or video is one for all prompts or one a prompt, got {rows} for {prompt_count(call)} prompts"
        )
    check_frames("the number of frames of video", frames, stride)
    if frames >= call.num_frames:
        raise KnobError(
            f"num_frames counts the condition too and has to exceed it, got num_frames={call.num_frames} for a"
            f" condition of {frames}; pass num_frames={frames + stride} or more"
        )
    return pixels


def _unit_range(pixels: Any) -> Any:
    """8-bit pixels to [0, 1]; diffusers' processors take every array for one in [0, 1]."""
    if isinstance(pixels, (list, tuple)):
        return [_unit_range(item) for item in pixels]
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255.0
    if isinstance(pixels, Tensor) and pixels.dtype == torch.uint8:
        return pixels.float() / 255.0
    return pixels


def block_schedule(
    scheduler: Any,
    sampler: Sampler,
    steps: int | None = None,
    sigmas: list[float] | None = None,
    timesteps: list[float] | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """A scheduler with the steps of one block set; the one given is left as it was.

    Args:
        scheduler: the pipeline's.
        sampler: "few_step" and "rolling" need a `FlowMatchEulerDiscreteScheduler` with `stochastic_sampling=True`,
            whose step is x0 = x - sigma * v, then (1 - sigma') * x0 + sigma' * fresh noise; one with shift 5 is made
            if `scheduler` is not.
        steps: how many; with those two their levels are 1, 1 - 1/steps, ... before the shift.
        sigmas: levels in (0, 1] before the shift, decreasing.
        timesteps: levels times `num_train_timesteps` after the shift, decreasing.
    """
    scheduler = copy.deepcopy(scheduler)
    euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if sampler != "multistep" and not (euler and scheduler.config.stochastic_sampling):
        scheduler, euler = FlowMatchEulerDiscreteScheduler(shift=FEW_STEP_SHIFT, stochastic_sampling=True), True
    given = _check_levels(scheduler, steps, sigmas, timesteps)
    if given is None:
        steps = steps or DEFAULT_STEPS[sampler]
        if sampler != "multistep":
            scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
        else:
            scheduler.set_timesteps(steps, device=device)
    elif sigmas is not None or not euler:
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        if given not in accepted:
            raise KnobError(f"{type(scheduler).__name__} takes no {given}; pass num_inference_steps")
        scheduler.set_timesteps(**{given: sigmas or timesteps}, device=device)
    else:
        # the scheduler shifts every sigma it is given, so these are shifted back first
        shift = scheduler.shift
        levels = [t / scheduler.config.num_train_timesteps for t in timesteps or ()]
        levels = [s / (shift - (shift - 1) * s) for s in levels]
        scheduler.set_timesteps(sigmas=levels, timesteps=timesteps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def _check_levels(
    scheduler: Any, steps: int | None, sigmas: list[float] | None, timesteps: list[float] | None
) -> Literal["sigmas", "timesteps"] | None:
    """Which of the two lists is given; refuses lists no sampler can follow."""
    if steps is not None and steps < 1:
        raise KnobError(f"num_inference_steps is at least 1, got {steps}")
    if sigmas is None and timesteps is None:
        return None
    if sigmas is not None and timesteps is not None:
        raise KnobError("sigmas (before the shift) and timesteps (after it) say the same thing, got both; pass one")
    name: Literal["sigmas", "timesteps"] = "sigmas" if sigmas is not None else "timesteps"
    levels = list(sigmas if sigmas is not None else timesteps or ())
    top = 1 if name == "sigmas" else scheduler.config.num_train_timesteps
    falling = all(a > b for a, b in pairwise(levels))
    if not levels or not falling or levels[0] > top or levels[-1] <= 0:
        raise KnobError(f"{name} fall from at most {top} and stay above 0, got {levels}")
    if steps is not None and steps != len(levels):
        raise KnobError(f"num_inference_steps={steps} and {len(levels)} {name} disagree; pass one of them")
    return name
