"""What single frames do not show: flicker, and seams where one chunk of a streamed video ends and the next begins."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .clips import Clip, ClipError, as_float_clip


def frame_jumps(clip: Clip) -> NDArray[np.float64]:
    """Mean absolute change from each frame to the next in [0, 1], shape (F - 1,)."""
    values = as_float_clip(clip)
    return np.abs(np.diff(values, axis=0)).mean(axis=(1, 2, 3))


def flicker(clip: Clip) -> float:
    """Mean absolute second difference over time, in [0, 2]: 0 for a still or a linear fade, high for brightness that
    jumps back and forth. `nan` for fewer than three frames, which have no second difference.

    Moving edges count as well, so compare it with the flicker of the reference clip, not with zero.
    """
    values = as_float_clip(clip)
    if len(values) < 3:
        return float("nan")
    return float(np.abs(np.diff(values, n=2, axis=0)).mean())


def seam(clip: Clip, borders: Sequence[int]) -> float:
    """How much larger the change between frames is at chunk borders than inside chunks: 1 is seamless.

    `borders` holds the index of the first frame of every chunk but the first, each in [1, F - 1]. The result is the
    mean jump at the borders over the mean jump elsewhere; `inf` if the clip moves at its borders only, 1 if it never
    moves, and `nan` if there are no borders or nothing but borders. Raises `ClipError` for a border outside the clip.
    """
    jumps = frame_jumps(clip)
    outside = [border for border in borders if not 1 <= border <= len(jumps)]
    if outside:
        raise ClipError(
            f"chunk borders must lie in 1..{len(jumps)} for a clip of {len(jumps) + 1} frames, got {outside}"
        )
    at_border = np.zeros(len(jumps), dtype=bool)
    at_border[[border - 1 for border in borders]] = True
    if at_border.all() or not at_border.any():
        return float("nan")
    border_jump, inner_jump = float(jumps[at_border].mean()), float(jumps[~at_border].mean())
    if inner_jump == 0.0:
        return 1.0 if border_jump == 0.0 else float("inf")
    return border_jump / inner_jump


def chunk_borders(num_frames: int, frames_per_block: int, temporal_factor: int = 4) -> tuple[int, ...]:
    """Pixel frames at which a block-causal video starts a new chunk, for `seam`.

    A causal video autoencoder turns the first latent frame into one pixel frame and each later one into
    `temporal_factor`. A chunk is `frames_per_block` latent frames; the first one takes the remainder, as
    `CausalWanPipeline` does. 81 frames in blocks of 3: (9, 21, 33, 45, 57, 69).
    """
    if min(frames_per_block, temporal_factor, num_frames) < 1:
        raise ClipError(
            "chunk borders need at least 1 frame, 1 latent frame a block and a temporal factor of 1, "
            f"got {num_frames}, {frames_per_block} and {temporal_factor}"
        )
    latent_frames = 1 + (num_frames - 1) // temporal_factor
    first = latent_frames % frames_per_block or frames_per_block
    return tuple(1 + temporal_factor * (start - 1) for start in range(first, latent_frames, frames_per_block))
