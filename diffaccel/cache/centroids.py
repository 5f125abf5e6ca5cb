"""Means of near tokens, as what stays of tokens that left."""

from operator import add

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ann.kmeans import to_nearest
from ..kernel.merge import Partial
from ..kernel.weighted import CHANNELS, channels_of
from .entries import Entries, Reader
from .ragged import Counts, Ragged, each_head

TOKENS, ROUNDS = 16, 3
"""Tokens to a mean, and rounds of Lloyd's algorithm that find them."""

_NOWHERE = 1e4  # a coordinate that nothing is near
_ABSENT = -3e4  # a score that weighs nothing, in every dtype


class Centroids:
    """Keys and values that are the means of tokens with near keys, with log(their number) added to the score.

    The estimation zone of RetroInfer (arXiv 2505.02922): what comes together is clustered on its own, `TOKENS` to a
    mean on average. The paper's zone grows with the text and is read beside the clusters that a query retrieves whole;
    here it stands for what a score left out, and a head holds at most as many means as a frame has tokens: over that,
    all of them are clustered again into half as many, by the tokens they stand for. Keys are as attention reads them,
    rotated, and near by their difference, not by their angle, as that is what scores differ by.

    Every mean of a head has a number of its own, so log(number) goes into the dot product (`kernel/weighted.py`) and
    all heads are read in one launch. The means are kept in fp32.
    """

    def __init__(self) -> None:
        self._k = self._v = self._tokens = torch.empty(0)  # (R, C, D) of R rows and heads, and (R, C)
        self._filled: Counts = ()
        self._read = Entries(self._k, self._v)

    def take(self, gone: Ragged, tokens_per_frame: int) -> None:
        """Add entries, of every head the first ones there."""
        wide, filled = torch.promote_types(gone.k.dtype, torch.float32), self._filled
        k, v = (x.transpose(1, 2).flatten(0, 1).to(wide) for x in (gone.k, gone.v))
        tokens = gone.there.flatten(0, 1).to(wide)
        k, v, tokens = clustered(k, v, tokens, gone.counts, new := each_head(lambda n: -(-n // TOKENS), gone.counts))
        if filled:
            k, v, tokens = (
                torch.cat([before, after], 1) for before, after in ((self._k, k), (self._v, v), (self._tokens, tokens))
            )
            new = each_head(add, filled, new)
        # those that stand for nothing come last
        order = (tokens == 0).to(torch.int8).argsort(dim=1, stable=True)[:, : max(map(max, new))]
        k, v, tokens = (x.gather(1, _wide(order, x)) for x in (k, v, tokens))
        if max(map(max, new)) > tokens_per_frame:
            fewer = each_head(lambda n: n if n <= tokens_per_frame else -(-tokens_per_frame // 2), new)
            k, v, tokens = clustered(k, v, tokens, new, fewer)
            new = fewer
        self._k, self._v, self._tokens, self._filled = k, v, tokens, new
        self._read = self._as_read(len(new), gone.k.dtype)

    def _as_read(self, rows: int, dtype: torch.dtype) -> Entries:
        """Keys with log(number) in channels of their own, values as wide."""
        scale = (self._k.shape[-1] + CHANNELS) ** -0.5
        weight = channels_of(self._tokens.clamp(min=1), scale, dtype)
        weight[..., 0].masked_fill_(self._tokens == 0, _ABSENT)
        k, v = torch.cat([self._k.to(dtype), weight], -1), pad(self._v.to(dtype), (0, CHANNELS))
        return Entries(*(x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (k, v)))

    @property
    def count(self) -> int:
        """Means of the head that has most."""
        return self._k.shape[1] if self._filled else 0

    @property
    def bytes(self) -> int:
        means = sum(x.numel() * x.element_size() for x in (self._k, self._v, self._tokens))
        return means + self._read.bytes

    def partial(self, q: Tensor, read: Reader) -> Partial:
        dim = q.shape[-1]
        # a reader scales by the channels it sees
        out, lse = read(pad(q * ((dim + CHANNELS) / dim) ** 0.5, (0, CHANNELS), value=1.0), self._read)
        return Partial(out[..., :dim], lse.masked_fill(lse < _ABSENT * (dim + CHANNELS) ** -0.5 / 2, -torch.inf))

    def frames(self) -> list[Tensor]:
        return []


def clustered(k: Tensor, v: Tensor, tokens: Tensor, given: Counts, clusters: Counts) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted means of keys and values (R, N, D) that stand for `tokens` (R, N) each: Lloyd's algorithm on the keys.

    Row r has the first `given[r]` of them and `clusters[r]` seeds, spread evenly over those. What comes has as many
    places as the most of `clusters`; one that stands for 0 tokens is empty.
    """
    device = k.device
    n, c = (torch.tensor(counts, device=device).flatten()[:, None] for counts in (given, clusters))
    seed = torch.arange(max(map(max, clusters)), device=device)
    at = ((2 * seed + 1) * n // (2 * c).clamp(min=1)).clamp(max=k.shape[1] - 1)
    centres = k.gather(1, _wide(at, k)).masked_fill((seed >= c)[..., None], _NOWHERE)
    for _ in range(ROUNDS):
        nearest = to_nearest(k, centres)[1]
        centres, total = _means(k, tokens, nearest, centres)
    return centres * (total > 0)[..., None], _means(v, tokens, nearest, torch.zeros_like(centres))[0], total


def _means(x: Tensor, tokens: Tensor, nearest: Tensor, instead: Tensor) -> tuple[Tensor, Tensor]:
    total = tokens.new_zeros(instead.shape[:2]).scatter_add_(1, nearest, tokens)
    sums = torch.zeros_like(instead).scatter_add_(1, _wide(nearest, x), x * tokens[..., None])
    return torch.where((total > 0)[..., None], sums / total.clamp(min=1)[..., None], instead), total


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index if like.ndim == 2 else index[..., None].expand(-1, -1, like.shape[-1])
