"""Helios: `HeliosTransformer3DModel`, Wan's blocks in sections with history in front of each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import HeliosTransformer3DModel
from torch import Tensor

from diffaccel.backbone import Geometry
from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.joint import Text
from diffaccel.port import Port
from diffaccel.rotary import rotate
from diffaccel.run import Run

from ._diffusers import HeliosAttnProcessor, helios_projections
from .common import ToSeam, exchange
from .sections import InSections, SectionHook


class Helios(InSections):
    """The family of `HeliosPipeline` and `HeliosPyramidPipeline`."""

    name = "Helios"
    model = HeliosTransformer3DModel
    parts = ("self", "cross")

    def geometry(self, denoiser: Any) -> Geometry:
        """Where history reads the prompt too, that attention has other queries than the grid, and stays as it is."""
        geometry = super().geometry(denoiser)
        return geometry if denoiser.config.guidance_cross_attn else replace(geometry, parts=("self",))

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt" and not denoiser.config.guidance_cross_attn:
            return "its history reads the prompt too (guidance_cross_attn=False), so that attention stays as it is"
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        ports = []
        for layer, block in enumerate(denoiser.blocks, first_layer):
            ports.append((block.attn1, Port(run, layer, "self")))
            if denoiser.config.guidance_cross_attn:
                ports.append((block.attn2, Port(run, layer, "cross")))
        hook = _RootHook(run, self.geometry(denoiser).patch)
        return exchange(denoiser, ports, HeliosAttnProcessor, _Processor, hook)


class _RootHook(SectionHook):
    arguments = (
        *(*SectionHook.arguments, "indices_hidden_states", "indices_latents_history_short"),
        *("indices_latents_history_mid", "indices_latents_history_long"),
        *("latents_history_short", "latents_history_mid", "latents_history_long"),
    )
    scales: ClassVar[dict[str, int]] = {"latents_history_short": 1, "latents_history_mid": 2, "latents_history_long": 4}

    def text(self, given: dict[str, Any]) -> Text | None:
        """History, which lies and is read as text in front of the video would be."""
        tokens = self.history(given)
        return Text(tokens, (tokens,) * len(given["hidden_states"]), first=True) if tokens else None

    def smaller(self, given: dict[str, Any], grid: Grid) -> dict[str, Any]:
        """History shrinks as the section does; in the stages of a pyramid it may be larger than that."""
        section, changed = self.grid(given), super().smaller(given, grid)
        for name in [name for name in self.scales if given.get(name) is not None]:
            rows, columns = (size // side for size, side in zip(given[name].shape[3:], self.patch[1:], strict=True))
            few = Grid(1, rows * grid.height // section.height, columns * grid.width // section.width)
            changed[name] = self.shrunk(given[name], few)
        return changed


class _Processor(ToSeam, HeliosAttnProcessor):
    """The stock processor with its kernel call replaced by the seam."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        original_context_length: int | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise UnsupportedError("attention masks do not pass through diffaccel: call the model without one")
        q, k, v = helios_projections(attn, hidden_states, encoder_hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            cos, sin = rotary_emb.unsqueeze(2).chunk(2, 3)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if attn.is_amplify_history and not attn.is_cross_attention and original_context_length is not None:
            history, section = k.tensor_split([k.shape[1] - original_context_length], 1)
            louder = 1 + torch.sigmoid(attn.history_key_scale) * (attn.max_scale - 1)  # of each head, or of all
            k = torch.cat([(history * louder[:, None]).type_as(section), section], 1)
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2, 3).type_as(q)))
