"""Attention over entries that stand for several tokens each, the log-multiplicity applied exactly.

A bias on every score slows a dense kernel down on a GPU, and FlashAttention-3 takes none. Two ways do without. Entries
of one multiplicity share one bias, and a constant added to every score only moves the log-sum-exp: a group is read
plainly and weighted as it merges. Or the bias goes into the dot product: three more channels of a key hold log(m) /
scale in parts that add up to it, the query's are one. Where a cache holds its keys with these channels, all entries are
read in one launch, in place; elsewhere they are added as they are read.

A group read plainly costs a launch and a merge beside its own work: about a ninth of reading all entries once (4 680
queries x 32 760 keys of 128 channels, FA3). Through channels it costs a copy and up to half of its work again (kernels
round 128 + 8 channels up to 192), so less than its work. Groups below a ninth are therefore better off together. A
group of at least an eighth stays alone; of those there are at most eight, at most seven beside a smaller one, so never
more than eight launches.
"""

from functools import lru_cache
from itertools import accumulate
from math import log
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..plan import Plan
from ..sent import sent
from . import fa3, reference
from .merge import Partial, merge

if TYPE_CHECKING:
    from ..cache.entries import Entries, Room

Group = tuple[slice, int]  # which entries, the tokens each stands for

ALONE = 8  # a group of at least one in so many entries is read alone
PARTS = 3  # of a bfloat16's 8 bits each: what fp32 holds
CHANNELS = 8  # the parts, filled up with zeros to the multiple that kernels want


def over_entries(
    kernel: ModuleType, q: Tensor, entries: "Entries", scale: float, plan: Plan | None, asked: bool = True
) -> Partial:
    """`kernel` over `entries`, (B, S, H, D) queries; unless it was `asked` for, whatever reads them fastest."""
    if plan is None and not asked and in_one(q, entries, scale):
        return in_place(q, entries.room, scale)
    # a bias costs the CPU's flash attention nothing to speak of; what the rest is held to takes no detour
    if entries.multiplicity is None or plan is not None or not q.is_cuda or kernel is reference:
        return kernel.partial(q, entries.k, entries.v, scale=scale, log_weight=entries.log_weight(), plan=plan)
    return grouped(kernel, q, entries, scale)


def read_plainly(q: Tensor, entries: "Entries") -> Partial:
    """By the reference kernel and outside of any call, for what looks at a cache; scaled by the channels of `q`."""
    return over_entries(reference, q, entries, q.shape[-1] ** -0.5, None)


def in_one(q: Tensor, entries: "Entries", scale: float) -> bool:
    """Whether entries of several multiplicities are read in one launch, as they lie."""
    several = entries.multiplicity is not None and len(entries.multiplicity) > 1
    return several and entries.room is not None and entries.room.scale == scale


@lru_cache
def can_in_place(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether there is a kernel for wider keys that learns on the GPU how many they are: FlashAttention-3."""
    return spare(dim) is not None and fa3.unusable(device, dtype, dim + CHANNELS) is None


def spare(dim: int) -> tuple[int, int] | None:
    """Channels beside `dim` that a buffer of keys, and one of values, must have to be read so; None for wide heads."""
    value = fa3.value_width(torch.device("cuda"), torch.bfloat16, dim + CHANNELS, dim)
    return None if value is None else (CHANNELS, value - dim)


def in_place(q: Tensor, room: "Room | None", scale: float) -> Partial:
    """Attention of (B, S, H, D) queries to what a room holds: always the same launch, which a CUDA graph may keep."""
    assert room is not None
    part = fa3.over_cache(pad(q, (0, CHANNELS), value=1.0), room.k, room.v, room.used, scale=scale)
    return Partial(part.out[..., : q.shape[-1]], part.lse)


def grouped(kernel: ModuleType, q: Tensor, entries: "Entries", scale: float) -> Partial:
    """Large groups one by one, the small ones in one launch.

    A kernel that takes no keys so wide reads every group alone: the same result, slower.
    """
    dim, notes = q.shape[-1], entries.notes
    width = kernel.value_width(q.device, q.dtype, dim + CHANNELS, dim)
    if "launches" not in notes:
        notes["launches"] = launches(entries.multiplicity or ((entries.count, 1),))
    alone, together = notes["launches"]
    if width is None:
        alone, together = alone + together, []
    parts = []
    for place, tokens in alone:
        part = kernel.partial(q, entries.k[:, place], entries.v[:, place], scale=scale)
        parts.append(part if tokens == 1 else Partial(part.out, part.lse + log(tokens)))
    if together:
        if (scale, q.dtype) not in notes:
            notes[scale, q.dtype] = log_channels(together, scale, q)
        k = _joined(entries.k, together, dim + CHANNELS, notes[scale, q.dtype])
        v = _joined(entries.v, together, width, 0.0)
        part = kernel.partial(pad(q, (0, CHANNELS), value=1.0), k, v, scale=scale)
        parts.append(Partial(part.out[..., :dim], part.lse))
    return merge(parts)


def launches(multiplicity: tuple[tuple[int, int], ...]) -> tuple[list[Group], list[Group]]:
    """The groups to read alone and those to read together, of which there is none or at least two."""
    stops = list(accumulate(count for count, _ in multiplicity))
    groups = [(slice(stop - count, stop), tokens) for stop, (count, tokens) in zip(stops, multiplicity, strict=True)]
    large, small = ([g for g in groups if (ALONE * _size(g) < stops[-1]) is below] for below in (False, True))
    return (large, small) if len(small) > 1 else (groups, [])


def log_channels(groups: list[Group], scale: float, like: Tensor) -> Tensor:
    """Those of every entry of the groups, (N, CHANNELS); the number of operations does not grow with that of groups."""
    counts = torch.tensor([tokens for _, tokens in groups])
    sizes = torch.tensor([_size(group) for group in groups])
    table, sizes = (sent(x, like.device) for x in (channels_of(counts, scale, like.dtype), sizes))
    return table.repeat_interleave(sizes, 0, output_size=sum(map(_size, groups)))


def channels_of(counts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """log(m) / scale of every count m >= 1 in parts rounded to `dtype`, (..., CHANNELS)."""
    rest = counts.double().log() / scale
    parts = torch.zeros(*counts.shape, CHANNELS, dtype=dtype, device=counts.device)
    for part in range(PARTS):
        parts[..., part] = rest
        rest = rest - parts[..., part].double()
    return parts


def _joined(x: Tensor, groups: list[Group], width: int, fill: Tensor | float) -> Tensor:
    """The groups' entries of `x` one after another, (B, N, H, width), `fill` in the channels that `x` has not."""
    runs: list[slice] = []  # neighbours are copied at once
    for place, _ in groups:
        start = runs.pop().start if runs and runs[-1].stop == place.start else place.start
        runs.append(slice(start, place.stop))
    pieces = [x[:, run] for run in runs]
    if len(pieces) == 1 and width == x.shape[-1]:
        return pieces[0]
    sizes = [piece.shape[1] for piece in pieces]
    joined = x.new_empty(x.shape[0], sum(sizes), x.shape[2], width)
    for room, piece in zip(joined.split(sizes, 1), pieces, strict=True):
        room[..., : x.shape[-1]] = piece
    joined[..., x.shape[-1] :] = fill if isinstance(fill, float) else fill[:, None]
    return joined


def _size(group: Group) -> int:
    return group[0].stop - group[0].start
