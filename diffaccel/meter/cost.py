"""Pure counts: floating-point operations, bytes of memory, bytes over a link."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING

from ..errors import KnobError
from ..suggest import choose
from .machine import Machine

if TYPE_CHECKING:
    from ..window.tiles import TileCount


ALONE = 2.0
"""Read off timings of one to 32 queries on an H100: 12 of its 132 processors draw about twice their share of memory."""


@dataclass(frozen=True)
class Cost:
    """Operations, bytes of the device's memory, and bytes over the link to the host or to another device."""

    flops: float = 0.0
    memory: float = 0.0
    link: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.memory + other.memory, self.link + other.link)

    def __mul__(self, times: float) -> "Cost":
        return Cost(times * self.flops, times * self.memory, times * self.link)

    __rmul__ = __mul__

    @property
    def intensity(self) -> float:
        """Operations a byte of memory; infinite without bytes."""
        return self.flops / self.memory if self.memory else float("inf")

    def eflops(self, machine: Machine) -> float:
        """Kinetics' equivalent operations (arXiv 2506.05333): bytes count as what could be computed in their time.

        They add up, as if nothing overlapped.
        """
        return self.flops + machine.intensity * self.memory + machine.link_intensity * self.link

    def seconds(self, machine: Machine, busy: float = 1.0) -> float:
        """The least it can take: work, memory and link overlap wholly (a roofline).

        `busy` is the share of the machine's processors at work. Each computes its share, and moves up to `ALONE` times
        its share of bytes while others are idle.
        """
        link = self.link / machine.link if machine.link else 0.0
        work = self.flops / (machine.flops * busy)
        return max(work, self.memory / (machine.memory * min(1.0, ALONE * busy)), link)


def attention(
    queries: float, keys: float, heads: int, dim: int, *, key_heads: int | None = None, itemsize: float = 2
) -> Cost:
    """One row's attention of `queries` to `keys`, each of `heads` of `dim` channels; both may be means.

    Keys and values come once, from `key_heads` heads of `itemsize` bytes a channel; queries and results once. Two
    products of 2 operations each a pair of query and key and channel; the exponentials are not counted.
    """
    return Cost(
        flops=4 * queries * keys * heads * dim,
        memory=itemsize * dim * (2 * keys * (key_heads or heads) + 2 * queries * heads),
    )


def busy(queries: int, heads: int, machine: Machine, *, key_heads: int | None = None, tile: int = 128) -> float:
    """Share of the processors that a kernel keeps at work which cuts queries into tiles, and keys not at all.

    Heads of queries that share keys fill a tile together. The last of its waves may be ragged.
    """
    own = key_heads or heads
    pieces = own * ceil(queries * (heads // own) / tile)
    return pieces / (ceil(pieces / machine.processors) * machine.processors)


def reading(keys: float, key_heads: int, dim: int, *, bits: float, to: float = 2) -> Cost:
    """What opening stored keys and values costs beside `attention`: `bits` a channel and 4 bytes a vector are read, and
    `to` bytes a channel written. Without it nothing of a smaller store shows, because attention reads what was opened.
    """
    return Cost(memory=2 * keys * key_heads * (dim * bits / 8 + 4 + dim * to))


def tiled(count: "TileCount", tile: tuple[int, int], heads: int, dim: int) -> float:
    """Operations of a kernel that works on whole tiles of (queries, keys), for `window.tiles.count_tiles`."""
    return 4.0 * count.visited * tile[0] * tile[1] * heads * dim


PASSES = {"three": 3.0, "two": 2.0, "one": 1.0, "column sums": 2.0}
"""Times that a way to attend goes over the keys (FuseMax, arXiv 2406.10491, section 3): largest score, then sum, then
values; the first two in one with sums put right later; all in one, as flash kernels do. H2O's sums over all queries
need each row's sum first."""


def passes(way: str, *, probes: float = 0.0, queries: float = 1.0, flat: float = 0.0) -> float:
    """Times that a way of `PASSES` goes over the keys; beside it those of "probes" and "progressive".

    `probes` of `queries` read the keys once more to score them. `flat` is the share of queries for which low bits are
    fetched too (SpAtten).
    """
    choose(way, (*PASSES, "probes", "progressive"), "way")
    if way == "probes":
        return 1 + probes / queries
    return 1 + flat if way == "progressive" else PASSES[way]


def traffic(way: str, queries: int, keys: int, dim: int, *, itemsize: float = 2, sram: int = 2**17) -> float:
    """Bytes of memory of one head: keys and values once for each group of queries that half of `sram` bytes holds, each
    pass; of the passes before the last only the keys. Scores are never written."""
    over, groups = passes(way), ceil(queries * dim * itemsize / (sram / 2))
    return itemsize * dim * ((over + 1) * keys * groups + 2 * queries)


def spatten(
    tokens: Sequence[float], heads: Sequence[float], dim: int, *, bits: float = 16, values: float = 1.0
) -> float:
    """Bytes of keys and values that SpAtten (arXiv 2012.09852) fetches for one query.

    `tokens` and `heads` are those that its cascade has left in each layer, `values` the share of values that local
    pruning leaves. Raises `KnobError` where a later layer has more.
    """
    if len(tokens) != len(heads) or any(later > first for some in (tokens, heads) for first, later in pairwise(some)):
        raise KnobError(
            f"tokens and heads are those left in each layer, and what is pruned stays so, got {list(tokens)} and "
            f"{list(heads)}: give one of each a layer, none more than before"
        )
    return sum((1 + values) * n * h for n, h in zip(tokens, heads, strict=True)) * dim * bits / 8


def progressive(bits: float, more: float, flat: float) -> float:
    """Mean bits a channel where `more` are fetched for the `flat` share of queries whose attention is spread."""
    return bits + flat * more


def kinetics(
    parameters: float, read: int, written: int, width: int, *, ratio: float, trials: int = 1, itemsize: float = 2
) -> Cost:
    """A text written token by token: `written` tokens after `read`, `trials` times (Kinetics, arXiv 2506.05333).

    `width` is the channels of a token's keys and values in all layers, `ratio` the heads of queries a head of keys.
    What was read is shared by the trials; weights count for work alone, as there.
    """
    return Cost(
        flops=trials * (2 * parameters * written + 2 * ratio * (read * written + written**2 / 2) * width),
        memory=itemsize * (read * written + trials * written**2 / 2) * width,
    )
