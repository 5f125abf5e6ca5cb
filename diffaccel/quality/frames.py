"""PSNR and SSIM, one number a frame."""

import cv2
import numpy as np
from numpy.typing import NDArray

from .clips import Clip, ClipError, as_pair

_RADIUS, _SIGMA = 5, 1.5  # the 11 x 11 Gaussian of Wang et al.
_C1, _C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with L = 1


def psnr(a: Clip, b: Clip) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of every frame in dB, shape (F,); `inf` where two frames are identical.

    `10 log10(1 / mse)` with the peak at 1 and the mean over pixels and channels. Raises `ClipError` on unequal shapes.
    """
    left, right = as_pair(a, b)
    return psnr_of_mse(squared_error(left, right))


def squared_error(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean squared error of every frame, shape (F,); a frame at a time, so that a long clip needs no third copy."""
    return np.array([np.mean((x - y) ** 2) for x, y in zip(a, b, strict=True)])


def psnr_of_mse(mse: NDArray[np.float64]) -> NDArray[np.float64]:
    """dB of mean squared errors on the scale [0, 1]; `inf` for an error of zero."""
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(mse)


def ssim(a: Clip, b: Clip) -> NDArray[np.float64]:
    """Structural similarity of every frame in [-1, 1], shape (F,); 1 where two frames are identical.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    2004: 11 x 11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, each channel alone, then the mean over channels
    and over the positions at which the window lies inside the frame. Raises `ClipError` on unequal shapes and on frames
    smaller than the window.
    """
    left, right = as_pair(a, b)
    side = 2 * _RADIUS + 1
    if min(left.shape[1:3]) < side:
        raise ClipError(f"SSIM needs frames of at least {side}x{side} pixels, got {left.shape[2]}x{left.shape[1]}")
    return np.array([_ssim_frame(x, y) for x, y in zip(left, right, strict=True)])


def _ssim_frame(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * cov + _C2) / (var_x + var_y + _C2)
    return float((luminance * structure).mean())


def _blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
    side = 2 * _RADIUS + 1
    blurred = cv2.GaussianBlur(image, (side, side), _SIGMA, sigmaY=_SIGMA)
    return np.asarray(blurred, dtype=np.float64)[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
