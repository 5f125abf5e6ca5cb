"""LTX-2: `LTX2VideoTransformer3DModel`, the video's attention to itself; that of sound and prompt stays as it is."""

from collections.abc import Callable
from typing import Any

from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor

from diffaccel.errors import UnsupportedError
from diffaccel.port import Port
from diffaccel.run import Run

from ._diffusers import (
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from .common import Family, ToSeam, exchange
from .ltx_video import PackedHook


class LTX2(Family):
    """The family of `LTX2Pipeline` and `LTX2ImageToVideoPipeline`: self-attention of the video."""

    name = "LTX-2"
    model = LTX2VideoTransformer3DModel
    parts = ("self",)

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt":
            return "its prompt is read by video and sound under a mask of its own, so that attention stays as it is"
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        blocks = enumerate(denoiser.transformer_blocks, first_layer)
        ports = [(block.attn1, Port(run, layer, "self")) for layer, block in blocks]
        stock = LTX2PerturbedAttnProcessor if denoiser.config.perturbed_attn else LTX2AudioVideoAttnProcessor
        return exchange(denoiser, ports, stock, _Processor, _RootHook(run, self.geometry(denoiser).patch))


class _RootHook(PackedHook):
    arguments = (
        *("hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states", "timestep"),
        *("audio_timestep", "sigma", "audio_sigma", "encoder_attention_mask", "audio_encoder_attention_mask"),
        *("num_frames", "height", "width"),
    )


class _Processor(ToSeam, LTX2PerturbedAttnProcessor):
    """The stock processor with its kernel call replaced by the seam; without perturbation it is the other one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise UnsupportedError(
                "a mask of the video's attention to itself does not pass through diffaccel: use a pipeline without one"
            )
        if all_perturbed:  # values alone, nothing attends
            return super().__call__(
                attn, hidden_states, perturbation_mask=perturbation_mask, all_perturbed=all_perturbed
            )
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        if query_rotary_emb is not None:
            turned = apply_split_rotary_emb if attn.rope_type == "split" else apply_interleaved_rotary_emb
            q, k = turned(q, query_rotary_emb), turned(k, query_rotary_emb)
        heads = [x.unflatten(2, (attn.heads, -1)) for x in (q, k, v)]
        out = self.attend(*heads).flatten(2, 3).type_as(q)
        if perturbation_mask is not None:
            out = v.lerp(out, perturbation_mask)
        if attn.to_gate_logits is not None:  # a gate a head
            gates = 2.0 * attn.to_gate_logits(hidden_states).sigmoid()
            out = (out.unflatten(2, (attn.heads, -1)) * gates[..., None]).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))
