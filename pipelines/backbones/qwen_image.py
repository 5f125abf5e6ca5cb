"""Qwen-Image: `QwenImageTransformer2DModel`, images whose attention is joint over text and image, text first."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.joint import Text
from diffaccel.port import Port
from diffaccel.run import Run

from ._diffusers import QwenDoubleStreamAttnProcessor2_0, apply_rotary_emb_qwen
from .common import Family, RootHook, ToSeam, exchange
from .joint import KEEPS_PROMPT, project


class QwenImage(Family):
    """The family of `QwenImagePipeline`, its image-to-image, inpainting and control variants."""

    name = "Qwen-Image"
    model = QwenImageTransformer2DModel
    parts = ("joint",)

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        return KEEPS_PROMPT if slot == "prompt" else None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        blocks = enumerate(denoiser.transformer_blocks, first_layer)
        ports = [(block.attn, Port(run, layer, "self")) for layer, block in blocks]
        hook = _RootHook(run, self.geometry(denoiser).patch)
        return exchange(denoiser, ports, QwenDoubleStreamAttnProcessor2_0, _Processor, hook)


class _RootHook(RootHook):
    arguments = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes")

    def grid(self, given: dict[str, Any]) -> Grid:
        """The pipeline says of which images the tokens are, row by row of the batch."""
        first = given["img_shapes"][0]
        images = first if isinstance(first, list) else [first]
        if len(images) > 1:
            raise UnsupportedError(
                f"the tokens of Qwen-Image must be those of one image, got {len(images)} images in one sequence; "
                "pipelines that edit or layer images are not supported"
            )
        return Grid(*images[0])

    def text(self, arguments: dict[str, Any]) -> Text:
        rows, tokens = arguments["encoder_hidden_states"].shape[:2]
        mask_BN = arguments.get("encoder_hidden_states_mask")
        if mask_BN is None:
            return Text(tokens, (tokens,) * rows, first=True)
        mask_BN = mask_BN.bool()
        if bool((mask_BN[:, 1:] & ~mask_BN[:, :-1]).any()):
            raise UnsupportedError("the mask of the prompt must be of padding behind it, got gaps or padding before it")
        return Text(tokens, tuple(mask_BN.sum(1).tolist()), first=True)


class _Processor(ToSeam, QwenDoubleStreamAttnProcessor2_0):
    """The stock processor with its kernel call replaced by the seam, which leaves padding out by itself."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise UnsupportedError("attention masks do not pass through diffaccel: call the pipeline without one")
        own = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        text = project(attn, encoder_hidden_states, *own)
        image = project(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if image_rotary_emb is not None:
            (*image_qk, image_v), (*text_qk, text_v) = image, text
            of_image, of_text = image_rotary_emb
            image = *(apply_rotary_emb_qwen(x, of_image, use_real=False) for x in image_qk), image_v
            text = *(apply_rotary_emb_qwen(x, of_text, use_real=False) for x in text_qk), text_v
        q, k, v = (torch.cat(pair, 1) for pair in zip(text, image, strict=True))
        out = self.attend(q, k, v).flatten(2, 3).type_as(q)
        words = encoder_hidden_states.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, words:])), attn.to_add_out(out[:, :words])
