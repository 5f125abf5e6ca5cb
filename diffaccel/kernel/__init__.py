"""Kernels: one function each, all computing what `reference` defines; only speed differs.

partial(q, k, v, *, scale, log_weight=None, plan=None) -> Partial(out, lse)
"""

from types import ModuleType

import torch

from .. import suggest
from ..errors import KernelError
from . import choose, fa3, fa4, reference, sage, sdpa, split, xformers
from .merge import Partial, merge, nothing

KERNELS: dict[str, ModuleType] = {kernel.name: kernel for kernel in (reference, sdpa, fa3, fa4, xformers, sage, split)}
CHOICES = ("auto", *KERNELS)
EXACT = (fa3, sdpa, fa4, xformers)
"""What "auto" chooses from: the first that is usable, or what was measured to be faster."""


def resolve(
    wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, size: choose.Size | None = None
) -> ModuleType:
    """The kernel of that name, or for "auto" the fastest usable one. An explicit name never falls back."""
    return KERNELS[pick(wanted, device, dtype, head_dim, size).kernel]


def pick(
    wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, size: choose.Size | None = None
) -> choose.Choice:
    """As `resolve`, with the reason. Nothing is measured for "auto" without the `size` of the call, nor on a CPU."""
    if wanted == "auto":
        usable = (kernel for kernel in EXACT if kernel.unusable(device, dtype, head_dim) is None)
        if size is None or device.type != "cuda":
            return choose.Choice(next(usable, reference).name, "")
        return choose.fastest(list(usable) or [reference], device, size)
    kernel = KERNELS[suggest.choose(wanted, CHOICES, "kernel")]
    reason = kernel.unusable(device, dtype, head_dim)
    if reason:
        raise KernelError(f"kernel {wanted!r} cannot run here: {reason}; use kernel='auto' or another of {CHOICES}")
    return choose.Choice(wanted, "")


__all__ = ["CHOICES", "EXACT", "KERNELS", "Partial", "merge", "nothing", "pick", "resolve"]
