"""Kernels: one function each, all computing what `reference` defines; only speed differs.

partial(q, k, v, *, scale, log_weight=None, plan=None) -> Partial(out, lse)
"""

from types import ModuleType

import torch

from ..errors import KernelError
from ..suggest import choose
from . import fa3, fa4, reference, sdpa, split, xformers
from .merge import Partial, merge, nothing

KERNELS: dict[str, ModuleType] = {kernel.name: kernel for kernel in (reference, sdpa, fa3, fa4, xformers, split)}
CHOICES = ("auto", *KERNELS)
_BY_SPEED = (fa3, sdpa, reference)


def resolve(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> ModuleType:
    """The kernel of that name, or for "auto" the fastest usable one. An explicit name never falls back."""
    if wanted == "auto":
        return next(kernel for kernel in _BY_SPEED if kernel.unusable(device, dtype, head_dim) is None)
    kernel = KERNELS[choose(wanted, CHOICES, "kernel")]
    reason = kernel.unusable(device, dtype, head_dim)
    if reason:
        raise KernelError(f"kernel {wanted!r} cannot run here: {reason}; use kernel='auto' or another of {CHOICES}")
    return kernel


__all__ = ["CHOICES", "KERNELS", "Partial", "merge", "nothing", "resolve"]
