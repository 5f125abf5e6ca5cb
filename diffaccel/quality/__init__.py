"""What a speed-up costs: per-frame PSNR and SSIM against a reference clip, flicker, and seams between chunks.

    from diffaccel.quality import compare_clips

    scores = compare_clips(dense, accelerated, borders=chunk_borders(81, frames_per_block=3))
    print(scores.psnr_pooled, scores.ssim_mean, scores.seam)

A clip is a numpy array (F, H, W, 3): uint8, or float in [0, 1].
"""

from .clips import Clip, ClipError, as_float_clip
from .frames import psnr, ssim
from .scores import FrameScores, compare_clips
from .temporal import chunk_borders, flicker, frame_jumps, seam

__all__ = [
    "Clip",
    "ClipError",
    "FrameScores",
    "as_float_clip",
    "chunk_borders",
    "compare_clips",
    "flicker",
    "frame_jumps",
    "psnr",
    "seam",
    "ssim",
]
