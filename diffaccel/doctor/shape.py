"""The attention that a model runs: how many heads, channels, queries and keys."""

from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

import torch

from .. import backbone


@dataclass(frozen=True)
class Shape:
    """One self-attention of a model where it is largest.

    A causal model generates block by block: `block` is the tokens of one, `past` those of all blocks before the last.
    A bidirectional model reads all tokens of the video at once: they are its `block`, and it has no `past`. Frames are
    pixel frames, sizes are pixels. `parameters` counts those of all denoisers; `branches` is 2 under guidance, which
    keeps two caches.
    """

    model: str
    pipeline: str
    backbone: str
    causal: bool
    layers: int
    heads: int
    head_dim: int
    width: int
    height: int
    frames: int
    tokens_per_frame: int
    block: int
    past: int
    parameters: int
    branches: int

    @property
    def keys(self) -> int:
        """Tokens that a query reads."""
        return self.past + self.block

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """What the keys and values of all finished blocks take, in all layers and branches; 0 if bidirectional."""
        wide = self.heads * self.head_dim * dtype.itemsize
        return 2 * self.layers * self.branches * self.keys * wide if self.causal else 0

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return self.parameters * dtype.itemsize


def of_model(
    model: str | Path | None = None, width: int | None = None, height: int | None = None, frames: int | None = None
) -> Shape:
    """The shape of a model as `diffaccel generate` opens it; what is not given is the model's own.

    Only configurations are read. Raises `LoadError` or `UnsupportedError` for a model that cannot be opened or is of
    no known family, `KnobError` for a size or number of frames that it does not take.
    """
    from ..pipelines.loading import BUNDLED_MODELS, defaults
    from ..pipelines.outline import outline

    pipe = outline(model)
    given = defaults(pipe, model)
    name = BUNDLED_MODELS[0] if model is None else str(model)
    guided = given.guidance_scale is not None and given.guidance_scale > 1
    return of_pipeline(
        pipe,
        name,
        given.width if width is None else width,
        given.height if height is None else height,
        given.num_frames if frames is None else frames,
        branches=2 if guided else 1,
    )


def of_pipeline(pipe: Any, name: str, width: int, height: int, frames: int, branches: int = 1) -> Shape:
    """The shape of a pipeline that is open; `width` and `height` in pixels, `frames` in pixel frames."""
    from ..pipelines.inputs import block_ranges, check_frames, check_size

    family, denoisers = backbone.find(pipe)
    layouts = [family.geometry(denoiser) for denoiser in denoisers]
    first = layouts[0]
    temporal, spatial = _strides(pipe)
    check_frames("--frames", frames, temporal)
    for side, pixels, patch in (("width", width, first.patch[2]), ("height", height, first.patch[1])):
        check_size(f"the {side} in --size", pixels, lcm(16, spatial * patch))
    per_frame = (height // (spatial * first.patch[1])) * (width // (spatial * first.patch[2]))
    count = (1 + (frames - 1) // temporal) // first.patch[0]
    causal = bool(getattr(pipe, "block_causal", False))
    block = len(block_ranges(0, count, pipe.config["frames_per_block"])[-1]) if causal else count
    return Shape(
        model=name,
        pipeline=type(pipe).__name__,
        backbone=first.backbone,
        causal=causal,
        layers=sum(layout.layers for layout in layouts),
        heads=first.heads,
        head_dim=first.head_dim,
        width=width,
        height=height,
        frames=frames,
        tokens_per_frame=per_frame,
        block=block * per_frame,
        past=(count - block) * per_frame,
        parameters=sum(weight.numel() for denoiser in denoisers for weight in denoiser.parameters()),
        branches=branches,
    )


def _strides(pipe: Any) -> tuple[int, int]:
    """Pixel frames of a latent frame, and pixels of a latent's side."""
    names = (
        ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"),
        (
            "vae_scale_factor_spatial",
            "vae_spatial_compression_ratio",
        ),
    )
    temporal, spatial = (next(int(getattr(pipe, name)) for name in pair if hasattr(pipe, name)) for pair in names)
    return temporal, spatial
