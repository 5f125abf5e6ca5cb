"""FramePack: `HunyuanVideoFramepackTransformer3DModel`, HunyuanVideo in sections with history in front of each."""

from collections.abc import Callable
from typing import Any, ClassVar

from diffusers import HunyuanVideoFramepackTransformer3DModel

from diffaccel.joint import Text
from diffaccel.run import Run

from .hunyuan_video import HunyuanVideo, install
from .sections import InSections, SectionHook


class FramePack(InSections, HunyuanVideo):
    """The family of `HunyuanVideoFramepackPipeline`, whatever order it makes its sections in."""

    name = "FramePack"
    model = HunyuanVideoFramepackTransformer3DModel

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        return install(denoiser, run, first_layer, _RootHook(run, self.geometry(denoiser).patch))


class _RootHook(SectionHook):
    arguments = (
        *(*SectionHook.arguments, "encoder_attention_mask", "pooled_projections", "image_embeds", "indices_latents"),
        *("guidance", "latents_clean", "indices_latents_clean", "latents_history_2x", "indices_latents_history_2x"),
        *("latents_history_4x", "indices_latents_history_4x"),
    )
    scales: ClassVar[dict[str, int]] = {"latents_clean": 1, "latents_history_2x": 2, "latents_history_4x": 4}

    def text(self, given: dict[str, Any]) -> Text:
        """Image tokens come before those of the text and are all read; a row alone loses its padding in the model."""
        mask_BN, image = given["encoder_attention_mask"], given["image_embeds"].shape[1]
        valid = tuple((image + mask_BN.sum(1).int()).tolist())
        return Text(image + mask_BN.shape[1] if len(valid) > 1 else valid[0], valid, before=self.history(given))
