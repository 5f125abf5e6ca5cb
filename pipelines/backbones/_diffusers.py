"""Everything taken from diffusers that it does not document, in one place. Tested with diffusers 0.42."""

from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    _get_qkv_projections,
)

__all__ = [
    "HookRegistry",
    "HunyuanVideoAttnProcessor2_0",
    "LTXVideoAttnProcessor",
    "ModelHook",
    "StateManager",
    "WanAttention",
    "WanAttnProcessor",
    "WanRotaryPosEmbed",
    "_get_qkv_projections",
    "get_1d_rotary_pos_embed",
]
