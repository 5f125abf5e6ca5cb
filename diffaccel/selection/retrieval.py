"""RetrievalAttention: an index over the keys, made to answer queries (arXiv 2409.10516)."""

from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ann import IVF, Faiss, Flat, transforms
from ..policy import knob
from .asked import Asked
from .ranked import Ranked

_STEPS = ("centre", "scale")
_LEARNT_FROM = 64  # keys a list


@dataclass(frozen=True)
class RetrievalAttention(Ranked):
    """Some queries of each block look up their nearest keys in an index; the blocks of keys that they lie in are read.

    A block is worth the attention on the keys that were found in it. With `summaries` what was not found still counts,
    one mean key a block with log(tokens): the estimation zone of the authors' later RetroInfer.

    Queries are distributed otherwise than keys, so an index of keys alone scans many of them. The paper
    builds its graph of edges from queries to their exact nearest keys. Here, `calibrated`, keys are mapped by A and
    queries by the transposed inverse of A, which changes no product, and A makes both equally long in each channel.

    Differences from the paper: the index is IVF, ours or Faiss's, not a graph, because as many queries as a block of
    video has would walk it one by one; it lies beside the keys, not in host memory; what is always read are
    `sink_frames` and `recent_frames` (128 and 512 tokens there).
    """

    paper: ClassVar[str] = "RetrievalAttention, arXiv 2409.10516"
    summary: ClassVar[str] = "reads the blocks of keys in which an index finds the nearest keys of some queries"

    index: str = knob(
        "ivf", "what finds them: all keys, inverted lists, or those of Faiss", choices=("flat", "ivf", "faiss")
    )
    nearest: int = knob(100, "keys that a query looks up, >= 1")
    scanned: float = knob(0.1, "share of an index's lists that a query reads, in (0, 1]")
    calibrated: bool = knob(True, "fit the index to the queries, whose distribution is not that of the keys")
    queries: int = knob(4, "queries of each block that look up, >= 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.nearest >= 1, "nearest is a number of keys >= 1", nearest=self.nearest)
        self.require(0 < self.scanned <= 1, "scanned is a share in (0, 1]", scanned=self.scanned)
        self.require(isinstance(self.calibrated, bool), "calibrated is True or False", calibrated=self.calibrated)
        self.require(self.queries >= 1, "queries is a number of queries >= 1", queries=self.queries)
        self.require(
            self.index != "faiss" or find_spec("faiss") is not None,
            "Faiss is not installed: pip install 'diffaccel[faiss]', or take index='ivf'",
            index=self.index,
        )

    def rank(self, asked: Asked) -> Tensor:
        keys, weight = asked.keys.k.flatten(2, 3).float(), asked.keys.log_weight
        q = asked.samples(self.queries).flatten(2, 3)
        if weight is not None:  # one more channel, which is 1 in every query
            keys, q = torch.cat([keys, weight.flatten(2)[..., None]], -1), torch.nn.functional.pad(q, (0, 1), value=1.0)
        ids, scores = self.look_up(q, keys)
        worth = scores.softmax(-1)
        found = worth.new_zeros(*worth.shape[:3], asked.keys.choices)
        found.scatter_add_(-1, ids // asked.keys.block, worth)
        # the estimate orders the blocks in which nothing was found
        return found.unflatten(2, (asked.q.shape[2], -1)).mean(3) + 1e-6 * asked.mass()

    def look_up(self, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries (B, H, Q, D) the nearest of keys (B, H, N, D): ids and products, (B, H, Q, nearest)."""
        shape, dim = q.shape[:3], q.shape[-1]
        q, keys = q.reshape(-1, shape[2], dim), keys.reshape(-1, keys.shape[2], dim)
        to = q
        if self.calibrated:
            learnt = transforms.learn(_STEPS, "ip", keys, q)
            keys, to = (keys - learnt.shift) @ learnt.of_points, (q - learnt.query_shift) @ learnt.of_queries
        ids, distances = self._index(keys.shape[1]).fit(keys).search(to, min(self.nearest, keys.shape[1]))
        # centring took the same from all of a query's products, which their softmax does not see
        return ids.clamp(min=0).view(*shape, -1), -distances.view(*shape, -1)

    def _index(self, keys: int) -> Any:
        lists = max(1, round(keys**0.5))
        probes = ceil(self.scanned * lists)
        if self.index == "faiss":
            return Faiss(f"IVF{lists},Flat", "ip", f"nprobe={probes}")
        return Flat("ip") if self.index == "flat" else IVF("ip", lists, probes=probes, sample=_LEARNT_FROM * lists)
