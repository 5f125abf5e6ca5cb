"""SageAttention 2: scores from queries and keys of 8 bits, so faster than exact and not exact.

"auto" never takes it. The first call of a size is compared with the definition on the tensors that it is given, for a
sample of their queries, and refused where it is further off than `BUDGET`. Later calls of that size are not looked at.
"""

from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from ..errors import KernelError
from ..plan import Plan
from . import reference
from .choose import Size, size_of
from .gather import by_weight, planned
from .merge import Partial

name = "sage"

BUDGET = 0.05
"""Largest error of `out`, as a share of its norm in any head, and of `lse`, where it is a share of a merged weight."""

_SAMPLE = 32
_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
_INSTALL = "pip install --no-build-isolation git+https://github.com/thu-ml/SageAttention"
_fits: set[tuple[torch.device, Size]] = set()


def unusable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel cannot run there, or None."""
    if device.type != "cuda":
        return f"it runs on cuda, not on {device.type}"
    if reason := _broken():
        return reason
    if (found := torch.cuda.get_device_capability(device)) not in _CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in _CAPABILITIES)
        return f"it is built for compute capabilities {known}, not {found[0]}.{found[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype}"
    return f"it takes head dimensions up to 128, not {head_dim}" if head_dim > 128 else None


def value_width(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> int | None:
    """As `reference.value_width`: a log-weight in channels of the keys would be rounded to 8 bits with them."""
    return None


def partial(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_weight: Tensor | None = None, plan: Plan | None = None
) -> Partial:
    """As `reference.partial`, within `BUDGET`; else a `KernelError`. Keys go by weight."""
    return planned(_dense, q, k, v, scale, log_weight, plan)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor | None) -> Partial:
    if log_weight is not None:
        return by_weight(_dense, q, k, v, scale, log_weight)
    out, lse = _library().sageattn(q, k, v, tensor_layout="NHD", sm_scale=scale, return_lse=True)
    part = Partial(out, lse.transpose(1, 2))
    kind = (q.device, size_of(q, k.shape[1]))
    if kind not in _fits:
        _compare(part, q, k, v, scale, kind[1])
        _fits.add(kind)
    return part


def _compare(part: Partial, q: Tensor, k: Tensor, v: Tensor, scale: float, size: Size) -> None:
    """Raise `KernelError` where a sample of the queries is off by more than `BUDGET`."""
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise KernelError(f"kernel 'sage' meets {size} first while a CUDA graph is captured: run such a call before it")
    rows = torch.linspace(0, q.shape[1] - 1, min(q.shape[1], _SAMPLE), device=q.device).long()
    worst = worst_lse = q.new_zeros((), dtype=torch.float32)
    for head in range(q.shape[2]):  # one at a time, for its keys in fp32 and their scores are large
        one = slice(head, head + 1)
        exact = reference.partial(q[:, rows, one].float(), k[:, :, one].float(), v[:, :, one].float(), scale=scale)
        off = (part.out[:, rows, one] - exact.out).norm() / exact.out.norm().clamp(min=1e-30)
        worst = torch.maximum(worst, off)
        worst_lse = torch.maximum(worst_lse, (part.lse[:, rows, one] - exact.lse).abs().max())
    error, lse_error = float(worst), float(worst_lse)
    if not (error <= BUDGET and lse_error <= BUDGET):
        raise KernelError(
            f"kernel 'sage' is off by {error:.2g} of its result and by {lse_error:.2g} in the log-sum-exp at {size}, "
            f"and {BUDGET:g} is allowed: 8 bits do not hold these queries and keys; use kernel='auto'"
        )


@lru_cache(maxsize=1)
def _broken() -> str | None:
    """Why it is not there, cannot do what is asked of it, or does not load."""
    try:
        version = metadata.version("sageattention")
    except metadata.PackageNotFoundError:
        return f"the package sageattention is not installed (`{_INSTALL}`)"
    if Version(version).major < 2:
        return f"sageattention {version} gives no log-sum-exp, 2 and later do (`{_INSTALL}`)"
    try:
        _library()
    except Exception as error:  # of somebody else's module, which may raise anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"sageattention {version} does not load beside torch {torch.__version__}: {said} (`{_INSTALL}`)"
    return None


def _library() -> Any:
    import sageattention

    return sageattention
