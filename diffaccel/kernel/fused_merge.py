"""`merge` in one pass over memory: reads every partial once, writes the result once.

Written out in PyTorch a merge of two partials reads and writes an fp32 copy of the output several times.
It computes what `merge_eager` defines.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 4  # partials merged by one launch
_ROWS = 8


@triton.jit
def _fold(total, peak, acc, out_ptr, lse_ptr, ob, os, oh, lb, ls, lh, b, s, h, row_ok, d, d_ok):
    """Fold one partial into the running sum: the online softmax, one partial at a time."""
    lse = tl.load(lse_ptr + b * lb + s * ls + h * lh, mask=row_ok, other=float("-inf"))
    out = tl.load(
        out_ptr + (b * ob + s * os + h * oh)[:, None] + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0
    ).to(tl.float32)
    new = tl.maximum(peak, lse)
    safe = tl.where(new == float("-inf"), 0.0, new)  # no key so far: weights are exp(-inf) = 0, not nan
    keep, add = tl.exp(peak - safe), tl.exp(lse - safe)
    return total * keep + add, new, acc * keep[:, None] + add[:, None] * out


@triton.jit
def _merge(
    o0, o1, o2, o3, l0, l1, l2, l3, out_ptr, lse_ptr,
    ob0, os0, oh0, lb0, ls0, lh0,
    ob1, os1, oh1, lb1, ls1, lh1,
    ob2, os2, oh2, lb2, ls2, lh2,
    ob3, os3, oh3, lb3, ls3, lh3,
    rows, S, H, D,
    N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_ok = row < rows
    b, s, h = row // (S * H), (row // H) % S, row % H
    d = tl.arange(0, WIDTH)
    d_ok = d < D
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total, peak, acc = _fold(total, peak, acc, o0, l0, ob0, os0, oh0, lb0, ls0, lh0, b, s, h, row_ok, d, d_ok)
    if N > 1:
        total, peak, acc = _fold(total, peak, acc, o1, l1, ob1, os1, oh1, lb1, ls1, lh1, b, s, h, row_ok, d, d_ok)
    if N > 2:
        total, peak, acc = _fold(total, peak, acc, o2, l2, ob2, os2, oh2, lb2, ls2, lh2, b, s, h, row_ok, d, d_ok)
    if N > 3:
        total, peak, acc = _fold(total, peak, acc, o3, l3, ob3, os3, oh3, lb3, ls3, lh3, b, s, h, row_ok, d, d_ok)
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, peak + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    place = row[:, None] * D + d[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & d_ok[None, :])
    tl.store(lse_ptr + row, lse, mask=row_ok)


def merged(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`outs` are (B, S, H, D) with contiguous channels, `lses` fp32 (B, S, H); contiguous out and lse.

    More than four go in several launches, the running result in fp32.
    """
    dtype = outs[0].dtype
    outs, lses = list(outs), list(lses)
    while len(outs) > 1:
        now, outs = outs[:MOST], outs[MOST:]
        now_lse, lses = lses[:MOST], lses[MOST:]
        out, lse = _launch(now, now_lse, torch.float32 if outs else dtype)
        outs, lses = [out, *outs], [lse, *lses]
    return outs[0], lses[0]


def _launch(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, queries, heads, dim = outs[0].shape
    out = torch.empty(batch, queries, heads, dim, dtype=dtype, device=outs[0].device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=outs[0].device)
    outs = [o if o.stride(-1) == 1 else o.contiguous() for o in outs]
    filled = range(MOST)
    padded = [outs[min(i, len(outs) - 1)] for i in filled], [lses[min(i, len(lses) - 1)] for i in filled]
    strides = [stride for o, lse_i in zip(*padded, strict=True) for stride in (*o.stride()[:3], *lse_i.stride())]
    rows = batch * queries * heads
    _merge[(triton.cdiv(rows, _ROWS),)](
        *padded[0], *padded[1], out, lse, *strides, rows, queries, heads, dim,
        N=len(outs), ROWS=_ROWS, WIDTH=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out, lse
