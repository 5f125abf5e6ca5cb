"""HunyuanVideo: `HunyuanVideoTransformer3DModel`, whose attention is joint over video and text, text last."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from diffaccel.backbone import Geometry
from diffaccel.joint import Text
from diffaccel.port import Port
from diffaccel.run import Run

from ._diffusers import HunyuanVideoAttnProcessor2_0
from .common import RootHook, exchange
from .joint import KEEPS_PROMPT, JointToSeam


class HunyuanVideo:
    """The family of `HunyuanVideoPipeline` and its image-to-video variants, guidance-distilled or not."""

    name = "HunyuanVideo"

    def denoisers(self, pipe: Any) -> list[nn.Module]:
        found = getattr(pipe, "transformer", None)
        return [found] if isinstance(found, HunyuanVideoTransformer3DModel) else []

    def geometry(self, denoiser: Any) -> Geometry:
        config = denoiser.config
        return Geometry(
            backbone=type(denoiser).__name__,
            layers=config.num_layers + config.num_single_layers,
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            patch=(config.patch_size_t, config.patch_size, config.patch_size),
            parts=("joint",),
        )

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt":
            return KEEPS_PROMPT
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        blocks = [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
        ports = [(block.attn, Port(run, layer, "self")) for layer, block in enumerate(blocks, first_layer)]
        hook = _RootHook(run, self.geometry(denoiser).patch)
        return exchange(denoiser, ports, HunyuanVideoAttnProcessor2_0, _Processor, hook)


class _RootHook(RootHook):
    arguments = (*RootHook.arguments, "encoder_attention_mask")

    def text(self, arguments: dict[str, Any]) -> Text:
        """Of each row the model reads as many text tokens, from the first on, as its mask has ones, wherever these."""
        mask_BN = arguments["encoder_attention_mask"]
        return Text(mask_BN.shape[1], tuple(mask_BN.sum(1, dtype=torch.int).tolist()))


class _Processor(JointToSeam, HunyuanVideoAttnProcessor2_0):
    """The stock processor with its kernel call replaced by the seam."""
