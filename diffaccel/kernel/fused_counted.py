"""Attention to entries that stand for several tokens each, in one launch that a CUDA graph may hold.

It computes what `reference.partial` defines with a log-weight for every key. The entries are the first ones of a
buffer, and how many there are is read on the GPU: the launch is the same while they come and go.
"""

from math import e, log2
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_block_sparse import Config, _describable, _described, _fold, _tile

if TYPE_CHECKING:
    from ..cache.entries import Room

_LOG2_E = tl.constexpr(log2(e))
_FLOOR = tl.constexpr(-1e30)

CANDIDATES = (
    Config(128, 128, 8, 2, tma=True),
    Config(128, 64, 8, 3, tma=True),
    Config(64, 128, 4, 2, tma=True),
    Config(64, 64, 4, 3, tma=True),
    Config(64, 64, 4, 2, tma=True),
    Config(128, 64, 8, 2),
    Config(64, 64, 4, 3),
)
# by channels (a power of two) and the major compute capability
_BEST = {(128, 9): Config(64, 64, 4, 3, tma=True), (64, 9): Config(128, 64, 8, 3, tma=True)}
_ELSEWHERE = {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 4, 2)}


@triton.jit(do_not_specialize=["S", "H", "C"])
def _counted(
    q_ptr, k, v, weight_ptr, used_ptr, out_ptr, lse_ptr,
    qb, qs, qh, kb, kn, kh, vb, vn, vh, S, H, C, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs belong to one head, so that they find each other's keys in the cache.
    tiles = tl.cdiv(S, QUERIES)
    head = tl.program_id(0) // tiles
    b, h = head // H, head % H
    row = (tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    d = tl.arange(0, WIDTH)
    ok = (row < S)[:, None] & (d < D)[None, :]
    q_at = q_ptr + b.to(tl.int64) * qb + h.to(tl.int64) * qh + row[:, None] * qs + d[None, :]
    q = tl.load(q_at, mask=ok, other=0.0)
    used = tl.load(used_ptr).to(tl.int32)

    factor = scale * _LOG2_E
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    peak = tl.full([QUERIES], _FLOOR, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    lane = tl.arange(0, KEYS)
    for start in range(0, used, KEYS):
        keys = tl.minimum(start + lane, C - 1)
        bias = tl.load(weight_ptr + start + lane, mask=start + lane < used, other=float("-inf")) * _LOG2_E
        key = _tile(k, b, h, start, keys, lane >= 0, kb, kn, kh, KEYS, D, WIDTH, TMA, False)
        scores = tl.dot(q, key.T, input_precision="ieee") * factor + bias[None, :]
        value = _tile(v, b, h, start, keys, lane >= 0, vb, vn, vh, KEYS, D, WIDTH, TMA, False)
        acc, peak, total = _fold(acc, peak, total, scores, 1.0, value)

    some = total > 0
    total = tl.where(some, total, 1.0)
    at = (b.to(tl.int64) * S + row) * H + h
    tl.store(out_ptr + at[:, None] * D + d[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(lse_ptr + at, tl.where(some, (peak + tl.log2(total)) / _LOG2_E, float("-inf")), mask=row < S)


def attend(q: Tensor, room: "Room", scale: float, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Attention of (B, S, H, D) queries: out in their dtype and lse fp32 (B, S, H), both contiguous.

    Channels are contiguous, the other strides are free. No entries: out = 0, lse = -inf.
    """
    batch, queries, heads, dim = q.shape
    width = max(16, triton.next_power_of_2(dim))
    if config is None:
        major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 0
        config = _BEST.get((width, major), _ELSEWHERE[max(width, 64)])
    k, v = room.k, room.v
    tma = config.tma and all(_describable(x) for x in (k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    _counted[(batch * heads * triton.cdiv(queries, config.queries),)](
        q,
        *(_described(x, config.keys, width) if tma else x for x in (k, v)),
        room.log_weight,
        room.used,
        out,
        lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        queries, heads, k.shape[1], scale,
        D=dim, WIDTH=width, QUERIES=config.queries, KEYS=config.keys, TMA=tma,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out, lse
