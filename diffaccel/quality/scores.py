"""One clip scored against another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .clips import Clip, as_pair
from .frames import psnr_of_mse, squared_error, ssim
from .temporal import flicker, seam


@dataclass(frozen=True)
class FrameScores:
    """`compare_clips(reference, clip)`: one number a frame, and their summaries.

    `psnr` (dB, `inf` where frames are identical) and `ssim` have one entry a frame. `psnr_mean` is the mean over the
    frames that differ, so that a first chunk that nothing has touched cannot lift it; it is `inf` only for identical
    clips. `psnr_pooled` is the PSNR of the mean squared error over the whole clip, and `psnr_worst` the lowest frame.
    `flicker` and `seam` are those of the clip, `flicker_reference` and `seam_reference` those of the reference; they
    are `nan` where undefined (fewer than three frames; no chunk borders).
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    psnr_mean: float
    psnr_pooled: float
    ssim_mean: float
    flicker: float
    flicker_reference: float
    seam: float
    seam_reference: float

    @property
    def identical(self) -> bool:
        """Whether every frame equals its reference bit for bit."""
        return all(math.isinf(value) for value in self.psnr)

    @property
    def identical_frames(self) -> int:
        """How many frames equal their reference bit for bit."""
        return sum(math.isinf(value) for value in self.psnr)

    @property
    def psnr_worst(self) -> float:
        """PSNR of the frame that is farthest from its reference."""
        return min(self.psnr)

    def to_dict(self) -> dict[str, Any]:
        """The scores for strict JSON: `inf` and `nan` become null. A null PSNR means identical frames, and then
        `identical_frames` says how many and `identical` whether all of them are."""
        return {
            "identical": self.identical,
            "identical_frames": self.identical_frames,
            "psnr_mean": _finite(self.psnr_mean),
            "psnr_pooled": _finite(self.psnr_pooled),
            "psnr_worst": _finite(self.psnr_worst),
            "ssim_mean": self.ssim_mean,
            "flicker": _finite(self.flicker),
            "flicker_reference": _finite(self.flicker_reference),
            "seam": _finite(self.seam),
            "seam_reference": _finite(self.seam_reference),
            "psnr": [_finite(value) for value in self.psnr],
            "ssim": list(self.ssim),
        }


def compare_clips(reference: Clip, clip: Clip, borders: Sequence[int] = ()) -> FrameScores:
    """Score `clip` against `reference`, both (F, H, W, 3), uint8 or float in [0, 1].

    `borders` are the first frames of the later chunks (`chunk_borders`), needed for the seam only. Raises `ClipError`
    on unequal shapes, on values outside the range and on frames under 11 x 11 pixels.
    """
    left, right = as_pair(reference, clip)
    error = squared_error(left, right)
    per_frame = psnr_of_mse(error)
    differing = per_frame[np.isfinite(per_frame)]
    similarity = ssim(left, right)
    return FrameScores(
        psnr=tuple(per_frame.tolist()),
        ssim=tuple(similarity.tolist()),
        psnr_mean=float(differing.mean()) if differing.size else math.inf,
        psnr_pooled=float(psnr_of_mse(error.mean())),
        ssim_mean=float(similarity.mean()),
        flicker=flicker(right),
        flicker_reference=flicker(left),
        seam=seam(right, borders),
        seam_reference=seam(left, borders),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
