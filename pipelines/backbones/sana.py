"""SANA, SANA-Video and stage 1 of SANA-WM: known, and refused."""

from collections.abc import Callable
from typing import Any

from diffusers import SanaTransformer2DModel, SanaVideoTransformer3DModel, SanaWMTransformer3DModel
from torch import nn

from diffaccel.backbone import Geometry
from diffaccel.errors import UnsupportedError
from diffaccel.run import Run

_MODELS = (SanaTransformer2DModel, SanaVideoTransformer3DModel, SanaWMTransformer3DModel)


class Sana:
    """The family of `SanaPipeline`, `SanaVideoPipeline` and `SanaWMPipeline`, whose attention is no softmax.

    Cross-attention is one, of few keys under a mask. So are some layers of SANA-WM, but they have no processors.
    """

    name = "SANA"

    def denoisers(self, pipe: Any) -> list[nn.Module]:
        found = getattr(pipe, "transformer", None)
        return [found] if isinstance(found, _MODELS) else []

    def geometry(self, denoiser: Any) -> Geometry:
        config = denoiser.config
        size = config.patch_size
        return Geometry(
            backbone=type(denoiser).__name__,
            layers=config.num_layers,
            heads=config.num_attention_heads,
            head_dim=getattr(config, "attention_head_dim", None) or config.linear_head_dim,
            patch=(1, size, size) if isinstance(size, int) else tuple(size),
            parts=(),
        )

    def refuses(self, denoiser: Any, slot: str) -> str:
        every = getattr(denoiser.config, "softmax_every_n", 0)
        where = f" in all but every {every}th layer, which has no processor to exchange" if every else ""
        return (
            f"its {type(denoiser).__name__} has linear attention{where}, which sums over all keys once for all "
            "queries, so there is nothing to choose, to keep or to reuse"
        )

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        raise UnsupportedError(f"{type(run.pipe).__name__} is known and not accelerated: {self.refuses(denoiser, '')}")
