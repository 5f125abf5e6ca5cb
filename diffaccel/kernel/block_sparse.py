"""Attention in which each block of queries reads its own list of key blocks, head by head.

FlashAttention-4 or a fused Triton kernel reads the listed blocks where they lie. `written_out` defines what they
compute, and runs where there is no GPU. `gathered` is the other way: it copies the listed blocks together and leaves
them to a dense kernel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import KernelError, KnobError
from . import fa4
from .inputs import check
from .merge import HAS_TRITON, Partial, nothing

_WORTH_FA4 = 1.5e11  # operations of a call, 0.3 ms at what it reaches


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Which blocks of keys each block of queries reads, head by head.

    Block i of the keys covers keys [i * key_block, (i + 1) * key_block), and so for queries; the last may be shorter.
    A list names a block once at most. Ascending lists let programs that run together share what they load, and more
    kernels take them.
    """

    lists: Tensor  # (B, H, QB, M) int32 ids of key blocks; those past `counts` are ignored
    counts: Tensor  # (B, H, QB) int32
    query_block: int
    key_block: int
    ascending: bool = False  # ids rise along every list

    def __post_init__(self) -> None:
        if self.lists.shape[:-1] != self.counts.shape or self.lists.ndim != 4:
            raise KnobError(
                f"lists are (batch, heads, query blocks, most) and counts the same without most, got "
                f"{tuple(self.lists.shape)} and {tuple(self.counts.shape)}"
            )
        if self.lists.dtype != torch.int32 or self.counts.dtype != torch.int32:
            raise KnobError(f"lists and counts are int32, got {self.lists.dtype} and {self.counts.dtype}")
        if self.query_block < 1 or self.key_block < 1:
            raise KnobError(f"blocks hold one token at least, got {self.query_block} and {self.key_block}")

    def check(self, keys: int) -> None:
        """Raise `KernelError` where counts, ids or their order are not what they have to be for so many keys.

        The host waits for the device. Once for lists that stay as they are: `block_sparse` does it on a CPU; on a GPU
        it does not, and the Triton kernel reads nothing outside of its tensors whatever the lists say.
        """
        if keys in self._checked:
            return
        most, blocks = self.lists.shape[-1], -(-keys // self.key_block)
        slot = torch.arange(most, device=self.lists.device)
        past = slot >= self.counts[..., None]
        outside = ((self.lists < 0) | (self.lists >= blocks)) & ~past
        ids = torch.where(past, blocks + slot.int(), self.lists)  # each once, and rising
        again = (ids.diff(dim=-1) if self.ascending else ids.sort(-1).values.diff(dim=-1)) <= 0
        broken = {
            f"counts lie between 0 and the {most} entries of a list": (self.counts < 0) | (self.counts > most),
            f"{keys} keys in blocks of {self.key_block} have ids from 0 to {blocks - 1}": outside.any(-1),
            f"a list names a block once{', in ascending order' * self.ascending}": again.any(-1),
        }
        for rule, places in broken.items():
            if places.any():
                b, h, block = places.nonzero()[0].tolist()
                count = int(self.counts[b, h, block])
                some = self.lists[b, h, block, : max(0, count)].tolist()
                raise KernelError(
                    f"{rule}; the list of row {b}, head {h}, query block {block} has the count {count} and ids "
                    f"{str(some[:8])[:-1]}{', ...' * (len(some) > 8)}]"
                )
        self._checked.add(keys)

    @cached_property
    def _checked(self) -> set[int]:
        return set()

    @cached_property
    def none(self) -> Tensor:
        """Counts of empty lists."""
        return torch.zeros_like(self.counts)

    def listed(self, key_blocks: int) -> Tensor:
        """Which of `key_blocks` blocks each list names, bool (B, H, QB, NB)."""
        if key_blocks not in self._listed:
            self._listed[key_blocks] = self._mark(key_blocks)
        return self._listed[key_blocks]

    @cached_property
    def _listed(self) -> dict[int, Tensor]:
        return {}

    def _mark(self, key_blocks: int) -> Tensor:
        past = torch.arange(self.lists.shape[-1], device=self.lists.device) >= self.counts[..., None]
        # those past the end mark one block too many, and so do ids of no block, which would stop the device
        ids = self.lists.masked_fill(past, key_blocks).clamp(-1, key_blocks).remainder(key_blocks + 1).long()
        found = torch.zeros(*self.counts.shape, key_blocks + 1, dtype=torch.bool, device=ids.device)
        return found.scatter_(-1, ids, True)[..., :-1]


class Summary(NamedTuple):
    """One key for each block of keys, read in place of those blocks that a list does not name."""

    k: Tensor  # (B, NB, G, D) mean keys, in the keys' dtype
    v: Tensor  # (B, NB, G, D) mean values
    log_count: Tensor  # (B, G, NB) fp32, added to the score of the mean key


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockLists,
    *,
    scale: float,
    order: Tensor | None = None,
    log_weight: Tensor | None = None,
    summary: Summary | None = None,
) -> Partial:
    """Softmax attention of (B, S, H, D) queries to the listed ones of (B, N, G, D) keys, and its log-sum-exp.

    H is a multiple of G: head h reads keys of head h // (H // G). Lists and orders are of the queries' heads, what
    belongs to keys is of theirs. Channels are contiguous, the other strides are free. `order` (B, H, S) permutes the
    queries of each head before they are cut into blocks: place i holds query order[b, h, i], and its result returns to
    that query's place. `log_weight` fp32 (B, G, N) is added to every score of its key. With a `summary`, blocks outside
    a list count as one key each. Queries that read nothing: out = 0, lse = -inf.

    Raises `KernelError` for shapes, dtypes or devices that do not fit, and on a CPU for ids that are no blocks of the
    keys; elsewhere `BlockLists.check` looks, when it is asked to.
    """
    _check(q, k, v, blocks, scale, order, log_weight, summary)
    if 0 in (q.numel(), k.numel()):
        return nothing(q)
    path = fastest(q, k, blocks, log_weight)
    if path == "fa4":
        return by_fa4(q, k, v, blocks, scale=scale, order=order, summary=summary)
    if path == "triton":
        from . import fused_block_sparse

        return Partial(*fused_block_sparse.attend(q, k, v, blocks, scale, order, log_weight, summary))
    return written_out(q, k, v, blocks, scale=scale, order=order, log_weight=log_weight, summary=summary)


def fastest(q: Tensor, k: Tensor, blocks: BlockLists, log_weight: Tensor | None) -> str:
    """What `block_sparse` runs: "fa4", "triton" or "written out".

    Over the same lists FA4 takes a fifth to a third less time than the Triton kernel (samples/RESULTS.md), but 0.3 ms
    of the host for each call: what is less work than that is left to Triton.
    """
    if not (q.is_cuda and HAS_TRITON and q.dtype != torch.float64 and q.shape[-1] <= 256):
        return "written out"
    if log_weight is not None or fa4.cannot_list(blocks, k.shape[1]) or fa4.unusable(q.device, q.dtype, q.shape[-1]):
        return "triton"
    operations = 4 * q.numel() * blocks.lists.shape[-1] * blocks.key_block
    return "fa4" if operations > _WORTH_FA4 else "triton"


def by_fa4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockLists,
    *,
    scale: float,
    order: Tensor | None = None,
    summary: Summary | None = None,
) -> Partial:
    """`block_sparse` by FA4, the summary by the fused kernel."""
    if summary is None:
        return fa4.listed(q, k, v, blocks, scale=scale, order=order)
    from . import fused_block_sparse

    part = fa4.listed_in_order(q, k, v, blocks, scale, order)
    return Partial(*fused_block_sparse.attend(q, k, v, blocks, scale, order, summary=summary, part=part))


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockLists,
    *,
    scale: float,
    order: Tensor | None = None,
    log_weight: Tensor | None = None,
    summary: Summary | None = None,
) -> Partial:
    """`block_sparse` in eager fp32 (fp64 for fp64 inputs), every score written out."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys = q.shape[1], k.shape[1]
    query, key, value = (x.transpose(1, 2).to(wide) for x in (q, k, v))
    place = None if order is None else order.long()[..., None].expand(query.shape)
    if place is not None:
        query = query.gather(2, place)
    listed = blocks.listed(-(-keys // blocks.key_block)).repeat_interleave(blocks.query_block, 2)[:, :, :queries]
    each = q.shape[2] // k.shape[2]  # heads that read the same keys
    key, value = (x.repeat_interleave(each, 1) for x in (key, value))
    scores = query @ key.mT * scale
    if log_weight is not None:
        scores += log_weight.repeat_interleave(each, 1)[:, :, None]
    scores.masked_fill_(~listed.repeat_interleave(blocks.key_block, 3)[..., :keys], -torch.inf)
    if summary is not None:
        k_mean, v_mean = (x.transpose(1, 2).to(wide).repeat_interleave(each, 1) for x in summary[:2])
        means = query @ k_mean.mT * scale + summary.log_count.repeat_interleave(each, 1)[:, :, None]
        scores = torch.cat([scores, means.masked_fill(listed, -torch.inf)], 3)
        value = torch.cat([value, v_mean], 2)
    lse = torch.logsumexp(scores, -1)
    out = torch.exp(scores - lse.clamp(min=torch.finfo(wide).min)[..., None]) @ value
    if place is not None:
        lse = torch.empty_like(lse).scatter_(2, place[..., 0], lse)
        out = torch.empty_like(out).scatter_(2, place, out)
    return Partial(out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2).float())


def gathered(
    dense: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockLists,
    *,
    scale: float,
    order: Tensor | None = None,
    at_once: int = 64,
) -> Partial:
    """`block_sparse` by a `dense` kernel over copies of the listed blocks, `at_once` lists a call.

    That bounds the copies to 2 x at_once x M x key_block x D numbers. All lists must have M entries: a dense kernel
    masks nothing, and `counts` are not read. Where the last block of keys is short it is filled up with zeros, whose
    part in the result, exp(0) each in the denominator, is taken out again; that costs digits where the real scores
    are all far below zero.
    """
    _check(q, k, v, blocks, scale, order)
    batch, queries, heads, dim = q.shape
    most, key_block, query_block = blocks.lists.shape[-1], blocks.key_block, blocks.query_block
    if 0 in (q.numel(), k.numel(), most):
        return nothing(q)
    key_blocks = -(-k.shape[1] // key_block)
    filled = key_blocks * key_block - k.shape[1]
    each = heads // k.shape[2]
    k, v = (_head_major(x, filled).view(-1, key_block * dim) for x in (k, v))
    head = torch.arange(batch * heads, device=q.device)[:, None, None] // each
    lists = (blocks.lists.flatten(0, 1) + head * key_blocks).flatten(0, 1)
    zeros = filled * (blocks.lists == key_blocks - 1).any(-1).flatten() if filled else None
    places = _places(blocks, batch, queries, heads, order, q.device)
    rows = q.reshape(-1, dim)
    out = torch.empty_like(rows)
    lse = torch.empty(len(rows), dtype=torch.float32, device=q.device)
    for now in _slices(len(lists), at_once):
        place, these = places[now].flatten(), lists[now].flatten()
        copies = [x.index_select(0, these).view(-1, most * key_block, 1, dim) for x in (k, v)]
        part = dense.partial(rows.index_select(0, place).view(-1, query_block, 1, dim), *copies, scale=scale)
        if zeros is not None:
            share = zeros[now, None, None] * torch.exp(-part.lse)
            part = Partial((part.out / (1 - share)[..., None]).to(q.dtype), part.lse + torch.log1p(-share))
        out.index_copy_(0, place, part.out.reshape(-1, dim))
        lse.index_copy_(0, place, part.lse.reshape(-1))
    return Partial(out.view(q.shape), lse.view(q.shape[:-1]))


def _head_major(x: Tensor, more: int) -> Tensor:
    """(B, N, H, D) as contiguous (B, H, N + more, D), zeros behind; a copy that lies so already is taken as it is."""
    x = x.transpose(1, 2)
    return pad(x, (0, 0, 0, more)) if more else x.contiguous()


def _places(
    blocks: BlockLists, batch: int, queries: int, heads: int, order: Tensor | None, device: torch.device
) -> Tensor:
    """Where among (B * S * H) rows the queries of each block lie, (B * H * QB, query_block) int64.

    A short last block is filled up with its last query: computed more than once, the same each time.
    """
    place = torch.arange(blocks.counts.shape[-1] * blocks.query_block, device=device).clamp(max=queries - 1)
    row = place.expand(batch, heads, -1) if order is None else order.long()[..., place]
    b = torch.arange(batch, device=device)[:, None, None]
    h = torch.arange(heads, device=device)[:, None]
    return ((b * queries + row) * heads + h).reshape(-1, blocks.query_block)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockLists,
    scale: float,
    order: Tensor | None,
    log_weight: Tensor | None = None,
    summary: Summary | None = None,
) -> None:
    check(q, k, v)
    batch, queries, heads, _ = q.shape
    wanted = (batch, heads, -(-queries // blocks.query_block))
    if tuple(blocks.counts.shape) != wanted:
        raise KernelError(
            f"{queries} queries in blocks of {blocks.query_block}, {batch} rows and {heads} heads need lists for "
            f"{wanted}, got {tuple(blocks.counts.shape)}"
        )
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise KernelError("the channels of queries, keys and values must be contiguous: call .contiguous() on them")
    if scale <= 0:
        raise KernelError(f"the scale must be positive, got {scale}")
    keys, shared = k.shape[1:3]
    sizes = {"lists": (blocks.lists, tuple(blocks.lists.shape))}
    if order is not None:
        sizes["order of the queries"] = (order, (batch, heads, queries))
    if log_weight is not None:
        sizes["log-weights"] = (log_weight, (batch, shared, keys))
    if summary is not None:
        key_blocks = -(-keys // blocks.key_block)
        sizes["mean keys"] = (summary.k, (batch, key_blocks, *k.shape[2:]))
        sizes["mean values"] = (summary.v, (batch, key_blocks, *v.shape[2:]))
        sizes["counts of the means"] = (summary.log_count, (batch, shared, key_blocks))
    for name, (given, size) in sizes.items():
        if tuple(given.shape) != size or given.device != q.device:
            raise KernelError(
                f"the {name} must be {size} on {q.device}, got {tuple(given.shape)} on {given.device}: what belongs to "
                "keys is of their heads, lists and orders of those of the queries"
            )
    if q.device.type == "cpu":
        blocks.check(keys)
