"""HunyuanVideo: `HunyuanVideoTransformer3DModel`, whose attention is joint over video and text, text last."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from diffaccel.backbone import Geometry
from diffaccel.joint import Text
from diffaccel.port import Port
from diffaccel.rotary import rotate
from diffaccel.run import Run

from ._diffusers import HunyuanVideoAttnProcessor2_0
from .common import RootHook, ToSeam, exchange


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
            return "its prompt is read in one attention with the video and changed by every layer, so all of it stays"
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


class _Processor(ToSeam, HunyuanVideoAttnProcessor2_0):
    """The stock processor with its kernel call replaced by the seam, which leaves padding out by itself."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        both = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k
        own = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        q, k, v = _project(attn, hidden_states, *both)
        if image_rotary_emb is not None:
            cos, sin = (table[:, None] for table in image_rotary_emb)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # dual-stream blocks have weights of the text's own, single-stream ones the same for both
        text = _project(attn, encoder_hidden_states, *(both if attn.add_q_proj is None else own))
        q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), text, strict=True))
        out = self.attend(q, k, v).flatten(2, 3).type_as(q)
        video, words = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        return video, words if attn.to_add_out is None else attn.to_add_out(words)


def _project(
    attn: Any, x_BSC: Tensor, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normalised head by head, and values, all (B, S, H, D)."""
    q, k, v = (to(x_BSC).unflatten(2, (attn.heads, -1)) for to in (to_q, to_k, to_v))
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v
