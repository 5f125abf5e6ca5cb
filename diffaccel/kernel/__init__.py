"""Kernels: one function each, all computing what `reference` defines; only speed differs.

partial(q, k, v, *, scale, log_weight=None, plan=None) -> Partial(out, lse)
"""

from types import ModuleType

import torch

from .. import suggest
from ..errors import KernelError
from . import choose, fa3, fa4, reference, sdpa, split, xformers
from .merge import Partial, merge, nothing

KERNELS: dict[str, ModuleType] = {kernel.name: kernel for kernel in (reference, sdpa, fa3, fa4, xformers, split)}
CHOICES = ("auto", *KERNELS)
_PREFERRED = (fa3, sdpa, fa4, xformers)  # exact ones; "auto" takes the first, or what was measured to be faster


def resolve(
    wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, size: choose.Size | None = None
) -> ModuleType:
    """The kernel of that name, or for "auto" the fastest usable one. An explicit name never falls back."""
    return KERNELS[pick(wanted, device, dtype, head_dim, size).kernel]


def pick(
    wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, size: choose.Size | None = None
) -> choose.Choice:
    """As `resolve`, with the reason. Without the `size` of the call nothing is measured for "auto"."""
    if wanted == "auto":
        usable = candidates(device, dtype, head_dim)
        if size is None or len(usable) < 2:
            return choose.Choice(usable[0].name, "")
        return choose.fastest(usable, device, size)
    kernel = KERNELS[suggest.choose(wanted, CHOICES, "kernel")]
    reason = kernel.unusable(device, dtype, head_dim)
    if reason:
        raise KernelError(f"kernel {wanted!r} cannot run here: {reason}; use kernel='auto' or another of {CHOICES}")
    return choose.Choice(wanted, "")


def candidates(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[ModuleType]:
    """What "auto" chooses from: usable exact kernels, the preferred one first; the definition where there is none."""
    return [kernel for kernel in _PREFERRED if kernel.unusable(device, dtype, head_dim) is None] or [reference]


__all__ = ["CHOICES", "KERNELS", "Partial", "candidates", "merge", "nothing", "pick", "resolve"]
