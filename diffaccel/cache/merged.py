"""Entries that tokens of later frames join: all layers and batch rows of one branch in one set of buffers.

Every operation has shapes that the host knows, so that a commit waits for the device twice (how many entries are left,
and of which multiplicity), whatever the number of layers.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernel.merge import Partial
from ..kernel.weighted import can_in_place, channels_of, spare
from .entries import Entries, Lasting, Reader, Room
from .shuttle import InTurn, Shuttle, host_like
from .store import Joined, Plain, Store, longer, make_store, portions, size_of

if TYPE_CHECKING:
    from ..spread import Spread

ANCHOR = 32
EXTRA_BYTES = 2 * ANCHOR + 12
"""Random projections kept of an entry's first key, to tell how far its members have drifted, and what an entry takes
beside its key and value."""

SPARE = 1
"""The last place of a row stays free: what an operation of fixed shape has too much is written there."""

_DRIFT = 256  # joins of a row and round of `fold` whose drift is noted


@dataclass
class Drift:
    """Cosine between a joining key and the first member of its entry, over all joins of a generation."""

    joins: Tensor
    total: Tensor
    least: Tensor

    @staticmethod
    def of(noted: Sequence["Drift"]) -> dict[str, float]:
        """Of all of them together, for the report."""
        joins = sum(int(drift.joins) for drift in noted)
        if not joins:
            return {}
        mean, least = sum(float(drift.total) for drift in noted) / joins, min(float(drift.least) for drift in noted)
        return {"mean": round(mean, 4), "least": round(least, 4)}


class MergedTokens:
    """Entries (R, C, H, D) of R = layers x batch rows; the first `used` of each row are filled, sorted by multiplicity.

    Args:
        k, v: one frame of keys and values (R, T, H, D), which show heads, channels, dtype, device and size.
        capacity: entries to make room for at once.
        representative: key of an entry: "mean" of its members, the "last" one, or the "medoid", the member that was
            nearest to their mean when it came.
        bits: 8, 4 or 2 to hold keys and values quantised; None holds them in the model's dtype.
        shuttle: what brings keys and values from the host's memory, if they are to lie there between commits.
        spread: the devices that hold other heads, if there are any.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        capacity: int,
        representative: str = "mean",
        bits: int | None = None,
        shuttle: Shuttle | None = None,
        spread: "Spread | None" = None,
    ) -> None:
        rows, tokens, heads, dim = k.shape
        self.spread = spread
        self.representative, self.rows, self.tokens, self.shuttle = representative, rows, tokens, shuttle
        self._away, self._parked = False, dict[int, list[Tensor]]()
        device, width = k.device, heads * dim
        capacity += SPARE
        self.wide = not (bits or shuttle) and can_in_place(device, k.dtype, dim)
        more = (spare(dim) if self.wide else None) or (0, 0)
        self.k = make_store(k, capacity, bits, channels=1, spare=more[0])
        self.v = make_store(v, capacity, bits, spare=more[1])
        self.centre = make_store(k, capacity, bits, channels=1) if representative == "medoid" else None
        self.count = torch.zeros(rows, capacity, dtype=torch.int32, device=device)
        self.frame = torch.zeros(rows, capacity, dtype=torch.int32, device=device)
        self.cell = torch.zeros(rows, capacity, dtype=torch.int32, device=device)  # place in the frame
        self.anchor = torch.zeros(rows, capacity, ANCHOR, dtype=torch.float16, device=device)
        generator = torch.Generator().manual_seed(0)
        self._project = torch.randn(width, ANCHOR, generator=generator).to(device) / width**0.5
        self.used = torch.zeros(rows, dtype=torch.int64, device=device)
        self.settled = torch.zeros(rows, dtype=torch.int32, device=device)  # `used`, where a captured launch reads it
        self.owner: Tensor | None = None  # (R, T) entry of each token of the newest frame, -1 where it was evicted
        self.bound = 0  # no row holds more than this
        self.absorbed = 0  # tokens taken by each row
        self.evicted = torch.zeros((), dtype=torch.int64, device=device)  # tokens that were in evicted entries
        self.best = torch.full((), -1.0, device=device)  # most alike pair of entries met by `fold`
        self.least = torch.full((), torch.inf, device=device)  # and the least alike one that it merged
        self.drift = Drift(*(torch.full((), start, device=device) for start in (0.0, 0.0, 1.0)))
        self._lasting = [Lasting() for _ in range(rows)]

    @property
    def capacity(self) -> int:
        return self.k.capacity

    @property
    def bytes(self) -> int:
        about = sum(size_of(held) for held in (self.count, self.frame, self.cell, self.anchor))
        return about + (0 if self._away else self._held)

    @property
    def host_bytes(self) -> int:
        """What lies in the host's memory between commits."""
        return self._held if self._away else 0

    @property
    def _held(self) -> int:
        return sum(size_of(part) for store in self._stores for part in store.parts)

    @property
    def _stores(self) -> list[Store]:
        return [store for store in (self.k, self.v, self.centre) if store is not None]

    @property
    def _places(self) -> Tensor:
        """Place in the frame of each token of one frame, (R, T)."""
        return torch.arange(self.tokens, device=self.count.device).expand(self.rows, -1)

    def park(self) -> None:
        """Leave keys and values in the host's memory; `fetch` brings them back, `Row.entries` what it reads."""
        assert self.shuttle is not None
        for store in self._stores:
            parked = self._parked.get(id(store), [])
            if [part.shape for part in parked] != [part.shape for part in store.parts]:
                parked = self._parked[id(store)] = [host_like(part) for part in store.parts]
            for part, place in zip(store.parts, parked, strict=True):
                for row in range(self.rows):
                    self.shuttle.send(part[row, : self.bound], place[row, : self.bound])
            store.parts = parked
        self._away = True

    def fetch(self) -> None:
        """Start to bring keys and values to the device, for a commit."""
        if self.shuttle is not None and self._away:
            self.shuttle.fetch(self, 0, self._filled, self.count.device)

    def unpark(self) -> None:
        """Have keys and values on the device, for a commit."""
        if self.shuttle is None or not self._away:
            return
        filled = iter(self.shuttle.take(self, 0, self._filled, self.count.device))
        for store in self._stores:
            here = [part.new_zeros(part.shape, device=self.count.device) for part in store.parts]
            for part in here:
                part[:, : self.bound] = next(filled)
            store.parts = here
        self._away = False

    @property
    def _filled(self) -> list[Tensor]:
        return [part[:, : self.bound] for store in self._stores for part in store.parts]

    def add(self, k: Tensor, v: Tensor, frame: int) -> None:
        """Take one frame (R, T, H, D), every token as an entry of its own, which `absorb` does not join later."""
        self._make_room(self.tokens)
        target = self.used[:, None] + self._places
        where = _flat(target, self.capacity)
        k, v = k.flatten(2).flatten(0, 1), v.flatten(2).flatten(0, 1)
        for store, vectors in ((self.k, k), (self.v, v), (self.centre, k)):
            if store is not None:
                store.write(where, vectors)
        self.count.scatter_(1, target, 1)
        self.frame.scatter_(1, target, frame)
        self.cell.scatter_(1, target, self._places.int())
        self.anchor.view(-1, ANCHOR)[where] = self._seen(k)
        self.used = self.used + self.tokens
        self.bound, self.absorbed = self.bound + self.tokens, self.absorbed + self.tokens

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
        self.cell.scatter_(1, target, self._places.int())
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
        self._note_drift(k.flatten(0, 1), where, joins.flatten())
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
        speaks = _flat(leader, leader.shape[1])
        total.index_add_(0, speaks, new.flatten(0, 1).float())
        old = held.read(where) * before.flatten()[:, None]
        held.write(where, (old + total[speaks]) / after.flatten()[:, None])

    def _note_drift(self, k: Tensor, where: Tensor, joins: Tensor) -> None:
        """Of keys (n, W) that join the entries at `where` (n,), or found them where they do not."""
        flat, seen = self.anchor.view(-1, ANCHOR), self._seen(k)
        cosine = torch.cosine_similarity(flat[where].float(), seen.float(), dim=1)
        flat[where] = torch.where(joins[:, None], flat[where], seen)
        self.drift.joins += joins.sum()
        self.drift.total += (cosine * joins).sum()
        self.drift.least = torch.minimum(self.drift.least, torch.where(joins, cosine, 1.0).min())

    def _seen(self, k: Tensor) -> Tensor:
        return (k @ self._project.to(k.dtype)).half()

    def fold(
        self,
        threshold: Tensor | None,
        limit: int | None,
        scale: Tensor,
        sink_frames: int,
        most: int | None,
        new: int,
        floor: float = -torch.inf,
    ) -> None:
        """Merge entries that follow each other in time at one place, the most alike ones first.

        How alike is 1 - |k - k'| |v - v'| / (2 `scale`), of the entries' keys and values. Pairs above `threshold`
        (R, 1) merge, and over `limit` entries a row as many more above `floor` as it takes. `new` entries came since
        the last fold.
        A round merges pairs that are more alike than those beside them, so that no entry is in two; the last one
        whatever is still wanted, in chains.
        """
        if self.bound < 2:
            return
        over = 0 if limit is None else max(0, self.bound - limit)
        rounds = 2 + 6 * over // self.bound  # the more of all entries must go, the more careful
        for number in range(rounds):
            order, alike = self._neighbours(scale, sink_frames, most)
            self.best = torch.maximum(self.best, alike.max())
            ranked = alike.sort(dim=1, descending=True).values
            left = torch.zeros_like(self.used) if limit is None else ((self.count > 0).sum(1) - limit).clamp(min=0)
            bar = ranked.gather(1, (left[:, None] - 1).clamp(0, alike.shape[1] - 1))
            bar = torch.where(left[:, None] > 0, bar.clamp(min=floor), torch.inf)
            wanted = alike >= (bar if threshold is None else torch.minimum(bar, threshold))
            wanted &= alike > -torch.inf
            if number < rounds - 1 or most is not None:
                wanted &= _ahead_of_both(torch.where(wanted, alike, -torch.inf))
            self._unite(order, torch.where(wanted, alike, -torch.inf), min(over + new, alike.shape[1]))

    def _neighbours(self, scale: Tensor, sink_frames: int, most: int | None) -> tuple[Tensor, Tensor]:
        """Entries by place, then frame (R, N), and how alike each is with the one behind it (R, N - 1), -inf for no
        pair."""
        filled = self.count > 0
        key = torch.where(filled, (self.cell.long() << 32) + self.frame, torch.iinfo(torch.int64).max)
        order = key.argsort(dim=1)[:, : self.bound]
        count, frame, cell = (held.gather(1, order) for held in (self.count, self.frame, self.cell))
        pair = (count[:, :-1] > 0) & (count[:, 1:] > 0) & (cell[:, :-1] == cell[:, 1:]) & (frame[:, :-1] >= sink_frames)
        if most is not None:
            pair &= count[:, :-1] + count[:, 1:] <= most
        where = _flat(order, self.capacity).view_as(order)
        first, second = where[:, :-1].flatten(), where[:, 1:].flatten()
        apart = (self.k.apart(first, second) * self.v.apart(first, second)).sqrt().view_as(pair)
        alike = 1 - apart / (2 * scale)
        return order, torch.where(pair, alike, -torch.inf)

    def _unite(self, order: Tensor, alike: Tensor, most: int) -> None:
        """Merge the pairs (R, N - 1) of neighbours that are not -inf, the `most` most alike of a row."""
        best, pairs = alike.topk(most, dim=1)
        there = best > -torch.inf
        self.least = torch.minimum(self.least, torch.where(there, best, torch.inf).min())
        pairs, there = pairs.masked_fill(~there, alike.shape[1]).sort(dim=1).values, there.sort(1, True).values
        chained = torch.zeros(len(order), order.shape[1] + 1, dtype=torch.bool, device=order.device)
        chained = chained.scatter_(1, pairs + 1, there)[:, :-1]
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        first = torch.where(chained, 0, place).cummax(dim=1).values
        spare, index = self.capacity - SPARE, (pairs + 1).clamp(max=order.shape[1] - 1)
        gone = torch.where(there, order.gather(1, index), spare)
        stays = torch.where(there, order.gather(1, first.gather(1, index)), spare)
        chain = stays.diff(dim=1, prepend=torch.full_like(stays[:, :1], -1)).eq(0) & there
        slot = torch.arange(most, device=order.device).expand_as(gone)
        leader = torch.where(chain, 0, slot).cummax(dim=1).values  # members of one entry lie side by side

        weight, before = self.count.gather(1, gone), self.count.gather(1, stays)
        self.count.scatter_add_(1, stays, weight)
        self.count.scatter_(1, gone, torch.zeros_like(weight))
        after = self.count.gather(1, stays).clamp(min=1)
        self.frame.scatter_reduce_(1, stays, self.frame.gather(1, gone), "amax")
        if self.owner is not None:
            parent = torch.arange(self.capacity, device=order.device).repeat(self.rows, 1).scatter_(1, gone, stays)
            self.owner = torch.where(self.owner < 0, -1, parent.gather(1, self.owner.clamp(min=0)))

        gone, stays = (_flat(index, self.capacity).view_as(index) for index in (gone, stays))
        some = slice(None, None, 1 + most // _DRIFT)
        self._note_drift(self.k.read(gone[:, some].flatten()), stays[:, some].flatten(), there[:, some].flatten())
        joined = Joined(gone, stays, leader, weight, before, after)
        self.v.pool(joined)
        if self.representative == "mean":
            self.k.pool(joined)
            return
        if self.centre is not None:
            self.centre.pool(joined)
        spares = _flat(torch.full_like(leader, spare), self.capacity).view_as(leader)
        for rows in self._portions(most):
            away, where, lead = gone[rows].flatten(), stays[rows].flatten(), leader[rows]
            k = self.k.read(away)
            if self.centre is None:
                speaks = slot[rows] == lead.scatter_reduce(1, lead, slot[rows], "amax").gather(1, lead)  # the newest
            else:
                centre = self.centre.read(where)
                new, old = ((x - centre).square().sum(1).view_as(lead) for x in (k, self.k.read(where)))
                nearest = torch.full_like(new, torch.inf).scatter_reduce(1, lead, new, "amin")
                speaks = (new <= nearest.gather(1, lead)) & (new < 0.999 * old)
            self.k.write(torch.where(speaks, stays[rows], spares[rows]).flatten(), k)

    def _portions(self, places: int) -> Iterator[slice]:
        """Rows so many at a time that vectors at `places` of each are few bytes."""
        return portions(self.rows, 4 * self._project.shape[0] * places)

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
        keys = torch.where(self.count > 0, self.count, torch.iinfo(torch.int32).max)
        order = torch.argsort(keys, dim=1, stable=True)
        for part in (part for store in self._stores for part in store.parts):
            for row in range(self.rows):  # row by row, so that no second copy of the whole cache exists
                part[row, : self.bound] = part[row][order[row, : self.bound]]
        self.anchor = self.anchor.gather(1, order[..., None].expand_as(self.anchor))
        self.count, self.frame, self.cell = (held.gather(1, order) for held in (self.count, self.frame, self.cell))
        if self.owner is not None:
            place = torch.empty_like(order).scatter_(
                1, order, torch.arange(self.capacity, device=order.device).expand_as(order)
            )
            owner = place.gather(1, self.owner.clamp(min=0))
            gone = (self.owner < 0) | (self.count.gather(1, owner) == 0)
            self.owner = torch.where(gone, -1, owner)
        self.used = (self.count > 0).sum(1)
        self.settled.copy_(self.used)
        if self.wide:
            assert isinstance(self.k, Plain)
            *_, dim = self.k.shape
            channels = channels_of(self.count.clamp(min=1), dim**-0.5, self.k.wide.dtype)
            self.k.wide[..., dim:] = channels[:, :, None]

        used = self.used.max()
        if self.spread is not None:  # how many rounds `fold` takes goes by the longest row of all heads
            used = self.spread.most(used)
        most, self.bound = torch.stack([self.count.max().long(), used]).tolist()
        sizes = torch.zeros(self.rows, most + 1, dtype=torch.int64, device=order.device)
        sizes.scatter_add_(1, self.count.long(), torch.ones_like(self.count, dtype=torch.int64))
        frames = self.frame[:, : self.bound].to("cpu", torch.int64)
        rows = []
        for number, groups in enumerate(sizes.tolist()):
            multiplicity = tuple((n, tokens) for tokens, n in enumerate(groups) if n and tokens)
            filled = sum(n for n, _ in multiplicity)
            self._lasting[number].version += 1
            rows.append(Row(self, number, frames[number, :filled], multiplicity, self._lasting[number]))
        return rows

    def _make_room(self, tokens: int) -> None:
        needed = self.bound + tokens + SPARE
        if needed <= self.capacity:
            return
        more = max(needed, 2 * self.capacity) - self.capacity
        for store in self._stores:
            store.parts = [longer(part, more) for part in store.parts]
        about = (self.count, self.frame, self.cell, self.anchor)
        self.count, self.frame, self.cell, self.anchor = (longer(held, more) for held in about)


@dataclass(eq=False)
class Row(InTurn):
    """One filled row: what is known of its entries on the host, and how to read them; `following` is read next."""

    merged: MergedTokens
    number: int
    frames: Tensor
    multiplicity: tuple[tuple[int, int], ...]
    lasting: Lasting
    notes: dict[Any, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.frames.shape[0]

    def entries(self) -> Entries:
        merged, shuttle, k = self.merged, self.merged.shuttle, len(self.merged.k.parts)
        parts = self._parts()
        if shuttle is not None:
            parts = shuttle.take(self, 0, parts, merged.count.device)
            if (following := self.following) is not None and following.count:
                shuttle.fetch(following, 0, following._parts(), merged.count.device)
        vectors = (merged.k.opened(parts[:k], self.number), merged.v.opened(parts[k:], self.number))
        return Entries(*vectors, self.frames, self.multiplicity, self.notes, self.lasting, room=self.room())

    def room(self) -> Room | None:
        """Where the entries lie, if they lie so that they can be read in one launch."""
        merged, row = self.merged, slice(self.number, self.number + 1)
        if not merged.wide:
            return None
        assert isinstance(merged.k, Plain)
        assert isinstance(merged.v, Plain)
        return Room(merged.k.wide[row], merged.v.wide[row], merged.settled[row], merged.k.shape[-1] ** -0.5)

    def _parts(self) -> list[Tensor]:
        """What holds the keys, then what holds the values."""
        return [part[self.number, : self.count] for part in (*self.merged.k.parts, *self.merged.v.parts)]


@dataclass(frozen=True, eq=False)
class MergedTier:
    """The rows of one layer: one a video of the batch, or one a head of each (`heads` rows a video).

    They differ in number of entries, so each is read alone.
    """

    rows: list[Row]
    bytes: int
    host_bytes: int = 0
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

    def address(self) -> Hashable | None:
        """Where the entries lie if reading them launches the same each time, however many they are; else None."""
        [row, *others] = self.rows
        room = row.room()
        if others or room is None or len(row.multiplicity) < 2:
            return None
        return room.k.data_ptr(), room.v.data_ptr(), room.used.data_ptr()

    def frames(self) -> list[Tensor]:
        return [row.frames for row in self.rows]


def _ahead_of_both(alike: Tensor) -> Tensor:
    """Pairs (R, N) more alike than the pairs on either side, so that no two are neighbours; of equals the even ones,
    then the earlier ones."""
    even = torch.arange(alike.shape[1], device=alike.device) % 2 == 0
    edge = alike.new_full((alike.shape[0], 1), -torch.inf)
    before, after = torch.cat([edge, alike[:, :-1]], 1), torch.cat([alike[:, 1:], edge], 1)
    return torch.where(even, (alike >= before) & (alike >= after), (alike > before) & (alike > after))


def _flat(index_RT: Tensor, width: int) -> Tensor:
    """Positions (R, T) within rows of `width` as positions in all of them put together, (R * T,)."""
    rows = torch.arange(index_RT.shape[0], device=index_RT.device)[:, None] * width
    return (index_RT + rows).flatten()


def _pick(x_RTW: Tensor, index_RT: Tensor) -> Tensor:
    return x_RTW.flatten(0, 1)[_flat(index_RT, x_RTW.shape[1])].view_as(x_RTW)
