"""Mochi: `MochiTransformer3DModel`, whose attention is joint over video and text, with rotary angles for every head."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import MochiTransformer3DModel
from torch import Tensor

from diffaccel.errors import UnsupportedError
from diffaccel.joint import Text
from diffaccel.port import Port
from diffaccel.rotary import turn
from diffaccel.run import Run

from ._diffusers import MochiAttnProcessor2_0
from .common import Family, RootHook, exchange
from .joint import KEEPS_PROMPT, JointToSeam


class Mochi(Family):
    """The family of `MochiPipeline`."""

    name = "Mochi"
    model = MochiTransformer3DModel
    parts = ("joint",)

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        return KEEPS_PROMPT if slot == "prompt" else None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        blocks = enumerate(denoiser.transformer_blocks, first_layer)
        ports = [(block.attn1, Port(run, layer, "self")) for layer, block in blocks]
        hook = _RootHook(run, self.geometry(denoiser).patch)
        return exchange(denoiser, ports, MochiAttnProcessor2_0, _Processor, hook)


class _RootHook(RootHook):
    arguments = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")

    def text(self, arguments: dict[str, Any]) -> Text:
        """The model reads the text tokens where its mask has ones, none of an empty prompt that is zeroed."""
        mask_BN = arguments["encoder_attention_mask"].bool()
        places = torch.arange(1, mask_BN.shape[1] + 1, device=mask_BN.device)
        valid, last = torch.stack([mask_BN.sum(1), (mask_BN * places).amax(1)]).tolist()
        if valid != last:
            raise UnsupportedError(
                f"padding of Mochi's prompt must lie behind its tokens, got masks of {valid} ones that end at {last}: "
                "pad on the right, as its own tokenizer does"
            )
        return Text(mask_BN.shape[1], tuple(valid))


class _Processor(JointToSeam, MochiAttnProcessor2_0):
    """The stock processor with its kernel call replaced by the seam."""

    def turned(self, x_BSHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """As there; tables are (S, H, D / 2)."""
        return turn(x_BSHD, *rotary)
