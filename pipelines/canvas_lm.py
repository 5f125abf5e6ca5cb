"""FlashBlock in diffusers' own `DiffusionGemmaPipeline`, which keeps a cache of its encoder itself.

from diffaccel import FlashBlock
from diffaccel.pipelines.canvas_lm import CanvasLM

with CanvasLM(lm, reuse=FlashBlock(refresh=2)) as model:
    pipe = DiffusionGemmaPipeline(model=model, scheduler=scheduler, processor=processor)
    text = pipe("A tale of two boats", gen_length=512).texts[0]
print(model.report())
"""

from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
from torch import nn

from diffaccel.errors import NotEngagedError, UnsupportedError
from diffaccel.kernel import Partial
from diffaccel.reuse.flashblock import FlashBlock

from .block_attention import CANVAS, Counters, Pass, at_work


class CanvasLM(nn.Module):
    """A DiffusionGemma model as `model=` of `DiffusionGemmaPipeline`, whose decoder reuses attention to the context.

    A canvas is denoised over many forwards against the encoder's cache, which does not change meanwhile. Its tokens are
    drawn anew at random until they are committed, so `TokenCount` would never reuse: the fixed steps of `FlashBlock`
    decide, counted in forwards of the decoder, for all heads. `min_past` is the context over the canvas, in tokens.
    Attention to the context is what is saved; the decoder still copies its cache beside the canvas at every forward.

    Args:
        lm: `DiffusionGemmaForBlockDiffusion`.
        reuse: `FlashBlock` with `refresh` and `min_past`.
        kernel: one of `diffaccel.kernel.CHOICES`.

    Raises:
        UnsupportedError: a knob of `reuse` that is for video, a static cache, or a model without the interface.
        NotEngagedError: on leaving `with`, if nothing was ever reused.
    """

    lm: Any

    def __init__(self, lm: nn.Module, reuse: FlashBlock, *, kernel: str = "auto") -> None:
        super().__init__()
        self.lm, self.reuse, self.kernel = lm, reuse, kernel
        other = {name: value for name, value in reuse.values().items() if value != reuse.defaults()[name]}
        for name in other.keys() - {"refresh", "min_past"}:
            raise UnsupportedError(
                f"FlashBlock over a canvas has refresh and min_past, got {name}={other[name]!r}; leave it out"
            )
        self.reset()

    @property
    def config(self) -> Any:
        return self.lm.config

    @property
    def model(self) -> Any:
        """The inner model, whose encoder the pipeline calls."""
        return self.lm.model

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    def reset(self) -> None:
        """Forget the stored attention and the counters."""
        self.counters = Counters()
        self._forget()

    def _forget(self) -> None:
        self._stored: dict[Any, Partial] = {}
        self._cache, self._past, self._step = None, 0, 0

    def __enter__(self) -> "CanvasLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._forget()
        if kind is None:
            self.require_engaged()

    def forward(self, *, decoder_input_ids: torch.Tensor, past_key_values: Any, **given: Any) -> Any:
        """One denoising step of a canvas (B, S) against the encoder's cache; returns what the model does."""
        if past_key_values.is_compileable:
            raise UnsupportedError(
                "a static cache holds the canvas in its middle, so context and canvas cannot be read apart; "
                "leave cache_implementation out"
            )
        past, counters = int(past_key_values.get_seq_length()), self.counters
        if past_key_values is not self._cache or past != self._past:
            self._forget()
            self._cache, self._past = past_key_values, past
        now = Pass(0, None, None, None, self.kernel, counters, stored=self._stored)
        if past >= self.reuse.min_past * decoder_input_ids.shape[1]:
            now.answer = "reuse" if not self._computes(self._step) else "store"
            if now.answer == "store" and self._computes(self._step + 1):
                now.answer = "together"
        self._step += 1
        counters.passes += 1
        counters.tokens_forwarded += decoder_input_ids.numel()
        calls = counters.calls
        with at_work(self.lm, now, CANVAS):
            result = self.lm(decoder_input_ids=decoder_input_ids, past_key_values=past_key_values, **given)
        if counters.calls == calls:
            raise UnsupportedError(
                f"{type(self.lm).__name__} does not attend through transformers' attention interface; use it unwrapped"
            )
        return result

    def _computes(self, step: int) -> bool:
        refresh = self.reuse.refresh
        return step % refresh == 0 if isinstance(refresh, int) else step == 0 or step in refresh

    def require_engaged(self) -> None:
        """Raise `NotEngagedError` with the reason if nothing was ever reused."""
        if self.reuse.refresh == 1 or self.counters.external_reused:
            return
        if not self.counters.passes:
            why = "nothing was generated"
        else:
            why = (
                f"no canvas had a context of min_past={self.reuse.min_past:g} times its length and a step between "
                f"those of refresh={self.reuse.refresh!r}: use a longer prompt, more steps or a lower min_past"
            )
        raise NotEngagedError(f"FlashBlock (reuse) was asked for and never reused anything: {why}")

    def report(self) -> dict[str, Any]:
        """The fields of `Counters`, of the decoder, and `external_share`, computed of the query-key pairs outside the
        canvas (None without any)."""
        counters = self.counters
        share = counters.pairs_computed / counters.pairs_total if counters.pairs_total else None
        lossy = ["attention to the context is reused"] if self.reuse.refresh != 1 else []
        return {**asdict(counters), "external_share": share, "reuse": self.reuse.values(), "approximate": lossy}
