"""What every block is made under, asked for when the block begins: a prompt of its own, the actions of a player."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sized
from types import SimpleNamespace
from typing import Any

import torch

from diffaccel.errors import KnobError, UnsupportedError
from diffaccel.run import Run

from . import inputs
from .inputs import Rollout

Given = Mapping[str, Any] | None
Condition = Callable[[int, int, Any], Given] | Iterable[Given]
"""A function of block, its first latent frame and the pipeline, or one entry for each block in order."""

_TEXT = {
    "prompt": "prompt_embeds",
    "negative_prompt": "negative_prompt_embeds",
    "prompt_embeds": "prompt",
    "negative_prompt_embeds": "negative_prompt",
}
"""What a prompt is given as, and what it takes the place of."""

_OURS = {"hidden_states", "timestep", "encoder_hidden_states", "return_dict"}


def asked(condition: Condition | None, blocks: int) -> Callable[[int, int, Any], Given] | None:
    """The condition as a function. Raises `KnobError` where a list has not one entry for each of the `blocks`."""
    if condition is None or callable(condition):
        return condition
    rule = f"condition has an entry for each of the {blocks} blocks, those of given frames included"
    remedy = "pass None for a block under what held before it, or a function"
    if isinstance(condition, Sized) and len(condition) != blocks:
        raise KnobError(f"{rule}, got {len(condition)}; {remedy}")
    entries = iter(condition)

    def following(block: int, start: int, pipe: Any) -> Given:
        try:
            return next(entries)
        except StopIteration:
            raise KnobError(f"{rule}, and it ended after {block}; {remedy}") from None

    return following


def ask(pipe: Any, rollout: Rollout, run: Run, block: int, finished: int) -> None:
    """Take the conditions up to that of `block`, none of them twice; `finished` blocks have been committed."""
    while rollout.condition is not None and rollout.asked <= block:
        index, rollout.asked = rollout.asked, rollout.asked + 1
        given = rollout.condition(index, rollout.blocks[index].start, pipe) or {}
        if not isinstance(given, Mapping):
            raise KnobError(f"the condition of a block is a dict or None, got {type(given).__name__} for block {index}")
        text = {name: value for name, value in given.items() if name in _TEXT}
        extra = {name: value for name, value in given.items() if name not in _TEXT}
        _check(pipe, rollout, extra)
        rollout.extra[index] = rollout.extra_of(index - 1) | extra
        known = vars(rollout.call)
        if any(isinstance(value, torch.Tensor) or value != known[name] for name, value in text.items()):
            change(pipe, rollout, text)
            if finished and rollout.call.on_prompt_change != "keep":
                renew(pipe, rollout, run, finished - 1)
                pipe._commit_block(rollout, run, finished - 1)


def _check(pipe: Any, rollout: Rollout, extra: dict[str, Any]) -> None:
    if not extra:
        return
    names = ", ".join(extra)
    if rollout.rolling:
        raise UnsupportedError(
            f"blocks of a rolling window share one forward, so {names} of one block has no place there: give prompts "
            "only, or take sampler='few_step'"
        )
    takes = inspect.signature(pipe.transformer.forward).parameters
    if any(taken.kind is taken.VAR_KEYWORD for taken in takes.values()):
        return
    allowed = [name for name in takes if name not in _OURS]
    if unknown := [name for name in extra if name not in allowed]:
        raise KnobError(f"the condition of a block may hold {', '.join([*_TEXT, *allowed])}, got {', '.join(unknown)}")


@torch.no_grad()
def change(pipe: Any, rollout: Rollout, text: dict[str, Any]) -> None:
    """Go on under another prompt, given by some of the names that `pipe` takes it by.

    Raises `ValueError` for one that the pipeline would refuse, or another number of them.
    """
    call = SimpleNamespace(**vars(rollout.call) | {_TEXT[name]: None for name in text} | text)
    inputs.check(pipe, call, pipe.config["sampler"], pipe.config["frames_per_block"])
    if inputs.prompt_count(call) != inputs.prompt_count(rollout.call):
        raise KnobError(
            f"a stream of {inputs.prompt_count(rollout.call)} prompts goes on with as many, "
            f"got {inputs.prompt_count(call)}"
        )
    embeds = pipe._encode_prompts(call)
    if not {"negative_prompt", "negative_prompt_embeds"} & set(text):
        embeds.pop("uncond", None)
    rollout.embeds.update(embeds)
    rollout.call = call


def renew(pipe: Any, rollout: Rollout, run: Run, index: int) -> None:
    """Before block `index` is committed under a new prompt: keep, recompute or drop what earlier ones left."""
    rollout.cached, how = rollout.embeds["cond"], rollout.call.on_prompt_change
    if how == "keep":
        return
    held = run.frames_kept()
    run.flush()
    if how == "recompute":
        for earlier, frames in enumerate(rollout.blocks[:index]):
            if not held.isdisjoint(frames):
                pipe._commit_block(rollout, run, earlier)
