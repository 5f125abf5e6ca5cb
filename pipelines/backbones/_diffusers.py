"""Everything taken from diffusers that it does not document, in one place. Tested with diffusers 0.42."""

from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    _get_qkv_projections,
)

__all__ = [
    "HookRegistry",
    "ModelHook",
    "StateManager",
    "WanAttention",
    "WanAttnProcessor",
    "WanRotaryPosEmbed",
    "_get_qkv_projections",
    "get_1d_rotary_pos_embed",
]
