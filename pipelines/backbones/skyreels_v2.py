"""SkyReels-V2: `SkyReelsV2Transformer3DModel`, Wan's blocks whose frames may each have a noise level of their own."""

from collections.abc import Callable
from typing import Any

from diffusers import SkyReelsV2Transformer3DModel

from diffaccel.errors import UnsupportedError
from diffaccel.port import Port
from diffaccel.run import Run

from ._diffusers import SkyReelsV2AttnProcessor
from .common import Family, RootHook, exchange
from .wan import WanToSeam


class SkyReelsV2(Family):
    """The family of `SkyReelsV2Pipeline`, its image-to-video variant, and diffusion forcing without causal blocks."""

    name = "SkyReels-V2"
    model = SkyReelsV2Transformer3DModel
    parts = ("self", "cross")

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt" and denoiser.config.added_kv_proj_dim is not None:
            return "its image tokens are found by counting back from 512 prompt tokens, which therefore have to stay"
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        ports = []
        for layer, block in enumerate(denoiser.blocks, first_layer):
            ports += [(block.attn1, Port(run, layer, "self")), (block.attn2, Port(run, layer, "cross"))]
        hook = _RootHook(run, tuple(denoiser.config.patch_size))
        return exchange(denoiser, ports, SkyReelsV2AttnProcessor, _Processor, hook)


class _RootHook(RootHook):
    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if module.config.num_frame_per_block > 1:  # the pipeline may set it between two generations
            raise UnsupportedError(
                f"causal blocks of {module.config.num_frame_per_block} frames mask attention, and masks do not pass "
                "through diffaccel: call the pipeline with causal_block_size=1"
            )
        return super().pre_forward(module, *args, **kwargs)

    def step(self, given: dict[str, Any]) -> tuple[int | None, int | None]:
        """In diffusion forcing every frame has a scheduler of its own: where the noisiest of them stands."""
        timesteps = getattr(getattr(self.run.pipe, "scheduler", None), "timesteps", None)
        if given["timestep"].ndim < 2 or timesteps is None:
            return super().step(given)
        return int((timesteps > given["timestep"].max().to(timesteps)).sum()), len(timesteps)


class _Processor(WanToSeam, SkyReelsV2AttnProcessor):
    """Of SkyReels-V2, whose copy differs from Wan's in its name alone."""
