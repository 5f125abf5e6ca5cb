"""Quantised points: fewer bytes for each, and every one of them scored."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .index import Index, State, distances_between, require, require_at_least, smallest
from .kmeans import KMeans

BITS = (8, 4)


class _Coded(Index[State]):
    """Queries stay fp32 and points are read as what their codes stand for: asymmetric distances.

    That is what tables of partial distances compute (Jégou et al., TPAMI 2011, section III-B). Points opened and
    multiplied give the same numbers, and a matrix product is what CPUs and GPUs are quick at. The distances that a
    search returns are those to the points as they were quantised. A search opens all points, in fp32, while it lasts.
    """

    @abstractmethod
    def _opened(self, state: State) -> Tensor:
        """The points as quantised, fp32 (P, N, D)."""

    def _nearest(self, state: State, queries_PQD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return smallest(distances_between(queries_PQD, self._opened(state), self.metric), k)

    def _numbers_per_query(self, state: State, k: int) -> int:
        return self._require_fitted().size


class _Integers(NamedTuple):
    codes: Tensor  # int8 (P, N, D), or uint8 (P, N, ceil(D / 2)) with two codes in a byte, the even channel's lower
    scale: Tensor  # (P, N, 1)
    dims: int


@dataclass(frozen=True)
class Quantized(_Coded[_Integers]):
    """Each point a scale and D whole numbers in [-127, 127] or [-7, 7]. Metrics: cosine, ip, l2.

    Building: `bits`, 8 or 4. A channel is off by at most half a step, the point's largest magnitude / 127 or / 7.
    """

    metric: str = "cosine"
    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bits in BITS, f"bits is 8 or 4, got bits={self.bits!r}")

    def _build(self, points_PND: Tensor, queries_PSD: Tensor | None) -> _Integers:
        most = 2 ** (self.bits - 1) - 1
        scale = points_PND.abs().amax(-1, keepdim=True).clamp(min=1e-30) / most
        codes = (points_PND / scale).round().to(torch.int8)
        if self.bits == 4:
            even = torch.nn.functional.pad(codes + most, (0, codes.shape[-1] % 2)).to(torch.uint8)
            codes = even[..., ::2] | (even[..., 1::2] << 4)
        return _Integers(codes, scale, points_PND.shape[-1])

    def _opened(self, state: _Integers) -> Tensor:
        codes = state.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., : state.dims].to(torch.int8) - 7
        return codes * state.scale


class _Words(NamedTuple):
    codes: Tensor  # uint8 (P, N, parts)
    codebooks: Tensor  # (P, parts, words, D / parts)


@dataclass(frozen=True)
class ProductQuantized(_Coded[_Words]):
    """Each point `parts` bytes: its channels are cut in parts, and each part is one of 2^bits words learnt by k-means.

    Product quantisation (Jégou et al., TPAMI 2011). Metrics: cosine, ip, l2; words are l2 clusters in all of them.

    Building: `parts`, which divides the channels; `bits` in [1, 8], words a part (no more than there are points);
    `iterations` of k-means; `seed`.
    """

    metric: str = "cosine"
    parts: int = 8
    bits: int = 8
    iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, parts=self.parts)
        require_at_least(0, iterations=self.iterations)
        require(1 <= self.bits <= 8, f"bits is between 1 and 8, as a code is a byte, got bits={self.bits!r}")

    def _build(self, points_PND: Tensor, queries_PSD: Tensor | None) -> _Words:
        dims = points_PND.shape[-1]
        require(dims % self.parts == 0, f"parts divides the channels, got parts={self.parts} with {dims} channels")
        pieces = points_PND.unflatten(-1, (self.parts, -1)).transpose(1, 2)
        words = min(2**self.bits, points_PND.shape[1])
        learnt = KMeans(words, "l2", self.iterations, self.seed).fit(pieces)
        return _Words(learnt.assign(pieces).to(torch.uint8).transpose(1, 2), learnt.centroids)

    def _opened(self, state: _Words) -> Tensor:
        codes = state.codes.transpose(1, 2).long()[..., None]
        return state.codebooks.gather(2, codes.expand(-1, -1, -1, state.codebooks.shape[-1])).transpose(1, 2).flatten(2)
