"""Your own stock diffusers pipeline, accelerated where it can be, and the same video after as before."""

import sys

import numpy as np
import torch
from diffusers import WanPipeline

from diffaccel import Accel, PadCollapse, TempCache, UnsupportedError
from diffaccel.pipelines.loading import bundled_model

frames = int(sys.argv[1]) if len(sys.argv) > 1 else 25
pipe = WanPipeline.from_pretrained(bundled_model())  # any Wan checkpoint in diffusers format


def generate() -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    size = {"height": 128, "width": 128, "num_frames": frames}
    return pipe("a small blue cross moves right over black", generator=generator, num_inference_steps=8, **size).frames


before = generate()
with Accel(prompt=PadCollapse())(pipe) as run:
    inside = generate()
print(run.report())
print("largest difference of a pixel with the lossless technique:", float(abs(inside - before).max()))
print("bit for bit the same after leaving:", np.array_equal(generate(), before))

try:  # what a bidirectional model cannot take is refused with the reason, never dropped in silence
    Accel(cache=TempCache()).apply(pipe)
except UnsupportedError as error:
    print(error)
