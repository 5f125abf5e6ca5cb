"""k-means, many problems at once."""

import copy
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from .hashing import generator
from .index import at_once, check_vectors, prepared, require, require_at_least

KMEANS_METRICS = ("l2", "cosine")


@dataclass(frozen=True)
class KMeans:
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii, SODA 2007); leading dimensions are problems.

    `metric` "l2", or "cosine" for spherical k-means: points and centroids of unit length. A cluster that runs empty
    takes the point that is farthest from its centroid. The same `seed` gives the same clusters on the same kind of
    device; on a GPU up to rounding, as sums are added up in any order unless torch is told to be deterministic.

    `fit` returns a fitted copy; `fit(points, centroids=previous.centroids)` starts where points were a step earlier,
    and then few `iterations` do.
    """

    clusters: int = 64
    metric: str = "l2"
    iterations: int = 10
    seed: int = 0
    _centroids: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(
            self.metric in KMEANS_METRICS,
            f"metric of k-means is one of {', '.join(KMEANS_METRICS)}, got {self.metric!r}",
        )
        require_at_least(1, clusters=self.clusters)
        require_at_least(0, iterations=self.iterations)

    @property
    def centroids(self) -> Tensor:
        """(..., clusters, D), fp32."""
        if self._centroids is None:
            raise ValueError("k-means is not fitted: use what fit returns, `kmeans = kmeans.fit(points)`")
        return self._centroids

    @torch.no_grad()
    def fit(self, points: Tensor, centroids: Tensor | None = None) -> Self:
        """A copy fitted to points (..., N, D), from `centroids` (..., clusters, D) if given; no wait for the device.

        Raises ValueError where there are fewer points than clusters, or centroids of another shape. Points that are not
        finite make centroids that are not: to look for them would be a wait.
        """
        check_vectors("points", points)
        lead, (count, dims) = points.shape[:-2], points.shape[-2:]
        require(
            self.clusters <= count,
            f"clusters is at most the number of points, got clusters={self.clusters} with {count} points: lower it",
        )
        expected = (*lead, self.clusters, dims)
        require(
            centroids is None or centroids.shape == expected,
            f"centroids are (..., clusters, D), here {tuple(expected)}, got "
            f"{None if centroids is None else tuple(centroids.shape)}",
        )
        vectors = prepared(points, self.metric)
        start = seeds(vectors, self.clusters, self.seed) if centroids is None else prepared(centroids, self.metric)
        found = lloyd(vectors, start, self.iterations, self.metric == "cosine")
        fitted = copy.copy(self)
        object.__setattr__(fitted, "_centroids", found.view(expected))
        return fitted

    @torch.no_grad()
    def assign(self, points: Tensor) -> Tensor:
        """The nearest centroid of points (..., N, D), int64 (..., N)."""
        check_vectors("points", points)
        lead, dims = self.centroids.shape[:-2], self.centroids.shape[-1]
        require(
            points.shape[:-2] == lead and points.shape[-1] == dims,
            f"points have the leading dimensions {tuple(lead)} and the {dims} channels that k-means was fitted to, "
            f"got {tuple(points.shape)}",
        )
        return to_nearest(prepared(points, self.metric), prepared(self.centroids, self.metric))[1].view(
            points.shape[:-1]
        )


def sampled(points_PND: Tensor, sample: int | None, seed: int) -> Tensor:
    """So many of the points, drawn at random and maybe one twice; all where there are no more, or for None."""
    count, device = points_PND.shape[1], points_PND.device
    if sample is None or sample >= count:
        return points_PND
    return points_PND[:, torch.randint(count, (sample,), generator=generator(seed, device), device=device)]


def seeds(points_PND: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means++: each next centroid is a point, drawn by its squared distance to the nearest centroid so far."""
    count, device = points_PND.shape[1], points_PND.device
    draws = torch.rand(clusters, generator=generator(seed, device), device=device)
    lengths = points_PND.square().sum(-1)
    chosen = (draws[:1] * count).long().clamp(max=count - 1).expand(len(points_PND), 1)
    centroids, apart = [], torch.full_like(lengths, torch.inf)
    for number in range(clusters):
        centroid = _at(points_PND, chosen)
        centroids.append(centroid)
        to_this = lengths - 2 * (points_PND @ centroid.mT).squeeze(-1) + centroid.square().sum(-1)
        apart = torch.minimum(apart, to_this.clamp(min=0)).scatter(1, chosen, 0.0)
        if number + 1 < clusters:
            mass = apart.cumsum(1)
            chosen = torch.searchsorted(mass, draws[number + 1] * mass[:, -1:]).clamp(max=count - 1)
    return torch.cat(centroids, dim=1)


def lloyd(points_PND: Tensor, centroids_PKD: Tensor, iterations: int, spherical: bool, refill: bool = True) -> Tensor:
    """Centroids after so many iterations; a cluster that runs empty takes the farthest point or, without `refill`,
    stays where it is."""
    clusters = centroids_PKD.shape[1]
    lengths = points_PND.square().sum(-1) if refill else torch.empty(0)
    one = points_PND.new_ones(()).expand(points_PND.shape[:2])
    for _ in range(iterations):
        apart, nearest = to_nearest(points_PND, centroids_PKD)
        sums = torch.zeros_like(centroids_PKD).scatter_add_(1, nearest[..., None].expand_as(points_PND), points_PND)
        sizes = torch.zeros_like(centroids_PKD[..., 0]).scatter_add_(1, nearest, one)[..., None]
        empty, instead = sizes == 0, centroids_PKD
        if refill:
            farthest = (apart + lengths).topk(clusters).indices
            turn = (empty.cumsum(1) - 1).clamp(min=0).squeeze(-1)  # the first empty one takes the farthest point, ...
            instead = _at(points_PND, farthest.gather(1, turn))
        means = torch.where(empty, instead, sums / sizes.clamp(min=1))
        centroids_PKD = torch.nn.functional.normalize(means, dim=-1) if spherical else means
    return centroids_PKD


def to_nearest(points_PND: Tensor, centroids_PKD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest centroid, less the point's own square; and which it is, int64; both (P, N)."""
    squares = centroids_PKD.square().sum(-1)[:, None]
    parts = points_PND.split(at_once(points_PND, centroids_PKD.shape[1]), dim=1)
    found = [torch.baddbmm(squares, part, centroids_PKD.mT, alpha=-2).min(-1) for part in parts]
    if len(found) == 1:
        return found[0].values, found[0].indices
    return torch.cat([part.values for part in found], dim=1), torch.cat([part.indices for part in found], dim=1)


def _at(points_PND: Tensor, index_PK: Tensor) -> Tensor:
    return points_PND.gather(1, index_PK[..., None].expand(-1, -1, points_PND.shape[-1]))
