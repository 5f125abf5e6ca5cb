"""Frames on their way to a page: strips of JPEG while they come, a file once they are all there."""

import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..video import to_uint8, write_video

QUALITY = 95
_MOST_ROWS = 8192  # of pixels in a strip: browsers draw no picture of any height


class Clip:
    """One video of a result. Frames are appended by the worker; a strip is coded when a page asks for it, so that
    this costs the generation no time."""

    def __init__(self, name: str, label: str) -> None:
        self.name, self.label = name, label
        self.size: tuple[int, int] | None = None
        """Width and height in pixels, once there is a frame."""
        self.parts: list[int] = []
        """Frames in each strip."""
        self.file: Path | None = None
        self._raw: list[NDArray[np.uint8] | None] = []
        self._coded: list[bytes | None] = []
        self._lock = threading.Lock()

    @property
    def frames(self) -> int:
        return sum(self.parts)

    def append(self, frames: NDArray[Any]) -> None:
        """Adds frames (F, H, W, 3), uint8 or float in [0, 1]."""
        pixels = to_uint8(frames)
        height, width = pixels.shape[1:3]
        self.size = width, height
        most = max(1, _MOST_ROWS // height)
        for start in range(0, len(pixels), most):
            part = pixels[start : start + most]
            self._raw.append(part)
            self._coded.append(None)
            self.parts.append(len(part))

    def strip(self, number: int) -> bytes:
        """The frames of one part below each other, as JPEG. Raises `IndexError` if there is no such part."""
        if not 0 <= number < len(self.parts):
            raise IndexError(number)
        with self._lock:
            coded, raw = self._coded[number], self._raw[number]
            if coded is None:
                assert raw is not None
                coded = self._coded[number] = _jpeg(raw.reshape(-1, *raw.shape[2:]))
        return coded

    def finish(self, file: Path, fps: float) -> None:
        """Writes the frames as a file and keeps nothing but their strips."""
        pixels = [part for part in self._raw if part is not None]
        if not pixels:
            return
        write_video(file, np.concatenate(pixels), fps)
        for number in range(len(self.parts)):
            self.strip(number)
        self._raw = [None] * len(self.parts)
        self.file = file


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    how = [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    ok, coded = cv2.imencode(".jpg", picture[..., ::-1], how)
    if not ok:
        raise RuntimeError(f"a strip of {picture.shape} could not be coded")
    return coded.tobytes()
