"""Kandinsky 5: `Kandinsky5Transformer3DModel`, whose prompt has blocks of its own before the video reads it."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from torch import Tensor, nn

from diffaccel.backbone import Geometry
from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.port import Port
from diffaccel.run import Run

from ._diffusers import Kandinsky5AttnProcessor
from .common import RootHook, ToSeam, exchange


class Kandinsky5:
    """The family of `Kandinsky5T2VPipeline` and its image variants; the blocks of the prompt stay stock."""

    name = "Kandinsky 5"

    def denoisers(self, pipe: Any) -> list[nn.Module]:
        found = getattr(pipe, "transformer", None)
        return [found] if isinstance(found, Kandinsky5Transformer3DModel) else []

    def geometry(self, denoiser: Any) -> Geometry:
        config = denoiser.config
        return Geometry(
            backbone=type(denoiser).__name__,
            layers=config.num_visual_blocks,
            heads=config.model_dim // sum(config.axes_dims),
            head_dim=sum(config.axes_dims),
            patch=tuple(config.patch_size),
            parts=("self", "cross"),
        )

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt":
            return "its prompt attends to itself before the video reads it, in places of its own, so all of it stays"
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        if denoiser.config.attention_type != "regular":
            raise UnsupportedError(
                f"this Kandinsky5Transformer3DModel selects keys itself (attention_type="
                f"{denoiser.config.attention_type!r}), in another order of tokens: use a checkpoint with regular "
                "attention, such as those of 5 s"
            )
        ports = []
        for layer, block in enumerate(denoiser.visual_transformer_blocks, first_layer):
            ports += [
                (block.self_attention, Port(run, layer, "self")),
                (block.cross_attention, Port(run, layer, "cross")),
            ]
        hook = _RootHook(run, tuple(denoiser.config.patch_size))
        return exchange(denoiser, ports, Kandinsky5AttnProcessor, _Processor, hook)


class _RootHook(RootHook):
    """Latents are (B, L, h, w, C)."""

    arguments = (
        *("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections"),
        *("visual_rope_pos", "text_rope_pos", "scale_factor", "sparse_params"),
    )
    branch_by = "text_rope_pos"  # the pipeline may cast its prompt anew at every step

    def grid(self, given: dict[str, Any]) -> Grid:
        return super().grid({"hidden_states": given["hidden_states"].movedim(-1, 1)})

    def smaller(self, given: dict[str, Any], grid: Grid) -> dict[str, Any]:
        """Positions count from 0 on, as in a video of that size."""
        whole = given["hidden_states"]
        small = self.shrunk(whole.movedim(-1, 1), grid).movedim(1, -1)
        if small.shape == whole.shape:
            return {"hidden_states": whole}
        sides = (grid.frames, grid.height, grid.width)
        places = [place[:side] for place, side in zip(given["visual_rope_pos"], sides, strict=True)]
        return {"hidden_states": small, "visual_rope_pos": places}


class _Processor(ToSeam, Kandinsky5AttnProcessor):
    """The stock processor with its kernel call replaced by the seam."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        if sparse_params is not None:
            raise UnsupportedError("keys selected by the model do not pass through diffaccel: leave sparse_params out")
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            to(x).unflatten(2, (attn.num_heads, -1))
            for to, x in ((attn.to_query, hidden_states), (attn.to_key, read), (attn.to_value, read))
        )
        q, k = attn.query_norm(q.float()).type_as(q), attn.key_norm(k.float()).type_as(k)
        if rotary_emb is not None:
            q, k = _turned(q, rotary_emb), _turned(k, rotary_emb)
        return attn.out_layer(self.attend(q, k, v).flatten(2, 3))


def _turned(x_BSHD: Tensor, rotary: Tensor) -> Tensor:
    """Rotated by matrices (B, S, 1, D / 2, 2, 2), and rounded to bf16 whatever the dtype, as the model does."""
    pairs = x_BSHD.unflatten(-1, (-1, 1, 2)).float()
    return (rotary * pairs).sum(-1).flatten(3).to(torch.bfloat16).type_as(x_BSHD)
