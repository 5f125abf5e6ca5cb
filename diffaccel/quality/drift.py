"""How a long clip moves away from its own beginning: colour, sharpness and likeness of its blocks to the first."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .clips import Clip, ClipError, as_float_clip

_BINS = 8
"""Of a colour histogram, each channel."""


@dataclass(frozen=True)
class Drift:
    """One value for every block but the first, each against the first.

    `colour`: distance of the mean colours in CIE L*a*b* (Delta E of 1976), 0 where nothing drifts. `sharpness`:
    variance of the Laplacian of luminance (Pech-Pacheco et al., 2000) over that of the first block, 1 where nothing
    drifts; `nan` where the first block is flat. `similarity`: intersection of the RGB histograms of 8 x 8 x 8 bins
    (Swain and Ballard, 1991) in [0, 1], which asks nothing of where things are.
    """

    colour: tuple[float, ...]
    sharpness: tuple[float, ...]
    similarity: tuple[float, ...]


def drift(clip: Clip, borders: Sequence[int]) -> Drift:
    """Drift of the blocks that begin at 0 and at each of `borders`, ascending and inside of the clip.

    Raises `ClipError` for borders that are not, and where there are none: one block has nothing to drift from.
    """
    frames = as_float_clip(clip)
    starts = [0, *borders]
    if not borders or starts != sorted(set(starts)) or starts[-1] >= len(frames):
        raise ClipError(
            f"drift is of blocks against the first, whose borders ascend in 1..{len(frames) - 1}, got {list(borders)}"
        )
    blocks = [_describe(frames[a:b]) for a, b in zip(starts, [*borders, len(frames)], strict=True)]
    (colour, sharpness, histogram), later = blocks[0], blocks[1:]
    return Drift(
        colour=tuple(float(np.linalg.norm(c - colour)) for c, _, _ in later),
        sharpness=tuple(s / sharpness if sharpness else float("nan") for _, s, _ in later),
        similarity=tuple(float(np.minimum(h, histogram).sum()) for _, _, h in later),
    )


def windows(frames: int, length: int = 16) -> tuple[int, ...]:
    """Borders of blocks of `length` frames, for a clip not made in blocks; what is left over joins the last."""
    return tuple(range(length, frames - length + 1, length))


def _describe(block: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    """Mean L*a*b* colour (3,), sharpness, and histogram (512,) that sums to 1."""
    flat = block.astype(np.float32)
    lab = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2LAB).mean(axis=(0, 1)) for frame in flat]).mean(0)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in flat]
    sharpness = float(np.mean([cv2.Laplacian(frame, cv2.CV_32F).var() for frame in gray]))
    level = np.minimum((block * _BINS).astype(int), _BINS - 1)
    counts = np.bincount((level @ (_BINS**2, _BINS, 1)).ravel(), minlength=_BINS**3)
    return lab.astype(np.float64), sharpness, counts / counts.sum()
