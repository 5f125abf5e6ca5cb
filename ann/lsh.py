"""LSH: random hyperplanes (Charikar, STOC 2002), sorted tables, exact ranking of what they propose."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .hashing import MAX_BITS, generator, gray_rank, pack, sort_key
from .index import Index, distances_to, require, require_at_least, smallest
from .transforms import learn, parse


class _Tables(NamedTuple):
    points: Tensor  # (P, N, D)
    planes: Tensor  # (P, D, T * (n_bits + 1)), as queries are projected on them
    offset: Tensor  # (P, 1, T * (n_bits + 1))
    spread: Tensor  # (P, T), of the projection that ties are broken by
    keys: Tensor  # (P, T, N), ascending
    ids: Tensor  # (P, T, N), of the points in that order


@dataclass(frozen=True)
class LSH(Index[_Tables]):
    """Points that fall on the query's side of random hyperplanes, ranked exactly. Metrics: cosine, ip, l2.

    Each of `n_tables` tables sorts the points by a code of `n_bits` signs, codes in Gray order, then by one more
    projection. A search reads an equal window of every table, around the place where the query itself would
    be sorted in: its bucket, the nearest part of it where the bucket is larger than the window, and where it is smaller
    also the buckets beside it, which differ in one bit. So there are always k results, and every shape is known
    beforehand: a search is sorts, gathers and products, without a wait. With `candidates` at least n_tables * probes *
    N it is exact.

    A collision has probability 1 - angle / pi for each bit (Charikar 2002). Multi-probe, flipping the bits of least
    margin one at a time: Lv et al., VLDB 2007. FAST-AR (arXiv 2602.01801, section 5.1) finds keys of attention by it.

    Building: `n_tables` >= 1, `n_bits` in [1, 16], `transform` (see `transforms`), `seed`.
    Searching: `candidates`, points read for a query over all tables, at least k from each; `probes` in [1, n_bits + 1],
    windows read in a table.
    """

    query_knobs: ClassVar = ("candidates", "probes")
    metric: str = "cosine"
    n_tables: int = 4
    n_bits: int = 8
    transform: str = "centre+points"
    seed: int = 0
    candidates: int = 256
    probes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        parse(self.transform, self.metric)
        require_at_least(1, n_tables=self.n_tables, candidates=self.candidates)
        require(1 <= self.n_bits <= MAX_BITS, f"n_bits is between 1 and {MAX_BITS}, got n_bits={self.n_bits!r}")
        require(
            1 <= self.probes <= self.n_bits + 1,
            f"probes is between 1 and n_bits + 1, as a probe flips one bit, "
            f"got probes={self.probes!r} with n_bits={self.n_bits}",
        )

    def _build(self, points_PND: Tensor, queries_PSD: Tensor | None) -> _Tables:
        space = learn(parse(self.transform, self.metric), self.metric, points_PND, queries_PSD)
        drawn = torch.randn(
            points_PND.shape[-1],
            self.n_tables * (self.n_bits + 1),
            generator=generator(self.seed, points_PND.device),
            device=points_PND.device,
        )
        projections = self._of_tables((points_PND - space.shift) @ (space.of_points @ drawn))
        spread = projections[..., -1].square().mean(-1).sqrt().clamp(min=1e-12)
        keys, ids = self._keys(pack(projections[..., :-1]), projections[..., -1], spread).sort(stable=True)
        planes = space.of_queries @ drawn
        return _Tables(points_PND, planes, space.query_shift @ planes, spread, keys, ids)

    def _nearest(self, state: _Tables, queries_PQD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        count, width = state.points.shape[1], self._width(state, k)
        projections = self._of_tables(queries_PQD @ state.planes - state.offset)
        bits, tie = projections[..., :-1], projections[..., -1]
        codes = pack(bits)[..., None].expand(-1, -1, -1, self.probes)
        if self.probes > 1:
            uncertain = bits.abs().topk(self.probes - 1, largest=False, sorted=True).indices
            flips = torch.nn.functional.pad(1 << (self.n_bits - 1 - uncertain), (1, 0))
            codes = codes ^ flips
        asked = self._keys(codes.flatten(2), tie.repeat_interleave(self.probes, dim=2), state.spread)
        first = (torch.searchsorted(state.keys, asked) - width // 2).clamp(0, count - width)
        window = first[..., None] + torch.arange(width, device=first.device)
        proposed = state.ids.gather(2, window.flatten(2)).unflatten(2, (queries_PQD.shape[1], -1))
        ids = proposed.transpose(1, 2).flatten(2).sort(dim=-1).values
        distances = distances_to(queries_PQD, state.points, ids, self.metric)
        distances[..., 1:].masked_fill_(ids[..., 1:] == ids[..., :-1], inf)  # proposed by several tables
        best, nearest = smallest(distances, k)
        return ids.gather(-1, best), nearest

    def _numbers_per_query(self, state: _Tables, k: int) -> int:
        windows = self.n_tables * self.probes * self._width(state, k)
        return windows * (state.points.shape[2] + 6)  # vectors, and ids twice over as int64

    def _width(self, state: _Tables, k: int) -> int:
        """Points read of a table at a time; at least k, for one window to have k points that differ."""
        return min(state.points.shape[1], max(k, self.candidates // (self.n_tables * self.probes)))

    def _of_tables(self, projections_PXB: Tensor) -> Tensor:
        """(P, T, X, n_bits + 1)"""
        return projections_PXB.unflatten(-1, (self.n_tables, self.n_bits + 1)).transpose(1, 2)

    def _keys(self, codes_PTX: Tensor, tie_PTX: Tensor, spread_PT: Tensor) -> Tensor:
        return sort_key(gray_rank(codes_PTX), tie_PTX / spread_PT[..., None])
