"""What the tests of compositions share: two small pipelines, a video of each, and a technique that changes it."""

import torch
from diffusers import WanPipeline
from tiny import tiny_components, tiny_pipeline

from diffaccel import Accel, AnnSA, FlashBlock, TempCache

LOSSY = {
    "stock": Accel(selection=AnnSA(0.5, dense_steps=0, min_past=0)),
    "causal": Accel(cache=TempCache(0.3), reuse=FlashBlock(refresh=2)),
}
KINDS = list(LOSSY)


def opened(kind, **transformer):
    """A `WanPipeline` or a `CausalWanPipeline` of tiny random components, the same ones every time."""
    if kind == "causal":
        return tiny_pipeline(**transformer)
    pipe = WanPipeline(**tiny_components(**transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe, **changes):
    """Latents of 9 latent frames, in the causal pipeline 3 blocks."""
    settings = {"height": 32, "width": 48, "num_frames": 33, "num_inference_steps": 3, "output_type": "latent"}
    seeded = {"generator": torch.Generator().manual_seed(1), "guidance_scale": 2.0}
    return pipe(**{"prompt": "a red circle", **seeded, **settings, **changes}).frames


def calls(run):
    """How often attention of each layer came to the seam, cross-attention before self-attention."""
    return [layer.calls for layer in run.report().layers]
