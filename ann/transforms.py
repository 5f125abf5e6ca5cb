"""Where hashing looks at queries and points: maps that answer for queries distributed otherwise than the points.

Queries and keys of attention differ in mean and covariance, and a hyperplane that halves the ones may leave the others
on one side. Ranking by inner product leaves freedom: it is the same after points are shifted (every score of a query
changes alike) and after points are mapped by A and queries by the transposed inverse of A. Hashing uses that freedom to
propose candidates; they are ranked as they came. Steps, joined by "+", each learnt on what the ones before left:

"centre"   points less their mean; under cosine and l2, which a common shift leaves alone, queries less it too
"scale"    channel c of points times s_c, of queries over s_c, s_c^2 the ratio of their root mean squares, queries over
           points: both then have equal second moments in each channel. cosine, ip; needs queries
"points"   hyperplanes drawn from the points' second moment instead of from an isotropic Gaussian: they cut where
           points vary
"queries"  the same, from the queries' second moment; needs queries
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .index import require

_RIDGE = 1e-4  # of the mean variance: a channel that never varies must not be blown up


class Transform(NamedTuple):
    """points -> (points - shift) @ of_points, queries -> (queries - query_shift) @ of_queries."""

    shift: Tensor  # (P, 1, D)
    query_shift: Tensor  # (P, 1, D)
    of_points: Tensor  # (P, D, D)
    of_queries: Tensor  # (P, D, D)


def parse(spec: str, metric: str) -> tuple[str, ...]:
    """The steps of `spec`; raises ValueError for one that is unknown or does not keep the metric's ranking."""
    steps = () if spec == "none" else tuple(spec.split("+"))
    unknown = [step for step in steps if step != "centre" and step not in _MAPS]
    require(not unknown, f"transform is none or steps of {', '.join(('centre', *_MAPS))} joined by +, got {spec!r}")
    lost = [step for step in steps if step == "scale" and metric == "l2"]
    require(not lost, f"scale keeps inner products and no l2 distances, got {spec!r} with metric='l2'")
    require("centre" not in steps[1:], f"centre comes first and once, as maps are linear, got {spec!r}")
    return steps


def learn(steps: tuple[str, ...], metric: str, points_PND: Tensor, queries_PSD: Tensor | None) -> Transform:
    """What `steps` are for these points and this sample of queries; ValueError if they need one and have none."""
    require(
        queries_PSD is not None or not {"scale", "queries"} & set(steps),
        f"transform={'+'.join(steps)!r} looks at queries: fit(points, queries=a sample of them)",
    )
    shift = points_PND.mean(1, keepdim=True) if "centre" in steps else torch.zeros_like(points_PND[:, :1])
    query_shift = torch.zeros_like(shift) if metric == "ip" else shift
    points = _second_moment(points_PND - shift)
    queries = points if queries_PSD is None else _second_moment(queries_PSD - query_shift)  # not read if not given
    of_points = of_queries = torch.eye(points.shape[-1], device=points.device).expand_as(points)
    for step in steps:
        if step != "centre":
            to_points, to_queries = _MAPS[step](_carried(points, of_points), _carried(queries, of_queries))
            of_points, of_queries = of_points @ to_points, of_queries @ to_queries
    return Transform(shift, query_shift, of_points, of_queries)


def _second_moment(vectors_PND: Tensor) -> Tensor:
    return vectors_PND.mT @ vectors_PND / vectors_PND.shape[1]


def _carried(moment: Tensor, through: Tensor) -> Tensor:
    """The second moment of vectors after a map, kept away from singular."""
    moment = through.mT @ moment @ through
    floor = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-12) * _RIDGE
    return moment + floor * torch.eye(moment.shape[-1], device=moment.device)


def _root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT


def _scale(points: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    ratio = queries.diagonal(dim1=-2, dim2=-1) / points.diagonal(dim1=-2, dim2=-1)
    return ratio.pow(0.25).diag_embed(), ratio.pow(-0.25).diag_embed()


def _drawn_from_points(points: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    root = _root(points)  # a hyperplane of covariance M is an isotropic one after the root of M
    return root, root


def _drawn_from_queries(points: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    root = _root(queries)
    return root, root


_MAPS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "scale": _scale,
    "points": _drawn_from_points,
    "queries": _drawn_from_queries,
}
