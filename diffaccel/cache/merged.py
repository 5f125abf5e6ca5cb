"""Entries that tokens of later frames join: all layers and batch rows of one branch in one set of buffers.

Every operation runs over all layers at once and has shapes that the host knows, so that a commit waits for the device
twice (how many entries are left, and of which multiplicity), whatever the number of layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernel.merge import Partial
from .entries import Entries, Reader
from .store import Store, longer, make_store

ANCHOR = 32
EXTRA_BYTES = 2 * ANCHOR + 8
"""Random projections kept of an entry's first key, to tell how far its members have drifted, and what an entry takes
beside its key and value."""


@dataclass
class Drift:
    """Cosine between a joining key and the first member of its entry, over all joins of a generation."""

    joins: Tensor
    total: Tensor
    least: Tensor

    def to_dict(self) -> dict[str, float]:
        joins = int(self.joins)
        if not joins:
            return {}
        return {"mean": round(float(self.total) / joins, 4), "least": round(float(self.least), 4)}


class MergedTokens:
    """Entries (R, C, H, D) of R = layers x batch rows; the first `used` of each row are filled, sorted by multiplicity.

    Args:
        k, v: one frame of keys and values (R, T, H, D), which show heads, channels, dtype, device and size.
        capacity: entries to make room for at once.
        representative: key of an entry: "mean" of its members, the "last" one, or the "medoid", the member that was
            nearest to their mean when it came.
        bits: 8, 4 or 2 to hold keys and values quantised; None holds them in the model's dtype.
    """

    def __init__(
        self, k: Tensor, v: Tensor, capacity: int, representative: str = "mean", bits: int | None = None
    ) -> None:
        rows, tokens, heads, dim = k.shape
        self.representative, self.rows, self.tokens = representative, rows, tokens
        device, width = k.device, heads * dim
        self.k, self.v = make_store(k, capacity, bits, channels=True), make_store(v, capacity, bits)
        self.centre = make_store(k, capacity, bits, channels=True) if representative == "medoid" else None
        self.count = torch.zeros(rows, capacity, dtype=torch.int32, device=device)
        self.frame = torch.zeros(rows, capacity, dtype=torch.int32, device=device)
        self.anchor = torch.zeros(rows, capacity, ANCHOR, dtype=torch.float16, device=device)
        generator = torch.Generator().manual_seed(0)
        self._project = torch.randn(width, ANCHOR, generator=generator).to(device) / width**0.5
        self.used = torch.zeros(rows, dtype=torch.int64, device=device)
        self.owner: Tensor | None = None  # (R, T) entry of each token of the newest frame, -1 where it was evicted
        self.bound = 0  # no row holds more than this
        self.absorbed = 0  # tokens taken by each row
        self.evicted = torch.zeros((), dtype=torch.int64, device=device)  # tokens that were in evicted entries
        self.drift = Drift(*(torch.full((), start, device=device) for start in (0.0, 0.0, 1.0)))

    @property
    def capacity(self) -> int:
        return self.k.capacity

    @property
    def bytes(self) -> int:
        about = sum(t.numel() * t.element_size() for t in (self.count, self.frame, self.anchor))
        return about + sum(store.bytes for store in self._stores)

    @property
    def _stores(self) -> list[Store]:
        return [store for store in (self.k, self.v, self.centre) if store is not None]

    def absorb(
        self, k: Tensor, v: Tensor, frame: int, joins: Tensor, match: Tensor, similarity: Tensor, most: int | None
    ) -> None:
        """Take one frame (R, T, H, D): where `joins` (R, T), token t joins the entry of token `match` (R, T) of the
        frame before, unless that entry is gone or stands for `most` tokens; the others become entries.

        Of several tokens that join one entry, the most similar one is the last.
        """
        self._make_room(self.tokens)
        if self.owner is None:
            target, joins = torch.zeros_like(match), torch.zeros_like(joins)
        else:
            target = self.owner.gather(1, match)
            joins = joins & (target >= 0)
            target = target.clamp(min=0)
            if most is not None:
                joins = joins & (self.count.gather(1, target) < most)
        fresh = self.used[:, None] + (~joins).cumsum(1) - 1
        target = torch.where(joins, target, fresh)
        self.used = self.used + (~joins).sum(1)
        self.bound, self.absorbed = self.bound + self.tokens, self.absorbed + self.tokens

        before = self.count.gather(1, target)
        self.count.scatter_add_(1, target, torch.ones_like(target, dtype=torch.int32))
        after = self.count.gather(1, target)
        self.frame.scatter_(1, target, torch.full_like(target, frame, dtype=torch.int32))
        where = _flat(target, self.capacity)
        leader = self._leaders(target, similarity)
        k, v = k.flatten(2), v.flatten(2)
        self._move_mean(self.v, v, where, leader, before, after)
        if self.representative == "mean":
            self._move_mean(self.k, k, where, leader, before, after)
        elif self.representative == "last":
            self.k.write(where, _pick(k, leader).flatten(0, 1))
        else:
            assert self.centre is not None
            self._move_mean(self.centre, k, where, leader, before, after)
            new, old, centre = _pick(k, leader).flatten(0, 1).float(), self.k.read(where), self.centre.read(where)
            # Two members are equally near: a margin keeps the older one whatever the rounding.
            nearer = (new - centre).square().sum(1) < 0.999 * (old - centre).square().sum(1)
            self.k.write(where, torch.where((nearer | (before == 0).flatten())[:, None], new, old))
        self._note_drift(k, where, joins)
        self.owner = target

    def _leaders(self, target: Tensor, similarity: Tensor) -> Tensor:
        """For each token the one that speaks for all that join its entry: the most similar, of equal ones the first."""
        best = torch.full_like(self.count, -torch.inf, dtype=torch.float32)
        best.scatter_reduce_(1, target, similarity, "amax")
        index = torch.arange(self.tokens, device=target.device).expand_as(target)
        index = torch.where(similarity >= best.gather(1, target), index, self.tokens)
        leader = torch.full_like(self.count, self.tokens, dtype=torch.int64)
        return leader.scatter_reduce_(1, target, index, "amin").gather(1, target)

    def _move_mean(
        self, held: Store, new: Tensor, where: Tensor, leader: Tensor, before: Tensor, after: Tensor
    ) -> None:
        """Means over members once the tokens `new` (R, T, W) have joined, in fp32 on the way."""
        total = torch.zeros(new.shape, dtype=torch.float32, device=new.device).flatten(0, 1)
        total.index_add_(0, _flat(leader, self.tokens), new.flatten(0, 1).float())
        old = held.read(where) * before.flatten()[:, None]
        held.write(where, (old + total[_flat(leader, self.tokens)]) / after.flatten()[:, None])

    def _note_drift(self, k: Tensor, where: Tensor, joins: Tensor) -> None:
        flat, here = self.anchor.view(-1, ANCHOR), joins.flatten()
        seen = (k.float() @ self._project).flatten(0, 1)
        cosine = torch.cosine_similarity(flat[where].float(), seen, dim=1)
        flat[where] = torch.where(here[:, None], flat[where], seen.half())
        self.drift.joins += here.sum()
        self.drift.total += (cosine * here).sum()
        self.drift.least = torch.minimum(self.drift.least, torch.where(here, cosine, 1.0).min())

    def evict(self, keep: int, worth: Tensor, sink_frames: int) -> None:
        """Leave at most `keep` entries a row, those of most `worth` (R, C) >= 0; the sink stays."""
        filled = self.count > 0
        worth = torch.where(self.frame < sink_frames, torch.inf, worth)
        worth = torch.where(filled, worth, -1.0)
        kept = torch.zeros_like(filled).scatter_(1, worth.topk(keep, dim=1).indices, True)
        self.evicted += torch.where(kept, 0, self.count).sum()
        self.count = torch.where(kept, self.count, 0)
        self.bound = keep

    def settle(self) -> list["Row"]:
        """Close the gaps and sort by multiplicity; what each row holds."""
        if self.owner is None:
            return []
        keys = torch.where(self.count > 0, self.count, torch.iinfo(torch.int32).max)
        order = torch.argsort(keys, dim=1, stable=True)
        for store in self._stores:
            for row in range(self.rows):  # row by row, so that no second copy of the whole cache exists
                store.reorder(row, order[row])
        self.anchor = self.anchor.gather(1, order[..., None].expand_as(self.anchor))
        self.count, self.frame = self.count.gather(1, order), self.frame.gather(1, order)
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(self.capacity, device=order.device).expand_as(order)
        )
        owner = place.gather(1, self.owner.clamp(min=0))
        gone = (self.owner < 0) | (self.count.gather(1, owner) == 0)
        self.owner = torch.where(gone, -1, owner)
        self.used = (self.count > 0).sum(1)

        most, self.bound = torch.stack([self.count.max().long(), self.used.max()]).tolist()
        sizes = torch.zeros(self.rows, most + 1, dtype=torch.int64, device=order.device)
        sizes.scatter_add_(1, self.count.long(), torch.ones_like(self.count, dtype=torch.int64))
        frames = self.frame[:, : self.bound].to("cpu", torch.int64)
        rows = []
        for number, groups in enumerate(sizes.tolist()):
            multiplicity = tuple((n, tokens) for tokens, n in enumerate(groups) if n and tokens)
            filled = sum(n for n, _ in multiplicity)
            rows.append(Row(self, number, frames[number, :filled], multiplicity))
        return rows

    def _make_room(self, tokens: int) -> None:
        needed = self.bound + tokens
        if needed <= self.capacity:
            return
        more = max(needed, 2 * self.capacity) - self.capacity
        for store in self._stores:
            store.grow(more)
        self.count, self.frame, self.anchor = (longer(held, more) for held in (self.count, self.frame, self.anchor))


@dataclass(frozen=True, eq=False)
class Row:
    """One filled row: what is known of its entries on the host, and how to read them."""

    merged: MergedTokens
    number: int
    frames: Tensor
    multiplicity: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return self.frames.shape[0]

    def entries(self) -> Entries:
        k, v = (store.rows(self.number, self.count) for store in (self.merged.k, self.merged.v))
        return Entries(k, v, self.frames, self.multiplicity)


@dataclass(frozen=True, eq=False)
class MergedTier:
    """The rows of one layer: one a video of the batch, or one a head of each (`heads` rows a video).

    They differ in number of entries, so each is read alone.
    """

    rows: list[Row]
    bytes: int
    heads: int = 1

    @property
    def count(self) -> int:
        """Entries of the longest row."""
        return max(row.count for row in self.rows)

    def partial(self, q: Tensor, read: Reader) -> Partial:
        if len(self.rows) == 1:
            return read(q, self.rows[0].entries())
        parts = []
        for number, own in enumerate(q.split(1)):
            rows = self.rows[number * self.heads : (number + 1) * self.heads]
            heads = own.split(q.shape[2] // self.heads, dim=2)
            found = [read(head, row.entries()) for head, row in zip(heads, rows, strict=True)]
            parts.append(Partial(*(torch.cat(same, dim=2) for same in zip(*found, strict=True))))
        return Partial(*(torch.cat(same) for same in zip(*parts, strict=True)))

    def frames(self) -> list[Tensor]:
        return [row.frames for row in self.rows]


def _flat(index_RT: Tensor, width: int) -> Tensor:
    """Positions (R, T) within rows of `width` as positions in all of them put together, (R * T,)."""
    rows = torch.arange(index_RT.shape[0], device=index_RT.device)[:, None] * width
    return (index_RT + rows).flatten()


def _pick(x_RTW: Tensor, index_RT: Tensor) -> Tensor:
    return x_RTW.flatten(0, 1)[_flat(index_RT, x_RTW.shape[1])].view_as(x_RTW)
