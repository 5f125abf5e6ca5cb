"""What an index is: knobs, `fit`, `search`. Checks, dtypes, leading dimensions and memory are dealt with here, once.

Axis letters of this package: P problems (leading dimensions flattened), N points, Q queries, D channels, K clusters or
codewords, C candidates of a query.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

METRICS = ("cosine", "ip", "l2")
_AT_ONCE, _AT_ONCE_ON_CPU = 2**25, 2**22  # numbers; a CPU is quickest where its allocator gives the same memory again

State = TypeVar("State")


class Found(NamedTuple):
    """Points found for each query, nearest first: `ids` int64 and `distances` fp32, both (..., Q, k)."""

    ids: Tensor
    distances: Tensor


class _Fitted(NamedTuple):
    state: Any
    lead: torch.Size
    size: int
    dims: int
    device: torch.device


class Index(ABC, Generic[State]):
    """Nearest neighbours among points; an index is a frozen dataclass and its fields are its knobs.

    Knobs of building come first. Those of searching, named in `query_knobs`, trade recall for time in an index that is
    built already: `index.at(probes=8)` is the same fitted index with another value, and nothing is built again.

    `metric`: "cosine" (distance 1 - cos, in [0, 2]), "ip" (distance -<q, p>) or "l2" (squared Euclidean distance).

    A method is `_build`, which turns points into a state, and `_nearest`, which reads it. Vectors arrive there in fp32,
    with one leading dimension, and of unit length if the metric is cosine.
    """

    query_knobs: ClassVar[tuple[str, ...]] = ()
    metric: str
    _fitted: _Fitted | None = None

    def __post_init__(self) -> None:
        require(self.metric in METRICS, f"metric is one of {', '.join(METRICS)}, got {self.metric!r}")

    @torch.no_grad()
    def fit(self, points: Tensor, queries: Tensor | None = None) -> Self:
        """A copy of this index, fitted to points (..., N, D) of any float dtype; leading dimensions are problems apart.

        `queries` (..., S, D) is a sample of what will be asked, for transforms that look at it (`LSH`). fp32 points may
        be held as they are, without a copy: do not write to them while the index is in use.

        Raises ValueError for points that are not finite, which on a GPU is the one wait for the device.
        """
        check_vectors("points", points)
        require(points.numel() > 0, f"an index needs at least one point, got points {tuple(points.shape)}")
        require(
            bool(torch.isfinite(points).all()),
            "points must be finite, got NaN or infinity among them: find where they come from, or drop those points",
        )
        lead, count, dims = points.shape[:-2], *points.shape[-2:]
        fitted = copy.copy(self)
        if queries is not None:
            self._check_queries(queries, lead, dims, points.device)
            queries = prepared(queries, self.metric)
        state = self._build(prepared(points, self.metric), queries)
        object.__setattr__(fitted, "_fitted", _Fitted(state, lead, count, dims, points.device))
        return fitted

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Found:
        """The k nearest points of queries (..., Q, D), with the leading dimensions of the points; nearest first.

        Always k results: what an index does where its candidates are fewer is said in its docstring. Never waits for
        the device. Queries that are not finite find arbitrary points.
        """
        fitted = self._require_fitted()
        require(
            1 <= k <= fitted.size,
            f"k is between 1 and the number of points, got k={k} with {fitted.size} points: lower k",
        )
        self._check_queries(queries, fitted.lead, fitted.dims, fitted.device)
        shape = (*queries.shape[:-1], k)
        if queries.numel() == 0:
            return Found(queries.new_empty(shape, dtype=torch.long), queries.new_empty(shape, dtype=torch.float))
        vectors = prepared(queries, self.metric)
        chunk = at_once(vectors, self._numbers_per_query(fitted.state, k))
        parts = [self._nearest(fitted.state, part, k) for part in vectors.split(chunk, dim=1)]
        ids, distances = (torch.cat(found, dim=1).view(shape) for found in zip(*parts, strict=True))
        return Found(ids, distances)

    def at(self, **knobs: Any) -> Self:
        """The same index, fitted to the same points, with other values of its `query_knobs`."""
        wrong = sorted(set(knobs) - set(self.query_knobs))
        require(
            not wrong,
            f"at() changes what a search reads, which for {type(self).__name__} is "
            f"{', '.join(self.query_knobs) or 'nothing'}; got {', '.join(wrong)}: make a new index and fit it",
        )
        other = replace(self, **knobs)  # type: ignore[type-var]  # every index is a dataclass
        object.__setattr__(other, "_fitted", self._fitted)
        return other

    @property
    def bytes(self) -> int:
        """What the fitted index holds."""
        state = self._require_fitted().state
        return sum(
            part.nbytes for part in (state if isinstance(state, tuple) else (state,)) if isinstance(part, Tensor)
        )

    @property
    def knobs(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]

    @abstractmethod
    def _build(self, points_PND: Tensor, queries_PSD: Tensor | None) -> State: ...

    @abstractmethod
    def _nearest(self, state: State, queries_PQD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Ids and distances (P, Q, k)."""

    @abstractmethod
    def _numbers_per_query(self, state: State, k: int) -> int:
        """How many numbers `_nearest` makes for one query."""

    def _require_fitted(self) -> _Fitted:
        if self._fitted is None:
            raise ValueError("the index is not fitted: search what fit returns, `index = index.fit(points)`")
        return self._fitted

    def _check_queries(self, queries: Tensor, lead: torch.Size, dims: int, device: torch.device) -> None:
        check_vectors("queries", queries)
        require(
            queries.shape[:-2] == lead and queries.shape[-1] == dims,
            f"queries have the leading dimensions {tuple(lead)} and the {dims} channels of the points, "
            f"got queries {tuple(queries.shape)}: expand or reshape them",
        )
        require(
            queries.device == device, f"queries lie on the points' device, {device}, got {queries.device}: move them"
        )


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def prepared(vectors: Tensor, metric: str) -> Tensor:
    """Vectors (..., X, D) as (P, X, D) in fp32, of unit length if the metric is cosine."""
    vectors = vectors.float().reshape(vectors.shape[:-2].numel(), *vectors.shape[-2:])
    return torch.nn.functional.normalize(vectors, dim=-1) if metric == "cosine" else vectors


def require_at_least(least: int, **values: int) -> None:
    """Refuse counts, named as the knobs that hold them, below `least`."""
    for name, value in values.items():
        require(value >= least, f"{name} is a whole number >= {least}, got {name}={value!r}")


def at_once(vectors_PXD: Tensor, numbers_each: int) -> int:
    """How many vectors of each problem to work on at a time, if each makes so many numbers on the way; >= 1."""
    room = _AT_ONCE_ON_CPU if vectors_PXD.device.type == "cpu" else _AT_ONCE
    return max(1, room // max(1, len(vectors_PXD) * numbers_each))


def check_vectors(name: str, vectors: Tensor) -> None:
    require(
        vectors.dim() >= 2 and vectors.shape[-1] >= 1 and vectors.is_floating_point(),
        f"{name} are vectors (..., count, channels) of a float dtype, got {tuple(vectors.shape)} of {vectors.dtype}",
    )


def distances_between(queries_PQD: Tensor, points_PND: Tensor, metric: str) -> Tensor:
    """Every distance, (P, Q, N), by one matrix product."""
    products = queries_PQD @ points_PND.mT
    if metric == "l2":
        lengths = points_PND.square().sum(-1)[:, None]
        return (queries_PQD.square().sum(-1, keepdim=True) - 2 * products + lengths).clamp(min=0)
    return 1 - products if metric == "cosine" else -products


def smallest(distances_PQN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and distances of the k smallest, (P, Q, k), smallest first."""
    nearest, ids = distances_PQN.topk(k, dim=-1, largest=False, sorted=True)
    return ids, nearest


def distances_to(queries_PQD: Tensor, points_PND: Tensor, ids_PQC: Tensor, metric: str) -> Tensor:
    """Exact distances of each query to candidates of its own, (P, Q, C)."""
    problems, count, dims = points_PND.shape
    first = torch.arange(problems, device=ids_PQC.device).view(-1, 1, 1) * count
    read = points_PND.reshape(-1, dims).index_select(0, (ids_PQC + first).flatten()).view(*ids_PQC.shape, dims)
    if metric == "l2":
        return (read - queries_PQD[:, :, None]).square().sum(-1)
    products = (read @ queries_PQD[..., None]).squeeze(-1)
    return 1 - products if metric == "cosine" else -products
