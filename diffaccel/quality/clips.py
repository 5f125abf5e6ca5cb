"""The one form in which clips are measured."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DiffaccelError

Clip = NDArray[Any]
"""(F, H, W, 3), uint8 or float in [0, 1]; red, green, blue."""

_ROUNDING = 1e-3
"""A decoder's clamp may overshoot [0, 1] by rounding; more than this is a clip in another range."""


class ClipError(DiffaccelError, ValueError):
    """An array is not a clip, or two clips cannot be compared."""


def as_float_clip(clip: Clip, name: str = "the clip") -> NDArray[np.float64]:
    """`clip` as float64 in [0, 1], shape (F, H, W, 3); uint8 is divided by 255.

    Raises `ClipError`, calling the array `name`, for another shape, dtype or range and for values that are not finite.
    """
    array = np.asarray(clip)
    if array.ndim != 4 or array.shape[-1] != 3 or min(array.shape) < 1:
        raise ClipError(f"{name} must have the shape (frames, height, width, 3), got {array.shape}")
    if array.dtype == np.uint8:
        return array.astype(np.float64) / 255.0
    if not np.issubdtype(array.dtype, np.floating):
        raise ClipError(f"{name} must be uint8, or float in [0, 1], got {array.dtype}")
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ClipError(f"{name} holds values that are not finite (nan or inf), so it cannot be measured")
    low, high = float(values.min()), float(values.max())
    if low < -_ROUNDING or high > 1.0 + _ROUNDING:
        raise ClipError(
            f"{name} must lie in [0, 1] when it is float, got [{low:.3g}, {high:.3g}]; rescale it or pass uint8"
        )
    return np.clip(values, 0.0, 1.0)


def as_pair(a: Clip, b: Clip) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both clips as float64 in [0, 1]; `ClipError` unless their shapes are equal."""
    left, right = as_float_clip(a, "the first clip"), as_float_clip(b, "the second clip")
    if left.shape != right.shape:
        raise ClipError(
            f"two clips are compared frame by frame and must have one shape, got {left.shape} and {right.shape}; "
            "cut or resize one of them first"
        )
    return left, right
