"""Entries that differ from head to head, in content and in number."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ..kernel.merge import Partial, nothing
from .entries import Entries, Reader

Counts = tuple[tuple[int, ...], ...]
"""Entries of each batch row and head, known to the host."""


@dataclass(frozen=True, eq=False)
class Ragged:
    """Keys and values (B, N, H, D) of which each row and head has those that are `there` (B, H, N), `counts` in number.

    `columns` (B, H, N) travel with the entries: "token" is the place of an entry's token in the video, the others are
    what a policy notes on it.
    """

    k: Tensor
    v: Tensor
    columns: dict[str, Tensor]
    there: Tensor
    counts: Counts

    @classmethod
    def whole(cls, k: Tensor, v: Tensor, columns: dict[str, Tensor]) -> "Ragged":
        """Of heads that all have all of the entries."""
        b, n, h, _ = k.shape
        return cls(k, v, columns, torch.ones(b, h, n, dtype=torch.bool, device=k.device), ((n,) * h,) * b)

    def then(self, later: "Ragged") -> "Ragged":
        return Ragged(
            torch.cat([self.k, later.k], 1),
            torch.cat([self.v, later.v], 1),
            {name: torch.cat([self.columns[name], column], -1) for name, column in later.columns.items()},
            torch.cat([self.there, later.there], -1),
            each_head(lambda one, other: one + other, self.counts, later.counts),
        )

    def part(self, start: int, stop: int) -> "Ragged":
        """Some of the entries, of which all are there."""
        columns = {name: column[..., start:stop] for name, column in self.columns.items()}
        return Ragged.whole(self.k[:, start:stop], self.v[:, start:stop], columns)

    def split(self, score: Tensor, counts: Counts) -> tuple["Ragged", "Ragged"]:
        """The entries of the highest `score` (B, H, N), `counts` of each head, and the others; in their order here."""
        order = score.masked_fill(~self.there, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
        stays = rank < torch.tensor(counts, device=order.device)[..., None]
        left = each_head(lambda had, keeps: had - keeps, self.counts, counts)
        return self._picked(stays & self.there, counts), self._picked(~stays & self.there, left)

    def _picked(self, which: Tensor, counts: Counts) -> "Ragged":
        most = max(map(max, counts))
        places = (~which).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]
        at = places.transpose(1, 2)[..., None].expand(-1, -1, -1, self.k.shape[-1])
        columns = {name: column.gather(-1, places) for name, column in self.columns.items()}
        return Ragged(self.k.gather(1, at), self.v.gather(1, at), columns, which.gather(-1, places), counts)


def each_head(function: Callable[..., int], *counts: Counts) -> Counts:
    """What a function makes of the numbers of every row and head."""
    return tuple(tuple(map(function, *rows)) for rows in zip(*counts, strict=True))


class ByHead:
    """A tier of entries that differ from head to head; heads with equally many are read together.

    Its entries have no place on the grid that all heads share, so windows and selections leave them alone: they are
    read whole.
    """

    def __init__(self) -> None:
        self.tokens_per_frame = 1
        self._columns: dict[str, Tensor] = {}
        self._there = torch.empty(0, dtype=torch.bool)
        self._counts: Counts = ()
        self._groups: list[tuple[int | None, list[int], Entries]] = []  # row (None: all of them), heads

    def hold(self, held: Ragged, tokens_per_frame: int, each: Sequence[Sequence[int]] | None = None) -> None:
        """Take these instead of the present entries; one of row b and head h stands for `each[b][h]` tokens."""
        self.tokens_per_frame = tokens_per_frame
        self._columns, self._there, self._counts = held.columns, held.there, held.counts
        kinds = [
            [(count, 1 if each is None else each[row][head]) for head, count in enumerate(counts)]
            for row, counts in enumerate(held.counts)
        ]
        self._groups = []
        for row in [None] if all(kind == kinds[0] for kind in kinds) else range(len(kinds)):
            alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
            for head, kind in enumerate(kinds[row or 0]):
                alike[kind].append(head)
            for (count, tokens), heads in alike.items():
                rows, some = _rows(row), slice(None) if len(heads) == len(kinds[0]) else heads
                k, v = held.k[rows, :count, some], held.v[rows, :count, some]
                if count:
                    self._groups.append((row, heads, Entries(k, v, multiplicity=((count, tokens),))))

    def crop(self, token: int) -> None:
        """Drop the entries of this token and of later ones."""
        if (held := self.held) is not None:
            earlier = held.there & (held.columns["token"] < token)
            counts = tuple(tuple(map(int, row)) for row in earlier.sum(-1).tolist())
            left = held.split(earlier.float(), counts)[0]
            left.columns["token"].masked_fill_(~left.there, 0)  # what fills up a head names no token to come
            self.hold(left, self.tokens_per_frame)

    @property
    def counts(self) -> Counts:
        return self._counts

    @property
    def held(self) -> Ragged | None:
        """All entries, padded to the longest head; None before there are any."""
        if not self._groups:
            return None
        rows, heads, most = self._there.shape
        like = self._groups[0][2].k
        if like.shape[0] == rows and like.shape[2] == heads:
            return Ragged(like, self._groups[0][2].v, self._columns, self._there, self._counts)
        k, v = (like.new_zeros(rows, most, heads, like.shape[3]) for _ in range(2))
        for row, some, entries in self._groups:
            k[_rows(row), : entries.count, some], v[_rows(row), : entries.count, some] = entries.k, entries.v
        return Ragged(k, v, self._columns, self._there, self._counts)

    @property
    def count(self) -> int:
        """Entries of a head, the mean over all rows and heads, rounded up."""
        return ceil(sum(map(sum, self._counts)) / sum(map(len, self._counts))) if self._groups else 0

    @property
    def bytes(self) -> int:
        return sum(entries.bytes for _, _, entries in self._groups)

    def partial(self, q: Tensor, read: Reader) -> Partial:
        row, heads, entries = self._groups[0]
        if row is None and len(heads) == q.shape[2]:
            return read(q, entries)
        whole = nothing(q)
        for row, heads, entries in self._groups:
            found = read(q[_rows(row), :, heads], entries)
            whole.out[_rows(row), :, heads], whole.lse[_rows(row), :, heads] = found.out, found.lse
        return whole

    def frames(self) -> list[Tensor]:
        """None where entries stand for tokens of many frames."""
        if "token" not in self._columns:
            return []
        return [self._columns["token"][self._there].unique().cpu() // self.tokens_per_frame]


def _rows(row: int | None) -> slice:
    return slice(None) if row is None else slice(row, row + 1)
