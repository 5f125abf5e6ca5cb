"""Step caches beside a run: those of diffusers (`enable_cache`) and of cache-dit.

They skip blocks, or attention, where a denoising step resembles the one before. What a run counts stays true: attention
that is skipped never gets to it. Some do not go together with what it does, though, and nothing would say so.
"""

from collections.abc import Iterator
from typing import Any

from diffaccel.errors import UnsupportedError
from diffaccel.reuse.flow_cache import FEWEST_STEPS
from diffaccel.run import Run

from ._diffusers import StateManager

HOOK = "diffaccel.root"
"""Of the run itself, on the root of a denoiser."""


def refuse(denoiser: Any, run: Run, steps: int = 0, branches: int = 1) -> None:
    """Raise `UnsupportedError` if a step cache sits in the denoiser and does not go with the run.

    `steps` is what the generation takes, if that is known; `branches` are those of guidance met so far.
    """
    if getattr(denoiser, "_is_cached", False):
        name, keeps_apart, halves, remedy = "cache-dit", True, False, "call cache_dit.disable_cache(pipe)"
    elif found := list(_hooks(denoiser)):
        config = getattr(denoiser, "_cache_config", None)
        name = type(found[0][1]).__name__ if config is None else type(config).__name__.removesuffix("Config")
        keeps_apart = all(_manager(hook) for _, hook in found)
        halves = any(module is denoiser for module, _ in found)
        remedy = "call transformer.disable_cache()"
    else:
        return
    if run.causal:
        raise UnsupportedError(
            f"{name} skips what resembles the step before, and with it the clean pass that writes the keys of a "
            f"finished block: {remedy}, and take FlashBlock, which knows about blocks"
        )
    if halves:
        raise UnsupportedError(
            f"{name} takes half of the batch away at some steps, and techniques know its rows by their places: "
            f"{remedy}, or take FirstBlockCache"
        )
    if run.accel.reuse is not None:
        raise UnsupportedError(
            f"{type(run.accel.reuse).__name__} (slot reuse) makes forwards of its own, which {name} would take for "
            f"denoising steps: {remedy}, or leave reuse out"
        )
    if 1 < steps < FEWEST_STEPS:
        raise UnsupportedError(
            f"{name} skips steps that resemble the one before, and among fewer than {FEWEST_STEPS} none do; "
            f"got {steps}: {remedy}, or take more steps"
        )
    if branches > 1 and not keeps_apart:
        raise UnsupportedError(
            f"{name} keeps one state for both passes of guidance, and this pipeline runs one after the other, so that "
            f"each would get the other's attention: {remedy}, or take FirstBlockCache"
        )


def _hooks(denoiser: Any) -> Iterator[tuple[Any, Any]]:
    """What stands in for a forward by what it remembers, and the module it is on."""
    for module in denoiser.modules():
        registry = vars(module).get("_diffusers_hook")
        for label, hook in () if registry is None else registry.hooks.items():
            if label != HOOK and hasattr(hook, "new_forward") and (hook._is_stateful or _manager(hook)):
                yield module, hook


def _manager(hook: Any) -> bool:
    """Whether it keeps the branches of guidance apart."""
    return any(isinstance(value, StateManager) for value in vars(hook).values())
