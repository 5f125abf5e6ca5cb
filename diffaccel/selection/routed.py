"""Routed: queries read the keys routed to the clusters they are (Routing Transformer, arXiv 2003.05997)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..ann import KMeans
from ..policy import knob
from ..site import Site
from .asked import Asked
from .ranked import Ranked

if TYPE_CHECKING:
    from ..cache.entries import Entries, Lasting

_COLD, _WARM = 10, 1  # iterations of k-means, from nothing and from the centroids of a past much like this one
_RESORT = 1.25  # growth of the past after which all of it is routed anew, as for AnnSA


@dataclass(frozen=True)
class Routed(Ranked):
    """Cluster the keys of a head on the sphere, route queries to the same clusters, and read what lies in near ones.

    The clusters of one block of video start from those of the block before. A block of keys is worth the product of
    its mean centroid with that of the queries.

    Differences from the paper: there queries and keys are one vector, centroids are learned in training
    as a running mean (decay 0.999) and each takes its nearest n / k tokens; here keys make the centroids, nothing is
    trained, and blocks are of equal size because the sorted keys are cut so. Half of its heads attend locally; here
    the block at work is always read. Keys are compared by direction alone, so lengths and the tokens that an entry
    stands for do not count in the choice, where AnnSA has both.
    """

    paper: ClassVar[str] = "Routing Transformer, arXiv 2003.05997"
    summary: ClassVar[str] = "routes queries and keys to clusters by direction, and reads keys of near clusters"

    clusters: int = knob(32, "centroids a head, >= 1; no more than there are keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.clusters >= 1, "clusters is a number >= 1", clusters=self.clusters)

    def resorts(self) -> float:
        return _RESORT

    def key_buckets(self, entries: "Entries", site: Site) -> Tensor | None:
        keys, before = entries.k.transpose(1, 2), entries.lasting.notes.get("routed")
        count = min(self.clusters, keys.shape[2])
        if before is not None and before.centroids.shape[-2] != count:
            before = None
        kmeans = KMeans(count, "cosine", _COLD if before is None else _WARM)
        routed = kmeans.fit(keys, None if before is None else before.centroids)
        entries.lasting.notes["routed"] = routed
        return routed.assign(keys)

    def query_buckets(self, q: Tensor, entries: "Entries", site: Site) -> Tensor | None:
        buckets: Tensor = entries.lasting.notes["routed"].assign(q.transpose(1, 2))
        return buckets

    def rank(self, asked: Asked) -> Tensor:
        return _centres(asked.lasting, asked.q) @ _centres(asked.lasting, asked.keys.k).mT


def _centres(lasting: "Lasting", blocks: Tensor) -> Tensor:
    """Mean of the centroids that the vectors of each block (B, H, blocks, n, D) are nearest to, (B, H, blocks, D)."""
    kmeans, vectors = lasting.notes["routed"], blocks.flatten(2, 3)
    nearest: Tensor = kmeans.assign(vectors)[..., None].expand(*vectors.shape)
    return torch.gather(kmeans.centroids, 2, nearest).unflatten(2, blocks.shape[2:4]).mean(3)
