"""Settings to start from. Presets are plain functions that return an `Accel`; change one with `dataclasses.replace`.

    from diffaccel.pipelines.presets import balanced

    with balanced()(pipe) as run:
        frames = pipe("a large red circle moves left").frames

`balanced` and `fast` use what earlier chunks leave behind, so they need a block-causal pipeline; a bidirectional one
refuses them with the reason, and takes `exact`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffaccel.accel import Accel
from diffaccel.backbone import find
from diffaccel.techniques import FlashBlock, PadCollapse, TempCache


def exact() -> Accel:
    """Nothing is approximated: the padding of the prompt, whose keys and values are all alike, is read as one key with
    its multiplicity. Equal to dense attention up to rounding; saves cross-attention time when prompts are short."""
    return Accel(prompt=PadCollapse())


def balanced() -> Accel:
    """Small visible change for a smaller cache and less attention: keys of older frames that hardly changed are merged,
    and attention to them is computed at every second denoising step once the past is twice as long as a block. The
    newest block and the pass that writes the cache stay exact. Trades fine detail of long videos; their beginning is
    as dense."""
    return Accel(prompt=PadCollapse(), cache=TempCache(threshold=0.95), reuse=FlashBlock(refresh=2))


def fast() -> Accel:
    """As `balanced`, merging more and recomputing less: every third step. Trades more: moving objects may take another
    path than in the dense video while the scene stays the one of the prompt."""
    return Accel(prompt=PadCollapse(), cache=TempCache(threshold=0.9), reuse=FlashBlock(refresh=3))


PRESETS: dict[str, Callable[[], Accel]] = {"exact": exact, "balanced": balanced, "fast": fast}
"""Every preset by the name the command line uses."""


def auto(pipe: Any, num_frames: int, height: int, width: int, frames_per_block: int | None = None) -> tuple[Accel, str]:
    """What pays for a video of that size on the device the pipeline is on, and a phrase that says why.

    Attention to earlier blocks is all that merging and reusing save, so nothing is done unless, at the end of the
    video, it would be so many operations beside those of the rest of a forward (`PAYS`).
    """
    [family, denoisers], device = find(pipe), pipe._execution_device.type
    if not getattr(pipe, "block_causal", False):
        if getattr(family, "block_causal", False):
            return Accel(), f"dense: the blocks of {type(pipe).__name__} are its own; name techniques for it"
        return Accel(), f"dense: {family.name} makes all frames at once, and nothing that is kept of earlier ones pays"
    shape = family.geometry(denoisers[0])
    patch, scale = shape.patch, pipe.vae_scale_factor_spatial
    per_frame = (height // scale // patch[1]) * (width // scale // patch[2])
    latent = (1 + (num_frames - 1) // pipe.vae_scale_factor_temporal) // patch[0]
    block = min(latent, (frames_per_block or pipe.config["frames_per_block"]) // patch[0])
    blocks = [module for name, module in denoisers[0].named_modules() if name == "blocks.0"]
    weights = sum(p.numel() for module in blocks for p in module.parameters() if p.ndim == 2)
    share = 2 * (latent - block) * per_frame * shape.heads * shape.head_dim / weights
    limit = PAYS.get(device, PAYS["cuda"])
    seen = f"attention to the past is {share:.2g} times the rest of a forward at the end, and pays from {limit:g} on"
    if share < limit:
        return Accel(), f"dense: {seen}"
    chosen = Accel(cache=TempCache(threshold=0.9, budget="24 frames"), reuse=FlashBlock(refresh=2))
    chosen = chosen if device == "cuda" else balanced()
    if pipe.config["sampler"] == "rolling":  # where nothing is reused
        chosen = replace(chosen, reuse=None)
    return chosen, f"techniques on: {seen}"


PAYS = {"cpu": 0.3, "cuda": 3.0}
"""Attention to the past over the rest of a forward, in operations, from which techniques pay (samples/RESULTS.md)."""
