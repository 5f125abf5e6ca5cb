"""Wan 2.1 and 2.2: `WanTransformer3DModel`, bidirectional or block-causal, and `WanVACETransformer3DModel`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

from diffaccel.backbone import Geometry
from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.port import Port
from diffaccel.rotary import rotate
from diffaccel.run import Run

from ._diffusers import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    _get_qkv_projections,
    get_1d_rotary_pos_embed,
)
from .common import RootHook, ToSeam, exchange, plain

_MODELS = (WanTransformer3DModel, WanVACETransformer3DModel)


class Wan:
    """The family of `WanPipeline`, its image, video, two-stage and VACE variants and `CausalWanPipeline`."""

    name = "Wan"

    def denoisers(self, pipe: Any) -> list[nn.Module]:
        found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
        return [denoiser for denoiser in found if isinstance(denoiser, _MODELS)]

    def geometry(self, denoiser: Any) -> Geometry:
        config = denoiser.config
        return Geometry(
            backbone=type(denoiser).__name__,
            layers=len(_blocks(denoiser)),
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            patch=tuple(config.patch_size),
            parts=("self", "cross"),
        )

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt" and denoiser.config.added_kv_proj_dim is not None:
            return "its image tokens are found by counting back from 512 prompt tokens, which therefore have to stay"
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        ports = []
        for layer, block in enumerate(_blocks(denoiser), first_layer):
            ports += [(block.attn1, Port(run, layer, "self")), (block.attn2, Port(run, layer, "cross"))]
        hook = _VACEHook if isinstance(denoiser, WanVACETransformer3DModel) else RootHook
        hooked = hook(run, tuple(denoiser.config.patch_size))
        give_back = exchange(denoiser, ports, WanAttnProcessor, _Processor, hooked)
        rope = denoiser.rope.register_forward_hook(_Rotary(run, ports[0][1]))
        run.later = partial(_later, denoiser.rope)

        def undo() -> None:
            rope.remove()
            give_back()

        return undo


def _blocks(denoiser: Any) -> list[Any]:
    """All blocks, those that carry VACE's control after the others: they run before them."""
    return [*denoiser.blocks, *getattr(denoiser, "vace_blocks", ())]


class _VACEHook(RootHook):
    arguments = (*RootHook.arguments, "encoder_hidden_states_image", "control_hidden_states")

    def smaller(self, given: dict[str, Any], grid: Grid) -> dict[str, Any]:
        """The control lies as the latents do."""
        control = self.shrunk(given["control_hidden_states"], grid)
        return super().smaller(given, grid) | {"control_hidden_states": control}


class WanToSeam(ToSeam):
    """Wan's stock processor with its kernel call replaced by the seam, mixed into that or a copy of it."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise UnsupportedError("attention masks do not pass through diffaccel: call the pipeline without one")
        image = None
        if attn.add_k_proj is not None and encoder_hidden_states is not None:
            # image tokens come first, then 512 of text
            image, encoder_hidden_states = encoder_hidden_states[:, :-512], encoder_hidden_states[:, -512:]
        split = partial(torch.unflatten, dim=2, sizes=(attn.heads, -1))
        trained = torch.is_grad_enabled()
        if rotary_emb is not None and not trained and plain(attn.norm_q, attn.norm_k):
            q, k, v = map(split, _get_qkv_projections(attn, hidden_states, encoder_hidden_states))
            found = self.attend_projected(q, k, v, attn.norm_q, attn.norm_k, *rotary_emb)
        elif encoder_hidden_states is not None and not trained and self._keeps(attn):
            q = split(attn.norm_q(attn.to_q(hidden_states)))
            found = self.attend_prompt(q, encoder_hidden_states, attn.to_k, attn.to_v, attn.norm_k)
        else:
            q, k, v = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
            q, k, v = split(attn.norm_q(q)), split(attn.norm_k(k)), split(v)
            if rotary_emb is not None:
                q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
            found = self.attend(q, k, v)
        out = found.flatten(2, 3).type_as(q)
        if image is not None:
            out = out + self._attend_image(attn, q, image)
        return attn.to_out[1](attn.to_out[0](out))

    def _keeps(self, attn: WanAttention) -> bool:
        """Whether what is projected of the prompt may be kept."""
        if attn.fused_projections or attn.to_k.bias is None:
            return False
        return plain(attn.to_k, attn.to_v, attn.norm_k)

    def _attend_image(self, attn: WanAttention, q: Tensor, image: Tensor) -> Tensor:
        """Cross-attention to the condition image of Wan's image-to-video models: 257 keys, never worth a policy."""
        k = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, (attn.heads, -1))
        v = attn.add_v_proj(image).unflatten(2, (attn.heads, -1))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2, 3)


class _Processor(WanToSeam, WanAttnProcessor):
    """Of Wan itself."""


class _Rotary:
    """Forward hook of the rotary module: the temporal angles start at the block's own first frame."""

    def __init__(self, run: Run, port: Port) -> None:
        self.run, self.port = run, port
        self.last: tuple[Any, tuple[Tensor, Tensor]] = (None, (torch.empty(0),) * 2)

    def __call__(self, rope: WanRotaryPosEmbed, args: tuple[Tensor], tables: tuple[Tensor, Tensor]) -> Any:
        start, latents = self.run.start, args[0]
        if start > 0:
            key = (start, latents.shape[2:], latents.device)
            if self.last[0] != key:
                self.last = key, self._moved(rope, tables, start, latents.shape[2] // rope.patch_size[0])
            tables = self.last[1]
        tables = self.run.tables or tables
        self.run.rotary = tables
        return tables

    def _moved(
        self, rope: WanRotaryPosEmbed, tables: tuple[Tensor, Tensor], start: int, frames: int
    ) -> tuple[Tensor, Tensor]:
        cos, sin = (table.clone() for table in tables)
        spread = self.port.spread  # the tables are of this device's tokens then
        tokens = cos.shape[1] * (1 if spread is None else spread.size)
        for table, angles in zip((cos, sin), _time_angles(rope, start, frames), strict=True):
            every = angles.repeat_interleave(tokens // frames, 0)
            table[0, :, 0, : rope.t_dim] = every if spread is None else spread.own(every, 0)
        return cos, sin


def _later(rope: WanRotaryPosEmbed, k_BNHD: Tensor, frames: int) -> Tensor:
    """Rotated keys as they would be `frames` latent frames later."""
    cos, sin = (k_BNHD.new_full((1, 1, 1, k_BNHD.shape[3]), still, dtype=torch.float32) for still in (1.0, 0.0))
    for table, angles in zip((cos, sin), _time_angles(rope, frames, 1), strict=True):
        table[..., : rope.t_dim] = angles
    return rotate(k_BNHD, cos, sin)


def _time_angles(rope: WanRotaryPosEmbed, start: int, frames: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (frames, t_dim) of frame numbers from `start` on; the module's own table ends at 1024."""
    places = torch.arange(start, start + frames, device=rope.freqs_cos.device)
    return get_1d_rotary_pos_embed(
        rope.t_dim, places, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
    )
