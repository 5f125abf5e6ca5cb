"""A prompt becomes a video, block by block, with the bundled model; what accelerated it is reported."""

import sys

import torch

from diffaccel import Accel, FlashBlock, PadCollapse, TempCache
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.loading import bundled_model
from diffaccel.video import write_video

frames = int(sys.argv[1]) if len(sys.argv) > 1 else 49
pipe = CausalWanPipeline.from_pretrained(bundled_model())
accel = Accel(cache=TempCache(), reuse=FlashBlock(refresh=3), prompt=PadCollapse())
with accel(pipe) as run:
    video = pipe(
        "a large red circle moves left over a teal checkerboard",
        height=128,
        width=128,
        num_frames=frames,
        num_inference_steps=8,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(1),
    ).frames[0]
write_video("generated.mp4", video, fps=16)
print(run.report())
