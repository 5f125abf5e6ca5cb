"""Buffers of keys or values, as they are or quantised, that policies write entry by entry."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernel.merge import HAS_TRITON

BITS = (8, 4, 2)
_AT_ONCE = 2**26  # bytes of fp32 vectors opened at a time


class Joined(NamedTuple):
    """E entries of each of R rows that join others; all (R, E).

    The vector at place `gone`, which stands for `weight` tokens, joins the one at `stays`, which stood for `before`
    and now for `after`. Those that join one entry lie side by side, and `leader` is the first of them, within the row.
    """

    gone: Tensor
    stays: Tensor
    leader: Tensor
    weight: Tensor
    before: Tensor
    after: Tensor


class Store(Protocol):
    """R rows of C places, each a vector of H x D numbers. `where` counts places through all rows.

    `parts` are the tensors (R, C, ...) that hold them. They may be taken away and brought back; `opened` reads a copy.
    """

    parts: list[Tensor]

    @property
    def capacity(self) -> int: ...

    @property
    def width(self) -> int:
        """Numbers in a vector, H x D."""
        ...

    def read(self, where: Tensor) -> Tensor:
        """The vectors at places (n,), (n, H * D) fp32."""
        ...

    def write(self, where: Tensor, vectors: Tensor) -> None: ...

    def apart(self, first: Tensor, second: Tensor) -> Tensor:
        """Squared distance of the vectors at places (n,) and (n,), fp32 (n,)."""
        ...

    def pool(self, joined: Joined) -> None:
        """Make each vector that others join the mean over all tokens it now stands for."""
        ...

    def opened(self, parts: Sequence[Tensor], row: int) -> Tensor:
        """The vectors of some places (n, ...) of a row as attention reads them, (1, n, H, D)."""
        ...

    def every(self, parts: Sequence[Tensor], count: int) -> Tensor:
        """The first `count` vectors of all rows as attention reads them, (R, count, H, D)."""
        ...


class Plain:
    """Vectors in the model's dtype; what is opened is a view. Each head has `spare` channels behind its own."""

    def __init__(self, like_RTHD: Tensor, capacity: int, spare: int = 0) -> None:
        rows, _, *self.shape = like_RTHD.shape  # heads and channels of a vector
        self.spare = spare
        self.parts = [like_RTHD.new_zeros(rows, capacity, self.shape[0] * (self.shape[1] + spare))]

    @property
    def _data(self) -> Tensor:
        return self.parts[0]

    @property
    def _vectors(self) -> Tensor:
        """(R * C, H, D)."""
        return self.wide[..., : self.shape[1]].flatten(0, 1)

    @property
    def wide(self) -> Tensor:
        """With the spare channels, (R, C, H, D + spare)."""
        return self._data.unflatten(2, (self.shape[0], -1))

    @property
    def capacity(self) -> int:
        return self._data.shape[1]

    @property
    def width(self) -> int:
        return self.shape[0] * self.shape[1]

    def read(self, where: Tensor) -> Tensor:
        return self._vectors[where].flatten(1).float()

    def write(self, where: Tensor, vectors: Tensor) -> None:
        self._vectors[where] = vectors.to(self._data.dtype).unflatten(1, self.shape)

    def apart(self, first: Tensor, second: Tensor) -> Tensor:
        if self._data.is_cuda and HAS_TRITON:
            from ..kernel.fused_rows import squared_distances

            return squared_distances(self._data.flatten(0, 1), first, second, self.shape[1], self.spare)
        return apart_written_out(self, first, second)

    def pool(self, joined: Joined) -> None:
        if self._data.is_cuda and HAS_TRITON:
            from ..kernel.fused_rows import pool

            pool(self._data.flatten(0, 1), *joined)
        else:
            pool_written_out(self, joined)

    def opened(self, parts: Sequence[Tensor], row: int) -> Tensor:
        return self.every([parts[0][None]], len(parts[0]))

    def every(self, parts: Sequence[Tensor], count: int) -> Tensor:
        return parts[0][:, :count].unflatten(2, (self.shape[0], -1))[..., : self.shape[1]]


class Quantised:
    """Vectors in 8, 4 or 2 bits a number, with a lowest value and a step for each head of each vector.

    Keys have channels far larger than the rest, which would take all steps for themselves (KIVI, arXiv 2402.02750,
    section 3): every channel is first divided by its size in the vectors shown at the start, to the power `channels`:
    1 for keys, 0 to leave it out, 1/2 for the values of ZipCache (arXiv 2405.14256, section 4.1). A vector that is read
    and written back unchanged keeps its code.
    """

    def __init__(self, like_RTHD: Tensor, capacity: int, bits: int, channels: float) -> None:
        rows, _, heads, dim = like_RTHD.shape
        self._shape, self._dtype, self.bits = (heads, dim), like_RTHD.dtype, bits
        device = like_RTHD.device
        codes = torch.zeros(rows, capacity, heads * dim * bits // 8, dtype=torch.uint8, device=device)
        ranges = torch.zeros(rows, capacity, heads, 2, dtype=torch.float16, device=device)  # lowest value and step
        self.parts = [codes, ranges]
        self._size = torch.ones(rows, 1, 1, 1, device=device)
        if channels:
            size = like_RTHD.float().abs().amax(dim=1, keepdim=True)
            self._size = size.masked_fill(size == 0, 1.0).clamp(min=1e-6) ** channels

    @property
    def _codes(self) -> Tensor:
        return self.parts[0]

    @property
    def _range(self) -> Tensor:
        return self.parts[1]

    @property
    def capacity(self) -> int:
        return self._codes.shape[1]

    @property
    def width(self) -> int:
        return self._shape[0] * self._shape[1]

    def read(self, where: Tensor) -> Tensor:
        if self._codes.is_cuda and HAS_TRITON:
            from ..kernel.fused_rows import opened

            return opened(self._codes, self._range, self._size, where, self.bits, torch.float32)
        size = self._size[where // self.capacity, 0]
        return self._open(self._codes.flatten(0, 1)[where], self._range.flatten(0, 1)[where], size).flatten(1)

    def write(self, where: Tensor, vectors: Tensor) -> None:
        x = vectors.float().unflatten(1, self._shape) / self._size[where // self.capacity, 0]
        low, high = x.amin(dim=2, keepdim=True).half().float(), x.amax(dim=2, keepdim=True)
        step = ((high - low) / (2**self.bits - 1)).clamp(min=6e-8)
        step = step.half().float()
        codes = ((x - low) / step).round().clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(1)
        each = 8 // self.bits
        packed = sum(codes[:, part::each] << (self.bits * part) for part in range(each))
        self._codes.flatten(0, 1)[where] = packed
        self._range.flatten(0, 1)[where] = torch.cat([low, step], dim=2).half()

    def apart(self, first: Tensor, second: Tensor) -> Tensor:
        if self._codes.is_cuda and HAS_TRITON:
            from ..kernel.fused_rows import opened_distances

            return opened_distances(self._codes, self._range, self._size, first, second, self.bits)
        return apart_written_out(self, first, second)

    def pool(self, joined: Joined) -> None:
        if self._codes.is_cuda and HAS_TRITON:
            from ..kernel.fused_rows import opened_pool

            opened_pool(self._codes, self._range, self._size, self.bits, *joined)
        else:
            pool_written_out(self, joined)

    def opened(self, parts: Sequence[Tensor], row: int) -> Tensor:
        codes, ranges = parts
        if codes.is_cuda and HAS_TRITON:
            from ..kernel.fused_rows import opened

            where = torch.arange(len(codes), device=codes.device)
            found = opened(codes[None], ranges[None], self._size[row, None], where, self.bits, self._dtype)
            return found.unflatten(1, self._shape)[None]
        return self._open(codes, ranges, self._size[row])[None].to(self._dtype)

    def every(self, parts: Sequence[Tensor], count: int) -> Tensor:
        codes, ranges = parts
        rows, capacity = codes.shape[:2]
        if codes.is_cuda and HAS_TRITON:
            from ..kernel.fused_rows import opened

            where = torch.arange(rows, device=codes.device)[:, None] * capacity
            where = (where + torch.arange(count, device=codes.device)).flatten()
            found = opened(codes, ranges, self._size, where, self.bits, self._dtype)
        else:
            size = self._size.repeat_interleave(count, 0)[:, 0]
            found = self._open(codes[:, :count].flatten(0, 1), ranges[:, :count].flatten(0, 1), size).to(self._dtype)
        return found.view(rows, count, *self._shape)

    def _open(self, codes: Tensor, ranges: Tensor, size: Tensor) -> Tensor:
        """Codes (n, H * D * bits / 8) as numbers (n, H, D) fp32."""
        each, mask = 8 // self.bits, 2**self.bits - 1
        parts = [codes >> (self.bits * part) & mask for part in range(each)]
        numbers = torch.stack(parts, dim=2).flatten(1).unflatten(1, self._shape)
        return (ranges[..., :1].float() + numbers * ranges[..., 1:].float()) * size


def make_store(like_RTHD: Tensor, capacity: int, bits: int | None, channels: float = 0, spare: int = 0) -> Store:
    """A store for vectors like these; `bits=None` keeps them as they are, with `spare` channels a head."""
    if bits is None:
        return Plain(like_RTHD, capacity, spare)
    return Quantised(like_RTHD, capacity, bits, channels)


def store_bytes(heads: int, dim: int, bits: int | None, itemsize: int, spare: int = 0) -> int:
    """What one vector takes in a store."""
    return heads * (dim + spare) * itemsize if bits is None else heads * (dim * bits // 8 + 4)


def row_of(store: Store, row: int, count: int) -> Tensor:
    """The first `count` vectors of a row as attention reads them, (1, count, H, D)."""
    return store.opened([part[row, :count] for part in store.parts], row)


def apart_written_out(store: Store, first: Tensor, second: Tensor) -> Tensor:
    """`Store.apart` in PyTorch: what the fused kernel is held to."""
    found = [
        (store.read(first[some]) - store.read(second[some])).square().sum(1)
        for some in portions(len(first), 4 * store.width)
    ]
    return torch.cat(found) if found else first.new_zeros(0, dtype=torch.float32)


def pool_written_out(store: Store, joined: Joined) -> None:
    """`Store.pool` in PyTorch: what the fused kernel is held to."""
    rows, most = joined.gone.shape
    for some in portions(rows, 4 * store.width * most):
        gone, stays, leader, weight, before, after = (part[some] for part in joined)
        lead = (leader + most * torch.arange(len(leader), device=leader.device)[:, None]).flatten()
        new = store.read(gone.flatten()) * weight.flatten()[:, None]
        total = torch.zeros_like(new).index_add_(0, lead, new)
        where = stays.flatten()
        store.write(where, (store.read(where) * before.flatten()[:, None] + total[lead]) / after.flatten()[:, None])


def portions(count: int, size: int) -> Iterator[slice]:
    """Slices of `count` things that take `size` bytes each, so many at a time that they are few bytes."""
    step = max(1, _AT_ONCE // max(1, size))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def size_of(held: Tensor) -> int:
    """Bytes."""
    return held.numel() * held.element_size()


def longer(held: Tensor, more: int) -> Tensor:
    """(R, C, ...) with `more` empty places in every row."""
    return torch.cat([held, held.new_zeros(held.shape[0], more, *held.shape[2:])], dim=1)
