"""How much of the attention mass of the past a bounded cache still answers for, on a few heads."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernel.merge import merge
from .kernel.weighted import read_plainly
from .site import Site

if TYPE_CHECKING:
    from .cache import Memory

QUERIES, HEADS = 16, 2


class Observer:
    """Keeps every key of a few heads on the host and compares, whenever a block is finished, what they sum up to.

    recall = exp(lse over what the cache kept - lse over all tokens of the past), at most 1, the mean over QUERIES
    queries of the block's clean pass: where tokens were dropped the share of the mass that the others carry, where
    they were merged also how well their entry's key stands for them. The first, a middle and the last layer, HEADS
    heads each, first video of the batch, conditional branch.
    """

    def __init__(self, layers: int) -> None:
        self.layers = sorted({0, layers // 2, layers - 1})
        self.recall: dict[int, list[tuple[int, float]]] = {layer: [] for layer in self.layers}
        self._keys: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self._seen = dict.fromkeys(self.layers, -1)

    def see(self, memory: "Memory", q: Tensor, k: Tensor, site: Site) -> None:
        """A block of keys (B, S, H, D) is about to be finished; it is not part of the memory's past yet."""
        if site.phase != "clean" or site.branch != "cond" or site.start <= self._seen.get(site.layer, site.start):
            return  # also a block that is recomputed under another prompt: its keys count once
        self._seen[site.layer] = site.start
        heads = torch.linspace(0, q.shape[2] - 1, min(HEADS, q.shape[2])).long()
        picks = torch.linspace(0, q.shape[1] - 1, min(QUERIES, q.shape[1])).long()
        past = self._keys[site.layer]
        if past:
            some, scale = q[:, picks.to(q.device)], q.shape[-1] ** -0.5
            tiers = [tier for tier in memory.past() if tier.count]
            recall = torch.zeros(1)
            if tiers:  # a cache may just have been flushed
                read = [tier.partial(some, read_plainly) for tier in tiers]
                scores = torch.einsum("shd,nhd->shn", some[0].cpu().float()[:, heads], torch.cat(past).float()) * scale
                recall = (merge(read).lse[0].cpu().float()[:, heads] - scores.logsumexp(-1)).exp().clamp(max=1)
            self.recall[site.layer].append((site.start, round(float(recall.mean()), 4)))
        past.append(k[0].cpu()[:, heads])
