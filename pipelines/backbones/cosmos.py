"""Cosmos 1, Predict 2 and Predict 2.5: `CosmosTransformer3DModel`."""

from collections.abc import Callable
from typing import Any

from diffusers import CosmosTransformer3DModel
from torch import Tensor

from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.port import Port
from diffaccel.run import Run

from ._diffusers import CosmosAttnProcessor2_0, apply_rotary_emb
from .common import Family, RootHook, ToSeam, exchange


class Cosmos(Family):
    """The family of `CosmosTextToWorldPipeline`, `Cosmos2VideoToWorldPipeline` and their kin of text, image, video."""

    name = "Cosmos"
    model = CosmosTransformer3DModel
    parts = ("self", "cross")

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        if denoiser.config.img_context_dim_in:
            raise UnsupportedError(
                "this CosmosTransformer3DModel reads an image beside its prompt, as Cosmos Transfer 2.5 does, and "
                "diffaccel knows those that read a prompt alone: use Cosmos 1, Predict 2 or Predict 2.5"
            )
        ports = []
        for layer, block in enumerate(denoiser.transformer_blocks, first_layer):
            ports += [(block.attn1, Port(run, layer, "self")), (block.attn2, Port(run, layer, "cross"))]
        hook = _RootHook(run, tuple(denoiser.config.patch_size))
        return exchange(denoiser, ports, CosmosAttnProcessor2_0, _Processor, hook)


class _RootHook(RootHook):
    arguments = (
        *(*RootHook.arguments, "block_controlnet_hidden_states", "attention_mask", "fps"),
        *("condition_mask", "padding_mask"),
    )

    def __init__(self, run: Run, patch: tuple[int, int, int]) -> None:
        super().__init__(run, patch)
        self.timesteps: Tensor | None = None

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """These pipelines do not say where a generation ends: the next one begins with timesteps of its own."""
        timesteps = getattr(getattr(self.run.pipe, "scheduler", None), "timesteps", None)
        if timesteps is not self.timesteps:
            self.timesteps = timesteps
            self.run.forget()
        return super().pre_forward(module, *args, **kwargs)

    def smaller(self, given: dict[str, Any], grid: Grid) -> dict[str, Any]:
        """The mask of given frames lies as the latents do; that of padding is brought to size by the model."""
        changed, mask = super().smaller(given, grid), given.get("condition_mask")
        return changed if mask is None else changed | {"condition_mask": self.shrunk(mask, grid)}


class _Processor(ToSeam, CosmosAttnProcessor2_0):
    """The stock processor with its kernel call replaced by the seam."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise UnsupportedError("attention masks do not pass through diffaccel: call the pipeline without one")
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            to(x).unflatten(2, (attn.heads, -1))
            for to, x in ((attn.to_q, hidden_states), (attn.to_k, read), (attn.to_v, read))
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (
                apply_rotary_emb(x, image_rotary_emb, use_real=True, use_real_unbind_dim=-2, sequence_dim=1)
                for x in (q, k)
            )
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2, 3).type_as(q)))
