"""MS-SSIM, one number a frame."""

import numpy as np
from numpy.typing import NDArray

from ..errors import DiffaccelError
from .clips import Clip, ClipError, as_pair

_SIDE = 160
"""Five scales halve a frame four times, and the smallest must exceed the 11 x 11 window: (11 - 1) * 2**4."""


class MetricError(DiffaccelError):
    """A measure cannot be taken here; the sentence says what is missing."""


def ms_ssim(a: Clip, b: Clip) -> NDArray[np.float64]:
    """Multi-scale structural similarity of every frame in [0, 1], shape (F,); 1 where two frames are identical.

    Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment", 2003, with its five
    weights, by torchmetrics. Raises `ClipError` on unequal shapes and where a side is not above 160 pixels,
    `MetricError` without torchmetrics.
    """
    left, right = as_pair(a, b)
    if min(left.shape[1:3]) <= _SIDE:
        raise ClipError(f"MS-SSIM needs sides above {_SIDE} pixels, got {left.shape[2]}x{left.shape[1]}")
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
    except ImportError as error:
        raise MetricError(
            "torchmetrics, which measures MS-SSIM, is not installed: pip install 'diffaccel[eval]'"
        ) from error
    import torch

    values = []
    for x, y in zip(left, right, strict=True):  # a frame at a time, as float64 frames of a long clip are large
        one, other = (torch.from_numpy(frame).permute(2, 0, 1)[None] for frame in (x, y))
        values.append(float(multiscale_structural_similarity_index_measure(other, one, data_range=1.0)))
    return np.array(values)
