"""What the callbacks of a causal pipeline are shown, and what is taken over of what they return."""

from typing import Any

from torch import Tensor

from diffaccel.errors import KnobError

from .inputs import Rollout


def end_step(pipe: Any, rollout: Rollout, step: int, t: Tensor, latents: Tensor) -> Tensor:
    """After a step: the latents (B, C, n, h, w) to go on with."""
    call = rollout.call
    if call.callback_on_step_end is None:
        return latents
    everything = _tensors(rollout, latents)
    tensors = {name: everything.get(name) for name in call.callback_on_step_end_tensor_inputs}
    return _accept(pipe, rollout, latents, call.callback_on_step_end(pipe, step, t, tensors))


def end_chunk(pipe: Any, rollout: Rollout, index: int, latents: Tensor) -> Tensor:
    """After a block: its latents (B, C, n, h, w)."""
    callback = rollout.call.callback_on_chunk_end
    if callback is None:
        return latents
    returned = callback(pipe, index, len(rollout.blocks), _tensors(rollout, latents))
    return _accept(pipe, rollout, latents, returned)


def _tensors(rollout: Rollout, latents: Tensor) -> dict[str, Tensor]:
    tensors = {"latents": latents, "prompt_embeds": rollout.embeds["cond"]}
    if "uncond" in rollout.embeds:
        tensors["negative_prompt_embeds"] = rollout.embeds["uncond"]
    return tensors


def _accept(pipe: Any, rollout: Rollout, latents: Tensor, returned: dict[str, Tensor] | None) -> Tensor:
    returned = returned or {}
    if unknown := set(returned) - set(pipe._callback_tensor_inputs):
        raise KnobError(
            f"a callback may return {', '.join(pipe._callback_tensor_inputs)}, got {', '.join(sorted(unknown))}"
        )
    for name, branch in (("prompt_embeds", "cond"), ("negative_prompt_embeds", "uncond")):
        if returned.get(name) is not None:
            rollout.embeds[branch] = returned[name].to(rollout.embeds["cond"])
    return returned.get("latents", latents)
