"""FlashAttention-4, over all keys or over listed blocks of them, on Hopper; `pip install diffaccel[fa4]`."""

import importlib.util
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..plan import Plan
from .gather import by_weight, planned
from .merge import Partial

if TYPE_CHECKING:
    from .block_sparse import BlockLists

name = "fa4"

TILE = 128  # queries of a tile; of keys it takes whole listed blocks


def unusable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel cannot run there, or None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it was tried on Hopper GPUs (compute capability 9.x) only"
    if not _installed():
        return "the package flash-attn-4 is not installed (`pip install diffaccel[fa4]`)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if head_dim not in (64, 128):
        return f"it was tried with head dimensions 64 and 128, not {head_dim}"
    return None


def value_width(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> int | None:
    """As `reference.value_width`."""
    return key_dim if key_dim in (64, 128) else None


def partial(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_weight: Tensor | None = None, plan: Plan | None = None
) -> Partial:
    """As `reference.partial`. Keys go by weight, as FA4's bias would slow all of them."""
    return planned(_dense, q, k, v, scale, log_weight, plan, shares_heads=True)


def cannot_list(blocks: "BlockLists", keys: int) -> str | None:
    """Why it cannot read these lists of blocks of so many keys, or None."""
    if keys % blocks.key_block and not blocks.ascending:
        return "it masks a short last block of keys only where that ends a list: sort them"
    if blocks.query_block % TILE or blocks.key_block not in (64, TILE):
        return (
            f"it reads lists for blocks of {TILE} queries or a multiple, of blocks of 64 or {TILE} keys, not "
            f"{blocks.query_block} and {blocks.key_block}"
        )
    return None


def listed(
    q: Tensor, k: Tensor, v: Tensor, blocks: "BlockLists", *, scale: float, order: Tensor | None = None
) -> Partial:
    """`block_sparse` by FA4, of blocks that it can list."""
    out, lse = listed_in_order(q, k, v, blocks, scale, order)
    if order is None:
        return Partial(out, lse.transpose(1, 2))
    back, back_lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    back.transpose(1, 2).scatter_(2, order[..., None].expand(-1, -1, -1, q.shape[3]), out.transpose(1, 2))
    back_lse.transpose(1, 2).scatter_(2, order, lse)
    return Partial(back, back_lse)


def listed_in_order(
    q: Tensor, k: Tensor, v: Tensor, blocks: "BlockLists", scale: float, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `listed`, out (B, S, H, D) and lse (B, H, S) of the queries as they are ordered, both contiguous."""
    if order is not None:
        q = q.transpose(1, 2).gather(2, order[..., None].expand(-1, -1, -1, q.shape[3])).transpose(1, 2)
    tensors = _package()[1](
        mask_block_cnt=blocks.none,
        mask_block_idx=blocks.lists[..., :1],
        full_block_cnt=blocks.counts,
        full_block_idx=blocks.lists,
        block_size=(blocks.query_block, blocks.key_block),
    )
    return _attention(q, k, v, scale, block_sparse_tensors=tensors)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor | None) -> Partial:
    if log_weight is not None:
        return by_weight(_dense, q, k, v, scale, log_weight)
    out, lse = _attention(q, k, v, scale)
    return Partial(out, lse.transpose(1, 2))


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: object) -> tuple[Tensor, Tensor]:
    """Out (B, S, H, D) and lse (B, H, S)."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its compiler about itself
        found: tuple[Tensor, Tensor] = _package()[0](q, k, v, softmax_scale=scale, return_lse=True, **options)[:2]
    return found


@lru_cache(maxsize=1)
def _package() -> tuple[Any, Any]:
    """Its function, and its class of lists; to be imported without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import flash_attn_func
    return flash_attn_func, BlockSparseTensorsTorch


@lru_cache(maxsize=1)
def _installed() -> bool:
    """`flash_attn` alone is FlashAttention-2."""
    return (
        importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None
    )
