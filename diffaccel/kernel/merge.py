"""Partial attention and the one identity the package rests on."""

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # comes with torch for CUDA, but not on every platform


class Partial(NamedTuple):
    """Softmax attention over some of the keys.

    `out` is (B, S, H, D) in the queries' dtype, normalised over those keys alone; `lse` is fp32 (B, S, H), the
    natural logarithm of the sum of their exponentiated logits. No keys: out = 0, lse = -inf.
    """

    out: Tensor
    lse: Tensor


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint sets of keys, from the partial of each; exact, fp32 inside.

    l = log(sum_i exp(l_i)), o = sum_i exp(l_i - l) o_i. The order of `parts` changes rounding only.
    """
    if len(parts) == 1:
        return parts[0]
    if parts[0].out.is_cuda and HAS_TRITON and parts[0].out.dtype != torch.float64:
        from .fused_merge import merged

        return Partial(*merged([part.out for part in parts], [part.lse for part in parts]))
    return merge_eager(parts)


def merge_eager(parts: Sequence[Partial]) -> Partial:
    """`merge` written out: what the fused kernel is held to."""
    lse = parts[0].lse
    for part in parts[1:]:
        lse = torch.logaddexp(lse, part.lse)
    floor = lse.clamp(min=torch.finfo(torch.float32).min)  # a row without any key: exp(-inf - floor) is 0, not nan
    out = torch.exp(parts[0].lse - floor)[..., None] * parts[0].out
    for part in parts[1:]:
        out += torch.exp(part.lse - floor)[..., None] * part.out
    return Partial(out.to(parts[0].out.dtype), lse)


def nothing(q_BSHD: Tensor) -> Partial:
    """Attention over no keys."""
    return Partial(torch.zeros_like(q_BSHD), q_BSHD.new_full(q_BSHD.shape[:-1], -torch.inf, dtype=torch.float32))
