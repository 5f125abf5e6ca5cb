"""An order that puts near points side by side, for attention that reads and is masked by equal blocks."""

import torch
from torch import Tensor

from .hashing import MAX_BITS, generator, gray_rank, pack, sort_key
from .index import check_vectors, distances_between, prepared, require, require_at_least
from .kmeans import lloyd, seeds, to_nearest

METHODS = ("lsh", "kmeans")
_SUBSPACE_ITERATIONS = 4
_ROUNDING = 1e-4  # of the largest projection


@torch.no_grad()
def order(
    points: Tensor,
    method: str = "kmeans",
    *,
    n_bits: int = 8,
    clusters: int = 64,
    iterations: int = 4,
    seed: int = 0,
) -> Tensor:
    """A permutation of points (..., N, D), int64 (..., N), whose consecutive blocks of any equal size are tight.

    "lsh": sorted by a code of `n_bits` signs along the principal directions, codes in Gray order, then along the first
    of them; products and a sort. "kmeans": by `clusters` clusters (at most N) in a chain from each to the nearest that
    is left, points within a cluster from the one before towards the one after; tighter, and about ten times the work.
    Tight by l2: normalise points first for cosine. Blocks are equal, so a block's edge may lie within a cluster. Never
    waits for the device; points that are not finite go anywhere.

    FAST-AR (arXiv 2602.01801, section 5.1) reads keys that hashing puts together.
    """
    check_vectors("points", points)
    require(method in METHODS, f"method is one of {', '.join(METHODS)}, got {method!r}")
    require(1 <= n_bits <= MAX_BITS, f"n_bits is between 1 and {MAX_BITS}, got n_bits={n_bits!r}")
    require_at_least(1, clusters=clusters)
    require_at_least(0, iterations=iterations)
    points_PND = prepared(points, "l2")
    points_PND = points_PND - points_PND.mean(1, keepdim=True)
    if method == "lsh":
        major, minor = _hashed(points_PND, n_bits, seed)
    else:
        major, minor = _clustered(points_PND, min(clusters, points.shape[-2]), iterations, seed)
    spread = minor.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    return sort_key(major, minor / spread).argsort(dim=1, stable=True).view(points.shape[:-1])


def inverse(permutation: Tensor) -> Tensor:
    """Where each point went: `x.gather(p).gather(inverse(p))` is x; int64 (..., N)."""
    places = torch.arange(permutation.shape[-1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(-1, permutation, places)


def _hashed(points_PND: Tensor, n_bits: int, seed: int) -> tuple[Tensor, Tensor]:
    projections = points_PND @ _principal(points_PND, min(n_bits, points_PND.shape[-1]), seed)
    along = projections[..., 0]
    rounding = _ROUNDING * along.abs().amax(1)[:, None, None]  # directions in which points do not vary give no bits
    return gray_rank(pack(projections - rounding)), along


def _principal(points_PND: Tensor, count: int, seed: int) -> Tensor:
    """About the first principal directions (P, D, count), by subspace iteration: eigh would wait for the device."""
    moment, device = points_PND.mT @ points_PND, points_PND.device
    drawn = torch.randn(points_PND.shape[-1], count, generator=generator(seed, device), device=device)
    directions = drawn.expand(len(points_PND), -1, -1)
    for _ in range(_SUBSPACE_ITERATIONS):
        directions = torch.linalg.qr(moment @ directions).Q
    return directions


def _clustered(points_PND: Tensor, clusters: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    centroids = lloyd(points_PND, seeds(points_PND, clusters, seed), iterations, spherical=False)
    chain = _chain(centroids)
    centroids = centroids.gather(1, chain[..., None].expand_as(centroids))
    cluster = to_nearest(points_PND, centroids)[1]
    before, after = centroids[:, :1], centroids[:, -1:]
    along = torch.cat([centroids[:, 1:], after], dim=1) - torch.cat([before, centroids[:, :-1]], dim=1)
    along, centre = (x.gather(1, cluster[..., None].expand_as(points_PND)) for x in (along, centroids))
    return cluster, ((points_PND - centre) * torch.nn.functional.normalize(along, dim=-1)).sum(-1)


def _chain(centroids_PKD: Tensor) -> Tensor:
    """An outermost cluster, the one nearest to it, the one of the rest nearest to that, ...: int64 (P, K)."""
    distances = distances_between(centroids_PKD, centroids_PKD, "l2")
    last = centroids_PKD.square().sum(-1).argmax(-1, keepdim=True)  # the mean of all points is zero
    chain = [last]
    for _ in range(distances.shape[1] - 1):
        distances = distances.scatter(2, last[..., None].expand(-1, distances.shape[1], 1), torch.inf)  # not again
        last = (
            distances.gather(1, last[..., None].expand(-1, 1, distances.shape[2])).squeeze(1).argmin(-1, keepdim=True)
        )
        chain.append(last)
    return torch.cat(chain, dim=1)
