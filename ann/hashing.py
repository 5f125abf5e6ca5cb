"""Codes of bits, and the line they are sorted along."""

import torch
from torch import Tensor

MAX_BITS = 16
_FRACTION = 30  # bits of a sort key below the code


def pack(projections: Tensor) -> Tensor:
    """Sign bits of (..., n_bits) projections, the first the most significant, as one int64 (...)."""
    bits = projections.shape[-1]
    weights = 1 << torch.arange(bits - 1, -1, -1, device=projections.device)
    return ((projections > 0) * weights).sum(-1)


def gray_rank(codes: Tensor) -> Tensor:
    """Place of a code of up to 16 bits in the Gray order, in which codes that follow each other differ in one bit."""
    for shift in (8, 4, 2, 1):
        codes = codes ^ (codes >> shift)
    return codes


def sort_key(major: Tensor, minor: Tensor) -> Tensor:
    """int64 that sorts by `major` >= 0 (integers), then by `minor` (floats, best in about [-4, 4])."""
    fraction = (torch.sigmoid(minor) * (2**_FRACTION - 1)).long().clamp(0, 2**_FRACTION - 1)
    return (major << _FRACTION) | fraction


def generator(seed: int, device: torch.device) -> torch.Generator:
    """Random numbers made on the device itself: the same for the same seed on the same kind of device."""
    return torch.Generator(device).manual_seed(seed)
