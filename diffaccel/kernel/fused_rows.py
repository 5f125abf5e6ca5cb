"""Work on vectors that lie scattered in one buffer, each read once and in its own dtype.

Written out in PyTorch they are gathered, widened to fp32, combined and written back, each in a pass of its own over
memory. Both compute what `cache/store.py` writes out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS, _WIDTH = 4, 512  # of one program; neighbours in the list often share a vector, which the cache then holds


@triton.jit
def _distances(x_ptr, first_ptr, second_ptr, out_ptr, N, W, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    ok = pair < N
    first = tl.load(first_ptr + pair, mask=ok, other=0) * W
    second = tl.load(second_ptr + pair, mask=ok, other=0) * W
    total = tl.zeros([PAIRS, WIDTH], tl.float32)
    for start in range(0, W, WIDTH):
        w = start + tl.arange(0, WIDTH)
        here = ok[:, None] & (w < W)[None, :]
        a = tl.load(x_ptr + first[:, None] + w[None, :], mask=here, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + second[:, None] + w[None, :], mask=here, other=0.0).to(tl.float32)
        total += (a - b) * (a - b)
    tl.store(out_ptr + pair, tl.sum(total, axis=1), mask=ok)


def squared_distances(x_PW: Tensor, first_N: Tensor, second_N: Tensor) -> Tensor:
    """|x[first] - x[second]|^2, fp32 (N,); `x_PW` contiguous, indices int64."""
    pairs, width = len(first_N), x_PW.shape[1]
    out = torch.empty(pairs, dtype=torch.float32, device=x_PW.device)
    wide = min(_WIDTH, triton.next_power_of_2(width))
    _distances[(triton.cdiv(pairs, _PAIRS),)](
        x_PW, first_N.contiguous(), second_N.contiguous(), out, pairs, width, PAIRS=_PAIRS, WIDTH=wide
    )
    return out


@triton.jit
def _pool(x_ptr, gone_ptr, stays_ptr, leader_ptr, weight_ptr, before_ptr, after_ptr, E, W, WIDTH: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    row, own = slot // E, slot % E
    if tl.load(leader_ptr + slot) == own:
        base = x_ptr + tl.load(stays_ptr + slot) * W
        before, after = tl.load(before_ptr + slot), tl.load(after_ptr + slot)
        for start in range(0, W, WIDTH):
            w = start + tl.arange(0, WIDTH)
            ok = w < W
            total = before.to(tl.float32) * tl.load(base + w, mask=ok, other=0.0).to(tl.float32)
            member, joins = own, own
            while joins == own:
                here = row * E + member
                x = tl.load(x_ptr + tl.load(gone_ptr + here) * W + w, mask=ok, other=0.0).to(tl.float32)
                total += tl.load(weight_ptr + here).to(tl.float32) * x
                member += 1
                joins = tl.load(leader_ptr + row * E + member, mask=member < E, other=-1)
            tl.store(base + w, (total / after.to(tl.float32)).to(x_ptr.dtype.element_ty), mask=ok)


def pool(
    x_PW: Tensor, gone: Tensor, stays: Tensor, leader: Tensor, weight: Tensor, before: Tensor, after: Tensor
) -> None:
    """`Store.pool` on a contiguous buffer, in place; indices int64, the rest int32, all (R, E)."""
    rows, most = gone.shape
    width = min(2 * _WIDTH, triton.next_power_of_2(x_PW.shape[1]))
    parts = [part.contiguous() for part in (gone, stays, leader, weight, before, after)]
    _pool[(rows * most,)](x_PW, *parts, most, x_PW.shape[1], WIDTH=width)


@triton.jit
def _opened(code_ptr, range_ptr, size_ptr, place, w, ok, C, H, D, BITS: tl.constexpr, CHANNELS: tl.constexpr):
    """Numbers `w` of the vectors at `place`, fp32: (lowest + code x step) x channel size, several codes to a byte."""
    each: tl.constexpr = 8 // BITS
    packed = tl.load(code_ptr + place * (H * D // each) + w // each, mask=ok, other=0).to(tl.int32)
    code = (packed >> (BITS * (w % each))) & ((1 << BITS) - 1)
    about = range_ptr + (place * H + w // D) * 2
    low = tl.load(about, mask=ok, other=0.0).to(tl.float32)
    step = tl.load(about + 1, mask=ok, other=0.0).to(tl.float32)
    x = low + code.to(tl.float32) * step
    if CHANNELS:
        x *= tl.load(size_ptr + (place // C) * H * D + w, mask=ok, other=0.0)
    return x


@triton.jit
def _open(
    code_ptr, range_ptr, size_ptr, where_ptr, out_ptr, C, H, D,
    BITS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    place = tl.load(where_ptr + pair)
    for start in range(0, H * D, WIDTH):
        w = start + tl.arange(0, WIDTH)
        ok = w < H * D
        x = _opened(code_ptr, range_ptr, size_ptr, place, w, ok, C, H, D, BITS, CHANNELS)
        tl.store(out_ptr + pair * H * D + w, x.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _open_distances(
    code_ptr, range_ptr, size_ptr, first_ptr, second_ptr, out_ptr, C, H, D,
    BITS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    first, second = tl.load(first_ptr + pair), tl.load(second_ptr + pair)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, H * D, WIDTH):
        w = start + tl.arange(0, WIDTH)
        ok = w < H * D
        a = _opened(code_ptr, range_ptr, size_ptr, first, w, ok, C, H, D, BITS, CHANNELS)
        b = _opened(code_ptr, range_ptr, size_ptr, second, w, ok, C, H, D, BITS, CHANNELS)
        total += (a - b) * (a - b)
    tl.store(out_ptr + pair, tl.sum(total))


def opened(codes: Tensor, ranges: Tensor, sizes: Tensor, where: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Vectors (n, W) at places (n,) of codes (R, C, W * bits / 8), ranges (R, C, H, 2), sizes (R, 1, H, D) or of ones
    (R, 1, 1, 1)."""
    shape, width, channels = _shape(codes, ranges, sizes, bits)
    out = torch.empty(len(where), shape[1] * shape[2], dtype=dtype, device=codes.device)
    _open[(len(where),)](
        codes, ranges, sizes, where.contiguous(), out, *shape, BITS=bits, CHANNELS=channels, WIDTH=width
    )
    return out


def opened_distances(codes: Tensor, ranges: Tensor, sizes: Tensor, first: Tensor, second: Tensor, bits: int) -> Tensor:
    """`squared_distances` of quantised vectors."""
    shape, width, channels = _shape(codes, ranges, sizes, bits)
    out = torch.empty(len(first), dtype=torch.float32, device=codes.device)
    places = first.contiguous(), second.contiguous()
    _open_distances[(len(first),)](
        codes, ranges, sizes, *places, out, *shape, BITS=bits, CHANNELS=channels, WIDTH=width
    )
    return out


def _shape(codes: Tensor, ranges: Tensor, sizes: Tensor, bits: int) -> tuple[tuple[int, int, int], int, bool]:
    """Capacity, heads and channels, how many numbers a program takes at a time, and whether channels have sizes."""
    heads, width = ranges.shape[2], codes.shape[2] * 8 // bits
    at_once = min(2 * _WIDTH, triton.next_power_of_2(width))
    return (codes.shape[1], heads, width // heads), at_once, sizes.shape[3] > 1
