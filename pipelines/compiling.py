"""Compiling a transformer's repeated blocks: one graph for all layers, with attention as an opaque operator in it.

Norms, modulation, rotary embedding and activations of a block are fused then; what any policy does stays outside of
the graph (`diffaccel.port`), so a growing cache compiles nothing anew.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from diffaccel import backbone
from diffaccel.errors import UnsupportedError
from diffaccel.suggest import choose

MODES = ("auto", "on", "off")
COSTS = 20.0
"""Seconds that compiling takes at most, about: 11 to 13 were met on an H100 for the blocks of Wan2.1-1.3B."""
SAVES = 0.1e-6
"""Seconds that a layer saves for each token, by 1 536 channels, over running eagerly: 15.7 ms of a forward of 4 680
tokens through 30 layers were met on an H200 (samples/RESULTS.md)."""


def compile_blocks(pipe: Any) -> Callable[[], None]:
    """Compile the repeated blocks of the pipeline's denoisers, at their first forward; returns what undoes it.

    Raises:
        UnsupportedError: diffusers names no repeated blocks for the model, or offloading hooks sit inside of them.
    """
    denoisers: list[Any] = list(backbone.find(pipe)[1])
    for denoiser in denoisers:
        if why := unfit(denoiser):
            raise UnsupportedError(f"the blocks of {type(denoiser).__name__} cannot be compiled: {why}")
    for denoiser in denoisers:
        denoiser.compile_repeated_blocks(fullgraph=True)

    def undo() -> None:
        for denoiser in denoisers:
            for block in _blocks(denoiser):
                block._compiled_call_impl = None

    return undo


def unfit(denoiser: nn.Module) -> str | None:
    """Why the blocks of a denoiser cannot be compiled, or None."""
    if not getattr(denoiser, "_repeated_blocks", None):
        return "diffusers names none that repeat"
    for block in _blocks(denoiser):
        for module in block.modules():
            hooks = getattr(module, "_diffusers_hook", None)
            if hasattr(module, "_hf_hook") or (hooks is not None and hooks.hooks):
                return "hooks sit inside of them, as sequential or group offload leaves; use none or model offload"
    return None


def compile_if(mode: str, pipe: Any, forwards: int, tokens: int) -> str | None:
    """Compile as `mode` of `MODES` says, "auto" where so many forwards to come, each of so many tokens, pay for it.

    Returns a sentence where "auto" compiles.

    Raises:
        KnobError: another mode.
        UnsupportedError: "on", and the model cannot be compiled.
    """
    choose(mode, MODES, "--compile")
    if mode == "off":
        return None
    if mode == "on":
        compile_blocks(pipe)
        return None
    saved = expected_saving(pipe, forwards, tokens)
    _, denoisers = backbone.find(pipe)
    if saved < COSTS or any(unfit(denoiser) for denoiser in denoisers):
        return None
    compile_blocks(pipe)
    return f"blocks are compiled first, since {forwards} forwards will save about {saved:.0f} s; --compile off skips it"


def to_come(pipe: Any, arguments: dict[str, Any], videos: int) -> tuple[int, int]:
    """Forwards of the denoiser in so many videos with the `arguments` of a call, and tokens of one."""
    family, denoisers = backbone.find(pipe)
    patch, scale = family.geometry(denoisers[0]).patch, pipe.vae_scale_factor_spatial
    frames = 1 + (arguments["num_frames"] - 1) // pipe.vae_scale_factor_temporal
    per_frame = (arguments["height"] // scale // patch[1]) * (arguments["width"] // scale // patch[2])
    steps = arguments.get("num_inference_steps", 50)
    branches = 1 if arguments.get("guidance_scale", 5.0) <= 1 else 2
    if not getattr(pipe, "block_causal", False):
        return videos * steps * branches, frames // patch[0] * per_frame
    block = min(frames, pipe.config["frames_per_block"])
    return videos * -(-frames // block) * (steps + 1) * branches, block // patch[0] * per_frame


def expected_saving(pipe: Any, forwards: int, tokens: int) -> float:
    """Seconds that compiled blocks save in so many forwards; none on a CPU."""
    if pipe._execution_device.type != "cuda":
        return 0.0
    family, denoisers = backbone.find(pipe)
    shape = family.geometry(denoisers[0])
    return forwards * tokens * shape.layers * SAVES * shape.heads * shape.head_dim / 1536


def _blocks(denoiser: Any) -> list[nn.Module]:
    names = getattr(denoiser, "_repeated_blocks", None) or ()
    return [module for module in denoiser.modules() if type(module).__name__ in names]
