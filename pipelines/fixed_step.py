"""A denoising step of a block-diffusion language model at fixed shapes, replayed as a CUDA graph.

A step forwards a handful of tokens, and launching its kernels takes the host several times longer than running them
takes the GPU. What differs from step to step lies in tensors here: tokens, positions, how much of the cache is filled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import UnsupportedError
from diffaccel.kernel import Partial, fa3, merge

from .block_attention import Answer, BlockCache, at_work, grouped


@dataclass
class FixedPass:
    """As `Pass`, where all that a call reads is a tensor that stays where it is.

    `past` (B,) int32 counts the filled keys of the cache. `pending` tokens, none or the block before, are written
    behind them, at `place` (pending,). `stored`, a partial a layer, is written where the answer is "store" and read
    where it is "reuse"; `dirty` (B, S) are the tokens that changed in between.
    """

    kernel: ModuleType
    cache: BlockCache
    stored: list[Partial]
    past: Tensor
    place: Tensor
    dirty: Tensor
    pending: int
    answer: Answer
    drop: bool

    def run(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of all tokens of the pass, (B, pending + S, H, D), from tensors as transformers has them."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        layer: Any = module.layer_idx
        if self.answer == "together" and not self.pending:
            return self._cached(q, layer, scale, (k, v)).out
        before, block = slice(0, self.pending), slice(self.pending, None)

        def own(rows: slice, keys: slice) -> Partial:
            return grouped(self.kernel, q[:, rows], k[:, keys], v[:, keys], scale)

        if self.answer == "reuse":
            return merge([self._reused(q, layer, scale), own(block, block)]).out
        outside, finished = self._cached(q, layer, scale), []
        if self.pending:
            finished = [merge([_rows(outside, before), own(before, before)]).out]
            outside = merge([_rows(outside, block), own(block, before)])
            held: Any = self.cache.layers[layer]
            held.keys.index_copy_(2, self.place, key[:, :, before])
            held.values.index_copy_(2, self.place, value[:, :, before])
        if self.answer == "store":
            for kept, new in zip(self.stored[layer], outside, strict=True):
                kept.copy_(new)
        return torch.cat([*finished, merge([outside, own(block, block)]).out], dim=1)

    def _cached(self, q: Tensor, layer: int, scale: float, new: tuple[Tensor, Tensor] | None = None) -> Partial:
        held: Any = self.cache.layers[layer]
        keys, values = held.keys.transpose(1, 2), held.values.transpose(1, 2)
        if self.kernel is fa3:
            return fa3.over_cache(q, keys, values, self.past, scale=scale, new=new)
        used = int(self.past[0])  # without a graph, which takes fa3
        outside = grouped(self.kernel, q, keys[:, :used], values[:, :used], scale)
        return outside if new is None else merge([outside, grouped(self.kernel, q, *new, scale)])

    def _reused(self, q: Tensor, layer: int, scale: float) -> Partial:
        stored = self.stored[layer]
        if self.drop:
            return Partial(stored.out, stored.lse.masked_fill(self.dirty[..., None], -torch.inf))
        fresh = self._cached(q, layer, scale)  # of all rows: it is the past that takes the time
        out = torch.where(self.dirty[..., None, None], fresh.out, stored.out)
        return Partial(out, torch.where(self.dirty[..., None], fresh.lse, stored.lse))


def _rows(partial: Partial, rows: slice) -> Partial:
    return Partial(partial.out[:, rows], partial.lse[:, rows])


class FixedSteps:
    """The steps of one model over one cache, each captured the first time that it is asked for.

    They hold as long as `fits` says so: buffers that grew and weights that moved are elsewhere.

    Raises:
        UnsupportedError: from a step, if the model cannot be captured; nothing has happened then.
    """

    def __init__(self, lm: Any, cache: BlockCache, batch: int, block: int, heads: int, kernel: ModuleType) -> None:
        self.lm, self.cache, self.block, self.kernel = lm, cache, block, kernel
        self.captured = 0
        buffer: Any = cache.layers[0].keys
        self._buffer, self._weights, self._shape = buffer, _places(lm), (batch, block)
        device = buffer.device
        self._past = torch.zeros(batch, dtype=torch.int32, device=device)
        self._range = torch.arange(block, device=device)
        self._place = self._range.clone()
        self._dirty = torch.zeros(batch, block, dtype=torch.bool, device=device)
        sizes = (batch, block, heads)
        self.stored = [
            Partial(buffer.new_zeros(*sizes, buffer.shape[3]), torch.zeros(sizes, device=device)) for _ in cache.layers
        ]
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._steps: dict[tuple[int, Answer, bool], Callable[[Tensor, Tensor], Tensor]] = {}

    def fits(self, cache: BlockCache, batch: int, *, weights: bool) -> bool:
        """Whether buffers and, where asked for, weights are still where they were."""
        same = cache is self.cache and batch == self._shape[0] and cache.layers[0].keys is self._buffer
        return same and (not weights or _places(self.lm) == self._weights)

    def __call__(
        self, tokens: Tensor, positions: Tensor, past: int, answer: Answer, dirty: Tensor | None, drop: bool
    ) -> Tensor:
        """Logits (B, S, V) of the block at work, the last S of `tokens` (B, pending + S), behind `past` cached ones."""
        pending = tokens.shape[1] - self.block
        self._past.fill_(past)
        torch.add(self._range, past, out=self._place)
        if dirty is None:
            self._dirty.zero_()
        else:
            self._dirty.copy_(dirty)
        kind = (pending, answer, drop or dirty is None)
        if kind not in self._steps:
            self._steps[kind] = self._prepare(tokens.clone(), positions.clone(), *kind)
        logits = self._steps[kind](tokens, positions)
        if pending:
            for layer in self.cache.layers:
                layer.length = past + pending
        return logits

    def _prepare(
        self, tokens: Tensor, positions: Tensor, pending: int, answer: Answer, drop: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        now = FixedPass(
            self.kernel, self.cache, self.stored, self._past, self._place, self._dirty, pending, answer, drop
        )

        def forward() -> Tensor:
            with at_work(self.lm, now):
                given = {"input_ids": tokens, "position_ids": positions, "logits_to_keep": self.block}
                found: Tensor = self.lm(**given, use_cache=False).logits
                return found

        replay = forward if tokens.device.type == "cpu" else self._capture(forward)

        def step(new_tokens: Tensor, new_positions: Tensor) -> Tensor:
            tokens.copy_(new_tokens)
            positions.copy_(new_positions)
            return replay()

        return step

    def _capture(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                forward()  # kernels are compiled and libraries initialised outside of the capture
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._pool):
                logits = forward()
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise UnsupportedError(f"{type(self.lm).__name__} cannot be captured as a CUDA graph: {why}") from error
        self.captured += 1

        def replay() -> Tensor:
            graph.replay()
            return logits.clone()

        return replay


def _places(lm: nn.Module) -> int:
    return hash(tuple(parameter.data_ptr() for parameter in lm.parameters()))
