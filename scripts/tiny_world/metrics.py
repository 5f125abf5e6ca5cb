"""What a clip shows, read from its pixels: which sprite colour, and where it goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .world import BACKGROUND_RGB, COLORS, SPRITE_RGB, VECTORS, Scene, second_shade

MIN_PIXELS = 60.0
MIN_TRAVEL = 8.0


@dataclass(frozen=True)
class Reading:
    """Median pixels of each sprite colour, and the direction the named one travels (None: it does not)."""

    pixels: dict[str, float]
    direction: str | None
    travel: float


def color_masks(frames: np.ndarray) -> np.ndarray:
    """Which sprite colour each pixel has, (8, F, H / 2, W / 2) booleans; `frames` (F, H, W, 3) in 0..1.

    A pixel belongs to the nearest of all sprite and background colours, and to none when that is far.
    """
    names = [*SPRITE_RGB.values(), *BACKGROUND_RGB.values(), *map(second_shade, BACKGROUND_RGB.values())]
    palette = torch.tensor(names, dtype=torch.float32)
    pixels = torch.as_tensor(np.ascontiguousarray(frames[:, ::2, ::2]), dtype=torch.float32)
    distance = torch.cdist(pixels.flatten(0, 2), palette)
    nearest, index = distance.min(dim=1)
    index = torch.where(nearest < 0.3, index, -1).view(pixels.shape[:3])
    return torch.stack([index == i for i in range(len(COLORS))]).numpy()


def read(frames: np.ndarray, color: str) -> Reading:
    """Reading of a clip (F, H, W, 3) in 0..1 for the named colour."""
    masks = color_masks(frames)
    counts = masks.sum(axis=(2, 3)) * 4.0
    pixels = {name: float(np.median(counts[i])) for i, name in enumerate(COLORS)}
    mask = masks[COLORS.index(color)]
    seen = np.flatnonzero(mask.sum(axis=(1, 2)) * 4.0 >= MIN_PIXELS / 2)
    if len(seen) < max(3, len(frames) // 4):
        return Reading(pixels, None, 0.0)
    centers = np.array([[np.nonzero(mask[i])[1].mean(), np.nonzero(mask[i])[0].mean()] for i in seen]) * 2.0
    slope = np.polyfit(seen, centers, 1)[0]
    travel = float(np.abs(slope).max()) * len(frames)
    axis = int(np.argmax(np.abs(slope)))
    direction = max(VECTORS, key=lambda name: VECTORS[name][axis] * slope[axis]) if travel >= MIN_TRAVEL else None
    return Reading(pixels, direction, travel)


def judge(clips: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of clips (N, F, H, W, 3) that show the colour, and the direction, of their scene's only sprite."""
    present = right = 0
    for frames, scene in zip(clips, scenes, strict=True):
        sprite = scene.sprites[0]
        reading = read(frames, sprite.color)
        most = max(reading.pixels, key=reading.pixels.__getitem__)
        present += most == sprite.color and reading.pixels[most] >= MIN_PIXELS
        right += reading.direction == sprite.motion
    return {"color": present / len(scenes), "direction": right / len(scenes)}
