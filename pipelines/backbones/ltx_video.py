"""LTX-Video: `LTXVideoTransformer3DModel`, whose tokens come packed and whose branches of guidance share a batch."""

from collections.abc import Callable
from typing import Any, ClassVar

from diffusers import LTXVideoTransformer3DModel
from torch import Tensor

from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.port import Port
from diffaccel.rotary import rotate
from diffaccel.run import Run

from ._diffusers import LTXVideoAttnProcessor
from .common import Family, RootHook, ToSeam, exchange


class LTXVideo(Family):
    """The family of `LTXPipeline` and `LTXImageToVideoPipeline`: self-attention; that to the prompt stays stock."""

    name = "LTX-Video"
    model = LTXVideoTransformer3DModel
    parts = ("self",)

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt":
            return "its prompt is masked row by row in a batch of both branches, so that attention stays as it is"
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        blocks = enumerate(denoiser.transformer_blocks, first_layer)
        ports = [(block.attn1, Port(run, layer, "self")) for layer, block in blocks]
        hook = PackedHook(run, self.geometry(denoiser).patch)
        return exchange(denoiser, ports, LTXVideoAttnProcessor, _Processor, hook)


class PackedHook(RootHook):
    arguments: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
        *("num_frames", "height", "width"),
    )

    def grid(self, given: dict[str, Any]) -> Grid:
        """The pipeline says how its tokens lie; it does not count those of conditions, which lie apart."""
        sizes: list[Any] = [given.get(name) for name in ("num_frames", "height", "width")]
        tokens = given["hidden_states"].shape[1]
        if None in sizes or (grid := Grid(*sizes)).tokens != tokens:
            raise UnsupportedError(
                f"packed tokens must be a grid of num_frames x height x width, got {tokens} tokens and "
                f"{' x '.join(map(str, sizes))}; pipelines that put condition frames beside the video are not supported"
            )
        return grid


class _Processor(ToSeam, LTXVideoAttnProcessor):
    """The stock processor with its kernel call replaced by the seam."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        if image_rotary_emb is not None:  # before the heads are told apart, so over all channels
            cos, sin = (table[:, :, None] for table in image_rotary_emb)
            q, k = rotate(q[:, :, None], cos, sin)[:, :, 0], rotate(k[:, :, None], cos, sin)[:, :, 0]
        q, k = (x.unflatten(2, (attn.heads, -1)) for x in (q, k))
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2, 3).type_as(q)))
