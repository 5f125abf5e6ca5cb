"""What a speed-up costs: frames held against a reference clip, flicker, seams between chunks, motion and drift.

    from diffaccel.quality import compare_clips

    scores = compare_clips(dense, accelerated, borders=chunk_borders(81, frames_per_block=3))
    print(scores.psnr_pooled, scores.ssim_mean, scores.seam)

A clip is a numpy array (F, H, W, 3): uint8, or float in [0, 1]. `Lpips` and `ClipScore` need weights of their own.
"""

from .adherence import ClipScore
from .clips import Clip, ClipError, as_float_clip
from .drift import Drift, drift, windows
from .frames import psnr, ssim
from .lpips import Lpips
from .motion import Motion, motion, warp_error
from .multiscale import MetricError, ms_ssim
from .scores import FrameScores, compare_clips
from .temporal import chunk_borders, flicker, frame_jumps, seam

__all__ = [
    "Clip",
    "ClipError",
    "ClipScore",
    "Drift",
    "FrameScores",
    "Lpips",
    "MetricError",
    "Motion",
    "as_float_clip",
    "chunk_borders",
    "compare_clips",
    "drift",
    "flicker",
    "frame_jumps",
    "motion",
    "ms_ssim",
    "psnr",
    "seam",
    "ssim",
    "warp_error",
    "windows",
]
