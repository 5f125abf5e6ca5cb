"""How the tokens of a model are split between devices that share its heads: diffusers' plan, or ours.

Ours split the video where it enters the first block, and its rotary tables, and gather it behind the last; every device
has the whole prompt. Models that diffusers has no plan for have one here, and so has LTX-Video: diffusers splits its
prompt, whose mask is then laid out for all heads over some.
"""

from typing import Any

from diffusers import (
    CogVideoXTransformer3DModel,
    CosmosTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    QwenImageTransformer2DModel,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import nn

from diffaccel.errors import UnsupportedError

from ._diffusers import (
    ContextParallelGatherHook,
    ContextParallelInput,
    ContextParallelOutput,
    ContextParallelSplitHook,
)

Plan = dict[str, Any]


def _split(dim: int, dims: int, made: bool = False) -> ContextParallelInput:
    """Along one of so many axes: what a module is given, or what it has `made`."""
    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=made)


_TOKENS = _split(1, 3)
_VIDEO = {"hidden_states": _TOKENS}
_GATHER = ContextParallelOutput(gather_dim=1, expected_dims=3)
_WAN: Plan = WanTransformer3DModel._cp_plan
_HUNYUAN: Plan = {
    "rope": {0: _split(0, 2, True), 1: _split(0, 2, True)},
    "transformer_blocks.0": _VIDEO,
    "proj_out": _GATHER,
}

PLANS: dict[type[nn.Module], Plan] = {
    WanTransformer3DModel: _WAN,
    FluxTransformer2DModel: FluxTransformer2DModel._cp_plan,
    QwenImageTransformer2DModel: QwenImageTransformer2DModel._cp_plan,
    WanVACETransformer3DModel: {
        "rope": _WAN["rope"],
        "blocks.0": _VIDEO,
        "vace_blocks.0": {"control_hidden_states": _TOKENS},
        "vace_blocks.*": _VIDEO,
        "proj_out": _GATHER,
    },
    SkyReelsV2Transformer3DModel: {
        "rope": _WAN["rope"],
        "blocks.0": _VIDEO,
        "blocks.*": {"temb": _split(2, 4)},  # of each token in diffusion forcing
        "norm_out": _GATHER,  # before such embeddings are added once more
    },
    LTXVideoTransformer3DModel: {
        "rope": {0: _split(1, 3, True), 1: _split(1, 3, True)},
        "transformer_blocks.0": _VIDEO,
        "proj_out": _GATHER,
    },
    HunyuanVideoTransformer3DModel: _HUNYUAN,
    HunyuanVideo15Transformer3DModel: _HUNYUAN,
    CogVideoXTransformer3DModel: {
        "transformer_blocks.0": _VIDEO,
        "transformer_blocks.*": {"image_rotary_emb": [_split(0, 2), _split(0, 2)]},
        "proj_out": _GATHER,
    },
    MochiTransformer3DModel: {
        "rope": {0: _split(0, 3, True), 1: _split(0, 3, True)},
        "transformer_blocks.0": _VIDEO,
        "proj_out": _GATHER,
    },
    CosmosTransformer3DModel: {
        "rope": {0: _split(0, 2, True), 1: _split(0, 2, True)},
        "learnable_pos_embed": {0: _split(1, 3, True)},
        "transformer_blocks.0": _VIDEO,
        "transformer_blocks.*": {"embedded_timestep": _TOKENS, "temb": _TOKENS},  # of each token with given frames
        "norm_out": {"embedded_timestep": _TOKENS, "temb": _TOKENS},
        "proj_out": _GATHER,
    },
}

WHY_NOT: dict[type[nn.Module], str] = {
    LTX2VideoTransformer3DModel: "in every layer its sound reads the whole video",
    Kandinsky5Transformer3DModel: "no module behind its blocks could gather its tokens before they are laid out anew",
}


def plan_of(denoiser: nn.Module) -> Plan:
    """How the tokens of a model are split.

    Raises `UnsupportedError` for one that several devices cannot share.
    """
    plan = PLANS.get(type(denoiser))
    why = WHY_NOT.get(type(denoiser), "there is no plan here of how its tokens are split")
    if plan is not None and getattr(denoiser.config, "image_condition_type", None) == "token_replace":
        plan, why = None, "its blocks treat the first frame apart, of which one device would have all tokens"
    if plan is None:
        raise UnsupportedError(f"several devices cannot share this {type(denoiser).__name__}: {why}; run it on one")
    return {place: part for place, part in plan.items() if getattr(denoiser, place.split(".")[0], True) is not None}


def splits_text(plan: Plan) -> bool:
    """Whether each device has a part of the prompt."""
    return any("encoder_hidden_states" in part for part in plan.values() if isinstance(part, dict))


def is_split_by(denoiser: nn.Module, plan: Plan) -> bool:
    """Whether diffusers splits and gathers just what a plan says."""
    expected: dict[str, Any] = {}
    for place, part in plan.items():
        gathers = isinstance(part, ContextParallelOutput)
        expected[f"cp_{'output' if gathers else 'input'}---{place}"] = [part] if gathers else part
    found = {}
    for module in denoiser.modules():
        for name, hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).items():
            if isinstance(hook, ContextParallelSplitHook | ContextParallelGatherHook):
                found[name] = hook.metadata
    return found == expected
