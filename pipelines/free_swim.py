"""FreeSwim: videos larger than the model was trained for (arXiv 2511.14712).

from diffaccel.pipelines import FreeSwimPipeline

big = FreeSwimPipeline(pipe, native=(480, 832))
frames = big("a paper boat in the rain", height=1088, width=1920).frames

A video of the native size, made from the prompt or given, is enlarged as pixels, noised, and denoised again. There
every query sees a window of the native size (`InwardWindow`), so that the model meets what it was trained on, and
attention to the prompt comes from passes over the whole frame (`FullFieldGuide`), so that each part of it does not show
all that the prompt names. Those passes run on the native grid here, the whole frame seen from afar; the published ones
read all of its tokens, at distances that the model never met.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray

from diffaccel import Accel, FullFieldGuide, Grid, InwardWindow, Run
from diffaccel.errors import KnobError, UnsupportedError
from diffaccel.spread import devices_of
from diffaccel.suggest import choose
from diffaccel.video import to_uint8

from . import inputs, streaming
from .causal_wan import CausalWanPipeline

FLOW_SHIFT = 9.0
"""Of the noise levels of a model that denoises a whole video at once: a large frame hides little at small ones."""


class FreeSwimPipeline:
    """Enlarges what a Wan pipeline makes, block by block or all at once.

    Args:
        pipe: `WanPipeline`, `WanVideoToVideoPipeline` or `CausalWanPipeline`. It is used, not changed.
        native: height and width in pixels that the model was trained on; its window has the next odd number of tokens.
        tile: rows and columns of queries that share a window, (1, 1) as published; by default a quarter of the window.
            Larger tiles are faster and may show where they meet.
        guide_every: steps between passes over the whole field; None makes none, which is a plain local window.
        guide_field: "native", such passes see the frame at the native size, or "whole", token by token as published.
        ratio: of `InwardWindow`.
        hold: of `FullFieldGuide`.
        accel: what else to run with, such as `Accel(prompt=PadCollapse())`; its window and reuse must be free.

    Raises:
        UnsupportedError: another pipeline, or an Accel with a window or reuse of its own.
        KnobError: a native size that is not a multiple of 16, or another `guide_field`.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        native: tuple[int, int] = (480, 832),
        tile: tuple[int, int] | None = None,
        guide_every: int | None = 2,
        guide_field: str = "native",
        ratio: float = 2.0,
        hold: str = "device",
        accel: Accel | None = None,
    ) -> None:
        if not isinstance(pipe, (WanPipeline, WanVideoToVideoPipeline)):
            raise UnsupportedError(
                f"FreeSwim is for the pipelines of Wan, got {type(pipe).__name__}; "
                "Accel(window=InwardWindow()) gives any supported pipeline the windows alone"
            )
        if getattr(pipe, "transformer_2", None) is not None:
            raise UnsupportedError(
                f"FreeSwim denoises with one transformer, and this {type(pipe).__name__} has two; pass a Wan 2.1 "
                "checkpoint, or one with transformer_2=None"
            )
        accel = accel or Accel()
        if accel.window is not None or accel.reuse is not None:
            raise UnsupportedError("FreeSwim is a window and a reuse; pass an Accel that has neither")
        self.pipe, self.native = pipe, native
        self._check_size(*native)
        rows, columns = (tokens // 2 * 2 + 1 for tokens in self.tokens(*native))
        tile = (max(1, rows // 4), max(1, columns // 4)) if tile is None else tile
        self.window = rows, columns
        window = InwardWindow(self.window, tile, ratio=ratio)
        choose(guide_field, ("native", "whole"), "guide_field")
        guide = None if guide_every is None else FullFieldGuide(every=guide_every, hold=hold)
        self.guide_field = guide_field
        self.accel: Any = replace(accel, window=window, reuse=guide)

    def accel_for(self, height: int, width: int) -> Accel:
        """`accel` as it is for a video of that size."""
        guide = self.accel.reuse
        if guide is None or self.guide_field == "whole":
            return self.accel
        shrink = max(1.0, min(height / self.native[0], width / self.native[1]))
        return replace(self.accel, reuse=replace(guide, shrink=shrink))

    def field(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that the guide's passes see."""
        guide: Any = self.accel_for(height, width).reuse
        grid = guide.field(Grid(1, *self.tokens(height, width)))
        return grid.height, grid.width

    def kept_bytes(self, height: int, width: int, num_frames: int, hold: str | None = None) -> int:
        """What the guide keeps on the device between its passes, of the frames that go through the model together."""
        config, guide = self.pipe.transformer.config, self.accel.reuse
        hold = hold or (guide and guide.hold)
        if hold in (None, "host"):
            return 0
        rows, columns = self.field(height, width)
        frames = self.frames_at_once(num_frames)
        heads = config.num_attention_heads
        width = config.attention_head_dim
        entry = width + 4 if hold == "int8" else width * self.pipe.transformer.dtype.itemsize
        return int(config.num_layers * frames * rows * columns * heads * entry) // devices_of(self.pipe.transformer)

    def frames_at_once(self, num_frames: int) -> int:
        """Latent frames of so many pixel frames that go through the model together."""
        frames = 1 + (num_frames - 1) // int(self.pipe.vae_scale_factor_temporal)
        return min(frames, self.pipe.config["frames_per_block"]) if isinstance(self.pipe, CausalWanPipeline) else frames

    def check(self, height: int, width: int, strength: float = 0.7) -> None:
        """Raise `KnobError` for a size or strength that a call would refuse."""
        self._check_size(height, width)
        if height < self.native[0] or width < self.native[1]:
            raise KnobError(
                f"FreeSwim makes frames larger than the native {self.native[0]} x {self.native[1]} (height x width), "
                f"got {height} x {width}; generate that size with the pipeline itself"
            )
        rows, columns = self.tokens(height, width)
        window = self.window
        if rows <= window[0] and columns <= window[1]:
            raise KnobError(
                f"a frame of {rows} x {columns} tokens is no larger than the window of {window[0]} x {window[1]}, so "
                "it would be read whole; take a larger frame, or generate it with the pipeline itself"
            )
        if not 0 < strength <= 1:
            raise KnobError(f"strength is a share of the steps in (0, 1], got {strength}")

    def tokens(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a frame of so many pixels."""
        stride = self._stride
        return height // stride, width // stride

    @property
    def _stride(self) -> int:
        return int(self.pipe.vae_scale_factor_spatial * self.pipe.transformer.config.patch_size[1])

    def _check_size(self, height: int, width: int) -> None:
        for name, pixels in (("height", height), ("width", width)):
            inputs.check_size(name, pixels, self._stride)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        video: Any = None,
        *,
        height: int,
        width: int,
        num_frames: int = 81,
        strength: float = 0.7,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        flow_shift: float | None = None,
        vae_tiling: bool = False,
        output_type: str = "np",
        callback_on_step_end: Callable[..., dict] | None = None,
        on_run: Callable[[Run], None] | None = None,
    ) -> WanPipelineOutput:
        """Makes a video of `height` x `width` pixels, multiples of 16 and no smaller than the native size.

        Args:
            video: what to enlarge, (F, H, W, 3) uint8 or float in [0, 1], F = 1 + 4k; None makes one of the native
                size from the prompt first.
            num_frames: of the video that is made first, 1 + 4k; not read with `video`.
            strength: share of the denoising steps that are run again, in (0, 1]; the rest of the video stays.
            num_inference_steps, guidance_scale, negative_prompt, generator: as of the pipeline.
            flow_shift: of the noise levels; 9 for a model that denoises the whole video at once, and the pipeline's own
                for one that goes block by block.
            vae_tiling: encode and decode the large video in tiles, which takes less memory and may show seams.
            output_type: "np" (1, F, H, W, 3) in [0, 1], "pt", "pil" or "latent".
            callback_on_step_end: as of the pipeline, called while the large video is denoised.
            on_run: called with the `Run` of the large video once it is done, for its report.

        Raises:
            KnobError: an argument breaks its rule; the message has the rule and the nearest valid values.
        """
        self.check(height, width, strength)
        usual = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        given: dict[str, Any] = {name: value for name, value in usual.items() if value is not None}
        given |= {"negative_prompt": negative_prompt, "generator": generator}
        if video is None:
            inputs.check_frames("num_frames", num_frames, self.pipe.vae_scale_factor_temporal)
            video = self._base(prompt, num_frames, given)
        frames = enlarge(video, height, width)
        inputs.check_frames("the number of frames of video", len(frames), self.pipe.vae_scale_factor_temporal)
        given |= {"height": height, "width": width, "output_type": output_type}
        given["callback_on_step_end"] = callback_on_step_end
        blockwise = isinstance(self.pipe, CausalWanPipeline)
        target = self.pipe if blockwise else self._video_to_video(flow_shift)
        with self.accel_for(height, width)(target) as run, _tiled(target.vae, vae_tiling):
            if blockwise:
                given |= self._noised(frames, strength, flow_shift, given)
                result = target(prompt, num_frames=len(frames), **given)
            else:
                result = target(frames.astype(np.float32) / 255, prompt, strength=strength, **given)
                self.pipe.maybe_free_model_hooks()  # the other pipeline has none of its own
        if on_run is not None:
            on_run(run)
        return result

    def _noised(self, frames: Any, strength: float, flow_shift: float | None, given: dict[str, Any]) -> dict[str, Any]:
        """What a pipeline that goes block by block starts from, in place of its steps: latents, and noise levels."""
        pipe: Any = self.pipe
        scheduler = pipe.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise UnsupportedError(
                f"noise levels are cut short for FlowMatchEulerDiscreteScheduler here, got {type(scheduler).__name__}"
            )
        if flow_shift is not None:
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=flow_shift)
        steps, device = given.pop("num_inference_steps", None), pipe._execution_device
        levels = inputs.block_schedule(scheduler, pipe.config["sampler"], steps).timesteps.tolist()
        levels = levels[len(levels) - max(1, int(len(levels) * strength)) :]
        noise_level = levels[0] / scheduler.config.num_train_timesteps
        pixels = pipe.video_processor.preprocess_video(frames.astype(np.float32) / 255)
        clean = streaming.encode(pipe.vae, pixels).to(device, torch.float32)
        noise = randn_tensor(clean.shape, generator=given["generator"], device=device, dtype=torch.float32)
        return {"latents": torch.lerp(clean, noise, noise_level), "timesteps": levels}

    def _base(self, prompt: str, num_frames: int, given: dict[str, Any]) -> Any:
        if isinstance(self.pipe, WanVideoToVideoPipeline):
            raise KnobError("a WanVideoToVideoPipeline makes no video of its own; pass video, or a WanPipeline")
        size = {"height": self.native[0], "width": self.native[1], "num_frames": num_frames}
        return self.pipe(prompt, **given, **size, output_type="np").frames[0]

    def _video_to_video(self, flow_shift: float | None) -> WanVideoToVideoPipeline:
        pipe, shift = self.pipe, FLOW_SHIFT if flow_shift is None else flow_shift
        names = inspect.signature(WanVideoToVideoPipeline.__init__).parameters
        parts = {name: part for name, part in pipe.components.items() if name in names}
        if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=shift)
        else:
            parts["scheduler"] = UniPCMultistepScheduler.from_config(
                pipe.scheduler.config, flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction"
            )
        made = WanVideoToVideoPipeline(**parts)
        made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return made


@contextmanager
def _tiled(vae: Any, tiled: bool) -> Iterator[None]:
    before = vae.use_tiling
    vae.use_tiling = before or tiled
    try:
        yield
    finally:
        vae.use_tiling = before


def enlarge(video: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Frames (F, H, W, 3), uint8 or float in [0, 1], as uint8 of another size: bilinear, frame by frame."""
    frames = to_uint8(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise KnobError(f"video is frames (F, H, W, 3), at least one, got an array of shape {frames.shape}")
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR) for frame in frames])
