"""The decoder of Wan's VAE with less traffic: the same convolutions, channels-last, and what lies between them fused.

On a GPU much of a frame's time goes into copies and elementwise passes: padding, joining with the frames before, norms
and activations in fp32, layouts turned around, pixels doubled in fp32. Here a norm, its activation and the frames
before meet in the buffer that the convolution reads, which pads by itself (samples/RESULTS.md has what that saves).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
)
from torch import Tensor, nn
from torch.nn import functional

from diffaccel.kernel.merge import HAS_TRITON

Past = list[Any]
"""Of every convolution of the decoder: its last two frames, None, or diffusers' "Rep" where a resampler has begun."""

_LAST = torch.channels_last_3d


def unfit(decoder: nn.Module) -> str | None:
    """Why a decoder runs as diffusers has it, or None."""
    if type(decoder) is not WanDecoder3d:
        return f"it is a {type(decoder).__name__}"
    if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in decoder.modules()):
        return "hooks on its layers (offload, casting) expect each to be called"
    if any("forward" in vars(module) for module in decoder.modules()):
        return "the forward of one of its layers has been replaced"
    if any(block.dropout.p for block in decoder.modules() if isinstance(block, WanResidualBlock)) and decoder.training:
        return "it is being trained"
    return None


@contextmanager
def fused(decoder: WanDecoder3d) -> Iterator[None]:
    """Inside, calls of `decoder` take the short way. Its weights become channels-last and stay so: the same values."""
    for module in decoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=_LAST)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    patched: list[nn.Module] = []

    def patch(module: nn.Module, forward: Any) -> None:
        module.__dict__["forward"] = forward
        patched.append(module)

    try:
        for module in decoder.modules():
            if isinstance(module, WanCausalConv3d):
                patch(module, partial(_conv, module))
            elif isinstance(module, WanResidualBlock):
                patch(module, partial(_residual, module))
            elif isinstance(module, WanResample) and module.mode in ("upsample2d", "upsample3d"):
                patch(module, partial(_resample, module))
        patch(decoder.norm_out, partial(_normed, decoder.norm_out))
        patch(decoder.nonlinearity, _same)
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


def _residual(block: Any, x: Tensor, feat_cache: Past | None = None, feat_idx: list[int] | None = None) -> Tensor:
    short, past, place = block.conv_shortcut(x), feat_cache, feat_idx or [0]
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        room = _room(x, 2)
        _before(room, None if past is None else past[place[0]])
        _norm_silu(norm, x, room, 2)
        if past is not None:
            past[place[0]] = room[:, :, -2:].clone()
            place[0] += 1
        x = _over(conv, room)
    return x + short


def _conv(conv: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    before = conv._padding[4]
    if not before:
        return _over(conv, x)
    room = _room(x, before)
    _before(room[:, :, :before], cache_x)
    room[:, :, before:] = x
    return _over(conv, room)


def _resample(module: Any, x: Tensor, feat_cache: Past | None = None, feat_idx: list[int] | None = None) -> Tensor:
    if module.mode == "upsample3d" and feat_cache is not None:
        assert feat_idx is not None
        place, past = feat_idx[0], feat_cache[feat_idx[0]]
        feat_idx[0] += 1
        if past is None:  # the video's first frame stays one
            feat_cache[place] = "Rep"
        else:
            room = _room(x, 2)
            _before(room, None if isinstance(past, str) else past)
            room[:, :, 2:] = x
            feat_cache[place] = room[:, :, -2:].clone()
            x = _over(module.time_conv, room)  # two frames of each, side by side as channels
            x = x.unflatten(1, (2, -1)).permute(0, 3, 1, 4, 5, 2).flatten(1, 2).permute(0, 4, 1, 2, 3)
    batch, frames = x.shape[0], x.shape[2]
    flat = x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)
    flat = module.resample[1](functional.interpolate(flat, scale_factor=2.0, mode="nearest"))
    return flat.permute(0, 2, 3, 1).unflatten(0, (batch, frames)).permute(0, 4, 1, 2, 3)


def _normed(norm: Any, x: Tensor) -> Tensor:
    room = _room(x, 0)
    _norm_silu(norm, x, room, 0)
    return room


def _same(x: Tensor) -> Tensor:
    return x


def _room(x: Tensor, before: int) -> Tensor:
    """For frames like those of `x` (B, C, T, H, W) behind so many earlier ones, channels-last."""
    batch, channels, frames, height, width = x.shape
    return x.new_empty(batch, before + frames, height, width, channels).permute(0, 4, 1, 2, 3)


def _before(room: Tensor, past: Tensor | None) -> None:
    """Fill the first two frames: zeros, and up to two that are known."""
    known = 0 if past is None else past.shape[2]
    room[:, :, : 2 - known] = 0
    if past is not None:
        room[:, :, 2 - known : 2] = past


def _over(conv: nn.Conv3d, room: Tensor) -> Tensor:
    _, _, _, height, width = conv.weight.shape
    return functional.conv3d(room, conv.weight, conv.bias, conv.stride, (0, height // 2, width // 2))


def _norm_silu(norm: Any, x: Tensor, room: Tensor, first: int) -> None:
    bias = norm.bias.flatten() if isinstance(norm.bias, Tensor) else None
    if x.is_cuda and HAS_TRITON:
        from diffaccel.kernel.fused_norm import norm_silu

        norm_silu(x.contiguous(memory_format=_LAST), norm.gamma.flatten(), bias, room, first)
    else:
        norm_silu_eager(x, norm.gamma.flatten(), bias, room, first)


def norm_silu_eager(x: Tensor, gamma: Tensor, bias: Tensor | None, room: Tensor, first: int) -> None:
    """`norm_silu` of `fused_norm` written out: what the kernel is held to."""
    y = functional.normalize(x.float(), dim=1) * x.shape[1] ** 0.5 * gamma.float().view(-1, 1, 1, 1)
    room[:, :, first:] = functional.silu(y if bias is None else y + bias.float().view(-1, 1, 1, 1))
