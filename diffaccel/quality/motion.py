"""Temporal consistency along the motion: the error that is left when a frame is warped onto the one before it."""

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from .clips import Clip, ClipError, as_float_clip


@dataclass(frozen=True)
class Motion:
    """Where the pixels of each frame but the last go: `flow` (F - 1, H, W, 2) in pixels, x then y, and `visible`
    (F - 1, H, W), whether they are inside and uncovered in the next frame."""

    flow: NDArray[np.float32]
    visible: NDArray[np.bool_]


def motion(clip: Clip) -> Motion:
    """The optical flow of a clip from each frame to the next, by OpenCV's DIS (Kroeger et al., 2016).

    A pixel is visible where the flow there and the flow back cancel: |f + b|^2 <= 0.01 (|f|^2 + |b|^2) + 0.5 (Sundaram,
    Brox and Keutzer, 2010). Raises `ClipError` for fewer than two frames.
    """
    frames = as_float_clip(clip)
    if len(frames) < 2:
        raise ClipError(f"motion needs at least 2 frames, got {len(frames)}")
    gray = [
        np.rint(cv2.cvtColor(frame.astype(np.float32), cv2.COLOR_RGB2GRAY) * 255).astype(np.uint8) for frame in frames
    ]
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows, visible = [], []
    for now, following in pairwise(gray):
        there, back = (_estimate(estimator, *pair) for pair in ((now, following), (following, now)))
        back = _sample(back, there)
        gap = np.square(there + back).sum(-1)
        size = np.square(there).sum(-1) + np.square(back).sum(-1)
        flows.append(there)
        visible.append((gap <= 0.01 * size + 0.5) & _inside(there))
    return Motion(np.stack(flows), np.stack(visible))


def warp_error(clip: Clip, along: Motion | None = None) -> float:
    """Mean squared error, in [0, 1], between each frame and the next one warped back onto it, over visible pixels.

    Lai et al., "Learning blind video temporal consistency", 2018. `along` is the motion of a reference clip, so that
    two clips are held against one motion; by default the clip's own. `nan` where no pixel is visible. Raises
    `ClipError` where the motion is that of a clip of another shape.
    """
    values = as_float_clip(clip)
    along = motion(clip) if along is None else along
    expected = (len(along.visible) + 1, *along.visible.shape[1:])
    if values.shape[:3] != expected:
        raise ClipError(f"the motion is of a clip of shape {expected}, and this one has {values.shape[:3]}")
    total = count = 0.0
    for now, following, flow, visible in zip(values, values[1:], along.flow, along.visible, strict=False):
        error = np.square(_sample(following.astype(np.float32), flow) - now).mean(-1)
        total += float(error[visible].sum())
        count += float(visible.sum())
    return total / count if count else float("nan")


def _estimate(estimator: cv2.DISOpticalFlow, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(estimator.calc(a, b, None), dtype=np.float32)  # type: ignore[call-overload]


def _positions(flow: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where each pixel goes, x and y, (H, W) each."""
    rows, columns = np.mgrid[0 : flow.shape[0], 0 : flow.shape[1]].astype(np.float32)
    return columns + flow[..., 0], rows + flow[..., 1]


def _sample(image: NDArray[np.float32], flow: NDArray[np.float32]) -> NDArray[np.float32]:
    found = cv2.remap(image, *_positions(flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found, dtype=np.float32)


def _inside(flow: NDArray[np.float32]) -> NDArray[np.bool_]:
    height, width = flow.shape[:2]
    x, y = _positions(flow)
    return np.asarray((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))
