"""CogVideoX: `CogVideoXTransformer3DModel`, whose attention is joint over text and video, text first."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.joint import Text
from diffaccel.port import Port
from diffaccel.rotary import rotate
from diffaccel.run import Run

from ._diffusers import CogVideoXAttnProcessor2_0
from .common import Family, RootHook, ToSeam, exchange
from .joint import KEEPS_PROMPT, project


class CogVideoX(Family):
    """The family of `CogVideoXPipeline`, its image-, video- and control-to-video variants, 1.0 and 1.5."""

    name = "CogVideoX"
    model = CogVideoXTransformer3DModel
    parts = ("joint",)

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        return KEEPS_PROMPT if slot == "prompt" else None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        blocks = enumerate(denoiser.transformer_blocks, first_layer)
        ports = [(block.attn1, Port(run, layer, "self")) for layer, block in blocks]
        hook = _RootHook(run, self.geometry(denoiser).patch)
        return exchange(denoiser, ports, CogVideoXAttnProcessor2_0, _Processor, hook)


class _RootHook(RootHook):
    arguments = ("hidden_states", "encoder_hidden_states", "timestep")

    def grid(self, given: dict[str, Any]) -> Grid:
        """Of latents (B, L, C, h, w): frames stand before channels."""
        return super().grid({**given, "hidden_states": given["hidden_states"].transpose(1, 2)})

    def text(self, arguments: dict[str, Any]) -> Text:
        """The model reads padding too."""
        rows, tokens = arguments["encoder_hidden_states"].shape[:2]
        return Text(tokens, (tokens,) * rows, first=True)

    def step(self, given: dict[str, Any]) -> tuple[int | None, int | None]:
        """Its own schedulers count no steps: there it is the place of the timestep among theirs."""
        scheduler = getattr(self.run.pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or hasattr(scheduler, "step_index"):
            return super().step(given)
        now = torch.as_tensor(given["timestep"], device=timesteps.device).flatten()[0]
        found = (timesteps == now).nonzero().flatten().tolist()
        return (found[0], len(timesteps)) if found else super().step(given)


class _Processor(ToSeam, CogVideoXAttnProcessor2_0):
    """The stock processor with its kernel call replaced by the seam."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise UnsupportedError("attention masks do not pass through diffaccel: call the pipeline without one")
        words = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        q, k, v = project(attn, x, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if image_rotary_emb is not None:
            cos, sin = (table[:, None].to(q.device) for table in image_rotary_emb)
            q, k = (torch.cat([x[:, :words], rotate(x[:, words:], cos, sin)], 1) for x in (q, k))
        out = attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2, 3).type_as(q)))
        return out[:, words:], out[:, :words]
