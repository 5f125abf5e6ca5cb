"""Rotary position embedding over neighbouring channels (RoFormer, arXiv 2104.09864), and its inverse."""

import torch
from torch import Tensor


def rotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of channels by its angle; tables are (1, S, 1, D) fp32, each value twice."""
    return turn(x_BSHD, cos[..., 0::2], sin[..., 1::2])


def turn(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate`, of tables that have each value once: (1, S, 1, D / 2), or as many heads as there are."""
    even, odd = x_BSHD.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x_BSHD)  # written in its own dtype: interleaving in fp32 would move twice the bytes
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def unrotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo `rotate`: a rotation by the opposite angles."""
    return rotate(x_BSHD, cos, -sin)
