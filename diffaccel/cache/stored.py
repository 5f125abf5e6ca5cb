"""Entries that differ from head to head, held in stores, and opened a piece at a time as they are read."""

from collections.abc import Callable, Sequence
from copy import copy
from itertools import pairwise
from operator import add
from typing import Protocol, Self

import torch
from torch import Tensor

from ..kernel.merge import Partial, merge
from .entries import Reader
from .ragged import ByHead, Counts, Ragged, each_head
from .shuttle import InTurn, Shuttle, host_like
from .store import make_store, size_of

PIECE_FRAMES = 8
"""Frames of tokens in a piece: room is made for so many at once, and so many are opened at once."""


class Vectors(Protocol):
    """What a `Store` does for this tier."""

    parts: list[Tensor]

    def write(self, where: Tensor, vectors: Tensor) -> None: ...

    def every(self, parts: Sequence[Tensor], count: int) -> Tensor: ...


Make = Callable[[Tensor, Tensor, int], tuple[Vectors, Vectors]]
"""Stores of keys and of values, each shown the first vectors (R, T, 1, D), and the places they have."""


def in_bits(bits: int) -> Make:
    """Quantised, keys by the size of their channels, values by its root (ZipCache, arXiv 2405.14256, section 4.1)."""
    return lambda k, v, places: (
        make_store(_floored(k), places, bits, channels=1),
        make_store(_floored(v), places, bits, channels=0.5),
    )


def _floored(x: Tensor) -> Tensor:
    """With one more vector, half the mean size of all channels: what is shown first may be a few tokens, among which a
    channel is small by chance, and to divide by that would give it all steps later."""
    return torch.cat([x, (x.abs().amax(1, keepdim=True).mean(-1, keepdim=True) / 2).expand_as(x[:, :1])], 1)


def plain(k: Tensor, v: Tensor, places: int) -> tuple[Vectors, Vectors]:
    """As they are."""
    return make_store(k, places, None), make_store(v, places, None)


class Stored(ByHead, InTurn):
    """A tier of entries in pieces, each a pair of stores with a row for every row and head of the batch.

    With a `shuttle` the pieces lie in the host's memory, and the next one comes while one is read. What is added moves
    nothing that is there.
    """

    def __init__(self, make: Make, shuttle: Shuttle | None = None) -> None:
        super().__init__()
        self._make, self._shuttle = make, shuttle
        self._pieces: list[tuple[Vectors, Vectors]] = []
        self._places = 0  # of a piece
        self._frames: list[Tensor] = []  # of what was taken, -1 where a head has nothing

    @classmethod
    def on_host(cls, layers: int) -> list[Self]:
        """Of each layer, in the host's memory; reading one brings the first piece of the next."""
        shuttle = Shuttle()
        tiers = [cls(plain, shuttle) for _ in range(layers)]
        for tier, following in pairwise([*tiers, tiers[0]]):
            tier.following = following
        return tiers

    def hold(self, held: Ragged, tokens_per_frame: int, each: Sequence[Sequence[int]] | None = None) -> None:
        assert each is None
        self._counts, self._frames = (), []
        self.take(held, tokens_per_frame)
        self._columns, self._there = held.columns, held.there

    def take(self, gone: Ragged, tokens_per_frame: int) -> None:
        """Add entries behind the present ones."""
        there, device = gone.there.flatten(0, 1), gone.k.device
        k, v = (x.transpose(1, 2).flatten(0, 1) * there[..., None] for x in (gone.k, gone.v))  # (R, n, D)
        if not self._pieces:
            self._places, self.tokens_per_frame = PIECE_FRAMES * tokens_per_frame, tokens_per_frame
            self._pieces.append(self._make(k[:, :, None], v[:, :, None], self._places + 1))
        frames = gone.columns["token"].div(tokens_per_frame, rounding_mode="floor").int()
        self._frames.append(frames.masked_fill(~gone.there, -1))
        before = self._counts or each_head(lambda _: 0, gone.counts)
        self._counts = each_head(add, before, gone.counts)
        place = torch.tensor(before, device=device).flatten()[:, None] + there.cumsum(1) - 1
        rows = torch.arange(len(there), device=device)[:, None] * (self._places + 1)
        for number in range(min(map(min, before)) // self._places, self._filled):
            if number == len(self._pieces):
                keys, values = self._pieces[0]
                self._pieces.append((_another(keys), _another(values)))
            mine = there & (place // self._places == number)
            # what is not of this piece goes to the place behind it, which nobody reads: no wait for the device
            where = (rows + torch.where(mine, place % self._places, self._places)).flatten()
            for store, vectors in zip(self._pieces[number], (k, v), strict=True):
                store.parts = [part.to(device) for part in store.parts]
                store.write(where, vectors.flatten(0, 1))
                if self._shuttle is not None:
                    store.parts = [self._sent(part) for part in store.parts]
        if self._shuttle is not None:
            self._shuttle.drop()

    @property
    def _filled(self) -> int:
        """Pieces that hold anything."""
        return -(-max(map(max, self._counts)) // self._places) if self._counts else 0

    @property
    def held(self) -> Ragged | None:
        """All entries, opened; None before there are any."""
        if not self._filled:
            return None
        device = self._there.device
        k, v = (torch.cat(x, 1) for x in zip(*(self._open(n, device)[:2] for n in range(self._filled)), strict=True))
        return Ragged(k, v, self._columns, self._there, self._counts)

    @property
    def count(self) -> int:
        """Entries of a head, the mean over all rows and heads, rounded down, but at least 1 where there are any."""
        entries = sum(map(sum, self._counts))
        return max(1, entries // sum(map(len, self._counts))) if entries else 0

    @property
    def bytes(self) -> int:
        return 0 if self._shuttle is not None else self._size

    @property
    def host_bytes(self) -> int:
        return self._size if self._shuttle is not None else 0

    @property
    def _size(self) -> int:
        return sum(size_of(part) for piece in self._pieces for store in piece for part in store.parts)

    def frames(self) -> list[Tensor]:
        if not self._frames:
            return []
        frames = torch.cat([taken.flatten() for taken in self._frames]).unique().long().cpu()
        return [frames[frames >= 0]]

    def fetch(self, number: int, device: torch.device) -> None:
        """Start to bring a piece to the device."""
        assert self._shuttle is not None
        self._shuttle.fetch(self, number, self._parts(number), device)

    def partial(self, q: Tensor, read: Reader) -> Partial:
        result: Partial | None = None
        for number in range(self._filled):
            k, v, counts = self._open(number, q.device)
            piece = ByHead()
            piece.hold(Ragged(k, v, {}, torch.empty(0), counts), self.tokens_per_frame)
            found = piece.partial(q, read)
            result = found if result is None else merge([result, found])
        assert result is not None
        return result

    def _open(self, number: int, device: torch.device) -> tuple[Tensor, Tensor, Counts]:
        """Keys and values (B, n, H, D) of a piece, and what of it each row and head has."""
        parts = self._parts(number)
        if self._shuttle is not None:
            parts = self._shuttle.take(self, number, parts, device)
            if number + 1 < self._filled:
                self.fetch(number + 1, device)
            elif (following := self.following) is not None and following._filled:
                following.fetch(0, device)
        start = number * self._places
        counts = each_head(lambda n: min(max(n - start, 0), self._places), self._counts)
        most, shape, (keys, values) = max(map(max, counts)), (len(counts), -1), self._pieces[number]
        split = len(keys.parts)
        k, v = keys.every(parts[:split], most), values.every(parts[split:], most)
        return *(x[:, :, 0].unflatten(0, shape).transpose(1, 2) for x in (k, v)), counts

    def _parts(self, number: int) -> list[Tensor]:
        return [part for store in self._pieces[number] for part in store.parts]

    def _sent(self, part: Tensor) -> Tensor:
        assert self._shuttle is not None
        target = host_like(part)
        self._shuttle.send(part, target)
        return target


def _another(store: Vectors) -> Vectors:
    """An empty one of the same kind."""
    other = copy(store)
    other.parts = [torch.zeros_like(part) for part in store.parts]
    return other
