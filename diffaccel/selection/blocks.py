"""Keys in blocks of near ones, and the blocks that near queries read of them."""

from dataclasses import dataclass, replace
from math import log
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ann import Ordered, ordered
from ..cache.entries import Entries
from ..errors import KernelError
from ..kernel import Partial, fa4, reference
from ..kernel.block_sparse import BlockLists, Summary, block_sparse, by_fa4, fastest, gathered, written_out
from ..sent import sent

SORTED = ("kmeans", "hash")
"""Groups of tokens that their own vectors make."""

_BLOCKS = (128, 64, 32, 16, 8)
_CLUSTERS, _CLUSTER = 64, 8  # of k-means, at most so many, of about so many points at least
_SAMPLE = 8192  # tokens of a head that k-means looks at
_WARM_ITERATIONS = 1
_GROWTH = 1.5  # of the room for sorted copies


@dataclass(frozen=True, eq=False)
class Chosen:
    """What the queries of one call read of some entries: keys in another order, and lists of their blocks."""

    k: Tensor  # (B, N, H, D)
    v: Tensor
    blocks: BlockLists
    even: bool  # all lists have all of their entries
    order: Tensor | None  # of the queries, (B, H, S)
    log_weight: Tensor | None  # (B, H, N) fp32
    summary: Summary | None
    keys_read: float  # of each query, on average over rows and heads

    @property
    def bytes(self) -> int:
        """What the sorted copies take, with the room behind them, and the means."""
        held = [self.k, self.v, *((self.log_weight,) if self.log_weight is not None else ()), *(self.summary or ())]
        return sum(x.untyped_storage().nbytes() for x in held)


class Described(NamedTuple):
    """What is known of the blocks that may be chosen, fp32."""

    k: Tensor  # (B, H, NB, D) mean keys
    v: Tensor
    spread: Tensor  # (B, H, NB, D) variance of a block's keys, channel by channel
    log_count: Tensor  # (B, H, NB): tokens of a block


class KeyBlocks:
    """Entries sorted head by head into blocks of equal size, of which queries choose; those that all read come last.

    What is sorted is a copy of the keys and values. Entries that are added are sorted among themselves, into blocks
    behind those that are there; what does not fill a block waits among those that all read. Clusters start from those
    of `before`.
    """

    def __init__(self, groups: str, block: int, before: "KeyBlocks | None" = None) -> None:
        self.groups, self.block = groups, block
        self.at: tuple[int, int, int] | None = None  # what the entries were when they were taken in
        self.together = 0  # how many of them may be chosen that were sorted at once
        self.always = torch.zeros(0, dtype=torch.bool)  # on the host, which of them all read
        self.chosen_at: tuple[int, int, int, int] | None = None  # block, queries, entries and step of the last choice
        self.lists: BlockLists | None = None
        self.even = True  # lists are equally long
        self.read = 0.0  # blocks that a query reads of those that may be chosen, on average
        self.kept: dict[Any, Any] = {} if before is None else before.kept  # from choice to choice
        self.order: Tensor | None = None  # of the queries, (B, H, S)
        self._key_centres: Tensor | None = None if before is None else before._key_centres
        self._query_centres: Tensor | None = None if before is None else before._query_centres
        self._k = self._v = torch.empty(0, 0, 0, 0)  # (B, H, room, D), sorted
        self._log_weight: Tensor | None = None
        self._sorted, self._pending = (torch.empty(0, dtype=torch.int64) for _ in range(2))  # (B, H, n) of entries
        self.about: Described | None = None
        self._means: Summary | None = None

    @property
    def choices(self) -> int:
        """Blocks that may be chosen."""
        return 0 if self.about is None else self.about.k.shape[2]

    @property
    def count(self) -> int:
        return len(self.always)

    def take(self, entries: Entries, always: Tensor, buckets: Tensor | None = None) -> None:
        """Sort in what is new. `always`: which entries every query reads, bool (N,) on the host; `buckets` (B, H, N) of
        all entries, for groups "prompt"."""
        device, (batch, _, heads, dim) = entries.k.device, entries.k.shape
        fresh = ~always
        fresh[: self.count] &= self.always  # the others are there
        if not self.count:
            self._pending = torch.empty(batch, heads, 0, dtype=torch.int64, device=device)
            self._sorted = self._pending
        added = sent(fresh.nonzero().squeeze(1), device)
        self.together = self.together or len(added)
        places = torch.cat([self._pending, added.expand(batch, heads, -1)], 2)
        if len(added) and buckets is not None:
            places = places.gather(2, buckets.gather(2, places).argsort(dim=2, stable=True))
        elif len(added) and self.groups in SORTED:
            keys = entries.k.transpose(1, 2).gather(2, places[..., None].expand(-1, -1, -1, dim))
            permutation, self._key_centres = sort(keys, self.groups, self._key_centres)
            places = places.gather(2, permutation)
        full = places.shape[2] // self.block * self.block
        places, self._pending = places.split([full, places.shape[2] - full], 2)
        self.always = always
        behind = torch.cat([self._pending, sent(always.nonzero().squeeze(1), device).expand(batch, heads, -1)], 2)
        self._write(entries, self._sorted.shape[2], torch.cat([places, behind], 2))
        if full:
            self._sorted = torch.cat([self._sorted, places], 2)
            self._describe(self._sorted.shape[2] - full, self._sorted.shape[2])
        self._means = None

    def refill(self, entries: Entries) -> None:
        """Other keys and values in the places of those before; what was chosen stays."""
        always = sent(self.always.nonzero().squeeze(1), entries.k.device).expand(*self._sorted.shape[:2], -1)
        self._write(entries, 0, torch.cat([self._sorted, self._pending, always], 2))
        self.about = self._means = None
        self._describe(0, self._sorted.shape[2])

    def _write(self, entries: Entries, start: int, places: Tensor) -> None:
        """Copy entries at `places` (B, H, n) behind the first `start` of the sorted ones."""
        batch, heads, added = places.shape
        if start + added > self._k.shape[2]:
            room = start + added if not start else int(_GROWTH * (start + added))
            k, v = (x.new_zeros(batch, heads, room, x.shape[3]) for x in (entries.k, entries.v))
            if start:
                k[:, :, :start], v[:, :, :start] = self._k[:, :, :start], self._v[:, :, :start]
            self._k, self._v = k, v
        index = places[..., None].expand(-1, -1, -1, entries.k.shape[3])
        for held, given in ((self._k, entries.k), (self._v, entries.v)):
            held[:, :, start : start + added] = given.transpose(1, 2).gather(2, index)
        weight = entries.log_weight()
        if weight is not None:
            before = [] if self._log_weight is None else [self._log_weight[..., :start]]
            self._log_weight = torch.cat([*before, weight[places]], 2)

    def _describe(self, start: int, end: int) -> None:
        """Means and variances of the blocks that the sorted entries `start` to `end` fill."""
        k, v = (x[:, :, start:end].unflatten(2, (-1, self.block)) for x in (self._k, self._v))
        if self._log_weight is None:
            spread, mean_k = torch.var_mean(k.float(), 3, correction=0)
            mean_v = v.mean(3, dtype=torch.float32)
            log_count = mean_k.new_full(mean_k.shape[:3], log(self.block))
        else:
            weight = self._log_weight[:, :, start:end].unflatten(2, (-1, self.block))
            log_count = weight.logsumexp(-1)
            share = (weight - log_count[..., None]).exp()[..., None]  # of a token's entry in its block
            mean_k, mean_v = ((x * share).sum(3) for x in (k, v))
            spread = ((k - mean_k[:, :, :, None]).square() * share).sum(3)
        new = Described(mean_k, mean_v, spread, log_count)
        if self.about is not None:
            new = Described(*(torch.cat(same, 2) for same in zip(self.about, new, strict=True)))
        self.about = new

    def arrange(self, q: Tensor, again: bool, buckets: Tensor | None = None) -> Tensor:
        """Near queries of (B, S, H, D) side by side, in blocks: (B, H, QB, query_block, D).

        The last block is filled up with its last query. `again`: these queries come in the order of the last ones.
        `buckets` (B, H, S), of the queries.
        """
        batch, queries, heads, dim = q.shape
        query_block = block_for(queries, 12)
        q = q.transpose(1, 2)
        if self.groups not in SORTED:
            self.order = None if buckets is None else buckets.argsort(dim=2, stable=True)
        elif not again or self.order is None or self.order.shape[2] != queries:
            self.order, self._query_centres = sort(q, self.groups, self._query_centres)
        filled = -(-queries // query_block) * query_block
        place = torch.arange(filled, device=q.device).clamp(max=queries - 1)
        place = place.expand(batch, heads, -1) if self.order is None else self.order[..., place]
        return q.gather(2, place[..., None].expand(-1, -1, -1, dim)).unflatten(2, (-1, query_block))

    def read_best(self, rank: Tensor, take: int, query_block: int) -> None:
        """Let each block of queries read the `take` blocks of highest `rank` (B, H, QB, KB), and those at the end."""
        found = rank.topk(take, dim=-1).indices.sort(-1).values
        behind = torch.arange(self.choices, self._blocks, device=rank.device)
        lists = torch.cat([found, behind.expand(*found.shape[:-1], -1)], -1).int()
        counts = torch.full(lists.shape[:-1], lists.shape[-1], dtype=torch.int32, device=rank.device)
        self.lists, self.read, self.even = BlockLists(lists, counts, query_block, self.block, True), take, True

    def read_all_or_none(self, all_of_them: Tensor, query_blocks: int, query_block: int) -> None:
        """Let some heads, bool (B, H), read every block and the others only those at the end. Waits for the device."""
        blocks = torch.arange(self._blocks, device=all_of_them.device)
        lists = torch.where(all_of_them[..., None], blocks, (blocks + self.choices) % self._blocks)
        counts = torch.where(all_of_them, self._blocks, self._blocks - self.choices)
        lists, counts = (x[:, :, None].repeat_interleave(query_blocks, 2).int() for x in (lists, counts))
        self.lists, self.even = BlockLists(lists, counts, query_block, self.block, ascending=True), False
        self.read = self.choices * float(all_of_them.float().mean())

    def read_all_in(self, heads: Tensor) -> None:
        """Let some heads, bool (H,) on the host, read every block, and the others what was chosen."""
        assert self.lists is not None
        chosen, share = self.lists, float(heads.float().mean())
        heads = sent(heads, chosen.lists.device)[:, None]
        every = torch.arange(self._blocks, device=chosen.lists.device, dtype=torch.int32)
        lists = torch.nn.functional.pad(chosen.lists, (0, self._blocks - chosen.lists.shape[-1]))
        counts = torch.where(heads, self._blocks, chosen.counts).int()
        self.lists = replace(chosen, lists=torch.where(heads[..., None], every, lists), counts=counts)
        self.read, self.even = share * self.choices + (1 - share) * self.read, False

    def chosen(self, summaries: bool) -> Chosen:
        """What was chosen, of the keys as they are now."""
        assert self.lists is not None
        read = self.read
        return Chosen(
            self._k[:, :, : self.count].transpose(1, 2),
            self._v[:, :, : self.count].transpose(1, 2),
            self.lists,
            self.even,
            self.order,
            self._log_weight,
            self._summary() if summaries else None,
            read * self.block + self.count - self.choices * self.block + (self.choices - read if summaries else 0),
        )

    @property
    def k(self) -> Tensor:
        """Keys that may be chosen, (B, H, KB, block, D)."""
        return self._k[:, :, : self.choices * self.block].unflatten(2, (-1, self.block))

    @property
    def log_weight(self) -> Tensor | None:
        """What is added to their scores, fp32 (B, H, KB, block); None for nothing."""
        held = self._log_weight
        return None if held is None else held[..., : self.choices * self.block].unflatten(2, (-1, self.block))

    @property
    def behind(self) -> tuple[Tensor, Tensor | None]:
        """Keys that all read, (B, H, n, D), and what is added to their scores, fp32 (B, H, n)."""
        those = slice(self.choices * self.block, self.count)
        return self._k[:, :, those], None if self._log_weight is None else self._log_weight[..., those]

    @property
    def _blocks(self) -> int:
        return -(-self.count // self.block)

    def _summary(self) -> Summary:
        """Of every block; those that are always read are in every list, so what stands for them is never looked at."""
        if self._means is None:
            assert self.about is not None
            more = self._blocks - self.choices
            k, v = (
                torch.nn.functional.pad(x.to(self._k.dtype), (0, 0, 0, more)).transpose(1, 2) for x in self.about[:2]
            )
            self._means = Summary(k, v, torch.nn.functional.pad(self.about.log_count, (0, more)))
        return self._means


def over_blocks(kernel: ModuleType, asked: bool, q: Tensor, chosen: Chosen, scale: float) -> Partial:
    """Attention of `q` over what was chosen. A kernel that was asked for reads the lists or copies, or refuses."""
    if not asked or kernel is reference:
        compute = written_out if kernel is reference else block_sparse
        return compute(
            q,
            chosen.k,
            chosen.v,
            chosen.blocks,
            scale=scale,
            order=chosen.order,
            log_weight=chosen.log_weight,
            summary=chosen.summary,
        )
    if kernel is fa4 and chosen.log_weight is None and fa4.cannot_list(chosen.blocks, chosen.k.shape[1]) is None:
        return by_fa4(q, chosen.k, chosen.v, chosen.blocks, scale=scale, order=chosen.order, summary=chosen.summary)
    if not chosen.even:
        raise KernelError(
            f"kernel={kernel.name!r} reads copies of the chosen keys, equally many for every head: use kernel='auto'"
        )
    if chosen.log_weight is not None or chosen.summary is not None:
        raise KernelError(
            f"kernel={kernel.name!r} reads copies of the chosen keys, which takes no summaries and no merged entries: "
            "use kernel='auto', or selection.summaries=False with a cache that merges nothing"
        )
    return gathered(kernel, q, chosen.k, chosen.v, chosen.blocks, scale=scale, order=chosen.order)


def path(kernel: ModuleType, asked: bool, q: Tensor, chosen: Chosen) -> str:
    """What `over_blocks` computes with, for the report."""
    if kernel is reference or asked:
        return str(kernel.name)
    return fastest(q, chosen.k, chosen.blocks, chosen.log_weight)


def sort(x_BHND: Tensor, groups: str, centroids: Tensor | None) -> Ordered:
    """A permutation (B, H, N) that puts near vectors side by side, from the centroids of vectors much like them."""
    if groups == "hash":
        return ordered(x_BHND, "lsh")
    if centroids is not None and centroids.shape[2] <= x_BHND.shape[2]:
        return ordered(x_BHND, "kmeans", iterations=_WARM_ITERATIONS, sample=_SAMPLE, centroids=centroids)
    return ordered(x_BHND, "kmeans", clusters=max(1, min(_CLUSTERS, x_BHND.shape[2] // _CLUSTER)), sample=_SAMPLE)


def block_for(tokens: int, least: int) -> int:
    """The largest block of which `tokens` fill `least`, or the smallest there is."""
    return next((block for block in _BLOCKS if tokens >= least * block), _BLOCKS[-1])
