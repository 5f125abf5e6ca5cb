"""The procedural world: scenes drawn from a seed, rendered in batches to 128x128 clips.

A scene is a textured background, a camera and one to three sprites, with at most one event. Sprites move
in screen coordinates; the camera scrolls the background under them, except in the event "the camera pans
away and returns", where the (still) sprites belong to the world and leave the view with it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

SIZE = 128
FRAMES = 81

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
MOTIONS = ("left", "right", "up", "down", "diagonally", "circles", "bounces", "still")
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = ("black", "gray", "navy", "maroon", "olive", "brown", "purple", "green")
PATTERNS = ("plain", "gradient", "striped", "checkerboard", "dotted", "wavy")
CAMERAS = ("static", "left", "right", "up", "down")
EVENTS = ("return", "behind", "recolor", "pan_return")

SPRITE_RGB = {
    "red": (0.92, 0.12, 0.14),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.93, 0.15),
    "green": (0.15, 0.80, 0.25),
    "cyan": (0.15, 0.85, 0.95),
    "blue": (0.15, 0.30, 0.98),
    "purple": (0.68, 0.22, 0.92),
    "white": (0.97, 0.97, 0.97),
}
# Backgrounds are darker than every sprite, so that "purple on navy" and "green on olive" stay readable.
BACKGROUND_RGB = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.38, 0.38, 0.38),
    "navy": (0.04, 0.06, 0.28),
    "maroon": (0.32, 0.03, 0.08),
    "olive": (0.32, 0.32, 0.05),
    "brown": (0.36, 0.22, 0.10),
    "purple": (0.24, 0.07, 0.34),
    "green": (0.05, 0.28, 0.12),
}
VECTORS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

# Never drawn for training, so that a score on them measures composition and not recall.
HELD_OUT: tuple[tuple[str, str, str], ...] = tuple(
    (shape, color, motion)
    for s, shape in enumerate(SHAPES)
    for c, color in enumerate(COLORS)
    for m, motion in enumerate(MOTIONS)
    if (s + 3 * c + 7 * m) % 10 == 0
)
_HELD_OUT = frozenset(HELD_OUT)


def second_shade(rgb: tuple[float, float, float]) -> tuple[float, float, float]:
    """The lighter colour of a pattern."""
    r, g, b = (value + 0.17 * (1.0 - value) for value in rgb)
    return r, g, b


@dataclass(frozen=True)
class Sprite:
    """One shape; positions are pixels (x right, y down), rates pixels or cycles per frame."""

    shape: str
    color: str
    size: str
    motion: str
    speed: str
    radius: float
    center: tuple[float, float]
    rate: float
    heading: tuple[float, float] = (0.0, 0.0)
    orbit: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything a clip shows."""

    pattern: str
    background: str
    camera: str
    sprites: tuple[Sprite, ...]
    event: str | None = None
    event_side: str = "left"
    event_color: str = ""
    event_start: float = 14.0
    period: float = 28.0
    offset: tuple[float, float] = (0.0, 0.0)
    pan_rate: float = 0.0
    seed: int = field(default=0, compare=False)

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return asdict(self)


def is_held_out(scene: Scene) -> bool:
    """Whether any sprite (before or after a change of colour) is a held-out combination."""
    for index, sprite in enumerate(scene.sprites):
        colors = [sprite.color] + ([scene.event_color] if scene.event == "recolor" and index == 0 else [])
        if any((sprite.shape, color, sprite.motion) in _HELD_OUT for color in colors):
            return True
    return False


def make_sprite(
    rng: random.Random,
    shape: str,
    color: str,
    motion: str,
    size: str,
    speed: str,
    center: tuple[float, float],
    frames: int = FRAMES,
) -> Sprite:
    """A sprite whose path over the standard 81 frames is centred on `center`."""
    radius = rng.uniform(10.0, 13.0) if size == "small" else rng.uniform(19.0, 24.0)
    rate, heading, orbit, phase = 0.0, (0.0, 0.0), 0.0, 0.0
    if motion in VECTORS or motion == "diagonally":
        rate = rng.uniform(0.35, 0.55) if speed == "slowly" else rng.uniform(0.9, 1.2)
        if motion == "diagonally":
            heading = (rng.choice((-1.0, 1.0)) * math.sqrt(0.5), rng.choice((-1.0, 1.0)) * math.sqrt(0.5))
        else:
            heading = VECTORS[motion]
    elif motion == "circles":
        rate = rng.uniform(0.011, 0.014) if speed == "slowly" else rng.uniform(0.024, 0.030)
        orbit, phase = rng.uniform(20.0, 30.0), rng.uniform(0.0, 1.0)
    elif motion == "bounces":
        rate = rng.uniform(0.021, 0.026) if speed == "slowly" else rng.uniform(0.042, 0.052)
        orbit, phase = rng.uniform(34.0, 46.0), rng.uniform(0.0, 1.0)
    return Sprite(shape, color, size, motion, speed, radius, center, rate, heading, orbit, phase)


def _place(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Path centres that keep their distance."""
    if count == 1:
        return [(rng.uniform(46, 82), rng.uniform(46, 82))]
    gap = 56.0 if count == 2 else 46.0
    while True:
        centers = [(rng.uniform(26, 102), rng.uniform(26, 102)) for _ in range(count)]
        if all(math.dist(a, b) >= gap for i, a in enumerate(centers) for b in centers[:i]):
            return centers


def _draw(rng: random.Random, seed: int) -> Scene:
    background = rng.choice(BACKGROUNDS)
    pattern = rng.choice(PATTERNS)
    colors = [color for color in COLORS if color != background]
    count = rng.choices((1, 2, 3), (0.55, 0.32, 0.13))[0]
    event = rng.choice(EVENTS) if rng.random() < 0.4 else None
    if event == "behind":
        count = max(count, 2)
    picked = rng.sample(colors, count + 1)
    centers = _place(rng, count)
    # The four straight directions are drawn twice as often: they are what a user asks for first.
    weights = (2, 2, 2, 2, 1, 1, 1, 1)
    sprites = []
    for index in range(count):
        motion = rng.choices(MOTIONS, weights)[0]
        # Three large sprites fill the frame; small ones keep all of them visible.
        size = "large" if rng.random() < (0.55, 0.5, 0.25)[count - 1] else "small"
        if event == "pan_return" or (event == "return" and index == 0) or (event == "behind" and index == 1):
            motion = "still"
        if event == "behind" and index == 0:
            motion, size = rng.choice(("left", "right")), "small"
        if event == "behind" and index == 1:
            size = "large"
        # An occlusion must happen inside the clip.
        speed = "quickly" if event == "behind" and index == 0 else rng.choice(SPEEDS)
        sprites.append(make_sprite(rng, rng.choice(SHAPES), picked[index], motion, size, speed, centers[index]))
    if event == "behind":
        spot = (rng.uniform(52, 76), rng.uniform(40, 88))
        sprites[0] = Sprite(**{**vars(sprites[0]), "center": (spot[0], spot[1] + rng.uniform(-5, 5))})
        sprites[1] = Sprite(**{**vars(sprites[1]), "center": spot, "shape": rng.choice(SHAPES[:4])})
    camera = rng.choice(CAMERAS) if rng.random() < 0.6 and event != "pan_return" else "static"
    return Scene(
        pattern=pattern,
        background=background,
        camera=camera,
        sprites=tuple(sprites),
        event=event,
        event_side=rng.choice(("left", "right") if event == "return" else tuple(VECTORS)),
        event_color=picked[count] if event == "recolor" else "",
        event_start=rng.uniform(10.0, 18.0),
        period=rng.uniform(24.0, 34.0),
        offset=(rng.uniform(0, 200), rng.uniform(0, 200)),
        pan_rate=rng.uniform(0.5, 0.8) if camera != "static" else 0.0,
        seed=seed,
    )


def draw_scene(seed: int) -> Scene:
    """A training scene; never a held-out combination."""
    rng = random.Random(seed)
    while True:
        scene = _draw(rng, seed)
        if not is_held_out(scene):
            return scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Single-sprite scenes of held-out combinations that move in one of the four straight directions."""
    rng = random.Random(seed)
    triples = [triple for triple in HELD_OUT if triple[2] in VECTORS]
    scenes = []
    for index in range(count):
        shape, color, motion = triples[index % len(triples)]
        background = rng.choice([name for name in BACKGROUNDS if name != color])
        # Quick enough to be told from drift, over a static camera, so that the direction is the sprite's own.
        sprite = make_sprite(
            rng, shape, color, motion, rng.choice(("small", "large")), rng.choice(SPEEDS), _place(rng, 1)[0]
        )
        scenes.append(
            Scene(
                rng.choice(PATTERNS),
                background,
                "static",
                (sprite,),
                period=rng.uniform(24.0, 34.0),
                offset=(rng.uniform(0, 200), rng.uniform(0, 200)),
                seed=index,
            )
        )
    return scenes


def _out_and_back(time: np.ndarray, start: float, travel: float, hold: float) -> np.ndarray:
    """0 before `start`, 1 between `start + travel` and `start + travel + hold`, then back to 0."""
    out = np.clip((time - start) / travel, 0.0, 1.0)
    back = np.clip((time - start - travel - hold) / travel, 0.0, 1.0)
    ramp = out - back
    return ramp * ramp * (3.0 - 2.0 * ramp)


def camera_path(scene: Scene, frames: int) -> np.ndarray:
    """World position of the frame's corner, (frames, 2) pixels."""
    time = np.arange(frames, dtype=np.float64)
    if scene.event == "pan_return":
        ramp = _out_and_back(time, scene.event_start - 4.0, 26.0, 8.0)
        return np.outer(ramp, np.asarray(VECTORS[scene.event_side])) * 116.0
    if scene.camera == "static":
        return np.zeros((frames, 2))
    return np.outer(time * scene.pan_rate, np.asarray(VECTORS[scene.camera]))


def sprite_path(scene: Scene, index: int, frames: int) -> np.ndarray:
    """Screen position of a sprite's centre, (frames, 2) pixels."""
    sprite = scene.sprites[index]
    time = np.arange(frames, dtype=np.float64)
    path = np.tile(np.asarray(sprite.center, dtype=np.float64), (frames, 1))
    if sprite.motion in VECTORS or sprite.motion == "diagonally":
        path += np.outer((time - (FRAMES - 1) / 2) * sprite.rate, np.asarray(sprite.heading))
        # A clip longer than the standard one meets the sprite again on the other side.
        span = SIZE + 2 * sprite.radius
        path = np.mod(path + sprite.radius, span) - sprite.radius
    elif sprite.motion == "circles":
        angle = 2 * np.pi * (time * sprite.rate + sprite.phase)
        path += sprite.orbit * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    elif sprite.motion == "bounces":
        height = np.abs(np.sin(np.pi * (time * sprite.rate + sprite.phase)))
        path[:, 1] += sprite.orbit * (0.5 - height)
    if scene.event == "return" and index == 0:
        ramp = _out_and_back(time, scene.event_start, 20.0, 14.0)
        x = sprite.center[0]
        gone = x + sprite.radius + 6 if scene.event_side == "left" else SIZE - x + sprite.radius + 6
        path += np.outer(ramp * gone, np.asarray(VECTORS[scene.event_side]))
    if scene.event == "pan_return":
        path -= camera_path(scene, frames)
    return path


def sprite_colors(scene: Scene, index: int, frames: int) -> np.ndarray:
    """Colour of a sprite, (frames, 3) in 0..1."""
    colors = np.tile(np.asarray(SPRITE_RGB[scene.sprites[index].color]), (frames, 1))
    if scene.event == "recolor" and index == 0:
        # Four frames of blend: one latent frame, so that the change is sharp yet encodable.
        mix = np.clip((np.arange(frames) - 38.0) / 4.0, 0.0, 1.0)[:, None]
        colors = colors * (1 - mix) + np.asarray(SPRITE_RGB[scene.event_color]) * mix
    return colors


def _square_wave(position: torch.Tensor, period: torch.Tensor, edge: float = 1.4) -> torch.Tensor:
    slope = period / (2 * math.pi * edge)
    return (0.5 + torch.sin(position * (2 * math.pi) / period) * slope).clamp(0, 1)


def _pattern(name: str, u: torch.Tensor, v: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """Weight of the lighter shade, 0..1; `u`, `v` world pixels (B, F, H, W), `period` (B, 1, 1, 1)."""
    if name == "striped":
        return _square_wave((u + v) * math.sqrt(0.5), period)
    if name == "checkerboard":
        a, b = _square_wave(u, period * 1.4), _square_wave(v, period * 1.4)
        return a + b - 2 * a * b
    if name == "dotted":
        du, dv = torch.remainder(u, period) - period / 2, torch.remainder(v, period) - period / 2
        return (0.5 + (0.27 * period - torch.sqrt(du * du + dv * dv)) / 1.2).clamp(0, 1)
    if name == "wavy":
        return _square_wave(v + 0.25 * period * torch.sin(u * (2 * math.pi / 1.8) / period), period)
    if name == "gradient":
        return 0.5 + 0.5 * torch.cos((0.6 * u + 0.8 * v) * (2 * math.pi / 200.0))
    return torch.zeros_like(u + v)


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels to a shape of nominal radius `r` centred at the origin, negative inside."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - r
    if shape == "ring":
        return (torch.sqrt(x * x + y * y) - 0.78 * r).abs() - 0.26 * r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * r
    if shape == "triangle":
        k = math.sqrt(3.0) / 2
        return torch.maximum(y - 0.62 * r, k * x.abs() - 0.5 * y - 0.58 * r)
    if shape == "star":
        # Five points: fold the plane into one tenth, then the distance to that point's edge line.
        angle = torch.atan2(x, -y)
        sector = 2 * math.pi / 5
        folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
        length = torch.sqrt(x * x + y * y)
        px, py = length * torch.sin(folded), length * torch.cos(folded)
        outer, inner = 1.22 * r, 0.56 * r
        ix, iy = inner * math.sin(sector / 2), inner * math.cos(sector / 2)
        ex, ey = ix, iy - outer
        norm = torch.sqrt(ex * ex + ey * ey)
        return (-ey * px + ex * (py - outer)) / norm
    raise ValueError(f"unknown shape {shape!r}")


def render(
    scenes: Sequence[Scene], frames: int = FRAMES, device: torch.device | str = "cpu", size: int = SIZE
) -> torch.Tensor:
    """Frames of every scene, (B, F, 3, size, size) uint8."""
    device = torch.device(device)
    count = len(scenes)
    grid = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (SIZE / size)
    gx, gy = grid.view(1, 1, 1, size), grid.view(1, 1, size, 1)

    def tensor(data: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(data, dtype=np.float32)).to(device)

    camera = tensor([camera_path(scene, frames) + np.asarray(scene.offset) for scene in scenes])
    period = tensor([scene.period for scene in scenes]).view(-1, 1, 1, 1)
    base = tensor([BACKGROUND_RGB[scene.background] for scene in scenes]).view(count, 1, 3, 1, 1)
    light = tensor([second_shade(BACKGROUND_RGB[scene.background]) for scene in scenes]).view(count, 1, 3, 1, 1)
    weight = torch.zeros(count, frames, size, size, device=device)
    for name in PATTERNS:
        rows = [i for i, scene in enumerate(scenes) if scene.pattern == name]
        if rows and name != "plain":
            index = torch.as_tensor(rows, device=device)
            u = gx + camera[index, :, 0].view(-1, frames, 1, 1)
            v = gy + camera[index, :, 1].view(-1, frames, 1, 1)
            weight[index] = _pattern(name, u, v, period[index])
    image = base + (light - base) * weight.unsqueeze(2)

    # In "passes behind", sprite 0 is drawn first; elsewhere the order is the scene's own.
    for slot in range(max(len(scene.sprites) for scene in scenes)):
        for shape in SHAPES:
            rows = [
                i for i, scene in enumerate(scenes) if slot < len(scene.sprites) and scene.sprites[slot].shape == shape
            ]
            if not rows:
                continue
            index = torch.as_tensor(rows, device=device)
            path = tensor([sprite_path(scenes[i], slot, frames) for i in rows])
            color = tensor([sprite_colors(scenes[i], slot, frames) for i in rows]).view(len(rows), frames, 3, 1, 1)
            radius = tensor([scenes[i].sprites[slot].radius for i in rows]).view(-1, 1, 1, 1)
            x = gx - path[..., 0].view(len(rows), frames, 1, 1)
            y = gy - path[..., 1].view(len(rows), frames, 1, 1)
            cover = (0.5 - _distance(shape, x, y, radius) / 1.2).clamp(0, 1).unsqueeze(2)
            image[index] += cover * (color - image[index])
    return (image.clamp(0, 1) * 255).round_().to(torch.uint8)
