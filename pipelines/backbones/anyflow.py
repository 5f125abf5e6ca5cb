"""AnyFlow: `AnyFlowTransformer3DModel`, Wan's blocks distilled to any number of steps, a whole video at once."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import AnyFlowTransformer3DModel
from torch import Tensor

from diffaccel.grid import Grid
from diffaccel.port import Port
from diffaccel.rotary import rotate
from diffaccel.run import Run

from ._diffusers import AnyFlowAttnProcessor, AnyFlowCrossAttnProcessor
from .common import Family, RootHook, ToSeam, exchange


class AnyFlow(Family):
    """The family of `AnyFlowPipeline`."""

    name = "AnyFlow"
    model = AnyFlowTransformer3DModel
    parts = ("self", "cross")

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt" and denoiser.config.image_dim is not None:
            return "image tokens may stand before those of the prompt, all of which therefore stay"
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        ports = []
        for layer, block in enumerate(denoiser.blocks, first_layer):
            ports += [(block.attn1, Port(run, layer, "self")), (block.attn2, Port(run, layer, "cross"))]
        hook = _Hook(run, self.geometry(denoiser).patch)
        return install(denoiser, ports, (AnyFlowAttnProcessor, AnyFlowCrossAttnProcessor), hook)


def install(denoiser: Any, ports: list[tuple[Any, Port]], stock: Any, hook: "AnyFlowHook") -> Callable[[], None]:
    """`exchange`, and real tables in place of the rotary module's complex ones."""
    give_back = exchange(denoiser, ports, stock, _Processor, hook)
    rope = denoiser.rope.register_forward_hook(hook.tables, with_kwargs=True)

    def undo() -> None:
        rope.remove()
        give_back()

    return undo


class AnyFlowHook(RootHook):
    arguments: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep", "r_timestep", "encoder_hidden_states")

    def grid(self, given: dict[str, Any]) -> Grid:
        """Of latents (B, L, C, h, w): frames stand before channels."""
        return super().grid({**given, "hidden_states": given["hidden_states"].transpose(1, 2)})

    def tables(self, rope: Any, args: Any, kwargs: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forward hook of the rotary module: cosines before sines, (1, 1, S, 2 D), in place of complex numbers."""
        angles = found["query"]
        both = torch.stack([angles.real, angles.imag], 3).float()  # (1, 1, S, 2, D / 2)
        table = both.repeat_interleave(2, 4).flatten(3)
        self.run.rotary = tuple(table.transpose(1, 2).chunk(2, 3))  # type: ignore[assignment]
        return {"query": table, "key": table}


class _Hook(AnyFlowHook):
    timesteps: Any = None  # of the scheduler, another tensor for each generation

    def _enter(self, given: dict[str, Any]) -> None:
        """diffusers resets no state of this model between two generations."""
        timesteps = getattr(getattr(self.run.pipe, "scheduler", None), "timesteps", None)
        if timesteps is not self.timesteps:
            self.run.forget()
        self.timesteps = timesteps
        super()._enter(given)


class _Processor(ToSeam, AnyFlowAttnProcessor):
    """The stock processors, of each part and model, with their kernel calls replaced by the seam.

    What FAR gives beside (a mask, its own cache) says what the seam knows.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: dict[str, Tensor] | None = None,
        kv_cache: Any = None,
        kv_cache_flag: Any = None,
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        found = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (x.type_as(hidden_states).unflatten(2, (attn.heads, -1)) for x in found)
        if rotary_emb is not None:
            cos, sin = rotary_emb["query"].transpose(1, 2).chunk(2, 3)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2, 3).type_as(q)))
