"""Flux 1: `FluxTransformer2DModel`, images whose attention is joint over text and image, text first."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.joint import Text
from diffaccel.port import Port
from diffaccel.rotary import rotate
from diffaccel.run import Run

from ._diffusers import FluxAttnProcessor
from .common import Family, RootHook, ToSeam, exchange
from .joint import KEEPS_PROMPT, project


class Flux(Family):
    """The family of `FluxPipeline`, its image-to-image, inpainting, fill and control variants."""

    name = "Flux"
    model = FluxTransformer2DModel
    parts = ("joint",)

    def layers(self, config: Any) -> int:
        return int(config.num_layers + config.num_single_layers)

    def patch(self, config: Any) -> tuple[int, int, int]:
        return 1, 2, 2  # the pipeline packs latents two by two

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        return KEEPS_PROMPT if slot == "prompt" else None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        blocks = [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
        ports = [(block.attn, Port(run, layer, "self")) for layer, block in enumerate(blocks, first_layer)]
        hook = _RootHook(run, self.geometry(denoiser).patch)
        return exchange(denoiser, ports, FluxAttnProcessor, _Processor, hook)


class _RootHook(RootHook):
    arguments = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids")

    def __init__(self, run: Run, patch: tuple[int, int, int]) -> None:
        super().__init__(run, patch)
        self.known: tuple[Callable[[], Tensor | None], Grid] | None = None

    def grid(self, given: dict[str, Any]) -> Grid:
        """One frame, by the positions of its tokens; read off the device once for all forwards that are given them."""
        places = given["img_ids"]
        if self.known is None or self.known[0]() is not places:
            self.known = weakref.ref(places), _grid(places.reshape(-1, 3))
        return self.known[1]

    def text(self, arguments: dict[str, Any]) -> Text:
        """The model reads padding too."""
        rows, tokens = arguments["encoder_hidden_states"].shape[:2]
        return Text(tokens, (tokens,) * rows, first=True)


def _grid(places: Tensor) -> Grid:
    """Of tokens at (0, row, column), row by row."""
    height, width = (int(side) + 1 for side in places[:, 1:].amax(0))
    rows, columns = (torch.arange(side, device=places.device) for side in (height, width))
    expected = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)
    if len(places) != len(expected) or not torch.equal(places, expected.to(places)):
        raise UnsupportedError(
            f"the tokens of Flux must be the rows and columns of one image, got {len(places)} tokens on "
            f"{height} x {width} places; pipelines that put reference images beside it, as Kontext, are not supported"
        )
    return Grid(1, height, width)


class _Processor(ToSeam, FluxAttnProcessor):
    """The stock processor with its kernel call replaced by the seam."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        if attention_mask is not None:
            raise UnsupportedError("attention masks do not pass through diffaccel: call the pipeline without one")
        q, k, v = project(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:  # dual-stream blocks, where text has weights of its own
            own = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
            text = project(attn, encoder_hidden_states, *own)
            q, k, v = (torch.cat(pair, 1) for pair in zip(text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            cos, sin = (table[:, None] for table in image_rotary_emb)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self.attend(q, k, v).flatten(2, 3).type_as(q)
        if encoder_hidden_states is None:
            return out
        words = encoder_hidden_states.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, words:])), attn.to_add_out(out[:, :words])
