"""Attention of a block-diffusion language model through transformers' attention interface, and its cache.

A pass forwards the tokens that are not cached yet (`pending`, finished blocks) and the block at work. Pending tokens
attend under a mask. The block at work sees everything, so it needs none: its attention is partial attention to what
lies outside the block merged with partial attention to its inside, and the outside may be reused (`TokenCount`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from diffaccel import kernel
from diffaccel.errors import UnsupportedError
from diffaccel.kernel import Partial, fa3, merge

if TYPE_CHECKING:
    from .block_policy import KeptCache

NAME, CANVAS = "diffaccel_block", "diffaccel_canvas"
"""What the attention is registered as; a model has it only while it forwards for `BlockLM` or `CanvasLM`."""

_CHANGES_SCORES = ("sliding_window", "softcap", "s_aux", "position_bias")


Answer = Literal["together", "store", "reuse"]
"""What to do with attention outside the block: read it with the block's own, compute it apart and keep it, reuse it."""


@dataclass
class Counters:
    """Sums over passes. Tokens are counted once for every row of the batch.

    `calls` are attention calls of the block at work, an "external" one is its attention to finished blocks; `pairs` of
    a query and a key outside the block, that dense attention would compute and that were. Graphs are of whole steps.
    """

    passes: int = 0
    tokens_forwarded: int = 0
    tokens_uncached: int = 0
    calls: int = 0
    external_computed: int = 0
    external_reused: int = 0
    pairs_total: int = 0
    pairs_computed: int = 0
    fewest_changed: int | None = None  # at a step that was not a block's first
    graphs_captured: int = 0
    graphs_replayed: int = 0
    most_seen: int = (
        0  # tokens of finished blocks, where a policy chooses among them, and the most kept: mean over layers
    )
    most_kept: int = 0
    kept_less: bool = False

    def note_kept(self, kept: int, seen: int, less: bool) -> None:
        """A policy went over finished blocks."""
        self.most_seen, self.most_kept = max(self.most_seen, seen), max(self.most_kept, kept)
        self.kept_less |= less

    def note(
        self, answer: str, batch: int, block: int, past: int, rows: int, read: int | None = None, layers: int = 1
    ) -> None:
        """A call in each of `layers`, which reads `read` of the tokens before the block, all unless told; `rows` of it
        are recomputed where the answer is "reuse"."""
        self.calls += layers
        if not past:
            return
        self.pairs_total += layers * batch * block * past
        self.pairs_computed += (
            layers * batch * (rows if answer == "reuse" else block) * (past if read is None else read)
        )
        if answer == "reuse":
            self.external_reused += layers
        else:
            self.external_computed += layers


@dataclass
class Pass:
    """What the attention calls of one forward pass have in common.

    `pending` tokens come before the block; `mask` is theirs, additive (B, 1, pending, N). `outside_allowed`
    (B, S, N - S) and `inside_allowed` (B, S, S) say which keys a query may read where there is padding, else None.
    `dirty` (B, S) are the tokens that changed since `stored`, a partial a layer, was computed; None if none did.
    `kept` holds what is left of finished blocks where a policy chooses, `before` is how many tokens they had then.
    """

    pending: int
    mask: Tensor | None
    outside_allowed: Tensor | None
    inside_allowed: Tensor | None
    kernel: str
    counters: Counters
    answer: Answer = "together"
    stored: dict[Any, Partial] = field(default_factory=dict)
    dirty: Tensor | None = None
    drop: bool = False
    kept: "KeptCache | None" = None
    before: int = 0

    def run(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of all tokens of the pass, (B, pending + S, H, D), from tensors as transformers has them."""
        written = key.shape[2] - query.shape[2] + self.pending  # what the block at work has before it
        before, q = query.split([self.pending, query.shape[2] - self.pending], dim=2)
        layer: Any = getattr(module, "layer_idx", module)
        out = self.attend(layer, q.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale)
        if not self.pending:
            return out
        past = key[:, :, :written], value[:, :, :written]
        if self.kept is not None and self.kept.count(layer):
            assert self.mask is not None
            own_k, own_v = (x.transpose(1, 2) for x in past)
            own = masked(before.transpose(1, 2), own_k, own_v, scale, self.mask[:, 0, :, -written:] == 0)
            finished = merge([self.kept.partial(layer, before.transpose(1, 2), scale), own]).out
            return torch.cat([finished, out], dim=1)
        finished, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, before, *past, self.mask, scaling=scale, is_causal=False)
        return torch.cat([finished, out], dim=1)

    def attend(self, layer: Any, q_BSHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, scale: float) -> Tensor:
        """Attention of the block at work, (B, S, H, D), to all N keys, the last S of which are its own."""
        read = _reader(self.kernel, q_BSHD, scale)
        block, past = q_BSHD.shape[1], k_BNGD.shape[1] - q_BSHD.shape[1]
        rows = 0 if self.dirty is None or self.drop else len(self.dirty_rows)
        held = 0 if self.kept is None else self.kept.count(layer)
        if self.kept is not None:
            self.kept.note(layer, q_BSHD, k_BNGD, v_BNGD, scale)
        self.counters.note(self.answer, q_BSHD.shape[0], block, self.before or past, rows, past + held)
        padded = self.outside_allowed is not None or self.inside_allowed is not None
        if not past + held or (self.answer == "together" and not padded and not held):
            return read(q_BSHD, k_BNGD, v_BNGD, self.inside_allowed).out

        def outside(q: Tensor, rows: Tensor | None = None) -> Partial:
            allowed = self.outside_allowed
            if allowed is not None and rows is not None:
                allowed = allowed[:, rows]
            parts = [read(q, k_BNGD[:, :past], v_BNGD[:, :past], allowed)] if past else []
            if held:
                assert self.kept is not None
                parts.append(self.kept.partial(layer, q, scale))
            return merge(parts)

        if self.answer == "reuse":
            external = self._reused(self.stored[layer], q_BSHD, outside)
        else:
            external = outside(q_BSHD)
            if self.answer == "store":
                self.stored[layer] = external
        inside = read(q_BSHD, k_BNGD[:, past:], v_BNGD[:, past:], self.inside_allowed)
        return merge([external, inside]).out

    @property
    def dirty_rows(self) -> Tensor:
        """Positions in the block that are dirty in any row of the batch."""
        if self._rows is None:
            assert self.dirty is not None
            self._rows = self.dirty.any(0).nonzero().squeeze(1)
        return self._rows

    _rows: Tensor | None = None

    def _reused(self, stored: Partial, q: Tensor, outside: Callable[..., Partial]) -> Partial:
        if self.dirty is None:
            return stored
        if self.drop:
            return Partial(stored.out, stored.lse.masked_fill(self.dirty[..., None], -torch.inf))
        rows = self.dirty_rows
        fresh, dirty = outside(q[:, rows], rows), self.dirty[:, rows, None]
        out, lse = stored.out.clone(), stored.lse.clone()
        out[:, rows] = torch.where(dirty[..., None], fresh.out, out[:, rows])
        lse[:, rows] = torch.where(dirty, fresh.lse, lse[:, rows])
        return Partial(out, lse)


def _reader(name: str, q: Tensor, scale: float) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Partial]:
    chosen = kernel.resolve(name, q.device, q.dtype, q.shape[-1])

    def read(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Partial:
        return grouped(chosen, q, k, v, scale) if allowed is None else masked(q, k, v, scale, allowed)

    return read


def grouped(chosen: ModuleType, q_BSHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, scale: float) -> Partial:
    """Partial attention where H/G neighbouring heads share a key: they become queries of that one head.

    No key is copied, which expanding G heads to H would do; every query reads every key, so their order is free.
    """
    g = k_BNGD.shape[2]
    if g == q_BSHD.shape[2] or chosen is fa3:  # which does this itself
        return chosen.partial(q_BSHD, k_BNGD, v_BNGD, scale=scale)
    return unfold(chosen.partial(fold(q_BSHD, g), k_BNGD, v_BNGD, scale=scale), q_BSHD)


def fold(q_BSHD: Tensor, heads: int) -> Tensor:
    """Queries (B, S * H / G, G, D) of G heads of keys, those of neighbouring heads after one another."""
    b, s, h, d = q_BSHD.shape
    return q_BSHD.reshape(b, s, heads, h // heads, d).transpose(2, 3).reshape(b, s * (h // heads), heads, d)


def unfold(folded: Partial, q_BSHD: Tensor) -> Partial:
    """The partial of `fold`ed queries as that of the queries."""
    (b, s, h, d), (out, lse) = q_BSHD.shape, folded
    g = out.shape[2]
    out = out.reshape(b, s, h // g, g, d).transpose(2, 3).reshape(b, s, h, d)
    return Partial(out, lse.reshape(b, s, h // g, g).transpose(2, 3).reshape(b, s, h))


def masked(q_BSHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, scale: float, allowed_BSN: Tensor) -> Partial:
    """`grouped` where each row of a batch has padding of its own; eager, in fp32. A query without a key gets 0."""
    b, s, h, d = q_BSHD.shape
    g = k_BNGD.shape[2]
    wide = torch.promote_types(q_BSHD.dtype, torch.float32)
    scores = torch.einsum("bsgrd,bngd->bsgrn", q_BSHD.reshape(b, s, g, h // g, d).to(wide), k_BNGD.to(wide)) * scale
    scores = scores.masked_fill(~allowed_BSN[:, :, None, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(wide).min)[..., None])
    out = torch.einsum("bsgrn,bngd->bsgrd", weights, v_BNGD.to(wide))
    return Partial(out.reshape(b, s, h, d).to(q_BSHD.dtype), lse.reshape(b, s, h).float())


class Attention(Protocol):
    """What the attention calls of a forward pass go through."""

    def run(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor: ...


_now: ContextVar[Attention] = ContextVar(NAME)


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, S, D), key and value (B, G, N, D) with the cache, out (B, S, H, D).

    The mask of the model is not read: which token sees which is settled by the pass. Raises `UnsupportedError` for
    attention that is not plain softmax over all keys.
    """
    _refuse_other_softmax(module, key, value, kwargs)
    return _now.get().run(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def canvas_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `block_attention`, where every query is of the block at work and the mask (B, 1, S, N) says what is padding.

    A layer with a sliding window holds the keys inside the window only, and reads all it holds.
    """
    _refuse_other_softmax(module, key, value, {**kwargs, "sliding_window": None})
    now, past = _now.get(), key.shape[2] - query.shape[2]
    assert isinstance(now, Pass)
    now.outside_allowed = now.inside_allowed = None
    if attention_mask is not None:
        allowed = (attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0)[:, 0]
        outside, inside = allowed[..., :past], allowed[..., past:]
        now.outside_allowed = None if bool(outside.all()) else outside
        now.inside_allowed = None if bool(inside.all()) else inside
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return now.attend(getattr(module, "layer_idx", module), *parts, scale), None


def _refuse_other_softmax(module: nn.Module, key: Tensor, value: Tensor, asked: dict[str, Any]) -> None:
    for name in _CHANGES_SCORES:
        if asked.get(name) is not None:
            raise UnsupportedError(
                f"attention to a whole block and all of its past is what can be split, and {type(module).__name__} "
                f"asks for {name}={asked[name]!r}; use a model without it"
            )
    if value.shape[-1] != key.shape[-1]:
        raise UnsupportedError(
            f"keys and values must be equally wide, and {type(module).__name__} has {key.shape[-1]} and "
            f"{value.shape[-1]} channels; use a model without latent attention"
        )


AttentionInterface.register(NAME, block_attention)
AttentionInterface.register(CANVAS, canvas_attention)


@contextmanager
def at_work(lm: Any, now: Attention, name: str = NAME) -> Iterator[None]:
    """The text model attends by what is registered as `name` for this pass; afterwards by what it had before."""
    config = lm.config.get_text_config()
    before = config._attn_implementation
    token = _now.set(now)
    config._attn_implementation = name  # what set_attn_implementation sets, without its 100 µs of checks
    try:
        yield
    finally:
        config._attn_implementation = before
        _now.reset(token)


_LEAST, _MOST = 512, 32768
"""Tokens that a cache grows by: as many as it holds, but no fewer than the first, a row, nor more than the second, over
the batch. Twice a long text would not fit a GPU."""


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer with room to grow: an update writes its own tokens and copies nothing of the past."""

    length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.length
        self.reserve(start + key_states.shape[2])
        self.length = start + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reserve(self, tokens: int) -> None:
        """Make room for so many; where there is, nothing moves."""
        if tokens > self.keys.shape[2]:
            more = min(max(self.length, _LEAST), max(_LEAST, _MOST // self.keys.shape[0]))
            size = max(tokens, self.length + more)
            self.keys, self.values = self._grown(self.keys, size), self._grown(self.values, size)

    def _grown(self, tensor: Tensor, size: int) -> Tensor:
        # Zeros: a kernel that reads the length on the GPU multiplies what lies behind it by 0, and 0 * nan is nan.
        room = tensor.new_zeros(*tensor.shape[:2], size, tensor.shape[3])
        room[:, :, : self.length] = tensor[:, :, : self.length]
        return room

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)


class BlockCache(DynamicCache):
    """A `DynamicCache` of `RoomyLayer`s."""

    def __init__(self) -> None:
        Cache.__init__(self, layer_class_to_replicate=RoomyLayer)
