"""The procedural world: scenes drawn from a seed, rendered in batches to 128x128 clips.

A scene is a patterned background, a camera and one or two sprites, with at most one event. Sprites move in screen
coordinates; the camera scrolls the background under them, except in the event "the camera pans away and returns",
where the (still) sprites belong to the world and leave the view with it. The events are what a bounded memory of the
past can get wrong.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

SIZE = 128
FRAMES = 81

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = ("red", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "large")
TEXTURES = ("plain", "banded", "shaded")
MOTIONS = ("left", "right", "up", "down", "circles", "bounces", "still")
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = ("black", "gray", "navy", "maroon", "plum", "teal")
PATTERNS = ("plain", "gradient", "striped", "checkerboard")
CAMERAS = ("static", "left", "right", "up", "down")
# return: leaves the frame and comes back the same. behind: one passes behind another. pan_return: the camera pans
# away and returns to the same place. recolor: a colour changes and stays changed. turn: a motion changes direction.
# twins: two of one shape and size cross each other's way and differ in colour alone.
EVENTS = ("return", "behind", "pan_return", "recolor", "turn", "twins")
# Events after which another prompt is true of the scene. One prompt can only say that they happen half way, which is
# in HALF_WAY; two prompts say when.
SWITCHES = ("recolor", "turn")
HALF_WAY = range(33, 46)

SPRITE_RGB = {
    "red": (1.00, 0.18, 0.16),
    "yellow": (1.00, 0.90, 0.12),
    "green": (0.20, 0.90, 0.30),
    "cyan": (0.15, 0.85, 0.95),
    "blue": (0.20, 0.42, 1.00),
    "purple": (0.78, 0.32, 1.00),
    "white": (0.97, 0.97, 0.97),
}
# Darker than every sprite, so that "blue on navy" stays readable. No name is also a sprite's, nor a pattern's a
# texture's: a model this small mixes up what only the order of the words tells apart.
BACKGROUND_RGB = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.38, 0.38, 0.38),
    "navy": (0.04, 0.06, 0.28),
    "maroon": (0.32, 0.03, 0.08),
    "plum": (0.24, 0.07, 0.34),
    "teal": (0.03, 0.27, 0.26),
}
VECTORS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
DARK = 0.66
"""How much of its colour a sprite keeps in its dark stripes, and at the bottom of its shading."""

# Never drawn for training, so that a score on them measures composition and not recall.
HELD_OUT: tuple[tuple[str, str, str], ...] = tuple(
    (shape, color, motion)
    for s, shape in enumerate(SHAPES)
    for c, color in enumerate(COLORS)
    for m, motion in enumerate(MOTIONS)
    if (s + 3 * c + 4 * m) % 9 == 0
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
    texture: str
    motion: str
    speed: str
    radius: float
    center: tuple[float, float]
    rate: float
    orbit: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything a clip shows. `event_frame` is where a colour or a direction changes (SWITCHES)."""

    pattern: str
    background: str
    camera: str
    sprites: tuple[Sprite, ...]
    event: str | None = None
    event_side: str = "left"
    event_color: str = ""
    event_motion: str = ""
    event_start: float = 14.0
    event_frame: int = 0
    offset: tuple[float, float] = (0.0, 0.0)
    pan_rate: float = 0.0
    seed: int = field(default=0, compare=False)

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return asdict(self)

    def before(self) -> "Scene":
        """The scene that a prompt describes which knows nothing of the change to come."""
        return replace(self, event=None) if self.event in SWITCHES else self

    def after(self) -> "Scene":
        """The scene that a prompt describes once the change has happened."""
        if self.event not in SWITCHES:
            return self
        new = {"color": self.event_color} if self.event == "recolor" else {"motion": self.event_motion}
        return replace(self, event=None, sprites=(replace(self.sprites[0], **new), *self.sprites[1:]))


def is_held_out(scene: Scene) -> bool:
    """Whether any sprite, before or after a change, is a held-out combination."""
    sprites = (*scene.sprites, *scene.after().sprites)
    return any((sprite.shape, sprite.color, sprite.motion) in _HELD_OUT for sprite in sprites)


def make_sprite(
    rng: random.Random,
    shape: str,
    color: str,
    motion: str,
    size: str,
    speed: str,
    center: tuple[float, float],
    texture: str = "plain",
) -> Sprite:
    """A sprite whose path over the standard 81 frames is centred on `center`."""
    radius = rng.uniform(15.5, 17.0) if size == "small" else rng.uniform(23.0, 26.0)
    rate, orbit, phase = 0.0, 0.0, 0.0
    if motion in VECTORS:
        rate = rng.uniform(0.40, 0.52) if speed == "slowly" else rng.uniform(0.95, 1.15)
    elif motion == "circles":
        rate = rng.uniform(0.011, 0.013) if speed == "slowly" else rng.uniform(0.024, 0.028)
        orbit, phase = rng.uniform(22.0, 28.0), rng.uniform(0.0, 1.0)
    elif motion == "bounces":
        rate = rng.uniform(0.021, 0.025) if speed == "slowly" else rng.uniform(0.042, 0.050)
        orbit, phase = rng.uniform(36.0, 44.0), rng.uniform(0.0, 1.0)
    return Sprite(shape, color, size, texture, motion, speed, radius, center, rate, orbit, phase)


def _place(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Path centres that keep their distance."""
    if count == 1:
        return [(rng.uniform(46, 82), rng.uniform(46, 82))]
    while True:
        centers = [(rng.uniform(28, 100), rng.uniform(28, 100)) for _ in range(count)]
        if math.dist(*centers) >= 56.0:
            return centers


def _texture(rng: random.Random) -> str:
    return rng.choices(TEXTURES, (0.6, 0.2, 0.2))[0]


def _draw(rng: random.Random, seed: int, events: Sequence[str | None]) -> Scene:
    background, pattern = rng.choice(BACKGROUNDS), rng.choice(PATTERNS)
    event = rng.choice(events)
    count = 2 if event in ("behind", "twins") else rng.choices((1, 2), (0.6, 0.4))[0]
    picked = rng.sample(COLORS, count + 1)
    centers = _place(rng, count)
    # The four straight directions are drawn twice as often: they are what a user asks for first.
    weights = (2, 2, 2, 2, 1, 1, 1)
    sprites = []
    for index in range(count):
        motion = rng.choices(MOTIONS, weights)[0]
        size, speed, shape, texture = rng.choice(SIZES), rng.choice(SPEEDS), rng.choice(SHAPES), _texture(rng)
        if event == "pan_return" or (event == "return" and index == 0):
            motion = "still"
        elif event == "turn" and index == 0:
            motion = rng.choice(tuple(VECTORS))
        elif event == "behind":
            # What passes is smaller than what hides it, and quick enough to come out again.
            motion, size, speed = (
                (rng.choice(("left", "right")), "small", "quickly") if index == 0 else ("still", "large", speed)
            )
            shape = rng.choice(SHAPES[:4]) if index == 1 else shape
        elif event == "twins":
            size, motion = "small", ("left", "right")[index]
            shape, speed, texture = (
                (shape, speed, texture) if index == 0 else (sprites[0].shape, sprites[0].speed, sprites[0].texture)
            )
        sprites.append(make_sprite(rng, shape, picked[index], motion, size, speed, centers[index], texture))
    if event == "behind":
        spot = (rng.uniform(52, 76), rng.uniform(40, 88))
        sprites[0] = replace(sprites[0], center=(spot[0], spot[1] + rng.uniform(-5, 5)))
        sprites[1] = replace(sprites[1], center=spot)
    elif event == "twins":
        x, y, gap = rng.uniform(56, 72), rng.uniform(50, 78), rng.choice((-1, 1)) * rng.uniform(9, 14)
        sprites = [replace(sprites[0], center=(x, y - gap)), replace(sprites[1], center=(x, y + gap))]
        rng.shuffle(sprites)
    camera = rng.choice(CAMERAS[1:]) if rng.random() < 0.4 and event != "pan_return" else "static"
    turns = [side for side in VECTORS if side not in (sprites[0].motion, OPPOSITE.get(sprites[0].motion))]
    return Scene(
        pattern=pattern,
        background=background,
        camera=camera,
        sprites=tuple(sprites),
        event=event,
        event_side=rng.choice(("left", "right") if event == "return" else tuple(VECTORS)),
        event_color=picked[count] if event == "recolor" else "",
        event_motion=rng.choice(turns) if event == "turn" else "",
        event_start=rng.uniform(10.0, 18.0),
        event_frame=4 * (rng.randrange(5, 17) if rng.random() < 0.4 else rng.randrange(9, 13)) - 3
        if event in SWITCHES
        else 0,
        offset=(rng.choice((0.0, 16.0)), rng.choice((0.0, 16.0))),
        pan_rate=rng.uniform(0.5, 0.7) if camera != "static" else 0.0,
        seed=seed,
    )


def draw_scene(seed: int, events: Sequence[str | None] = (*EVENTS, *(None,) * 4)) -> Scene:
    """A scene of one of `events` (None: nothing happens); never a held-out combination."""
    rng = random.Random(seed)
    while True:
        scene = _draw(rng, seed, events)
        if not is_held_out(scene):
            return scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Single-sprite scenes of held-out combinations that move in one of the four straight directions."""
    rng = random.Random(seed)
    triples = [triple for triple in HELD_OUT if triple[2] in VECTORS]
    scenes = []
    for index in range(count):
        shape, color, motion = triples[index % len(triples)]
        background = rng.choice(BACKGROUNDS)
        size, speed, texture = rng.choice(SIZES), rng.choice(SPEEDS), _texture(rng)
        sprite = make_sprite(rng, shape, color, motion, size, speed, _place(rng, 1)[0], texture)
        # A static camera, so that the direction is the sprite's own.
        offset = (rng.choice((0.0, 16.0)), rng.choice((0.0, 16.0)))
        scenes.append(Scene(rng.choice(PATTERNS), background, "static", (sprite,), offset=offset, seed=index))
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
    if sprite.motion in VECTORS:
        heading = np.tile(np.asarray(VECTORS[sprite.motion]), (frames, 1))
        middle = (FRAMES - 1) / 2
        if scene.event == "turn" and index == 0:
            middle = float(scene.event_frame)
            heading[time >= middle] = VECTORS[scene.event_motion]
        path += ((time - middle) * sprite.rate)[:, None] * heading
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
        mix = np.clip((np.arange(frames) - scene.event_frame + 1) / 4.0, 0.0, 1.0)[:, None]
        colors = colors * (1 - mix) + np.asarray(SPRITE_RGB[scene.event_color]) * mix
    return colors


def draw_order(scene: Scene) -> list[int]:
    """Sprites from the back to the front: large ones behind small ones, except where one passes behind another."""
    order = list(range(len(scene.sprites)))
    return order if scene.event == "behind" else sorted(order, key=lambda i: scene.sprites[i].size != "large")


def _square_wave(position: torch.Tensor, period: float, edge: float = 1.4) -> torch.Tensor:
    slope = period / (2 * math.pi * edge)
    return (0.5 + torch.sin(position * (2 * math.pi) / period) * slope).clamp(0, 1)


def _pattern(name: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Weight of the lighter shade, 0..1; `u`, `v` world pixels (B, F, H, W). Periods are whole latent tokens."""
    if name == "striped":
        return _square_wave(u + v, 32.0)
    if name == "checkerboard":
        a, b = _square_wave(u, 64.0), _square_wave(v, 64.0)
        return a + b - 2 * a * b
    if name == "gradient":
        return 0.5 + 0.5 * torch.cos((0.6 * u + 0.8 * v) * (2 * math.pi / 200.0))
    return torch.zeros_like(u + v)


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels to a shape of nominal radius `r` centred at the origin, negative inside."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - r
    if shape == "ring":
        return (torch.sqrt(x * x + y * y) - 0.74 * r).abs() - 0.29 * r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * r
    if shape == "triangle":
        k = math.sqrt(3.0) / 2
        return torch.maximum(y - 0.62 * r, k * x.abs() - 0.5 * y - 0.58 * r)
    if shape == "cross":
        a, b = x.abs(), y.abs()
        across = torch.maximum(a - 1.06 * r, b - 0.36 * r)
        return torch.minimum(across, torch.maximum(a - 0.36 * r, b - 1.06 * r))
    raise ValueError(f"unknown shape {shape!r}")


def _texture_weight(texture: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """How much of its colour a sprite shows, DARK..1."""
    if texture == "banded":
        return DARK + (1 - DARK) * _square_wave(y + 4.0, 16.0)
    if texture == "shaded":
        return 1.0 - (1 - DARK) * (0.5 + 0.5 * y / r).clamp(0, 1)
    return torch.ones_like(x)


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
    base = tensor([BACKGROUND_RGB[scene.background] for scene in scenes]).view(count, 1, 3, 1, 1)
    light = tensor([second_shade(BACKGROUND_RGB[scene.background]) for scene in scenes]).view(count, 1, 3, 1, 1)
    weight = torch.zeros(count, frames, size, size, device=device)
    for name in PATTERNS:
        rows = [i for i, scene in enumerate(scenes) if scene.pattern == name]
        if rows and name != "plain":
            index = torch.as_tensor(rows, device=device)
            u = gx + camera[index, :, 0].view(-1, frames, 1, 1)
            v = gy + camera[index, :, 1].view(-1, frames, 1, 1)
            weight[index] = _pattern(name, u, v)
    image = base + (light - base) * weight.unsqueeze(2)

    for layer in range(2):
        looks: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for i, scene in enumerate(scenes):
            if layer < len(scene.sprites):
                slot = draw_order(scene)[layer]
                looks.setdefault((scene.sprites[slot].shape, scene.sprites[slot].texture), []).append((i, slot))
        for (shape, texture), members in looks.items():
            index = torch.as_tensor([i for i, _ in members], device=device)
            path = tensor([sprite_path(scenes[i], slot, frames) for i, slot in members])
            color = tensor([sprite_colors(scenes[i], slot, frames) for i, slot in members])
            radius = tensor([scenes[i].sprites[slot].radius for i, slot in members]).view(-1, 1, 1, 1)
            x = gx - path[..., 0].view(-1, frames, 1, 1)
            y = gy - path[..., 1].view(-1, frames, 1, 1)
            cover = (0.5 - _distance(shape, x, y, radius) / 1.2).clamp(0, 1).unsqueeze(2)
            shade = _texture_weight(texture, x, y, radius).unsqueeze(2)
            image[index] += cover * (shade * color[..., None, None] - image[index])
    return (image.clamp(0, 1) * 255).round_().to(torch.uint8)
