"""The definition of correct: eager fp32 (fp64 for fp64 inputs), every score written out."""

import torch
from torch import Tensor

from ..plan import Plan
from .inputs import check
from .merge import Partial

name = "reference"


def unusable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel cannot run there, or None."""
    return None


def value_width(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> int | None:
    """The channels that values need beside keys of `key_dim`, or None where keys that wide do not fit."""
    return value_dim


def partial(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_weight: Tensor | None = None, plan: Plan | None = None
) -> Partial:
    """softmax(scale * q k^T + log_weight) v over the keys the plan keeps, and its log-sum-exp.

    q is (B, S, H, D), k and v are (B, N, G, D), H a multiple of G: head h reads keys of head h // (H // G).
    `log_weight` is (N,), added to every score of its key. Raises `KernelError` for shapes, dtypes or devices that do
    not fit.
    """
    check(q, k, v)
    if q.shape[2] != k.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bshd,bnhd->bshn", q.to(wide), k.to(wide)) * scale
    if log_weight is not None:
        scores = scores + log_weight.to(wide)
    if plan is not None:
        scores = scores.masked_fill(~plan.mask().to(q.device)[None, :, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(wide).min)[..., None])
    out = torch.einsum("bshn,bnhd->bshd", weights, v.to(wide))
    return Partial(out.to(q.dtype), lse.float())
