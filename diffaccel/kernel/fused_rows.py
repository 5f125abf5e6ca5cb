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
def _distances(
    x_ptr, first_ptr, second_ptr, out_ptr, N, W, D: tl.constexpr, SPARE: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    ok = pair < N
    first = tl.load(first_ptr + pair, mask=ok, other=0) * W
    second = tl.load(second_ptr + pair, mask=ok, other=0) * W
    total = tl.zeros([PAIRS, WIDTH], tl.float32)
    for start in range(0, W, WIDTH):
        w = start + tl.arange(0, WIDTH)
        here = ok[:, None] & ((w < W) & (w % (D + SPARE) < D))[None, :]
        a = tl.load(x_ptr + first[:, None] + w[None, :], mask=here, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + second[:, None] + w[None, :], mask=here, other=0.0).to(tl.float32)
        total += (a - b) * (a - b)
    tl.store(out_ptr + pair, tl.sum(total, axis=1), mask=ok)


def squared_distances(x_PW: Tensor, first_N: Tensor, second_N: Tensor, dim: int, spare: int = 0) -> Tensor:
    """|x[first] - x[second]|^2, fp32 (N,); `x_PW` contiguous, indices int64.

    Behind every `dim` numbers lie `spare` ones that are left out.
    """
    pairs, width = len(first_N), x_PW.shape[1]
    out = torch.empty(pairs, dtype=torch.float32, device=x_PW.device)
    wide = min(_WIDTH, triton.next_power_of_2(width))
    _distances[(triton.cdiv(pairs, _PAIRS),)](
        x_PW,
        first_N.contiguous(),
        second_N.contiguous(),
        out,
        pairs,
        width,
        D=dim,
        SPARE=spare,
        PAIRS=_PAIRS,
        WIDTH=wide,
    )
    return out


@triton.jit
def _pool(x_ptr, gone_ptr, stays_ptr, leader_ptr, weight_ptr, before_ptr, after_ptr, E, W, WIDTH: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    row, own = slot // E, slot % E
    if (tl.load(leader_ptr + slot) == own) & (tl.load(weight_ptr + slot) > 0):  # no weight: a slot left over
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


@triton.jit
def _open_pool(
    code_ptr, range_ptr, size_ptr, gone_ptr, stays_ptr, leader_ptr, weight_ptr, before_ptr, after_ptr, E, C, H, D,
    BITS: tl.constexpr, CHANNELS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, own = slot // E, slot % E
    each: tl.constexpr = 8 // BITS
    if (tl.load(leader_ptr + slot) == own) & (tl.load(weight_ptr + slot) > 0):
        byte, part = tl.arange(0, BYTES)[:, None], tl.arange(0, each)[None, :]
        w = byte * each + part  # one row a byte
        ok = w < D
        w += head * D
        stays = tl.load(stays_ptr + slot)
        before, after = tl.load(before_ptr + slot), tl.load(after_ptr + slot)
        x = before.to(tl.float32) * _opened(code_ptr, range_ptr, size_ptr, stays, w, ok, C, H, D, BITS, CHANNELS)
        member, joins = own, own
        while joins == own:
            here = row * E + member
            gone = tl.load(gone_ptr + here)
            new = _opened(code_ptr, range_ptr, size_ptr, gone, w, ok, C, H, D, BITS, CHANNELS)
            x += tl.load(weight_ptr + here).to(tl.float32) * new
            member += 1
            joins = tl.load(leader_ptr + row * E + member, mask=member < E, other=-1)
        x = x / after.to(tl.float32)
        if CHANNELS:
            x = x / tl.load(size_ptr + (stays // C) * H * D + w, mask=ok, other=1.0)
        most: tl.constexpr = (1 << BITS) - 1
        low = tl.min(tl.where(ok, x, float("inf"))).to(tl.float16).to(tl.float32)
        step = tl.maximum((tl.max(tl.where(ok, x, float("-inf"))) - low) / most, 6e-8).to(tl.float16).to(tl.float32)
        code = tl.minimum(tl.maximum(tl.floor((x - low) / step + 0.5), 0.0), 1.0 * most).to(tl.int32)
        packed = tl.sum(code << (BITS * part), axis=1).to(tl.uint8)
        tl.store(
            code_ptr + (stays * H + head) * (D // each) + tl.arange(0, BYTES),
            packed,
            mask=tl.arange(0, BYTES) * each < D,
        )
        tl.store(range_ptr + (stays * H + head) * 2, low.to(tl.float16))
        tl.store(range_ptr + (stays * H + head) * 2 + 1, step.to(tl.float16))


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


def opened_pool(codes: Tensor, ranges: Tensor, sizes: Tensor, bits: int, *joined: Tensor) -> None:
    """`pool` of quantised vectors; a head's numbers fill whole bytes."""
    (capacity, heads, dim), _, channels = _shape(codes, ranges, sizes, bits)
    rows, most = joined[0].shape
    parts = [part.contiguous() for part in joined]
    _open_pool[(rows * most, heads)](
        codes, ranges, sizes, *parts, most, capacity, heads, dim,
        BITS=bits, CHANNELS=channels, BYTES=triton.next_power_of_2(dim * bits // 8),
    )  # fmt: skip


def _shape(codes: Tensor, ranges: Tensor, sizes: Tensor, bits: int) -> tuple[tuple[int, int, int], int, bool]:
    """Capacity, heads and channels, how many numbers a program takes at a time, and whether channels have sizes."""
    heads, width = ranges.shape[2], codes.shape[2] * 8 // bits
    at_once = min(2 * _WIDTH, triton.next_power_of_2(width))
    return (codes.shape[1], heads, width // heads), at_once, sizes.shape[3] > 1
