"""Caches that keep a part, on the finished blocks of a language model: `BlockLM(..., cache=SnapKV(...))`.

A text is to them a video whose frames are one token each: `recent_frames`, `sink_frames` and "12 frames" count tokens,
and neighbours are those in the text. The clean pass over finished blocks, a prompt's too, is apart from the steps of
the block at work, which so never reads what was dropped. Probes are the queries of the last of those blocks: of clean
tokens, never of masks, and blind to nothing that is kept. Heads that share a key are probes of that key's head.
"""

from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from diffaccel import kernel
from diffaccel.accel import Accel
from diffaccel.cache import Extent
from diffaccel.cache.calibrated import Calibrated
from diffaccel.cache.ragged import ByHead
from diffaccel.cache.sink_recent import SinkRecent
from diffaccel.cache.sorting import Looking
from diffaccel.cache.tca_style import TCAStyle
from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.kernel import Partial, merge
from diffaccel.kernel.weighted import over_entries
from diffaccel.policy import CachePolicy
from diffaccel.run import Run
from diffaccel.site import Site

from .block_attention import BlockCache, RoomyLayer, fold, unfold

_SOME = Extent(1, Grid(1, 1, 1), 1, 1, 1, 1, 1, torch.float32)


def check(policy: CachePolicy) -> None:
    """Raise `UnsupportedError` for a cache of no use for text, `KnobError` for a budget below what it protects."""
    text = isinstance(policy, Looking | SinkRecent) and not isinstance(policy, Calibrated | TCAStyle)
    if not text:
        raise UnsupportedError(
            f"a language model takes caches that score tokens by what any text has (SnapKV, H2O, CAKE, TaskKV, "
            f"LazyEviction, ZipCache) and SinkRecent, got {type(policy).__name__}, which goes by frames or by a "
            "profile of a video model: take one of those, or cache=True for all tokens"
        )
    policy.check(_SOME)


class KeptCache(BlockCache):
    """What a policy keeps of finished blocks, in place of all of them. Its layers give back new tokens only."""

    def __init__(self, policy: CachePolicy, kernel: str, block: int) -> None:
        Cache.__init__(self, layer_class_to_replicate=_NewTokens)
        self.policy, self.kernel, self.block = policy, kernel, block
        self.run = Run(Accel(cache=policy), causal=True)
        self._new: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # of each layer: keys, values, probes
        self._committed = 0

    @property
    def engaged(self) -> bool:
        return self.run.slots["cache"].engaged

    @property
    def tokens(self) -> int:
        """Entries that a layer holds, on average over layers and heads, rounded up."""
        counts = [memory.count for memory in self.run.all_memories()]
        return ceil(sum(counts) / len(counts)) if counts else 0

    def count(self, layer: int) -> int:
        """Entries that a layer holds, on average over heads."""
        return self.run.all_memories()[layer].count if self._committed else 0

    def partial(self, layer: int, q_BSHD: Tensor, scale: float) -> Partial:
        """Attention to what is kept."""
        chosen = kernel.resolve(self.kernel, q_BSHD.device, q_BSHD.dtype, q_BSHD.shape[-1])
        memory = self.run.all_memories()[layer]
        q = fold(q_BSHD, memory.exact.past().entries.k.shape[2])
        parts = [
            tier.partial(q, lambda q, entries: over_entries(chosen, q, entries, scale, None))
            for tier in memory.past()
            if tier.count
        ]
        return unfold(merge(parts), q_BSHD)

    def note(self, layer: int, q_BSHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, scale: float) -> None:
        """New keys and values of a pass, and the queries of its last block, scaled so that scores are the model's."""
        q = fold(q_BSHD[:, -getattr(self.policy, "probes", 1) :], k_BNGD.shape[2])
        self._new[layer] = k_BNGD, v_BNGD, q * (scale * q.shape[-1] ** 0.5)

    def commit(self) -> None:
        """The pass was over finished blocks: they become part of the past, and the policy drops some of it."""
        rows, tokens, heads, dim = self._new[0][0].shape
        grid, start = Grid(tokens, 1, 1), self._committed
        if self.run.extent is None:
            dtype, layers = self._new[0][0].dtype, len(self._new)
            self.run.begin(0, Extent(0, Grid(self.block, 1, 1), layers, heads, dim, rows, 1, dtype))
        memories = []
        for layer, (k, v, queries) in sorted(self._new.items()):
            site = Site(layer, "self", 1, 1, start // self.block, start, "clean", "main", grid)
            memories.append(self.run.memory(site))
            memories[-1].place(k, v, site)
            memories[-1].queries = queries
            memories[-1].finish_block(tokens)
        self.policy.commit(memories, site, self.run)
        self._new.clear()
        self._committed += tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; of what is kept too, or all of it where a tier cannot tell tokens apart."""
        super().crop(tokens_to_remove)
        length, gone = self.get_seq_length(), self._committed - self.get_seq_length()
        if gone <= 0:
            return
        memories = self.run.all_memories()
        if not all(type(tier) is ByHead for memory in memories for tier in memory.older):
            super().crop(length)
            self.run.flush()
            self._committed = 0
            return
        notes = self.run.scratch("cache", "main")
        for layer, memory in enumerate(memories):
            for tier in memory.older:
                assert isinstance(tier, ByHead)
                tier.crop(length)
            memory.crop(length, gone)
            for name, column in notes.get(str(layer), {}).items():
                notes[str(layer)][name] = column[..., : memory.exact.count]
        self._committed = length


class _NewTokens(RoomyLayer):
    """Counts tokens and holds none."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[2]
        return key_states, value_states
