"""How a cache holds what it keeps. A tier answers a query with one partial; the tiers' answers merge.

Policies move entries between tiers when a block is finished; moving to nothing is eviction.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernel.merge import Partial
from .entries import Entries, Lasting, Reader


class Tier(Protocol):
    """One way to hold entries."""

    @property
    def count(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    def partial(self, q: Tensor, read: Reader) -> Partial: ...

    def frames(self) -> list[Tensor]:
        """Latent frame of every entry, (N,) on the host, of each batch row that differs."""
        ...


@dataclass(frozen=True, eq=False)
class Fixed:
    """Entries that are simply there: the keys of this call, or a view of another tier."""

    entries: Entries

    @property
    def count(self) -> int:
        return self.entries.count

    @property
    def bytes(self) -> int:
        return self.entries.bytes

    def partial(self, q: Tensor, read: Reader) -> Partial:
        return read(q, self.entries)

    def frames(self) -> list[Tensor]:
        return [] if self.entries.frames is None else [self.entries.frames]


@dataclass(frozen=True, eq=False)
class Each:
    """Entries of each video of a batch, which differ in number, so each is read alone."""

    rows: list[Entries]

    @property
    def count(self) -> int:
        return max(row.count for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def partial(self, q: Tensor, read: Reader) -> Partial:
        parts = [read(own, row) for own, row in zip(q.split(1), self.rows, strict=True)]
        return Partial(*(torch.cat(same) for same in zip(*parts, strict=True)))

    def frames(self) -> list[Tensor]:
        return [row.frames for row in self.rows if row.frames is not None]


class ExactTier:
    """Finished blocks, token for token, in one buffer with room behind them for the block at work.

    The block at work is written where it will stay, so that attention over past and block is one call over one
    contiguous range, and finishing a block copies nothing. One buffer of the video's length is what vAttention (arXiv
    2405.04437) reserves addresses for; a single stream owns its cache, so it needs no pages that others could take.
    """

    def __init__(self, expected: int = 0) -> None:
        self._expected = expected  # tokens to make room for at once; the buffer doubles beyond
        self._k = self._v = torch.empty(0)
        self._frames = torch.empty(0, dtype=torch.int64)
        self._count = self._placed = 0
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}  # of the buffers, of this block
        self._notes: dict[Any, Any] = {}  # of the past, as long as it stays as it is
        self.lasting = Lasting()

    @property
    def count(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        return 2 * self._k.numel() * self._k.element_size()

    def place(self, k: Tensor, v: Tensor, frames: Tensor) -> None:
        """Take the keys and values (B, S, H, D) of the block at work, over those of its previous step.

        They are copied, unless they were written to their `room` already.
        """
        end = self._count + k.shape[1]
        for held, given in zip((*self.room(k), self._frames[self._count : end]), (k, v, frames), strict=True):
            if held is not given:
                held.copy_(given)
        self._placed = end

    def room(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Where keys and values (B, S, H, D) like these go."""
        end = self._count + k.shape[1]
        if self._frames.shape[0] < end:
            self._grow(k, end)
        return self._view(self._count, end)[:2]

    def place_of(self, tokens: int) -> tuple[int, int, int] | None:
        """Where so many more tokens go: the buffers' addresses and the first entry; None if they must grow."""
        room = self._frames.shape[0] >= self._count + tokens
        return (self._k.data_ptr(), self._v.data_ptr(), self._count) if room else None

    def reserve(self, tokens: int, frames: Tensor) -> None:
        """As `place`, of keys and values that are written without it."""
        self._placed = self._count + tokens
        self._frames[self._count : self._placed] = frames

    def keep_placed(self) -> None:
        """The block at work is finished: it becomes part of the past."""
        self._count, self._notes = self._placed, {}
        self._views.clear()

    def past(self) -> Fixed:
        return Fixed(Entries(*self._view(0, self._count), notes=self._notes, lasting=self.lasting))

    def block(self) -> Fixed:
        return Fixed(Entries(*self._view(self._count, self._placed), at_work=True))

    def past_and_block(self) -> Fixed:
        return Fixed(Entries(*self._view(0, self._placed), at_work=True))

    def oldest(self, tokens: int) -> Entries:
        """A view of the oldest `tokens` entries."""
        return Entries(*self._view(0, tokens))

    def drop(self, start: int, end: int) -> None:
        """Remove the entries `start` to `end`; later ones move down."""
        left = self._count - (end - start)
        for buffer in (*self._k, *self._v, self._frames):
            later = buffer[end : self._count]
            buffer[start:left] = later if len(later) <= end - start else later.clone()  # where they overlap
        self._count = self._placed = left
        self._notes = {}
        self.lasting.version += 1

    def _view(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and frames; made once a block, as every step asks for the same."""
        if (start, end) not in self._views:
            self._views[start, end] = self._k[:, start:end], self._v[:, start:end], self._frames[start:end]
        return self._views[start, end]

    def _grow(self, like: Tensor, needed: int) -> None:
        room = max(needed, self._expected, 2 * self._frames.shape[0])
        k, v = (like.new_empty(like.shape[0], room, *like.shape[2:]) for _ in range(2))
        frames = torch.empty(room, dtype=torch.int64)
        if self._count:
            k[:, : self._count], v[:, : self._count] = self._k[:, : self._count], self._v[:, : self._count]
            frames[: self._count] = self._frames[: self._count]
        self._k, self._v, self._frames = k, v, frames
        self._views.clear()
