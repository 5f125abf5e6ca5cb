"""Exact search: the oracle every approximate index is measured against."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .index import Index, at_once, distances_between, distances_to, prepared, smallest


@dataclass(frozen=True)
class Flat(Index[Tensor]):
    """Brute force over every point, in fp32: a matrix product and a top-k. Metrics: cosine, ip, l2."""

    metric: str = "cosine"

    def distances(self, queries: Tensor, ids: Tensor) -> Tensor:
        """Distances of queries (..., Q, D) to points by id (..., Q, C), fp32 (..., Q, C)."""
        fitted = self._require_fitted()
        self._check_queries(queries, fitted.lead, fitted.dims, fitted.device)
        vectors, flat_ids = prepared(queries, self.metric), ids.reshape(len(fitted.state), *ids.shape[-2:])
        chunk = at_once(vectors, ids.shape[-1] * fitted.dims)
        parts = zip(vectors.split(chunk, dim=1), flat_ids.split(chunk, dim=1), strict=True)
        found = [distances_to(some, fitted.state, those, self.metric) for some, those in parts]
        return torch.cat(found, dim=1).view(ids.shape)

    def _build(self, points_PND: Tensor, queries_PSD: Tensor | None) -> Tensor:
        return points_PND

    def _nearest(self, state: Tensor, queries_PQD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return smallest(distances_between(queries_PQD, state, self.metric), k)

    def _numbers_per_query(self, state: Tensor, k: int) -> int:
        return state.shape[1]
