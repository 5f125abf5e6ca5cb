"""IVF: k-means lists, of which a query reads the nearest ones."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .index import Index, distances_between, distances_to, require, require_at_least, smallest
from .kmeans import KMeans, sampled


class _Lists(NamedTuple):
    points: Tensor  # (P, N, D), list after list
    ids: Tensor  # (P, N), of the points in that order
    centroids: Tensor  # (P, K, D)
    sizes: Tensor  # (P, K)
    starts: Tensor  # (P, K), where a list begins
    largest: tuple[int, ...]  # points in the 1, 2, ... largest lists of any problem


@dataclass(frozen=True)
class IVF(Index[_Lists]):
    """Inverted lists (Sivic and Zisserman, ICCV 2003; Jégou et al., TPAMI 2011): exact ranking in the nearest lists.

    Lists are k-means clusters: spherical for cosine, else by l2 (for ip, Faiss clusters directions: as good on keys of
    attention, better on vectors without clusters). A query reads the `probes` lists whose centroids are nearest by the
    metric, and further ones until it has k points; with probes = lists the search is exact. A search has room for the
    largest lists of any problem, so balanced lists are fast lists. `fit` waits for the device once more, to learn how
    large they are.

    Building: `lists`, at most the number of points; `iterations` of k-means, over a random `sample` of so many points
    where there are more (None: all), as Faiss takes 256 a list; `seed`. Searching: `probes` in [1, lists].
    """

    query_knobs: ClassVar = ("probes",)
    metric: str = "cosine"
    lists: int = 64
    iterations: int = 10
    seed: int = 0
    probes: int = 4
    sample: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, lists=self.lists)
        require_at_least(0, iterations=self.iterations)
        require_at_least(self.lists, sample=self.lists if self.sample is None else self.sample)
        require(
            1 <= self.probes <= self.lists,
            f"probes is between 1 and lists, got probes={self.probes!r} with lists={self.lists}",
        )

    def _build(self, points_PND: Tensor, queries_PSD: Tensor | None) -> _Lists:
        require(
            self.lists <= points_PND.shape[1],
            f"lists is at most the number of points, got lists={self.lists} with {points_PND.shape[1]} points",
        )
        metric = "cosine" if self.metric == "cosine" else "l2"
        learnt_from = sampled(points_PND, self.sample, self.seed)
        clusters = KMeans(self.lists, metric, self.iterations, self.seed).fit(learnt_from)
        assigned, ids = clusters.assign(points_PND).sort(dim=1, stable=True)
        edges = torch.arange(self.lists + 1, device=ids.device).expand(len(ids), -1).contiguous()
        bounds = torch.searchsorted(assigned, edges)
        sizes = bounds.diff(dim=1)
        largest = sizes.sort(dim=1, descending=True).values.cumsum(1).amax(0)
        points = points_PND.gather(1, ids[..., None].expand_as(points_PND))
        return _Lists(points, ids, clusters.centroids, sizes, bounds[:, :-1], tuple(largest.tolist()))

    def _nearest(self, state: _Lists, queries_PQD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        order = distances_between(queries_PQD, state.centroids, self.metric).argsort(-1)
        ends = _of_lists(state.sizes, order).cumsum(-1)
        slots = torch.arange(self._room(state, k), device=order.device).expand(*order.shape[:2], -1).contiguous()
        which = torch.searchsorted(ends, slots, right=True).clamp(max=self.lists - 1)
        # slot s of a query lies in the list at place `which` of its order, as far from the list's end as from `ends`
        after = _of_lists(state.starts + state.sizes, order) - ends
        place = (after.gather(-1, which) + slots).clamp(0, state.ids.shape[1] - 1)
        distances = distances_to(queries_PQD, state.points, place, self.metric)
        read = ends[..., self.probes - 1 : self.probes].clamp(min=k)
        best, nearest = smallest(distances.masked_fill(slots >= read, inf), k)
        place = place.gather(-1, best)
        return state.ids.gather(1, place.flatten(1)).view_as(place), nearest

    def _numbers_per_query(self, state: _Lists, k: int) -> int:
        return self._room(state, k) * (state.points.shape[2] + 6) + 8 * self.lists

    def _room(self, state: _Lists, k: int) -> int:
        return max(k, state.largest[self.probes - 1])


def _of_lists(values_PK: Tensor, order_PQK: Tensor) -> Tensor:
    return values_PK[:, None].expand_as(order_PQK).gather(-1, order_PQK)
