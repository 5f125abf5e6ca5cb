"""PyTorch's own kernels, through the aten ops that return the log-sum-exp.

cuDNN for fp16 and bf16 on CUDA, memory-efficient attention for fp32 there, flash attention on the CPU. The CPU kernel
takes a log-weight as an fp32 bias; on CUDA a bias would be rounded to the tensors' dtype, so keys go by weight.
"""

import torch
from torch import Tensor

from ..plan import Plan
from .gather import by_weight, planned
from .merge import Partial

name = "sdpa"

_aten = torch.ops.aten
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cuda": (torch.float16, torch.bfloat16, torch.float32)}
_DTYPES["cpu"] = (*_DTYPES["cuda"], torch.float64)


def unusable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel cannot run there, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda, not on {device.type}"
    if dtype not in _DTYPES[device.type]:
        return f"it takes {', '.join(map(str, _DTYPES[device.type]))} on {device.type}, not {dtype}"
    if device.type == "cuda" and head_dim % 8:
        return f"it takes head dimensions divisible by 8 on cuda, not {head_dim}"
    if device.type == "cuda" and head_dim > 128 and dtype != torch.float32:
        return f"it takes head dimensions up to 128 in {dtype}, not {head_dim}"
    return None


def value_width(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> int | None:
    """As `reference.value_width`. Keys wider than values are known of the memory-efficient kernel, and of cuDNN where
    it takes more than 128 channels: on compute capability 9.0, from 9.10 on.
    """
    if device.type == "cuda" and dtype == torch.float32:
        return value_dim
    if device.type == "cuda" and key_dim > 128:
        wide = torch.cuda.get_device_capability(device) == (9, 0) and (torch.backends.cudnn.version() or 0) >= 91000
        return value_dim if wide and key_dim <= 256 else None
    return key_dim


def partial(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_weight: Tensor | None = None, plan: Plan | None = None
) -> Partial:
    """As `reference.partial`."""
    return planned(_dense, q, k, v, scale, log_weight, plan)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor | None) -> Partial:
    if log_weight is not None and q.is_cuda:
        return by_weight(_dense, q, k, v, scale, log_weight)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not q.is_cuda:
        bias = None if log_weight is None else log_weight.view(1, 1, 1, -1)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    elif q.dtype == torch.float32:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)
        lse = lse[..., : q.shape[2]]  # padded to a multiple of 32 queries
    else:
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
        lse = lse.reshape(q.shape[:3])
    return Partial(out.transpose(1, 2), lse.transpose(1, 2))
