"""HunyuanVideo: `HunyuanVideoTransformer3DModel`, whose attention is joint over video and text, text last."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel

from diffaccel.joint import Text
from diffaccel.port import Port
from diffaccel.run import Run

from ._diffusers import HunyuanVideoAttnProcessor2_0
from .common import Family, RootHook, exchange
from .joint import KEEPS_PROMPT, JointToSeam


class HunyuanVideo(Family):
    """The family of `HunyuanVideoPipeline` and its image-to-video variants, guidance-distilled or not."""

    name = "HunyuanVideo"
    model = HunyuanVideoTransformer3DModel
    parts = ("joint",)

    def layers(self, config: Any) -> int:
        return int(config.num_layers + config.num_single_layers)

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt":
            return KEEPS_PROMPT
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        return install(denoiser, run, first_layer, _RootHook(run, self.geometry(denoiser).patch))


def install(denoiser: Any, run: Run, first_layer: int, hook: RootHook) -> Callable[[], None]:
    """Bring the attention of HunyuanVideo's blocks to the seam, and put `hook` on the root of the model they are in."""
    blocks = [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
    ports = [(block.attn, Port(run, layer, "self")) for layer, block in enumerate(blocks, first_layer)]
    return exchange(denoiser, ports, HunyuanVideoAttnProcessor2_0, _Processor, hook)


class _RootHook(RootHook):
    arguments = (*RootHook.arguments, "encoder_attention_mask")

    def text(self, arguments: dict[str, Any]) -> Text:
        """Of each row the model reads as many text tokens, from the first on, as its mask has ones, wherever these."""
        mask_BN = arguments["encoder_attention_mask"]
        return Text(mask_BN.shape[1], tuple(mask_BN.sum(1, dtype=torch.int).tolist()))


class _Processor(JointToSeam, HunyuanVideoAttnProcessor2_0):
    """The stock processor with its kernel call replaced by the seam."""
