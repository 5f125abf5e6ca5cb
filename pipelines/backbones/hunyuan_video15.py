"""HunyuanVideo-1.5: `HunyuanVideo15Transformer3DModel`, joint attention over video, image and two encoders' text."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel

from diffaccel.joint import Text
from diffaccel.port import Port
from diffaccel.run import Run

from ._diffusers import HunyuanVideo15AttnProcessor2_0
from .common import Family, RootHook, exchange
from .joint import KEEPS_PROMPT, JointToSeam


class HunyuanVideo15(Family):
    """The family of `HunyuanVideo15Pipeline` and `HunyuanVideo15ImageToVideoPipeline`, under any guider."""

    name = "HunyuanVideo-1.5"
    model = HunyuanVideo15Transformer3DModel
    parts = ("joint",)

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        return KEEPS_PROMPT if slot == "prompt" else None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        blocks = enumerate(denoiser.transformer_blocks, first_layer)
        ports = [(block.attn, Port(run, layer, "self")) for layer, block in blocks]
        hook = _RootHook(run, self.geometry(denoiser).patch)
        return exchange(denoiser, ports, HunyuanVideo15AttnProcessor2_0, _Processor, hook)


class _RootHook(RootHook):
    arguments = (
        *RootHook.arguments,
        *("encoder_attention_mask", "timestep_r"),
        *("encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds"),
    )

    def text(self, arguments: dict[str, Any]) -> Text:
        """The model sorts what is read of image and texts to the front, the image's tokens if any is not zero."""
        image = arguments["image_embeds"]
        masks = arguments["encoder_attention_mask"], arguments["encoder_attention_mask_2"]
        read = sum(mask.bool().sum(1) for mask in masks) + image.shape[1] * torch.any(image != 0)
        return Text(image.shape[1] + sum(mask.shape[1] for mask in masks), tuple(read.tolist()))


class _Processor(JointToSeam, HunyuanVideo15AttnProcessor2_0):
    """The stock processor with its kernel call replaced by the seam."""
