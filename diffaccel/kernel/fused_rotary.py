"""Queries and keys as attention reads them, in one pass: RMS norm, rotary embedding, and the place in a cache.

Written out in PyTorch, or compiled, that is several passes: channels next to each other are combined and written a
pair apart, and a cache copies what was just written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_rotate(
    x_ptr, weight_ptr, out_ptr, cos_ptr, sin_ptr, eps, D: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    pair = tl.arange(0, HALF)
    at = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    ok = at < W
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    size = tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / W + eps)
    x = x / size * tl.load(weight_ptr + at, mask=ok, other=0.0).to(tl.float32)
    even, odd = tl.split(x)
    cos = tl.load(cos_ptr + pair * 2 % D, mask=pair * 2 < W, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + pair * 2 % D + 1, mask=pair * 2 < W, other=0.0).to(tl.float32)
    out = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["S"])
def _place(
    q, k, v, q_weight, k_weight, cos, sin, q_out, k_out, v_out, qb, qs, kb, ks, vb, vs, kob, kos, vob, vos, S, eps,
    D: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    cos += s * D
    sin += s * D
    if tl.program_id(1) == 0:
        _norm_rotate(q + b * qb + s * qs, q_weight, q_out + token * W, cos, sin, eps, D, W, HALF)
    elif tl.program_id(1) == 1:
        _norm_rotate(k + b * kb + s * ks, k_weight, k_out + b * kob + s * kos, cos, sin, eps, D, W, HALF)
    else:
        lane = tl.arange(0, 2 * HALF)
        value = tl.load(v + b * vb + s * vs + lane, mask=lane < W)
        tl.store(v_out + b * vob + s * vos + lane, value, mask=lane < W)


def norm_rotate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    place: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (B, S, H, D) normed over all heads together and turned by the tables (1, S, 1, D), fp32 inside.

    Heads lie side by side (stride D) and channels too, in what comes in and in `place`: where keys and values go,
    without it new keys, and the values as they are. Returns queries, keys and values.
    """
    batch, tokens, heads, dim = q.shape
    width = heads * dim
    for x in (q, k, v, *(place or ())):
        assert x.stride()[2:] == (dim, 1), "heads and channels lie side by side"
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out, v_out = place or (torch.empty_like(q_out), v)
    _place[(batch * tokens, 2 if place is None else 3)](
        q, k, v, q_weight, k_weight, cos.contiguous(), sin.contiguous(), q_out, k_out, v_out,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_out.stride()[:2], *v_out.stride()[:2], tokens, eps,
        D=dim, W=width, HALF=triton.next_power_of_2(width) // 2, num_warps=4 if width <= 2048 else 8,
    )  # fmt: skip
    return q_out, k_out, v_out
