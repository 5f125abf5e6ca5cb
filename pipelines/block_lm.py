"""Block-diffusion language models in diffusers' own `LLaDA2Pipeline`, with an exact cache of finished blocks.

from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from diffaccel.pipelines.block_lm import BlockLM, TokenCount

with BlockLM(lm, block_length=8, reuse=TokenCount(tau=2)) as model:
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(block_length=8), tokenizer=tokenizer)
    text = pipe("A tale of two boats", gen_length=128).texts[0]
print(model.report())

The pipeline forwards the whole text at every step. Where no token sees a later block, finished blocks need one forward
only: their keys and values are kept, and a step forwards the block at work (block caching: Arriola et al., BD3-LM,
arXiv 2503.09573; FlashBlock: arXiv 2602.05305).
"""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import ModuleType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from diffaccel import kernel
from diffaccel.errors import KnobError, NotEngagedError, UnsupportedError
from diffaccel.policy import CachePolicy
from diffaccel.reuse.token_count import TokenCount

from . import block_policy
from .block_attention import Answer, BlockCache, Counters, Pass, at_work
from .block_policy import KeptCache
from .fixed_step import FixedSteps

__all__ = ["BlockLM", "TokenCount"]

# root mean square of a difference, over that of the logits, which rounding may leave: by dtype where other shapes are
# computed, and where only a token differs that must not be seen
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_UNSEEN = 1e-5
_CHUNK = 2048  # tokens of a prompt forwarded at a time: their mask grows with it


@dataclass
class _Outside:
    """Stored attention of the block that begins at `start`, computed when its tokens were `tokens` (B, S)."""

    start: int
    tokens: Tensor
    dirty: Tensor
    stored: dict[Any, Any] = field(default_factory=dict)


@dataclass
class _Progress:
    """One generation: the cache and the (B, N) tokens, validity and positions it was written from."""

    cache: BlockCache = field(init=False)
    seen: tuple[Tensor, ...] = ()
    outside: _Outside | None = None
    fixed: FixedSteps | None = None
    counters: Counters = field(default_factory=Counters)
    new: Callable[[], BlockCache] = BlockCache

    def __post_init__(self) -> None:
        self.cache = self.new()

    def keep(self, window: tuple[Tensor, ...], start: int, block: int) -> int:
        """Crop the cache to the whole blocks before `start` that it was written from as they are now; their tokens."""
        cached = self.cache.get_seq_length()
        kept = min(cached, start)
        if not self.seen or self.seen[0].shape[0] != window[0].shape[0]:
            self.cache, kept, cached = self.new(), 0, 0
        elif not all(torch.equal(a[:, :kept], b[:, :kept]) for a, b in zip(self.seen, window, strict=True)):
            differs = [(a[:, :kept] != b[:, :kept]).any(0) for a, b in zip(self.seen, window, strict=True)]
            kept = int(torch.stack(differs).any(0).nonzero()[0]) // block * block
        if kept < cached:
            self.cache.crop(kept - cached)
        return self.cache.get_seq_length()


class BlockLM(nn.Module):
    """A transformers decoder as `model=` of `LLaDA2Pipeline`: block-causal, with a cache of finished blocks.

    Tokens of a block see each other and all earlier blocks, whatever mask the model would make for itself. A step
    returns the logits of the last block only, which is what the pipeline reads. The cache follows the tokens: whatever
    changes in a finished block, from a new prompt to a callback's edit, is forwarded again. Padding is never read.

    Args:
        lm: takes `input_ids, attention_mask` (4-D, additive), `position_ids, past_key_values`, and returns `.logits`.
        block_length: tokens of a block; must be the pipeline's.
        reuse: `TokenCount` reuses attention to finished blocks between steps (FlashBlock). It needs a model that
            attends through transformers' attention interface.
        cache: False forwards the whole text at every step: what the pipeline does by itself, as the dense arm. A cache
            policy, such as `SnapKV(budget=96, recent_frames=16)`, keeps a part of finished blocks; to it a token is a
            frame (`block_policy.py`). Without padding in finished blocks, and without graphs.
        approximate: cache although the model turns out not to be block-causal; the report says so.
        kernel: one of `diffaccel.kernel.CHOICES`, for the block at work.
        graphs: replay steps as CUDA graphs: "auto" where that is possible, and the report says why where it is not.

    Raises:
        KnobError: block_length below 1, `reuse` without a cache, or a budget that holds no more than what is protected.
        UnsupportedError: a cache policy that is of no use for text; from the first forward: the model is not
            block-causal, which is checked by running it, or its attention cannot be split, or graphs were asked for and
            are not possible, or a cache policy meets padding.
        NotEngagedError: on leaving `with`, if `reuse` was asked for and nothing was ever reused, or a cache policy and
            it kept everything.
    """

    lm: Any

    def __init__(
        self,
        lm: nn.Module,
        block_length: int,
        *,
        reuse: TokenCount | None = None,
        cache: bool | CachePolicy = True,
        approximate: bool = False,
        kernel: str = "auto",
        graphs: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if block_length < 1:
            raise KnobError(f"block_length is a number of tokens >= 1, got {block_length}")
        if reuse is not None and cache is False:
            raise KnobError("reuse needs the cache of finished blocks, got cache=False; drop one of the two")
        self.lm, self.block_length = lm, block_length
        if graphs not in (True, False, "auto"):
            raise KnobError(f"graphs is True, False or 'auto', got {graphs!r}")
        self.reuse, self.cached, self.approximate, self.kernel, self.graphs = (
            reuse, cache is not False, approximate, kernel, graphs
        )  # fmt: skip
        self.policy = None if isinstance(cache, bool) else cache
        if self.policy is not None:
            block_policy.check(self.policy)
        self.doubts: list[str] = []
        self.no_graphs: str | None = None
        self._checked: tuple[torch.device, torch.dtype] | None = None
        self._interface = bool(getattr(lm, "_can_set_attn_implementation", lambda: False)())
        self._keeps_logits = "logits_to_keep" in inspect.signature(lm.forward).parameters
        self.reset()
        self._refuse_windows()

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.lm.parameters()).dtype

    def reset(self) -> None:
        """Forget the cache and the counters."""
        self._progress = self._afresh(Counters())

    def _afresh(self, counters: Counters) -> _Progress:
        policy = self.policy
        if policy is None or policy.is_exact:
            return _Progress(counters=counters)
        return _Progress(counters=counters, new=lambda: KeptCache(policy, self.kernel, self.block_length))

    def __enter__(self) -> "BlockLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._progress = self._afresh(self._progress.counters)  # frees the cache
        if kind is None:
            self.require_engaged()

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> CausalLMOutputWithPast:
        """Logits (B, block_length, V) of the last block of `input_ids` (B, N), N whole blocks.

        `attention_mask` (B, N) is 0 where a token is padding, `position_ids` (B, N) count from 0 where left out.
        """
        batch, length = input_ids.shape
        if length % self.block_length or not length:
            raise UnsupportedError(
                f"the text must be whole blocks of block_length={self.block_length} tokens, got {length} tokens; "
                "give BlockLM and the pipeline the same block_length"
            )
        self.check()
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device).expand(batch, -1)
        logits = self._forward(self._progress, (input_ids, valid, position_ids))
        return CausalLMOutputWithPast(logits=logits)

    def _forward(self, progress: _Progress, window: tuple[Tensor, ...]) -> Tensor:
        counters, (batch, length) = progress.counters, window[0].shape
        counters.passes += 1
        counters.tokens_uncached += batch * length
        if not self.cached:
            counters.tokens_forwarded += batch * length
            return self._logits(window, None, self._additive(window[1], 0, length))
        block, start = self.block_length, length - self.block_length
        if isinstance(progress.cache, KeptCache) and not bool(window[1][:, :start].all()):
            raise UnsupportedError(
                f"{type(self.policy).__name__} chooses among tokens that every row has, and finished blocks hold "
                "padding here; write texts with prompts of one length together, or one at a time"
            )
        kept = progress.keep(window, start, block)
        counters.tokens_forwarded += batch * (length - kept)
        replayed = bool(start) and self.no_graphs is None and bool(window[1].all())
        progress.seen = tuple(part[:, :start].clone() for part in window) if kept < start else progress.seen
        try:
            chooses = isinstance(progress.cache, KeptCache)  # then finished blocks are forwarded in passes of their own
            while start - kept > (0 if chooses else block * bool(kept) if replayed else _CHUNK):
                stop = min(start, kept + _CHUNK // block * block + block)
                before = tuple(part[:, :stop] for part in window)
                self._run(progress, before, kept, self._pass(before, kept, Counters()))
                if isinstance(progress.cache, KeptCache):
                    progress.cache.commit()
                    progress.counters.note_kept(progress.cache.tokens, stop, progress.cache.engaged)
                kept = stop
            answer, dirty = self._answer(progress, window[0], kept)
            if replayed and (logits := self._replay(progress, window, kept, answer, dirty)) is not None:
                return logits
            now = self._pass(window, kept, counters)
            now.answer, now.dirty, now.drop = answer, dirty, self.reuse is not None and self.reuse.dirty == "drop"
            now.stored = now.stored if progress.outside is None else progress.outside.stored
            logits = self._run(progress, window, kept, now)
            progress.cache.crop(-block)
        except BaseException:
            progress.cache, progress.seen, progress.fixed = progress.new(), (), None  # may hold different tokens now
            raise
        return logits

    def _run(self, progress: _Progress, window: tuple[Tensor, ...], kept: int, now: Pass) -> Tensor:
        """Logits of the last block; all tokens from `kept` on are put into the cache."""
        new = tuple(part[:, kept:] for part in window)
        now.kept = progress.cache if isinstance(progress.cache, KeptCache) else None
        now.before = window[0].shape[1] - self.block_length
        if not self._interface:
            return self._logits(new, progress.cache, self._additive(window[1], kept, window[0].shape[1]))
        with at_work(self.lm, now):
            return self._logits(new, progress.cache, None)

    def _pass(self, window: tuple[Tensor, ...], kept: int, counters: Counters) -> Pass:
        (tokens, valid, _), block = window, self.block_length
        start = tokens.shape[1] - block
        outside = inside = None
        if not bool(valid.all()):  # of each part alone: the tail of the last block is padding in most texts
            allowed = self._allowed(valid, start, start + block)
            outside = None if bool(valid[:, :start].all()) else allowed[..., :start]
            inside = None if bool(valid[:, start:].all()) else allowed[..., start:]
        mask = self._additive(valid, kept, start) if kept < start else None
        return Pass(start - kept, mask, outside, inside, self.kernel, counters)

    def _answer(self, progress: _Progress, tokens: Tensor, kept: int) -> tuple[Answer, Tensor | None]:
        """What to do with attention outside the block, and which of its tokens (B, S) changed, if any of them did."""
        start, counters = tokens.shape[1] - self.block_length, progress.counters
        if self.reuse is None or not start:
            return "together", None
        last, at_work = progress.outside, tokens[:, start:]
        changed = None
        if kept == start and last is not None and last.start == start:
            dirty = at_work != last.tokens
            if not bool((last.dirty & ~dirty).any()):  # a token that is masked again begins another generation
                changed = int(dirty.sum(1).max())
                fewest = counters.fewest_changed
                counters.fewest_changed = changed if fewest is None else min(changed, fewest)
        answer = self.reuse.answer(changed)
        if answer != "reuse":
            progress.outside = _Outside(start, at_work.clone(), torch.zeros_like(at_work, dtype=torch.bool))
            return answer, None
        assert last is not None
        last.dirty = dirty
        return answer, dirty if changed and self.reuse.dirty != "keep" else None

    # -- CUDA graphs --------------------------------------------------------------------------------------------------

    def _find_no_graphs(self) -> str | None:
        """Why steps cannot be replayed as CUDA graphs, or None."""
        if self.graphs is False:
            return "graphs=False"
        if self.policy is not None and not self.policy.is_exact:
            return f"{type(self.policy).__name__} keeps another number of tokens after every block"
        if not self._interface:
            return f"{type(self.lm).__name__} does not attend through transformers' attention interface"
        if self.device.type != "cuda":
            return f"CUDA graphs are for CUDA, and the model is on {self.device.type}"
        if (chosen := self._resolve()) is not kernel.fa3:
            why = kernel.fa3.unusable(self.device, self.dtype, self._head_dim) or f"kernel={self.kernel!r}"
            return f"only the kernel fa3 reads on the GPU how full the cache is, not {chosen.name}: {why}"
        return None

    @property
    def _head_dim(self) -> int:
        config = self.lm.config.get_text_config()
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def _resolve(self) -> ModuleType:
        return kernel.resolve(self.kernel, self.device, self.dtype, self._head_dim)

    def _refuse_graphs(self, why: str | None) -> None:
        self.no_graphs = why
        if why and self.graphs is True:
            raise UnsupportedError(f"graphs=True, and {why}; use graphs='auto' to go without where they cannot be")

    def _replay(
        self, progress: _Progress, window: tuple[Tensor, ...], kept: int, answer: Answer, dirty: Tensor | None
    ) -> Tensor | None:
        """Logits of the last block by a captured step; None where the model turns out not to be capturable."""
        (batch, length), block, cache = window[0].shape, self.block_length, progress.cache
        start = length - block
        pending, chosen = start - kept, self._resolve()
        for layer in cache.layers:
            layer.reserve(length)
        fixed, drop = progress.fixed, self.reuse is not None and self.reuse.dirty == "drop"
        if fixed is None or not fixed.fits(cache, batch, weights=pending > 0):
            heads = self.lm.config.get_text_config().num_attention_heads
            fixed = progress.fixed = FixedSteps(self.lm, cache, batch, block, heads, chosen)
        captured = fixed.captured
        try:
            logits = fixed(window[0][:, kept:], window[2][:, kept:], kept, answer, dirty, drop)
        except UnsupportedError as error:
            progress.fixed = None
            self._refuse_graphs(str(error))
            return None
        if answer == "store":
            assert progress.outside is not None
            progress.outside.stored = dict(enumerate(fixed.stored))
        counters = progress.counters
        counters.graphs_captured += fixed.captured - captured
        counters.graphs_replayed += 1
        rows = 0 if dirty is None or drop else block
        counters.note(answer, batch, block, start, rows, layers=len(cache.layers))
        return logits

    def _logits(
        self, window: tuple[Tensor, ...], cache: BlockCache | None, mask: Tensor | None, *, whole: bool = False
    ) -> Tensor:
        keep = {"logits_to_keep": self.block_length} if self._keeps_logits and not whole else {}
        ids, _, positions = window
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        logits = self.lm(**given, use_cache=cache is not None, **keep).logits
        return logits if whole else logits[:, -self.block_length :]

    def _allowed(self, valid: Tensor, start: int, stop: int) -> Tensor:
        """(B, stop - start, stop): which keys tokens from `start` on see. All but padding in their block and earlier
        ones, and themselves: padding that sees nothing else would be a softmax over no key."""
        index = torch.arange(stop, device=valid.device)
        blocks = index // self.block_length
        causal = blocks <= blocks[start:, None]
        return causal & (valid[:, None, :stop] | (index == index[start:, None]))

    def _additive(self, valid: Tensor, start: int, stop: int) -> Tensor:
        """`_allowed` as what is added to scores, (B, 1, stop - start, stop)."""
        allowed = self._allowed(valid, start, stop)[:, None]
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=valid.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)

    # -- is the cache exact, did the reuse engage ---------------------------------------------------------------------

    def _refuse_windows(self) -> None:
        config: Any = getattr(self.lm, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if (types and set(types) != {"full_attention"}) or (not types and window):
            met = f"layer types {', '.join(sorted(set(types)))}" if types else f"a sliding window of {window} tokens"
            raise UnsupportedError(
                f"finished blocks are read whole, so every layer must attend to all of the text, and "
                f"{type(self.lm).__name__} has {met}; use a model with full attention only"
            )

    def check(self) -> None:
        """Run the model on a few blocks of random tokens: is it block-causal, do cached logits equal uncached ones?

        Once for a device and dtype. Raises `UnsupportedError` with what was found, unless `approximate`, where
        `doubts` and the report hold it.
        """
        where = (self.device, self.dtype)
        if self._checked == where:
            return
        self._progress = self._afresh(self._progress.counters)  # a cache elsewhere is of no use here
        with torch.no_grad():
            self.doubts = [] if not self.cached else self._find_doubts()
        if not self.cached:
            self._refuse_graphs("cache=False forwards the whole text at every step")
        if self.doubts and not self.approximate:
            raise UnsupportedError(
                f"a cache of finished blocks is exact only for a block-causal model, and {type(self.lm).__name__} is "
                f"not: {'; '.join(self.doubts)}; use cache=False, or approximate=True to cache all the same"
            )
        self._checked = where

    def _find_doubts(self) -> list[str]:
        block, device, training = self.block_length, self.device, self.lm.training
        vocabulary = self.lm.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (1, 3 * block), generator=torch.Generator().manual_seed(0)).to(device)
        later, same = ids.clone(), ids.clone()
        later[:, 2 * block :] = (ids[:, 2 * block :] + 1) % vocabulary
        same[:, 2 * block - 1] = (ids[:, 2 * block - 1] + 1) % vocabulary
        self.lm.eval()
        try:
            usual = self._uncached(ids)
            unseen = max(_UNSEEN, torch.finfo(self.dtype).eps)
            found = []
            leak = _difference(self._uncached(later)[:, : 2 * block], usual[:, : 2 * block])
            if leak > unseen:
                found.append(
                    f"other tokens in a later block change the logits of earlier ones by {leak:.2g} of their size"
                )
            inner = slice(block, 2 * block - 1)
            if block > 1 and _difference(self._uncached(same)[:, inner], usual[:, inner]) <= unseen:
                found.append("a token does not see the later ones of its own block, so the model reads no 4-D mask")
            noise = self._noise(ids, usual)
            gap = self._cached_gap(ids, usual)
        finally:
            self.lm.train(training)
        if gap > max(_ROUNDING.get(self.dtype, _ROUNDING[torch.bfloat16]), 4 * noise):
            found.append(f"logits with the cache differ from those without by {gap:.2g} of their size")
        return found

    def _noise(self, ids: Tensor, usual: Tensor) -> float:
        """How far the logits move if the embeddings are off by their rounding: deep models amplify it."""
        generator = torch.Generator().manual_seed(1)

        def shake(_: Any, __: Any, hidden: Tensor) -> Tensor:
            noise = torch.randn(hidden.shape, generator=generator).to(hidden)
            return hidden * (1 + torch.finfo(self.dtype).eps * noise)

        hook = self.lm.get_input_embeddings().register_forward_hook(shake)
        try:
            return _difference(self._uncached(ids), usual)
        finally:
            hook.remove()

    def _uncached(self, ids: Tensor) -> Tensor:
        valid, positions = torch.ones_like(ids, dtype=torch.bool), torch.arange(ids.shape[1], device=ids.device)[None]
        return self._logits((ids, valid, positions), None, self._additive(valid, 0, ids.shape[1]), whole=True)

    def _cached_gap(self, ids: Tensor, usual: Tensor) -> float:
        """The largest difference of cached logits, over two windows and a second step in the last of them."""
        self.no_graphs = "not yet"
        gaps, calls = self._gaps(ids, usual)
        if self._interface and not calls:
            self._interface = False  # it says it attends through the interface, and does not
            gaps, _ = self._gaps(ids, usual)
        asked = "reuse" if self.reuse is not None else "a cache policy" if self.policy is not None else None
        if asked and not self._interface:
            raise UnsupportedError(
                f"{asked} needs a model that attends through transformers' attention interface, and "
                f"{type(self.lm).__name__} does not; leave {asked} out, the cache works without"
            )
        self._refuse_graphs(self._find_no_graphs())
        if self.no_graphs is None:
            gaps += self._gaps(ids, usual)[0]
        return max(gaps)

    def _gaps(self, ids: Tensor, usual: Tensor) -> tuple[list[float], int]:
        """Differences, and how many attention calls there were."""
        block, progress, gaps = self.block_length, _Progress(), []
        for stop in (2 * block, 3 * block, 3 * block):
            part = ids[:, :stop]
            window = (part, torch.ones_like(part, dtype=torch.bool), torch.arange(stop, device=ids.device)[None])
            gaps.append(_difference(self._forward(progress, window), usual[:, stop - block : stop]))
        return gaps, progress.counters.calls

    def require_engaged(self) -> None:
        """Raise `NotEngagedError` with the reason if a technique was asked for and never did anything."""
        counters, reuse, policy = self._progress.counters, self.reuse, self.policy
        if policy is not None and not policy.is_exact and not counters.kept_less:
            raise NotEngagedError(
                f"{type(policy).__name__} (cache) was asked for and never changed what is kept: texts had up to "
                f"{counters.most_seen} tokens in finished blocks; write longer ones, or keep fewer tokens"
            )
        if reuse is None or reuse.is_exact or counters.external_reused:
            return
        if not counters.passes:
            why = "nothing was generated"
        elif counters.fewest_changed is None:
            why = "no block with finished ones before it took a second step: generate more tokens, or take more steps"
        else:
            why = (
                f"every step changed at least tau={reuse.tau} tokens, the fewest were {counters.fewest_changed}: "
                "raise tau, or take more steps or a higher threshold, so that a step unmasks fewer"
            )
        raise NotEngagedError(f"TokenCount (reuse) was asked for and never reused anything: {why}")

    def report(self) -> dict[str, Any]:
        """What was forwarded and computed, as plain data: the fields of `Counters`, `external_share` computed of the
        query-key pairs outside the block (None without any), and what is approximate about it."""
        counters = self._progress.counters
        share = counters.pairs_computed / counters.pairs_total if counters.pairs_total else None
        lossy = self.reuse is not None and not self.reuse.is_exact
        return {
            **asdict(counters),
            "external_share": share,
            "cache": self.cached,
            "policy": None if self.policy is None else {"method": type(self.policy).__name__, **self.policy.values()},
            "reuse": None if self.reuse is None else self.reuse.values(),
            "interface": self._interface,
            "no_graphs": self.no_graphs,
            "approximate": [
                *self.doubts,
                *(["attention to finished blocks is reused"] if lossy else []),
                *(["finished blocks are kept in part"] if self.policy is not None and not self.policy.is_exact else []),
            ],
        }


def _difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference over that of `b`."""
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
