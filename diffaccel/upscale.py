"""What a larger video will take, and making it: what `diffaccel upscale` does."""

import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import KnobError
from .grid import Grid

if TYPE_CHECKING:
    from .pipelines import FreeSwimPipeline


@dataclass(frozen=True)
class Estimate:
    """What is known beforehand: forwards of the denoiser, passes over the whole field among them, the share of the keys
    that a window reads, bytes the guide keeps on the device, and about how many seconds denoising takes."""

    forwards: int
    passes: int
    share: float
    kept_bytes: int
    seconds: float


def estimate(
    big: "FreeSwimPipeline",
    height: int,
    width: int,
    num_frames: int,
    *,
    steps: int,
    strength: float,
    guidance: float,
) -> Estimate:
    """Counts operations, and times one forward of the native size to know how long they take here."""
    pipe = big.pipe
    causal = bool(getattr(pipe, "block_causal", False))
    frames, block = 1 + (num_frames - 1) // pipe.vae_scale_factor_temporal, big.frames_at_once(num_frames)
    blocks = -(-frames // block)
    run = max(1, int(steps * strength))
    branches = 2 if guidance > 1 else 1
    guide = big.accel.reuse
    rows, columns = big.tokens(height, width)
    clean = blocks - 1 if causal else 0  # passes of finished blocks; nothing reads the last
    ordinary = (run * blocks + clean) * branches
    passes = 0 if guide is None else -(-run // guide.every) * blocks
    if guide is not None and big.field(height, width) != (rows, columns):
        passes += clean  # they have a past of their own
    seen = min(rows, big.window[0]) * min(columns, big.window[1])
    past = frames / 2 if causal and blocks > 1 else 0.0  # on average

    def work(rows: int, columns: int, keys: int, past: float = past) -> float:
        """Multiplications and additions of one forward of a block whose queries read `keys` tokens of every frame."""
        config = pipe.transformer.config
        size, tokens = config.num_attention_heads * config.attention_head_dim, block * rows * columns
        dense = 2 * tokens * size * (6 * size + 2 * config.ffn_dim)  # projections of both attentions and the rest
        return config.num_layers * (dense + 4.0 * tokens * (past + block) * keys * size)

    native = big.tokens(*big.native)
    speed = work(*native, native[0] * native[1], 0.0) / _seconds_of_a_forward(pipe, Grid(block, *native))
    total = ordinary * work(rows, columns, seen)
    if passes:
        total += passes * work(*(field := big.field(height, width)), field[0] * field[1])
    return Estimate(
        forwards=ordinary + passes,
        passes=passes,
        share=seen / (rows * columns),
        kept_bytes=big.kept_bytes(height, width, num_frames),
        seconds=total / speed,
    )


def work_bytes(big: "FreeSwimPipeline", height: int, width: int, num_frames: int, branches: int = 2) -> int:
    """About what denoising takes beside the weights: the widest activations of a forward, and the past of a causal
    model for each branch of guidance."""
    config, itemsize = big.pipe.transformer.config, big.pipe.transformer.dtype.itemsize
    size, per_frame = config.num_attention_heads * config.attention_head_dim, math.prod(big.tokens(height, width))
    at_once, past = big.frames_at_once(num_frames), 0
    if getattr(big.pipe, "block_causal", False):
        frames = 1 + (num_frames - 1) // big.pipe.vae_scale_factor_temporal
        past = branches * frames * 2 * config.num_layers * size * itemsize
    # what a feed-forward layer takes and gives, and about four activations in fp32: 9.6 GiB where 9.2 were measured
    return int(per_frame * (at_once * (2 * config.ffn_dim * itemsize + 16 * size) + past))


def check_memory(big: "FreeSwimPipeline", height: int, width: int, num_frames: int, branches: int = 2) -> None:
    """Raise `KnobError` where denoising and what the guide keeps do not fit, with the smallest change that helps."""
    free = free_bytes(big.pipe.transformer.device)

    def fits(frames: int, hold: str | None = None) -> bool:
        return work_bytes(big, height, width, frames, branches) + big.kept_bytes(height, width, frames, hold) <= free

    if fits(num_frames):
        return
    fewer = range(num_frames - 4, 0, -big.pipe.vae_scale_factor_temporal)
    remedies = [f"--hold {hold}" for hold in ("int8", "host") if big.accel.reuse is not None and fits(num_frames, hold)]
    remedies += [f"--frames {frames}" for frames in fewer if fits(frames)]
    work, kept = work_bytes(big, height, width, num_frames, branches), big.kept_bytes(height, width, num_frames)
    raise KnobError(
        f"denoising takes about {work / 2**20:.1f} MiB and what guides {kept / 2**20:.1f} MiB, of which "
        f"{free / 2**20:.1f} MiB are free; use {remedies[0] if remedies else 'a smaller frame'}"
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def _seconds_of_a_forward(pipe: Any, grid: Grid) -> float:
    """The second of two."""
    model, device = pipe.transformer, pipe._execution_device
    config, patch = model.config, model.config.patch_size
    size = (grid.frames * patch[0], grid.height * patch[1], grid.width * patch[2])
    latents = torch.zeros(1, config.in_channels, *size, device=device, dtype=model.dtype)
    text = torch.zeros(1, 16, config.text_dim, device=device, dtype=model.dtype)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        model(hidden_states=latents, timestep=torch.ones(1, device=device), encoder_hidden_states=text)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds
