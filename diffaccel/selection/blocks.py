"""Keys in blocks of near ones, and the blocks that near queries read of them."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..ann import order
from ..cache.entries import Entries
from ..errors import KernelError
from ..kernel import Partial, reference
from ..kernel.block_sparse import BlockLists, Summary, block_sparse, gathered, written_out

SAMPLES = 16
"""Means of near queries that stand for a block of queries where blocks of keys are ranked."""

_BLOCKS = (128, 64, 32, 16, 8)
_CLUSTER = 8  # points of a k-means cluster, about


@dataclass(frozen=True, eq=False)
class Chosen:
    """What the queries of one call read of some entries: keys in another order, and lists of their blocks."""

    k: Tensor  # (B, N, H, D)
    v: Tensor
    blocks: BlockLists
    order: Tensor | None  # of the queries, (B, H, S)
    log_weight: Tensor | None  # (B, H, N) fp32
    summary: Summary | None
    keys_read: int  # of each query, the same for all
    queries: int  # how many they are

    @property
    def bytes(self) -> int:
        """What the sorted copies take, and the means."""
        held = [self.k, self.v, *((self.log_weight,) if self.log_weight is not None else ()), *(self.summary or ())]
        return sum(x.numel() * x.element_size() for x in held)


@dataclass(eq=False)
class KeyBlocks:
    """Entries sorted head by head into blocks of equal size, of which queries choose; those that all read come last.

    What is sorted is a copy of the keys and values. All of it is worked out once for entries that stay as they are,
    the order of the queries too: it only says which of them choose together.
    """

    k: Tensor  # (B, H, N, D), sorted
    v: Tensor
    log_weight: Tensor | None
    mean_k: Tensor  # (B, H, NB, D) of the NB blocks that may be chosen
    mean_v: Tensor
    spread: Tensor  # variance of a block's keys, channel by channel
    log_count: Tensor  # (B, H, NB): tokens of a block
    block: int
    order: Tensor | None = None  # of the queries
    chosen: Chosen | None = None  # the last time

    @classmethod
    def of(cls, entries: Entries, always: Tensor, block: int, groups: str) -> "KeyBlocks":
        """`always`: which entries every query reads, bool (N,) on the host."""
        device, (batch, _, heads, dim) = entries.k.device, entries.k.shape
        free, kept = ((~always).nonzero().squeeze(1).to(device), always.nonzero().squeeze(1).to(device))
        count = len(free) // block * block
        if groups == "place":
            sorted_free = free.expand(batch, heads, -1)
        else:
            sorted_free = free[sort(entries.k.transpose(1, 2)[:, :, free], groups)]
        permutation = torch.cat([sorted_free, kept.expand(batch, heads, -1)], 2)
        places = permutation[..., None].expand(-1, -1, -1, dim)
        k, v = (x.transpose(1, 2).gather(2, places) for x in (entries.k, entries.v))
        weight = entries.log_weight()
        if weight is not None:
            weight = weight[permutation]
        in_blocks = [x[:, :, :count].unflatten(2, (-1, block)).float() for x in (k, v)]
        share = (
            torch.zeros(1, 1, 1, block, device=device)
            if weight is None
            else weight[:, :, :count].unflatten(2, (-1, block))
        )
        log_count = share.logsumexp(-1).expand(batch, heads, count // block)
        share = (share - log_count[..., None]).exp()[..., None]  # of a token's entry in its block
        mean_k, mean_v = ((x * share).sum(3) for x in in_blocks)
        spread = ((in_blocks[0] - mean_k[:, :, :, None]).square() * share).sum(3)
        return cls(k, v, weight, mean_k, mean_v, spread, log_count, block)

    @property
    def choices(self) -> int:
        return self.mean_k.shape[2]

    def choose(self, q: Tensor, take: int, groups: str, scale: float, summaries: bool) -> Chosen:
        """The `take` blocks with most of the attention of each block of queries (B, S, H, D), and those always read.

        The mass of a block is estimated for the means of `SAMPLES` runs of near queries each, as if its scores were
        normally distributed: exp(mean + variance / 2), times its tokens. A few keys of two kinds are not, and none is
        far above what most have: the second term is at most the standard deviation. Ranked by the average of their
        shares in it.
        """
        batch, queries, heads, dim = q.shape
        query_block = block_for(queries, 12)
        q = q.transpose(1, 2)
        if groups != "place" and (self.order is None or self.order.shape[2] != queries):
            self.order = sort(q, groups)
        filled = -(-queries // query_block) * query_block
        place = torch.arange(filled, device=q.device).clamp(max=queries - 1)
        place = place.expand(batch, heads, -1) if self.order is None else self.order[..., place]
        near = q.gather(2, place[..., None].expand(-1, -1, -1, dim)).unflatten(
            2, (-1, query_block // min(query_block, SAMPLES))
        )
        means = near.mean(3, dtype=torch.float32) * scale
        variance = means.square() @ self.spread.mT
        scores = means @ self.mean_k.mT + torch.minimum(variance / 2, variance.sqrt()) + self.log_count[:, :, None]
        mass = scores.softmax(-1).unflatten(2, (filled // query_block, -1)).mean(3)
        found = mass.topk(take, dim=-1).indices.sort(-1).values
        behind = torch.arange(self.choices, -(-self.k.shape[2] // self.block), device=q.device)
        lists = torch.cat([found, behind.expand(*found.shape[:-1], -1)], -1).int()
        counts = torch.full(lists.shape[:-1], lists.shape[-1], dtype=torch.int32, device=q.device)
        always = self.k.shape[2] - self.choices * self.block
        return Chosen(
            self.k.transpose(1, 2),
            self.v.transpose(1, 2),
            BlockLists(lists, counts, query_block, self.block),
            self.order,
            self.log_weight,
            self._summary(len(behind)) if summaries else None,
            take * self.block + always + (self.choices - take if summaries else 0),
            queries,
        )

    def _summary(self, behind: int) -> Summary:
        """Of every block; those that are always read are in every list, so what stands for them is never looked at."""
        k, v = (
            torch.nn.functional.pad(x.to(self.k.dtype), (0, 0, 0, behind)).transpose(1, 2)
            for x in (self.mean_k, self.mean_v)
        )
        return Summary(k, v, torch.nn.functional.pad(self.log_count, (0, behind)))


def over_blocks(kernel: ModuleType, asked: bool, q: Tensor, chosen: Chosen, scale: float) -> Partial:
    """Attention of `q` over what was chosen. A kernel that was asked for reads copies of it or refuses."""
    knows = chosen.log_weight is None and chosen.summary is None
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
    if not knows:
        raise KernelError(
            f"kernel={kernel.name!r} reads copies of the chosen keys, which takes no summaries and no merged entries: "
            "use kernel='auto', or selection.summaries=False with a cache that merges nothing"
        )
    return gathered(kernel, q, chosen.k, chosen.v, chosen.blocks, scale=scale, order=chosen.order)


def sort(x_BHND: Tensor, groups: str) -> Tensor:
    """A permutation (B, H, N) that puts near vectors side by side."""
    if groups == "hash":
        return order(x_BHND, "lsh")
    return order(x_BHND, "kmeans", clusters=max(1, min(64, x_BHND.shape[2] // _CLUSTER)))


def block_for(tokens: int, least: int) -> int:
    """The largest block of which `tokens` fill `least`, or the smallest there is."""
    return next((block for block in _BLOCKS if tokens >= least * block), _BLOCKS[-1])
