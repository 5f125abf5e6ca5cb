"""FlashAttention-3, the fastest dense kernel on Hopper; `pip install diffaccel[hopper]`."""

import importlib.util

import torch
from torch import Tensor

from ..plan import Plan
from .gather import by_weight, planned
from .merge import Partial

name = "fa3"


def unusable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel cannot run there, or None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it runs on Hopper GPUs (compute capability 9.x) only"
    if importlib.util.find_spec("fa3_fwd_interface") is None:
        return "the package fa3-fwd is not installed (`pip install diffaccel[hopper]`)"
    if dtype != torch.bfloat16:  # fa3-fwd is built without FlashAttention-3's kernels for float16
        return f"the package fa3-fwd takes bfloat16, not {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"it takes head dimensions divisible by 8 up to 256, not {head_dim}"
    return None


def value_width(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> int | None:
    """As `reference.value_width`. Of its kernels for two widths one is of use here: 192 with 128."""
    if key_dim > 256:
        return None
    return value_dim if 128 < key_dim <= 192 and 96 < value_dim <= 128 else key_dim


def partial(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_weight: Tensor | None = None, plan: Plan | None = None
) -> Partial:
    """As `reference.partial`. FA3 takes no bias: keys go by weight."""
    return planned(_dense, q, k, v, scale, log_weight, plan, shares_heads=True)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor | None) -> Partial:
    from fa3_fwd_interface import fa3_fwd_cuda

    if log_weight is not None:
        return by_weight(_dense, q, k, v, scale, log_weight)
    # the operator itself: what flash_attn_func adds for training and compiling takes the host longer than `attend`
    out, lse, *_ = fa3_fwd_cuda.fwd(q, k, v, softmax_scale=scale, num_splits=1)
    return Partial(out, lse.transpose(1, 2))


def over_cache(
    q: Tensor, k: Tensor, v: Tensor, used: Tensor, *, scale: float, new: tuple[Tensor, Tensor] | None = None
) -> Partial:
    """Partial attention (B, S, H, D) to the first `used` (int32, (B,)) keys of buffers (B, N, G, D), H a multiple of G.

    How many there are is read on the GPU, so that a CUDA graph holds while they grow. `new` keys and values, both
    (B, M, G, D), are written behind them, and read as well.
    """
    from fa3_fwd_interface import flash_attn_with_kvcache

    more = {} if new is None else {"k": new[0], "v": new[1]}
    out, lse, *_ = flash_attn_with_kvcache(
        q, k, v, **more, cache_seqlens=used, softmax_scale=scale, return_softmax_lse=True
    )
    return Partial(out, lse.transpose(1, 2))
