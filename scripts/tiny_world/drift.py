"""How a long clip of the tiny world changes against its own first window."""

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np

from .metrics import MIN_AREA, Frames, label, to_uint8
from .world import COLORS, FRAMES, SIZE, Scene, draw_scene

DRIFT_SEED = 780_000_000


def drift_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes of one sprite that circles or bounces before a static camera, so that nothing leaves or changes."""
    kept: list[Scene] = []
    number = DRIFT_SEED + 10_000 * seed
    while len(kept) < count:
        scene = draw_scene(number, (None,))
        number += 1
        if len(scene.sprites) == 1 and scene.camera == "static" and scene.sprites[0].motion in ("circles", "bounces"):
            kept.append(scene)
    return kept


MEASURES = ("brightness", "contrast", "sharpness", "area", "motion")


def window_statistics(frames: Frames, window: int = FRAMES) -> dict[str, np.ndarray]:
    """Per window of a clip: each of MEASURES (W,), and "color", the mean RGB (W, 3); all in 0..1.

    Motion counts changes above 15 of 255 alone, or a grain would hide that a clip has frozen; area is that of the
    colour most present in the first window.
    """
    frames = to_uint8(frames)
    rows: list[dict[str, Any]] = []
    color = None
    for start in range(0, len(frames) - window + 1, window):
        part = np.ascontiguousarray(frames[start : start + window])
        some = part[::4].astype(np.float32) / 255
        labels = label(part[::4, ::2, ::2])
        counts = np.bincount(labels.ravel(), minlength=256)[: len(COLORS)]
        color = int(counts.argmax()) if color is None else color
        change = cv2.absdiff(part[1:].reshape(-1), part[:-1].reshape(-1)).ravel()
        rows.append(
            {
                "brightness": some.mean(),
                "contrast": some.std(axis=(1, 2)).mean(),
                "sharpness": np.mean([np.abs(cv2.Laplacian(frame, cv2.CV_32F)).mean() for frame in some]),
                "area": counts[color] / labels.size,
                "motion": change[change > 15].sum(dtype=np.int64) / change.size / 255,
                "color": some.mean(axis=(0, 1, 2)),
            }
        )
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}


def _relative(values: np.ndarray) -> list[float]:
    """Ratios (N, W - 1) of (N, W) to the first column, averaged over the rows that have one; [] if none has."""
    usable = values[values[:, 0] > 1e-5]
    return (usable[:, 1:] / usable[:, :1]).mean(axis=0).tolist() if len(usable) else []


def drift(clips: Iterable[Frames], window: int = FRAMES, latents: np.ndarray | None = None) -> dict[str, Any]:
    """How clips of several windows change against their first one; `latents` (N, C, f, h, w) are optional.

    Per measure the ratio of each later window, averaged over clips; `largest` deviation from 1 of these, with its
    name; `color_shift`, the mean RGB's distance per window, of 0..1; the share of clips whose sprite `dissolved` (its
    area under a third, or never there) or that `froze` (motion under a third, or none).
    """
    tables = [window_statistics(frames, window) for frames in clips]
    stacked = {name: np.stack([table[name] for table in tables]) for name in tables[0]}
    out: dict[str, Any] = {name: _relative(stacked[name]) for name in MEASURES}
    shift = np.linalg.norm(stacked["color"][:, 1:] - stacked["color"][:, :1], axis=-1).mean(axis=0)
    area, motion = stacked["area"], stacked["motion"]
    lost = (area[:, 1:] < area[:, :1] / 3).any(axis=1) | (area[:, 0] * SIZE * SIZE < MIN_AREA)
    still = (motion[:, 1:] < motion[:, :1] / 3).any(axis=1) | (motion[:, 0] < 1e-5)
    out |= {"color_shift": shift.tolist(), "dissolved": float(lost.mean()), "froze": float(still.mean())}
    if latents is not None:
        parts = np.array_split(np.asarray(latents, dtype=np.float64), area.shape[1], axis=2)
        out["latent_mean"] = [float(part.mean()) for part in parts]
        out["latent_std"] = _relative(np.stack([part.std(axis=(1, 2, 3, 4)) for part in parts], axis=1))
    deviations = {name: max(abs(ratio - 1) for ratio in out[name]) for name in MEASURES if out[name]}
    worst = max(deviations, key=deviations.__getitem__, default="")
    return out | {"largest": deviations.get(worst, 0.0), "largest_of": worst}
