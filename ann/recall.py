"""How good and how quick indexes are, against exact search."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .flat import Flat
from .index import Index, require

_TOLERANCE = 1e-5  # of the k-th distance (of 1, if that is less): rounding of the same distance computed otherwise

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One index on a frontier; `recall` in [0, 1], times in seconds, `bytes` of the fitted index."""

    name: str
    knobs: dict[str, Any]
    recall: float
    build_seconds: float
    search_seconds: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def recall(index: Index, queries: Tensor, k: int, truth: Flat) -> float:
    """Recall@k in [0, 1]: the share of the k points found for a query that are as near as the true k-th, the mean.

    Judged by distance, so that ties count (ANN-Benchmarks, Aumüller et al. 2020). `index` and `truth` are fitted to the
    same points with the same metric.
    """
    require(
        index.metric == truth.metric,
        f"index and truth rank by the same metric, got {index.metric!r} and {truth.metric!r}",
    )
    return _recall(truth, queries, index.search(queries, k).ids, truth.search(queries, k).distances[..., -1:])


def frontier(
    indexes: Mapping[str, Index],
    points: Tensor,
    queries: Tensor,
    k: int,
    *,
    sample: Tensor | None = None,
    repeats: int = 3,
) -> list[Row]:
    """What each index finds of the k nearest and what that takes, `Flat` first if no index of the mapping is one.

    `sample` (..., S, D) are queries that indexes may learn from while they are built, apart from those they are asked.
    Seconds, the device waited for, are those of one `fit` and the best of `repeats` searches. All indexes have the same
    metric.
    """
    metrics = sorted({index.metric for index in indexes.values()})
    require(len(metrics) == 1, f"a frontier is of indexes with one metric, got {', '.join(metrics) or 'no index'}")
    flat = Flat(metrics[0])
    if flat not in indexes.values():
        indexes = {"Flat": flat, **indexes}
    truth = flat.fit(points)
    bound = truth.search(queries, k).distances[..., -1:]
    rows = []
    for name, index in indexes.items():
        fitted, build = _timed(partial(index.fit, points, sample), points.device, 1)
        found, search = _timed(partial(fitted.search, queries, k), points.device, repeats)
        rows.append(Row(name, index.knobs, _recall(truth, queries, found.ids, bound), build, search, fitted.bytes))
    return rows


def _recall(truth: Flat, queries: Tensor, ids: Tensor, bound: Tensor) -> float:
    distances = truth.distances(queries, ids.clamp(min=0))
    near = distances <= bound + _TOLERANCE * bound.abs().clamp(min=1)
    return float((near & (ids >= 0)).float().mean())


def _timed(work: Callable[[], T], device: torch.device, repeats: int) -> tuple[T, float]:
    best = torch.inf
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        result = work()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return result, best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
