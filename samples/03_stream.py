"""Frames as soon as their block is finished, decoded exactly as the whole video would be."""

import sys
import time

import torch

from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.loading import bundled_model
from diffaccel.pipelines.presets import balanced
from diffaccel.video import VideoWriter

frames = int(sys.argv[1]) if len(sys.argv) > 1 else 49
pipe = CausalWanPipeline.from_pretrained(bundled_model())
pipe.set_progress_bar_config(disable=True)
settings = {"height": 128, "width": 128, "num_frames": frames, "num_inference_steps": 8, "guidance_scale": 2.5}
with balanced()(pipe), VideoWriter("streamed.mp4", fps=16) as video:
    began = time.perf_counter()
    chunks = pipe.stream("a small white ring circles over navy", generator=torch.Generator().manual_seed(2), **settings)
    for chunk in chunks:
        video.append(chunk[0])
        print(f"{time.perf_counter() - began:6.2f} s: {chunk.shape[1]} more frames")
