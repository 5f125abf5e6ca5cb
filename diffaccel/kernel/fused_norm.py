"""RMS norm over channels and SiLU in one pass over memory, for tensors whose channels lie together."""

import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of one program


@triton.jit(do_not_specialize=["rows", "own", "skipped"])
def _norm_silu(
    x_ptr, gamma_ptr, bias_ptr, out_ptr, rows, own, skipped,
    C: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    ok = (row < rows)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
    size = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
    y = x / size[:, None] * (tl.sqrt(C * 1.0) * tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32))[None, :]
    if BIASED:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    y = y / (1.0 + tl.exp(-y))
    place = row + (row // own + 1) * skipped  # behind the rows of earlier frames, in every video
    tl.store(out_ptr + place[:, None] * C + c[None, :], y.to(out_ptr.dtype.element_ty), mask=ok)


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, room: Tensor, first: int) -> None:
    """Writes silu(x / |x| * sqrt(C) * gamma + bias) of x (B, C, T, H, W) to the frames of `room` from `first` on.

    Both are laid out channels-last, `room` (B, C, first + T, H, W); computed in fp32, rounded once.
    """
    batch, channels, *sizes = x.shape
    frame = sizes[1] * sizes[2]
    own, rows = sizes[0] * frame, batch * sizes[0] * frame
    width = triton.next_power_of_2(channels)
    block = max(1, _ELEMENTS // width)
    _norm_silu[(triton.cdiv(rows, block),)](
        x, gamma, gamma if bias is None else bias, room, rows, own, first * frame,
        channels, bias is not None, block, width,
    )  # fmt: skip
