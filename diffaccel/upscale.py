"""What a larger video will take, and making it: what `diffaccel upscale` does."""

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
    frames = 1 + (num_frames - 1) // pipe.vae_scale_factor_temporal
    block = min(frames, pipe.config["frames_per_block"]) if causal else frames
    blocks = -(-frames // block)
    run = max(1, int(steps * strength))
    branches = 2 if guidance > 1 else 1
    guide = big.accel.reuse
    passes = 0 if guide is None else -(-run // guide.every) * blocks
    ordinary = (run + causal) * branches * blocks  # the clean pass of a block, as well
    rows, columns = big.tokens(height, width)
    seen = min(rows, big.window[0]) * min(columns, big.window[1])
    past = frames / 2 if causal and blocks > 1 else 0.0  # on average

    def work(rows: int, columns: int, keys: int, past: float) -> float:
        """Multiplications and additions of one forward of a block whose queries read `keys` tokens of every frame."""
        config = pipe.transformer.config
        size, tokens = config.num_attention_heads * config.attention_head_dim, block * rows * columns
        dense = 2 * tokens * size * (6 * size + 2 * config.ffn_dim)  # projections of both attentions and the rest
        return config.num_layers * (dense + 4.0 * tokens * (past + block) * keys * size)

    native = big.tokens(*big.native)
    speed = work(*native, native[0] * native[1], 0.0) / _seconds_of_a_forward(pipe, Grid(block, *native))
    pool = big.accel.window.field_pool
    field = -(-rows // pool) * -(-columns // pool)
    total = ordinary * work(rows, columns, seen, past) + passes * work(rows, columns, field, past)
    return Estimate(
        forwards=ordinary + passes,
        passes=passes,
        share=seen / (rows * columns),
        kept_bytes=big.kept_bytes(height, width, num_frames),
        seconds=total / speed,
    )


def check_memory(big: "FreeSwimPipeline", height: int, width: int, num_frames: int) -> None:
    """Raise `KnobError` where what the guide keeps does not fit, with the smallest change after which it does."""
    free = free_bytes(big.pipe.transformer.device)
    kept, rounded = (big.kept_bytes(height, width, num_frames, hold) for hold in (None, "int8"))
    if kept <= free:
        return
    remedy = "--hold int8" if rounded <= free else "--hold host"
    raise KnobError(
        f"the cross-attention kept between passes takes {kept / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free; "
        f"use {remedy}, or a smaller frame"
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
