"""What a selector sees where it ranks blocks of keys for blocks of queries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.entries import Lasting
from ..site import Site
from .blocks import KeyBlocks

SAMPLES = 16
"""Queries, or means of near ones, that stand for a block of queries."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Queries in blocks (B, H, QB, query_block, D), and the blocks of keys of which they read `take`."""

    q: Tensor
    given: Tensor  # (B, S, H, D), as they came
    keys: KeyBlocks
    take: int
    site: Site
    lasting: Lasting

    @property
    def query_block(self) -> int:
        return self.q.shape[3]

    def means(self, count: int = SAMPLES) -> Tensor:
        """Means of `count` runs of near queries in each block, times the scale of attention: fp32 (B, H, QB * n, D)."""
        runs = self.q.flatten(2, 3).unflatten(2, (-1, self.query_block // min(self.query_block, count)))
        return runs.mean(3, dtype=torch.float32) * self.q.shape[-1] ** -0.5

    def samples(self, count: int = SAMPLES) -> Tensor:
        """`count` of the queries of each block, times the scale of attention: fp32 (B, H, QB, n, D)."""
        return self.q[:, :, :, :: max(1, self.query_block // count)].float() * self.q.shape[-1] ** -0.5

    def scores(self, q: Tensor) -> Tensor:
        """Of scaled queries (B, H, X, D) with all keys that may be chosen, fp32 (B, H, X, KB, block)."""
        scores = (q @ self.keys.k.flatten(2, 3).float().mT).unflatten(-1, (-1, self.keys.block))
        return scores if self.keys.log_weight is None else scores + self.keys.log_weight[:, :, None]

    def mass(self) -> Tensor:
        """The share of attention on each block of keys, (B, H, QB, KB), estimated from means and variances alone.

        For means of `SAMPLES` runs of near queries, as if the scores of a block were normally distributed: exp(mean +
        variance / 2), times its tokens. A few keys of two kinds are not, and none is far above what most have: the
        second term is at most the standard deviation. The average of their shares.
        """
        about = self.keys.about
        assert about is not None
        means = self.means()
        variance = means.square() @ about.spread.mT
        scores = means @ about.k.mT + torch.minimum(variance / 2, variance.sqrt())
        scores += about.log_count[:, :, None]
        return scores.softmax(-1).unflatten(2, (self.q.shape[2], -1)).mean(3)
