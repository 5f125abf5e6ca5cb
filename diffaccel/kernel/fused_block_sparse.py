"""Attention of blocks of queries to listed blocks of keys, in one pass and in place: nothing is gathered first.

It computes what `block_sparse.written_out` defines. A program keeps a tile of queries and walks the list of its block.
A tile of keys is a listed block, a part of a larger one, or several smaller ones side by side. On Hopper tiles arrive
by TMA, described as (B, H, N, D) whatever the strides are: a listed block begins at a multiple of its size, so a plain
tiled copy finds it where it lies, and fills with zeros what lies past the last key or channel.
"""

from dataclasses import dataclass, replace
from math import e, log2
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from .block_sparse import BlockLists, Summary

_LOG2_E = tl.constexpr(log2(e))
_FLOOR = tl.constexpr(-1e30)  # below any score yet finite: rows that have met no key need no test for inf - inf
_SCAN = tl.constexpr(128)


@dataclass(frozen=True)
class Config:
    """How the kernel is cut and run: a tile of queries by a tile of keys.

    With `tma` copies go through the copy engine of Hopper and later; a block must then hold whole tiles of keys.
    `stages` is the number of tiles of keys held at a time.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False


CANDIDATES = (
    Config(128, 128, 8, 3, tma=True),
    Config(128, 128, 8, 2, tma=True),
    Config(128, 64, 8, 4, tma=True),
    Config(128, 64, 8, 3, tma=True),
    Config(128, 64, 8, 2, tma=True),
    Config(64, 128, 4, 2, tma=True),
    Config(64, 64, 4, 3, tma=True),
    Config(64, 64, 4, 2, tma=True),
    Config(128, 128, 8, 3),
    Config(128, 128, 8, 2),
    Config(128, 64, 8, 3),
    Config(128, 64, 8, 2),
    Config(64, 64, 4, 3),
)
# by channels (a power of two), keys of a block and the major compute capability; `scripts/bench_sparse.py` times them
_BEST = {
    (64, 128, 9): Config(64, 128, 4, 2, tma=True),
    (64, 64, 9): Config(64, 64, 4, 2, tma=True),
    (128, 128, 9): Config(64, 64, 4, 3, tma=True),
    (128, 64, 9): Config(64, 64, 4, 3, tma=True),
    (256, 128, 9): Config(128, 64, 8, 2, tma=True),
    (256, 64, 9): Config(128, 64, 8, 2, tma=True),
}
_ELSEWHERE = {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 4, 2)}
_FLOAT32 = Config(16, 16, 4, 1)  # no tensor cores for it: exact rather than fast


def configured(width: int, query_block: int, key_block: int, dtype: torch.dtype, major: int) -> Config:
    """What to run for so many channels, rounded up to a power of two, on a GPU of that major compute capability."""
    if dtype == torch.float32:
        config = _FLOAT32
    else:
        config = _BEST.get((width, min(key_block, 128), major), _ELSEWHERE[max(width, 64)])
    tile = max(16, triton.next_power_of_2(query_block))
    return config if tile >= config.queries else replace(config, queries=tile, warps=4)


@triton.jit
def _tile(
    x, b, h, start, keys, keys_ok, xb, xn, xh,
    KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys or values (KEYS, WIDTH): by TMA those from `start` on, else those at `keys`; zeros where there are none."""
    if TMA:
        tile = x.load([b, h, start, 0]).reshape([KEYS, WIDTH])
    else:
        d = tl.arange(0, WIDTH)
        at = x + b.to(tl.int64) * xb + h.to(tl.int64) * xh + keys.to(tl.int64)[:, None] * xn + d[None, :]
        if MASKED:
            tile = tl.load(at, mask=keys_ok[:, None] & (d < D)[None, :], other=0.0)
        elif D < WIDTH:
            tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def _fold(acc, peak, total, scores, factor, v):
    """Fold a tile into the running softmax: scores x factor are logits in base 2."""
    new = tl.maximum(peak, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new[:, None])
    keep = tl.exp2(peak - new)
    total = total * keep + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return acc, new, total


@triton.jit
def _entry(list_ptr, entry, count, ragged):
    """Block ids at places of a list in which the ragged block, if any, has changed places with the last."""
    place = tl.where(entry == ragged, count - 1, tl.where(entry == count - 1, ragged, entry))
    return tl.load(list_ptr + place, mask=entry < count, other=0)


@triton.jit
def _start(list_ptr, tile, count, ragged, KEYS: tl.constexpr, KEY_BLOCK: tl.constexpr):
    """First key of a tile that is a listed block or a part of one."""
    if KEY_BLOCK % KEYS == 0:
        parts: tl.constexpr = KEY_BLOCK // KEYS
        start = _entry(list_ptr, tile // parts, count, ragged) * KEY_BLOCK + tile % parts * KEYS
    else:  # a tile of several blocks has no such key
        start = tile * 0
    return start


@triton.jit
def _read(
    acc, peak, total, q, k, v, list_ptr, weight_ptr, b, h, tile, start, count, ragged, N,
    kb, kn, kh, vb, vn, vh, factor,
    KEYS: tl.constexpr, KEY_BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one tile of listed keys; `start` is its first key where one block holds the whole tile."""
    lane = tl.arange(0, KEYS)
    if KEY_BLOCK % KEYS == 0:
        keys = start + lane
        ok = (keys >= 0) & (keys < N)
    else:
        slot = tile * KEYS + lane
        keys = _entry(list_ptr, slot // KEY_BLOCK, count, ragged) * KEY_BLOCK + slot % KEY_BLOCK
        ok = (slot < count * KEY_BLOCK) & (keys >= 0) & (keys < N)
    if not MASKED:  # ids of no block lead nowhere else; the copy engine sees to that itself
        keys = tl.minimum(tl.maximum(keys, 0), N - 1)
    key = _tile(k, b, h, start, keys, ok, kb, kn, kh, KEYS, D, WIDTH, TMA, MASKED)
    scores = tl.dot(q, key.T, input_precision="ieee")
    value = _tile(v, b, h, start, keys, ok, vb, vn, vh, KEYS, D, WIDTH, TMA, MASKED)
    if weight_ptr is not None:
        bias = tl.load(weight_ptr + keys, mask=ok, other=float("-inf")) * _LOG2_E
        return _fold(acc, peak, total, scores * factor + bias[None, :], 1.0, value)
    if MASKED:
        scores = tl.where(ok[None, :], scores, float("-inf"))
    return _fold(acc, peak, total, scores, factor, value)


# sizes change from call to call, with the length of the past and the density: none is worth a kernel of its own
@triton.jit(do_not_specialize=["S", "H", "EACH", "N", "QB", "M", "NB", "listed_row"])
def _block_sparse(
    q_ptr, k, v, list_ptr, count_ptr, order_ptr, weight_ptr,
    mean_k_ptr, mean_v_ptr, log_count_ptr, listed_ptr, part_ptr, part_lse_ptr, out_ptr, lse_ptr,
    qb, qs, qh, kb, kn, kh, vb, vn, vh, S, H, EACH, N, QB, M, NB, listed_row, scale,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs belong to one head, so that they find each other's keys in the cache.
    tiles_of_block: tl.constexpr = (QUERY_BLOCK + QUERIES - 1) // QUERIES
    block = tl.program_id(0) // tiles_of_block
    head = block // QB
    b, h = head // H, head % H
    g = h // EACH  # the head of the keys
    key_head = head // EACH
    lane = tl.program_id(0) % tiles_of_block * QUERIES + tl.arange(0, QUERIES)
    place = block % QB * QUERY_BLOCK + lane
    place_ok = (lane < QUERY_BLOCK) & (place < S)
    row = place.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + head.to(tl.int64) * S + place, mask=place_ok, other=0).to(tl.int64)
        place_ok = place_ok & (row >= 0) & (row < S)
    d = tl.arange(0, WIDTH)
    row_ok = place_ok[:, None] & (d < D)[None, :]
    q_at = q_ptr + b.to(tl.int64) * qb + h.to(tl.int64) * qh + row[:, None] * qs + d[None, :]
    q = tl.load(q_at, mask=row_ok, other=0.0)
    list_ptr += block.to(tl.int64) * M
    count = tl.minimum(tl.maximum(tl.load(count_ptr + block), 0), M)
    if weight_ptr is not None:
        weight_ptr += key_head.to(tl.int64) * N

    # The loop over tiles that are whole has no mask: a block cut short by the last key is read after it, wherever in
    # the list it stands.
    ragged, whole = count - 1, count
    if RAGGED:
        found = -1
        for first in range(0, count, _SCAN):
            entry = first + tl.arange(0, _SCAN)
            ids = tl.load(list_ptr + entry, mask=entry < count, other=-1)
            found = tl.maximum(found, tl.max(tl.where(ids == N // KEY_BLOCK, entry, -1)))
        if found >= 0:
            ragged, whole = found, count - 1
    whole = whole * KEY_BLOCK // KEYS

    factor = scale * _LOG2_E
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    peak = tl.full([QUERIES], _FLOOR, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if part_ptr is not None:  # what another kernel read, query by query as they are ordered here
        part_row = (b.to(tl.int64) * S + place) * H + h
        acc = tl.load(part_ptr + part_row[:, None] * D + d[None, :], mask=row_ok, other=0.0).to(tl.float32)
        known = tl.load(part_lse_ptr + head.to(tl.int64) * S + place, mask=place_ok, other=0.0) * _LOG2_E
        peak = tl.maximum(known, _FLOOR)
        total = tl.where(known > _FLOOR, 1.0, 0.0)
    start = _start(list_ptr, 0, count, ragged, KEYS, KEY_BLOCK)
    for tile in range(whole):
        # carried over: a load of it in here would be pipelined too, at the cost of stages for keys and values
        now, start = start, _start(list_ptr, tile + 1, count, ragged, KEYS, KEY_BLOCK)
        acc, peak, total = _read(
            acc, peak, total, q, k, v, list_ptr, weight_ptr, b, g, tile, now, count, ragged, N,
            kb, kn, kh, vb, vn, vh, factor, KEYS, KEY_BLOCK, D, WIDTH, TMA, False,
        )  # fmt: skip
    if RAGGED or KEY_BLOCK % KEYS != 0:
        for tile in tl.range(whole, tl.cdiv(count * KEY_BLOCK, KEYS), num_stages=1):
            start = _start(list_ptr, tile, count, ragged, KEYS, KEY_BLOCK)
            acc, peak, total = _read(
                acc, peak, total, q, k, v, list_ptr, weight_ptr, b, g, tile, start, count, ragged, N,
                kb, kn, kh, vb, vn, vh, factor, KEYS, KEY_BLOCK, D, WIDTH, TMA, True,
            )  # fmt: skip

    if mean_k_ptr is not None:
        of_head = key_head.to(tl.int64) * NB
        listed_ptr += block.to(tl.int64) * listed_row
        for block_of_means in tl.range(0, NB, KEYS):
            means = block_of_means + tl.arange(0, KEYS)
            ok = means < NB
            ok = ok & (tl.load(listed_ptr + means, mask=ok, other=1) == 0)
            at = (of_head + means)[:, None] * D + d[None, :]
            at_ok = ok[:, None] & (d < D)[None, :]
            key = tl.load(mean_k_ptr + at, mask=at_ok, other=0.0)
            bias = tl.load(log_count_ptr + of_head + means, mask=ok, other=float("-inf")) * _LOG2_E
            scores = tl.dot(q, key.T, input_precision="ieee") * factor + bias[None, :]
            value = tl.load(mean_v_ptr + at, mask=at_ok, other=0.0)
            acc, peak, total = _fold(acc, peak, total, scores, 1.0, value)

    some = total > 0
    total = tl.where(some, total, 1.0)
    row = b.to(tl.int64) * S + row
    out_at = out_ptr + (row * H + h)[:, None] * D + d[None, :]
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=row_ok)
    lse = tl.where(some, (peak + tl.log2(total)) / _LOG2_E, float("-inf"))
    tl.store(lse_ptr + row * H + h, lse, mask=place_ok)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: "BlockLists",
    scale: float,
    order: Tensor | None = None,
    log_weight: Tensor | None = None,
    summary: "Summary | None" = None,
    config: Config | None = None,
    part: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `block_sparse.block_sparse`: out in the dtype of `q` and lse, both contiguous.

    `part` is what another kernel made of the listed keys, out (B, S, H, D) and lse (B, H, S) of the queries in `order`:
    then only the summary is read, and merged with it.
    """
    batch, queries, heads, dim = q.shape
    keys, key_block = k.shape[1], blocks.key_block
    width = max(16, triton.next_power_of_2(dim))
    if config is None:
        major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 0
        config = configured(width, blocks.query_block, key_block, q.dtype, major)
    tma = part is None and config.tma and key_block % config.keys == 0 and all(_describable(x) for x in (k, v))
    tables: tuple[Tensor | None, ...] = (None, None, None, None)
    key_blocks = listed_row = 0
    if summary is not None:
        k_mean, v_mean = (x.transpose(1, 2).contiguous() for x in summary[:2])
        key_blocks = k_mean.shape[2]
        listed = blocks.listed(key_blocks).view(torch.uint8)
        tables, listed_row = (k_mean, v_mean, summary.log_count.contiguous(), listed), listed.stride(2)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    query_blocks, most = blocks.lists.shape[2:]
    tiles = triton.cdiv(blocks.query_block, config.queries)
    _block_sparse[(batch * heads * query_blocks * tiles,)](
        q,
        *(_described(x, config.keys, width) if tma else x for x in (k, v)),
        blocks.lists.contiguous(),
        blocks.counts.contiguous() if part is None else blocks.none,
        None if order is None else order.contiguous(),
        None if log_weight is None else log_weight.contiguous(),
        *tables,
        *((None, None) if part is None else (x.contiguous() for x in part)),
        out,
        lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        queries, heads, heads // k.shape[2], keys, query_blocks, most, key_blocks, listed_row, scale,
        QUERY_BLOCK=blocks.query_block, KEY_BLOCK=key_block, D=dim, WIDTH=width,
        QUERIES=config.queries, KEYS=config.keys, TMA=tma, RAGGED=part is None and keys % key_block != 0,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out, lse


def _describable(x: Tensor) -> bool:
    """Whether the copy engine takes a tensor of these strides: multiples of 16 bytes, from such an address."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def _described(x: Tensor, keys: int, width: int) -> TensorDescriptor:
    """(B, N, H, D) as (B, H, N, D), of which a program loads `keys` of one head at a time."""
    heads_first = x.transpose(1, 2)
    return TensorDescriptor(heads_first, list(heads_first.shape), list(heads_first.stride()), [1, 1, keys, width])
