"""What a clip shows, read from its pixels and held against the scene it was asked for; no learned judge.

`read` and `judge` are for what a prompt names (held-out combinations), `remembers` for the events that a bounded
memory of the past can get wrong; long rollouts are in `drift`. A clip is (F, 128, 128, 3), uint8 or float in
0..1. Every score is a share of clips, 0..1, and the world's own rendering passes all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean

import cv2
import numpy as np
import torch

from .world import (
    BACKGROUND_RGB,
    COLORS,
    DARK,
    EVENTS,
    FRAMES,
    PATTERNS,
    SHAPES,
    SIZE,
    SPRITE_RGB,
    VECTORS,
    Scene,
    _distance,
    draw_scene,
    render,
    second_shade,
)

MIN_AREA, MAX_AREA = 100, 4000
"""Pixels of a colour that make a sprite (drawn: 440 to 2180)."""
MIN_OVERLAP, MAX_EDGE = 0.65, 4.5
"""A shape counts as drawn from that overlap with its template on, with no wider an edge in pixels. Truth has 0.87 and
0.6; a Gaussian blur of 1.5 pixels passes and one of 5 fails."""
MIN_SPEED, SPEED_BORDER, MAX_SPEED = 0.15, 0.70, 1.80
"""Pixels per frame: still below the first, slow to the second, quick to the third (drawn: 0.40-0.52, 0.95-1.15)."""
MIN_RADIUS, SIZE_BORDER, MAX_RADIUS = 11.5, 19.8, 33.0
"""Pixels: small between the first two, large between the last two (drawn: 15.5-17, 23-26)."""
MAX_BACKGROUND_ERROR = 0.05
"""Root mean square error of a background, of 0..1; two patterns of one colour differ by 0.04 to 0.09."""
SAME_VIEW_DB = 25.0
"""PSNR of a background from which two views are the same. Another pattern leaves less (95 % of them), as does another
colour, or stripes 8 pixels off; 2 pixels off leave more. While a camera is away, whole frames have at most 23.5."""

MEMORY_SEED = 700_000_000
"""Up to 760 million; drawn for training are 0.., 500_000_000.. and 900_000_000.."""

Frames = np.ndarray


def _segment_distance(rgb: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of colours (..., 3) in 0..1 to the nearest point between two colours."""
    axis = end - start
    along = np.clip(((rgb - start) @ axis) / (axis @ axis), 0.0, 1.0)
    return np.linalg.norm(rgb - start - along[..., None] * axis, axis=-1)


def _sprite_distance(rgb: np.ndarray, color: str) -> np.ndarray:
    """Distance to any shade of a sprite colour."""
    full = np.asarray(SPRITE_RGB[color], dtype=np.float32)
    return _segment_distance(rgb, DARK * full, full)


def _background_distance(rgb: np.ndarray, color: str) -> np.ndarray:
    """Distance to any shade of a background colour."""
    base = BACKGROUND_RGB[color]
    return _segment_distance(rgb, np.asarray(base, np.float32), np.asarray(second_shade(base), np.float32))


@lru_cache(maxsize=1)
def _label_table() -> np.ndarray:
    """Label of every colour of 6 bits a channel: 0..6 a sprite colour, 7..12 a background, 255 far from all."""
    levels = (np.arange(64, dtype=np.float32) + 0.5) / 64
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    distance = [_sprite_distance(rgb, name) for name in SPRITE_RGB]
    distance += [_background_distance(rgb, name) for name in BACKGROUND_RGB]
    table = np.argmin(distance, axis=0).astype(np.uint8)
    table[np.min(distance, axis=0) > 0.25] = 255
    return table


def label(frames: Frames) -> np.ndarray:
    """Label of every pixel (see `_label_table`), uint8 with the shape of the frames less the last axis."""
    high = (frames >> 2).astype(np.int32)
    return _label_table()[(high[..., 0] << 12) | (high[..., 1] << 6) | high[..., 2]]


def to_uint8(frames: Frames) -> Frames:
    """Frames in 0..1, or uint8 already, as uint8."""
    return frames if frames.dtype == np.uint8 else np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Track:
    """The largest blob of one colour: pixels (F,), centre x, y (F, 2), and whether it clears the frame's rim (F,)."""

    area: np.ndarray
    center: np.ndarray
    inside: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """Whether it may be a sprite, (F,)."""
        return (self.area >= MIN_AREA) & (self.area <= MAX_AREA)


class Clip:
    """Every `step`-th frame of a clip with its pixels labelled, the middle of its first and of its last four frames."""

    def __init__(self, frames: Frames, step: int) -> None:
        frames = to_uint8(frames)
        self.times = np.arange(0, len(frames), step)
        self.frames = np.ascontiguousarray(frames[::step])
        self.labels = label(self.frames)
        self.first, self.last = (np.median(part, axis=0) for part in (frames[:4], frames[-4:]))
        counts = np.bincount(self.labels[::2].ravel(), minlength=256)[len(COLORS) : len(COLORS) + len(BACKGROUND_RGB)]
        self.background = tuple(BACKGROUND_RGB)[int(counts.argmax())]
        self._masks: dict[str, np.ndarray] = {}
        self._tracks: dict[str, Track] = {}

    def mask(self, color: str) -> np.ndarray:
        """Where a colour is, (F, H, W) uint8 0 or 1, without specks and the thin mixed edges of other colours."""
        if color not in self._masks:
            plain = (self.labels == COLORS.index(color)).astype(np.uint8)
            kernel = np.ones((3, 3), np.uint8)
            self._masks[color] = np.stack([cv2.morphologyEx(frame, cv2.MORPH_OPEN, kernel) for frame in plain])
        return self._masks[color]

    def track(self, color: str) -> Track:
        """Where the largest blob of a colour is."""
        if color not in self._tracks:
            area, center, inside = [], [], []
            for mask in self.mask(color):
                _, _, stats, centers = cv2.connectedComponentsWithStats(mask)
                best = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()) if len(stats) > 1 else 0
                x, y, width, height, pixels = stats[best]
                area.append(int(pixels) if best else 0)
                center.append(centers[best] + 0.5)
                inside.append(bool(best) and x > 0 and y > 0 and x + width < SIZE and y + height < SIZE)
            found = Track(np.array(area), np.array(center), np.array(inside))
            self._tracks[color] = Track(found.area, found.center, found.inside & found.seen)
        return self._tracks[color]

    def blobs(self) -> np.ndarray:
        """Number of sprites in every frame, (F,)."""
        union = np.max([self.mask(color) for color in COLORS], axis=0)
        areas = [cv2.connectedComponentsWithStats(mask)[2][1:, cv2.CC_STAT_AREA] for mask in union]
        return np.array([(area >= MIN_AREA).sum() for area in areas])

    def within(self, first: float, last: float) -> np.ndarray:
        """Which of the frames lie between two times, (F,)."""
        return (self.times >= first) & (self.times <= last)


@lru_cache(maxsize=len(SHAPES))
def _moments(shape: str) -> tuple[float, float, float]:
    """Of a shape of radius 1: its area, its perimeter, and how far below its centre its centre of mass lies."""
    grid = torch.linspace(-1.3, 1.3, 521)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    distance = _distance(shape, x, y, torch.tensor(1.0))
    areas = [float((distance < edge).float().mean()) * 2.605**2 for edge in (-0.02, 0.0, 0.02)]
    return areas[1], (areas[2] - areas[0]) / 0.04, float(y[distance < 0].mean())


@dataclass(frozen=True)
class Look:
    """A sprite fitted over some frames: shape (None: of none), overlap 0..1; edge, radius, place (2,) in pixels."""

    shape: str | None
    overlap: float
    edge: float
    radius: float
    place: np.ndarray


def _fits(clip: Clip, color: str, index: int) -> np.ndarray:
    """Overlap with each shape's template at its fitted place and radius, that radius, and the edge's width, (5, 3).

    Pixels that are neither the sprite's colour nor the background's count against every shape, so a smear fails.
    """
    track = clip.track(color)
    x, y = track.center[index]
    reach = 44
    left, top = max(0, int(x) - reach), max(0, int(y) - reach)
    window = (slice(top, int(y) + reach), slice(left, int(x) + reach))
    rgb = clip.frames[index][window].astype(np.float32) / 255
    own, other = _sprite_distance(rgb, color), _background_distance(rgb, clip.background)
    weight = other / (own + other + 1e-6)
    for name in COLORS:
        if name != color:
            weight[cv2.dilate(clip.mask(name)[index][window], np.ones((3, 3), np.uint8)) > 0] = 0
    sure, any_of_it = (weight > 0.7) & (own < 0.25), weight > 0.3
    rows, columns = np.nonzero(sure)
    if not len(rows):
        return np.tile((0.0, 1.0, 99.0), (len(SHAPES), 1))
    grid_y, grid_x = np.mgrid[: rgb.shape[0], : rgb.shape[1]] + 0.5
    fits = []
    for shape in SHAPES:
        unit_area, unit_perimeter, below = _moments(shape)
        radius = float(np.sqrt((sure.sum() + any_of_it.sum()) / 2 / unit_area))
        across, down = grid_x - columns.mean() - 0.5, grid_y - rows.mean() - 0.5 + below * radius
        inside = _distance(shape, torch.from_numpy(across), torch.from_numpy(down), torch.tensor(radius)).numpy() < 0
        overlap = (sure & inside).sum() / (any_of_it | inside).sum()
        # From 0.3 to 0.7 is 0.4 of a straight ramp.
        edge = (any_of_it.sum() - sure.sum()) / (unit_perimeter * radius) / 0.4
        fits.append((overlap, radius, edge))
    return np.array(fits)


def look(clip: Clip, color: str, chosen: np.ndarray | None = None, most: int = 6) -> Look | None:
    """The sprite of a colour over up to `most` of the `chosen` frames (F,) in which it is whole; None if in none."""
    track = clip.track(color)
    usable = np.flatnonzero(track.inside if chosen is None else track.inside & chosen)
    if not len(usable):
        return None
    picks = usable[np.unique(np.linspace(0, len(usable) - 1, most).round().astype(int))]
    fits = np.median([_fits(clip, color, int(index)) for index in picks], axis=0)
    best = int(fits[:, 0].argmax())
    overlap, radius, edge = map(float, fits[best])
    drawn = overlap >= MIN_OVERLAP and edge <= MAX_EDGE
    return Look(SHAPES[best] if drawn else None, overlap, edge, radius, np.median(track.center[picks], axis=0))


def velocity(times: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Pixels per frame, (2,): the median over all pairs of frames, which a third of wrong centres does not move."""
    first, second = np.triu_indices(len(times), 1)
    return np.median((centers[second] - centers[first]) / (times[second] - times[first])[:, None], axis=0)


def heading(speed: np.ndarray | None) -> str | None:
    """The direction of a velocity, None where it stands still or moves askew."""
    if speed is None:
        return None
    axis = int(np.abs(speed).argmax())
    if abs(speed[axis]) < MIN_SPEED or abs(speed[1 - axis]) > 0.5 * abs(speed[axis]):
        return None
    return max(VECTORS, key=lambda name: VECTORS[name][axis] * speed[axis])


def moves(clip: Clip, color: str, chosen: np.ndarray | None = None) -> np.ndarray | None:
    """Velocity of a colour over the chosen frames: those in which it is whole, or where they are few, is seen."""
    track = clip.track(color)
    chosen = np.ones(len(clip.times), bool) if chosen is None else chosen
    usable = track.inside & chosen
    if usable.sum() < 4:
        usable = track.seen & chosen
    return velocity(clip.times[usable], track.center[usable]) if usable.sum() >= 4 else None


@lru_cache(maxsize=1)
def _backgrounds() -> tuple[list[tuple[str, str]], np.ndarray]:
    """Colour and pattern of every background at every offset, and its pixels (N, 64 * 64, 3) in 0..1."""
    offsets = [(x, y) for x in (0.0, 16.0) for y in (0.0, 16.0)]
    scenes = [
        Scene(pattern, color, "static", (), offset=at)
        for color in BACKGROUND_RGB
        for pattern in PATTERNS
        for at in offsets
    ]
    pixels = render(scenes, 1)[:, 0, :, ::2, ::2].flatten(2).transpose(1, 2).numpy()
    return [(scene.background, scene.pattern) for scene in scenes], pixels.astype(np.float32) / 255


def background(clip: Clip) -> tuple[str, str, float]:
    """Nearest background colour and pattern, and its root mean square error, over the pixels no sprite covers."""
    sprite = (clip.labels < len(COLORS)).astype(np.uint8)
    covered = np.stack([cv2.dilate(frame, np.ones((9, 9), np.uint8)) for frame in sprite])[:, ::2, ::2, None]
    count = (1 - covered.astype(np.float32)).sum(axis=0).reshape(-1, 1)
    total = (clip.frames[:, ::2, ::2] * (1 - covered)).sum(axis=0, dtype=np.float32).reshape(-1, 3) / 255
    free = count[:, 0] > 0
    if free.mean() < 0.3:
        return "", "", float("inf")
    names, pixels = _backgrounds()
    errors = np.sqrt(((pixels[:, free] - total[free] / count[free]) ** 2).mean(axis=(1, 2)))
    best = int(errors.argmin())
    return *names[best], float(errors[best])


@dataclass(frozen=True)
class Reading:
    """What a clip of one moving sprite shows; None where it shows none. Radius in pixels, velocity in px/frame."""

    color: str | None
    look: Look | None
    single: bool
    velocity: np.ndarray | None
    background: tuple[str, str, float]


def read(frames: Frames) -> Reading:
    """Reading of a clip; shape, size and motion are those of the most present sprite colour, whatever was asked."""
    clip = Clip(frames, max(1, min(4, len(frames) // 8)))
    areas = {color: float(np.median(clip.track(color).area * clip.track(color).seen)) for color in COLORS}
    most = max(areas, key=areas.__getitem__)
    if areas[most] < MIN_AREA:
        return Reading(None, None, False, None, background(clip))
    single = bool((clip.blobs() == 1).mean() > 0.5)
    return Reading(most, look(clip, most), single, moves(clip, most), background(clip))


def judge(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Which of the things that a single-sprite scene says a reading has; `all` if it has every one."""
    sprite, seen = scene.sprites[0], reading.look
    rate = float(np.abs(reading.velocity).max()) if reading.velocity is not None else 0.0
    rates = (MIN_SPEED, SPEED_BORDER) if sprite.speed == "slowly" else (SPEED_BORDER, MAX_SPEED)
    radii = (MIN_RADIUS, SIZE_BORDER) if sprite.size == "small" else (SIZE_BORDER, MAX_RADIUS)
    color, pattern, error = reading.background
    right = {
        "color": reading.color == sprite.color,
        "shape": seen is not None and seen.shape == sprite.shape,
        "count": reading.single,
        "direction": heading(reading.velocity) == sprite.motion,
        "speed": rates[0] <= rate < rates[1],
        "size": seen is not None and radii[0] <= seen.radius < radii[1],
        "background": (color, pattern) == (scene.background, scene.pattern) and error <= MAX_BACKGROUND_ERROR,
    }
    return right | {"all": all(right.values())}


def shares(rows: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Share of rows in which each name is true."""
    return {name: mean(float(row[name]) for row in rows) for name in rows[0]}


def _run(flags: np.ndarray) -> int:
    """Length of the longest run of true values."""
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest


def _same_again(clip: Clip, color: str, early: tuple[int, int], late: tuple[int, int]) -> bool:
    """Whether a sprite is seen in two stretches of frames with one shape, radius (15 %) and place (6 px)."""
    before, after = look(clip, color, clip.within(*early)), look(clip, color, clip.within(*late))
    if before is None or after is None or before.shape is None or before.shape != after.shape:
        return False
    return abs(after.radius / before.radius - 1) <= 0.15 and bool(np.linalg.norm(after.place - before.place) <= 6.0)


def _returned(clip: Clip, scene: Scene) -> bool:
    color = scene.sprites[0].color
    gone = _run(clip.track(color).area[clip.within(12, 70)] < MIN_AREA / 2) >= 3
    return gone and _same_again(clip, color, (0, 9), (72, 80))


def view_psnr(one: np.ndarray, other: np.ndarray, chosen: np.ndarray | None = None) -> float:
    """PSNR in dB of two frames (H, W, 3) in 0..255, over the chosen pixels (H, W)."""
    error = (one.astype(np.float64) - other) ** 2
    return float(-10 * np.log10((error if chosen is None else error[chosen]).mean() / 255**2 + 1e-10))


def _panned_back(clip: Clip, scene: Scene) -> bool:
    away = min(view_psnr(clip.first, frame) for frame in clip.frames[clip.within(30, 50)])
    # The camera moves between frames 6 and 74, so the first and the last frames are at rest.
    sprites = np.max([label(view.astype(np.uint8)) < len(COLORS) for view in (clip.first, clip.last)], axis=0)
    free = cv2.dilate(sprites.astype(np.uint8), np.ones((9, 9), np.uint8)) == 0
    if away >= SAME_VIEW_DB or not free.any() or view_psnr(clip.first, clip.last, free) < SAME_VIEW_DB:
        return False
    return all(_same_again(clip, sprite.color, (0, 5), (75, 80)) for sprite in scene.sprites)


def _passed_behind(clip: Clip, scene: Scene) -> bool:
    mover, hider = (clip.track(sprite.color) for sprite in scene.sprites)
    way = VECTORS[scene.sprites[0].motion][0]
    side = (mover.center[:, 0] - hider.center[:, 0]) * way
    early, late = clip.within(0, 24), clip.within(56, 80)
    before = (mover.area * (mover.seen & (side < 0)))[early].max()
    after = (mover.area * (mover.seen & (side > 0)))[late].max()
    hidden = mover.area[clip.within(16, 64)].min() < 0.5 * before
    stayed = hider.seen.all() and np.linalg.norm(hider.center - np.median(hider.center, axis=0), axis=1).max() <= 5.0
    return bool(before >= MIN_AREA and hidden and stayed and after >= 0.7 * before)


def _recolored(clip: Clip, scene: Scene) -> bool:
    old, new = clip.track(scene.sprites[0].color), clip.track(scene.event_color)
    if old.seen.sum() < 6 or new.seen.sum() < 6:
        return False
    # Half of its usual area, as a half-blended sprite has specks of either colour.
    is_old, is_new = (track.area >= 0.5 * np.median(track.area[track.seen]) for track in (old, new))
    last, first = int(np.flatnonzero(is_old)[-1]), int(np.flatnonzero(is_new)[0])
    if not (0 < first - last <= 6 and 16 <= clip.times[last] <= 64):
        return False
    # It may be out of sight for a while, but is mostly there; nothing is left of the old colour, or there of the new.
    present = is_old[: last + 1].mean() >= 0.7 and is_new[first:].mean() >= 0.7
    pure = not new.seen[:last].any() and not old.seen[first + 2 :].any()
    path = np.concatenate([old.center[: last + 1][is_old[: last + 1]], new.center[first:][is_new[first:]]])
    typical = float(np.median(np.linalg.norm(np.diff(path, axis=0), axis=1)))
    jump = float(np.linalg.norm(new.center[first] - old.center[last]))
    return bool(present and pure and jump <= 8.0 + 2.0 * typical * (first - last))


def _turned(clip: Clip, scene: Scene) -> bool:
    color = scene.sprites[0].color
    before, after = (heading(moves(clip, color, clip.within(*part))) for part in ((0, 32), (48, 80)))
    return before == scene.sprites[0].motion and after == scene.event_motion


def _stayed_themselves(clip: Clip, scene: Scene) -> bool:
    looks = []
    for sprite in scene.sprites:
        track = clip.track(sprite.color)
        halves = [heading(moves(clip, sprite.color, clip.within(*part))) for part in ((0, 36), (44, 80))]
        if track.seen.mean() < 0.9 or halves != [sprite.motion, sprite.motion]:
            return False
        # Whole for the last time, after they have crossed.
        late = np.flatnonzero(track.inside & clip.within(48, 80))[-6:]
        looks.append(look(clip, sprite.color, np.isin(np.arange(len(clip.times)), late)))
    return all(seen is not None and seen.shape is not None for seen in looks) and looks[0].shape == looks[1].shape


_REMEMBERS: dict[str, Callable[[Clip, Scene], bool]] = {
    "return": _returned,
    "pan_return": _panned_back,
    "behind": _passed_behind,
    "recolor": _recolored,
    "turn": _turned,
    "twins": _stayed_themselves,
}


def remembers(frames: Frames | Clip, scene: Scene) -> bool:
    """Whether an 81-frame clip keeps through its scene's event what the event must keep."""
    clip = frames if isinstance(frames, Clip) else Clip(frames, 2)
    return _REMEMBERS[str(scene.event)](clip, scene)


def truth(scenes: Sequence[Scene], frames: int = FRAMES, device: str = "cpu") -> Iterable[Frames]:
    """The scenes' rendered clips, (F, H, W, 3) uint8 each, a few at a time."""
    for start in range(0, len(scenes), 8):
        yield from render(scenes[start : start + 8], frames, device).permute(0, 1, 3, 4, 2).cpu().numpy()


def memory_scenes(event: str, count: int, seed: int = 0) -> tuple[list[Scene], int]:
    """`count` scenes of an event whose rendering passes, and how many were drawn; the others are ambiguous.

    Ambiguous is, say, a sprite that another one hides at the end, or that turns outside the frame.
    """
    first = MEMORY_SEED + 10_000_000 * EVENTS.index(event) + 10_000 * seed
    kept: list[Scene] = []
    drawn = 0
    while len(kept) < count:
        scenes = [draw_scene(first + drawn + i, (event,)) for i in range(min(8, count - len(kept)))]
        drawn += len(scenes)
        kept += [scene for scene, frames in zip(scenes, truth(scenes), strict=True) if remembers(frames, scene)]
    return kept, drawn
