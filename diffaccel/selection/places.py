"""Tokens in an order in which those near each other in the frame lie near each other."""

from functools import lru_cache

import torch
from torch import Tensor

from ..cache.sink_recent import SinkRecent
from ..cache.sorting import Sorting
from ..grid import Grid
from ..policy import Policy
from ..sent import sent


def keeps_frames(cache: Policy) -> bool:
    """Whether entries that a selector sees of this cache are whole frames, the same in all layers: then the number of
    an entry says its place. `Sorting` shows it the protected frames only."""
    whole = isinstance(cache, SinkRecent) and cache.summaries is None
    return whole or isinstance(cache, Sorting) or getattr(cache, "keeps_frames_whole", False)


def nearby(grid: Grid, like: Tensor) -> Tensor:
    """For tokens of whole frames (B, N, H, D), each one's place on a Z-curve through frames and places, (B, H, N).

    Any stretch of the curve is a compact piece of the video, so blocks need no tile size (Morton, IBM 1966).
    """
    batch, tokens, heads, _ = like.shape
    return sent(_curve(tokens // grid.tokens_per_frame, grid.height, grid.width), like.device).expand(batch, heads, -1)


@lru_cache(maxsize=64)
def _curve(*size: int) -> Tensor:
    """Bits of frame, row and column in turn, (frames * height * width,) int64."""
    axes = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    code = torch.zeros(size, dtype=torch.int64)
    for bit in range(max(size).bit_length()):
        for turn, axis in enumerate(reversed(axes)):
            code |= (axis >> bit & 1) << 3 * bit + turn
    return code.flatten()
