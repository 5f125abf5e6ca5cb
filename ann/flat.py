"""Exact search: the oracle every approximate index is measured against."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

METRICS = ("cosine", "ip", "l2")


class Index(Protocol):
    """Nearest neighbours among fitted points; leading dimensions are independent problems."""

    def fit(self, points: Tensor) -> "Index":
        """Take points (..., N, D) and return the index itself."""
        ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest points of each query (..., Q, D): ids int64, distances fp32, both (..., Q, k)."""
        ...


@dataclass
class Flat:
    """Brute force over every point, in fp32.

    `metric`: "cosine" (distance 1 - cos), "ip" (distance -<q, p>), "l2" (squared Euclidean distance).
    """

    metric: str = "cosine"
    _points: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric is one of {', '.join(METRICS)}, got {self.metric!r}")

    def fit(self, points: Tensor) -> "Flat":
        """Take points (..., N, D)."""
        self._points = self._prepared(points)
        return self

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest points of queries (..., Q, D): ids and distances, (..., Q, k), nearest first."""
        found = self._points.shape[-2]
        if not 1 <= k <= found:
            raise ValueError(f"k is between 1 and the number of points, got k={k} with {found} points")
        queries = self._prepared(queries)
        products = queries @ self._points.transpose(-2, -1)
        if self.metric == "l2":
            lengths = self._points.square().sum(-1)[..., None, :]
            distances = (queries.square().sum(-1, keepdim=True) - 2 * products + lengths).clamp(min=0)
        else:
            distances = (1 - products) if self.metric == "cosine" else -products
        nearest, ids = torch.topk(distances, k, dim=-1, largest=False, sorted=True)
        return ids, nearest

    def _prepared(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float()
        return torch.nn.functional.normalize(vectors, dim=-1) if self.metric == "cosine" else vectors
