"""`merge` in one pass over memory: reads every partial once, writes the result once.

Written out in PyTorch a merge of two partials reads and writes an fp32 copy of the output several times.
It computes what `merge_eager` defines. At a reused step the launch takes longer than the kernel, so it packs few
arguments: shapes and layouts are compiled in, and what is laid out as no kernel lays it out is copied first.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 4  # partials merged by one launch
_ROWS = 8


@triton.jit
def _fold(total, peak, acc, out_ptr, lse_ptr, row, row_ok, place, place_ok):
    """Fold one partial into the running sum: the online softmax, one partial at a time."""
    lse = tl.load(lse_ptr + row, mask=row_ok, other=float("-inf"))
    out = tl.load(out_ptr + place, mask=place_ok, other=0.0).to(tl.float32)
    new = tl.maximum(peak, lse)
    safe = tl.where(new == float("-inf"), 0.0, new)  # no key so far: weights are exp(-inf) = 0, not nan
    keep, add = tl.exp(peak - safe), tl.exp(lse - safe)
    return total * keep + add, new, acc * keep[:, None] + add[:, None] * out


@triton.jit(do_not_specialize=["rows", "queries"])
def _merge(
    o0, o1, o2, o3, l0, l1, l2, l3, out_ptr, lse_ptr, rows, queries,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    turned = (row // (queries * H) * H + row % H) * queries + row // H % queries  # the row of a (B, H, S)
    d = tl.arange(0, WIDTH)
    place = row.to(tl.int64)[:, None] * D + d[None, :]
    place_ok = row_ok[:, None] & (d < D)[None, :]
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total, peak, acc = _fold(total, peak, acc, o0, l0, turned if T0 else row, row_ok, place, place_ok)
    total, peak, acc = _fold(total, peak, acc, o1, l1, turned if T1 else row, row_ok, place, place_ok)
    if N > 2:
        total, peak, acc = _fold(total, peak, acc, o2, l2, turned if T2 else row, row_ok, place, place_ok)
    if N > 3:
        total, peak, acc = _fold(total, peak, acc, o3, l3, turned if T3 else row, row_ok, place, place_ok)
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, peak + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=place_ok)
    tl.store(lse_ptr + (turned if T0 else row), lse, mask=row_ok)


def merged(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """At least two `outs` (B, S, H, D) and `lses` fp32 (B, S, H); contiguous out, and lse as the first is laid out.

    More than four go in several launches, the running result in fp32.
    """
    dtype, outs, lses = outs[0].dtype, list(outs), list(lses)
    while len(outs) > MOST:
        out, lse = _launch(outs[:MOST], lses[:MOST], torch.float32)
        outs, lses = [out, *outs[MOST:]], [lse, *lses[MOST:]]
    return _launch(outs, lses, dtype)


def _launch(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, queries, heads, dim = outs[0].shape
    by_head = (heads * queries, 1, queries)  # of a (B, H, S), as most kernels write it
    turned = [x.stride() == by_head for x in lses]
    outs = [x.contiguous() for x in outs]
    lses = [x if t else x.contiguous() for x, t in zip(lses, turned, strict=True)]
    out, lse = torch.empty_like(outs[0], dtype=dtype), torch.empty_like(lses[0])
    rows, absent = batch * queries * heads, [None] * (MOST - len(outs))
    _merge[(-(-rows // _ROWS),)](
        *outs, *absent, *lses, *absent, out, lse, rows, queries,
        *turned, *absent, len(outs), heads, dim, _ROWS, 1 << (dim - 1).bit_length(),
    )  # fmt: skip
    return out, lse
