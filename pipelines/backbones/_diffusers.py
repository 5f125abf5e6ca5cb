"""Everything taken from diffusers that it does not document, in one place. Tested with diffusers 0.42."""

from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, MochiAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_anyflow import AnyFlowAttnProcessor, AnyFlowCrossAttnProcessor
from diffusers.models.transformers.transformer_anyflow_far import (
    AnyFlowCausalAttnProcessor,
    AnyFlowCausalRotaryPosEmbed,
)
from diffusers.models.transformers.transformer_anyflow_far import (
    AnyFlowCrossAttnProcessor as AnyFlowFARCrossAttnProcessor,
)
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_helios import HeliosAttnProcessor
from diffusers.models.transformers.transformer_helios import _get_qkv_projections as helios_projections
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2RefinerAttnProcessor
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    _get_qkv_projections,
)

__all__ = [
    "AnyFlowAttnProcessor",
    "AnyFlowCausalAttnProcessor",
    "AnyFlowCausalRotaryPosEmbed",
    "AnyFlowCrossAttnProcessor",
    "AnyFlowFARCrossAttnProcessor",
    "CogVideoXAttnProcessor2_0",
    "ContextParallelGatherHook",
    "ContextParallelInput",
    "ContextParallelOutput",
    "ContextParallelSplitHook",
    "CosmosAttnProcessor2_0",
    "FluxAttnProcessor",
    "HeliosAttnProcessor",
    "HookRegistry",
    "HunyuanVideo15AttnProcessor2_0",
    "HunyuanVideoAttnProcessor2_0",
    "Kandinsky5AttnProcessor",
    "LTX2AudioVideoAttnProcessor",
    "LTX2PerturbedAttnProcessor",
    "LTXVideoAttnProcessor",
    "MochiAttnProcessor2_0",
    "ModelHook",
    "QwenDoubleStreamAttnProcessor2_0",
    "SanaWMLTX2RefinerAttnProcessor",
    "SkyReelsV2AttnProcessor",
    "StateManager",
    "WanAttention",
    "WanAttnProcessor",
    "WanRotaryPosEmbed",
    "_get_qkv_projections",
    "apply_interleaved_rotary_emb",
    "apply_rotary_emb",
    "apply_rotary_emb_qwen",
    "apply_split_rotary_emb",
    "get_1d_rotary_pos_embed",
    "helios_projections",
]
