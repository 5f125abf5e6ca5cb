"""Faiss, by factory string; `pip install diffaccel[faiss]` (CPU) or `diffaccel[faiss-gpu]`."""

import importlib
import threading
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .index import Index


@dataclass(frozen=True)
class Faiss(Index[list[Any]]):
    """Any index of Faiss (Douze et al., arXiv 2401.08281). Metrics: cosine, ip, l2, as far as the factory string goes.

    Faiss knows no batches: each problem is an index of its own, fitted and asked one after the other. Contiguous fp32
    points and queries on the CPU are handed over without a copy; on a GPU, where the package must be faiss-gpu, through
    `faiss.contrib.torch_utils`. Where Faiss finds fewer than k points, ids are -1 and distances infinite.

    Building: `factory` as for `faiss.index_factory`, "IVF64,Flat". Searching: `parameters` as for
    `faiss.ParameterSpace`, "nprobe=8"; `at` copies the indexes, as Faiss keeps parameters in them.

    Raises ImportError without Faiss, ValueError for a factory string or parameters that it does not take.
    """

    query_knobs: ClassVar = ("parameters",)
    factory: str = "IVF64,Flat"
    metric: str = "cosine"
    parameters: str = ""

    def at(self, **knobs: Any) -> Self:
        other = super().at(**knobs)
        if other._fitted is not None:
            copies = [_faiss().clone_index(index) for index in other._fitted.state]
            object.__setattr__(other, "_fitted", other._fitted._replace(state=copies))
        return other

    @property
    def bytes(self) -> int:
        """What the indexes take when written out, CPU indexes only."""
        return sum(_faiss().serialize_index(index).nbytes for index in self._require_fitted().state)

    def _build(self, points_PND: Tensor, queries_PSD: Tensor | None) -> list[Any]:
        faiss = _faiss(points_PND.device)
        metric = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        built = []
        for points in points_PND:
            try:
                index = faiss.index_factory(points.shape[1], self.factory, metric)
            except RuntimeError as error:
                raise ValueError(
                    f"factory is a string that faiss.index_factory takes for {points.shape[1]} channels and "
                    f"metric={self.metric!r}, such as 'Flat', 'IVF64,Flat' or 'HNSW32', got {self.factory!r}: "
                    f"{_reason(error)}"
                ) from error
            if points.is_cuda:
                index = faiss.index_cpu_to_gpu(_resources(points.device), points.device.index, index)
            try:
                index.train(_handed_over(points))
                index.add(_handed_over(points))
            except RuntimeError as error:
                raise ValueError(
                    f"the index {self.factory!r} does not take {len(points)} points of {points.shape[1]} channels: "
                    f"{_reason(error)}"
                ) from error
            built.append(index)
        return built

    def _nearest(self, state: list[Any], queries_PQD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        faiss = _faiss(queries_PQD.device)
        space = faiss.GpuParameterSpace() if queries_PQD.is_cuda else faiss.ParameterSpace()
        ids, distances = [], []
        for index, queries in zip(state, queries_PQD, strict=True):
            if self.parameters:
                try:
                    space.set_index_parameters(index, self.parameters)
                except RuntimeError as error:
                    raise ValueError(
                        f"parameters are those that faiss.ParameterSpace knows for {self.factory!r}, such as "
                        f"'nprobe=8', got {self.parameters!r}: {_reason(error)}"
                    ) from error
            scores, found = map(torch.as_tensor, index.search(_handed_over(queries), k))
            ids.append(found)
            distances.append(self._distances(scores).masked_fill(found < 0, torch.inf))
        return torch.stack(ids), torch.stack(distances)

    def _distances(self, scores: Tensor) -> Tensor:
        if self.metric == "l2":
            return scores
        return 1 - scores if self.metric == "cosine" else -scores

    def _numbers_per_query(self, state: list[Any], k: int) -> int:
        return k


def _faiss(device: torch.device | None = None) -> Any:
    """The module, able to work on `device`."""
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "Faiss is not installed, and the index Faiss needs it: pip install 'diffaccel[faiss]', "
            "or 'diffaccel[faiss-gpu]' for tensors on a GPU"
        ) from error
    if device is not None and device.type == "cuda":
        if not hasattr(faiss, "StandardGpuResources"):
            raise ImportError(
                f"the points lie on {device} and the Faiss that is installed is for CPUs: "
                "pip install 'diffaccel[faiss-gpu]', or move the points to the CPU"
            )
        importlib.import_module("faiss.contrib.torch_utils")  # makes its indexes take tensors
    return faiss


_gpu_resources: dict[torch.device, Any] = {}
_gpu_resources_lock = threading.Lock()


def _resources(device: torch.device) -> Any:
    """Scratch memory of Faiss, which is large: once a device."""
    with _gpu_resources_lock:
        if device not in _gpu_resources:
            _gpu_resources[device] = _faiss(device).StandardGpuResources()
        return _gpu_resources[device]


def _handed_over(vectors: Tensor) -> Any:
    """Without a copy where it is contiguous already."""
    vectors = vectors.contiguous()
    return vectors if vectors.is_cuda else vectors.numpy()


def _reason(error: RuntimeError) -> str:
    """The end of Faiss's message: before it stand file, line and function of its source."""
    return str(error).rsplit(": ", 1)[-1].strip()
