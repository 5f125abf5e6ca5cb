"""How much of what a prompt names a clip of the tiny world shows, for `diffaccel eval ... --judge`.

PYTHONPATH=scripts diffaccel eval quality --prompts prompts.txt --judge tiny_world.adherence:adherence -o out
"""

import re

import numpy as np

from .metrics import judge, read
from .prompts import normalize
from .world import BACKGROUNDS, COLORS, PATTERNS, SHAPES, SIZE, SIZES, SPEEDS, VECTORS, Scene, Sprite

_SAME = {"little": "small", "big": "large", "gently": "slowly", "fast": "quickly", "stripes": "striped"}
_SAME |= {f"{side}ward": side for side in ("up", "down")}


def named(prompt: str) -> tuple[Scene, set[str]] | None:
    """The scene of a prompt with one sprite and a still camera, and what of it the prompt names, as `judge` calls it.

    None where the prompt names another number of sprites, a camera that moves, or something that happens on the way.
    """
    plain = re.sub(r"the camera (is static|stays still|does not move)", "", prompt)
    words = [_SAME.get(word, word) for word in normalize(plain)]
    colors = [word for word in words if word in COLORS]
    events = {"camera", "behind", "comes", "returns", "turns", "changes", "becomes", "then"}
    if len(colors) != 1 or events & set(words):
        return None

    def first(choices, default=""):
        return next((word for word in words if word in choices), default)

    around = "circles" in words or "in a circle" in " ".join(words)
    motion = "circles" if around else first(("bounces",)) or first(VECTORS, "still")
    sprite = Sprite(
        first(SHAPES), colors[0], first(SIZES), "plain", motion, first(SPEEDS), 0.0, (SIZE / 2, SIZE / 2), 0.0
    )
    background, pattern = first(BACKGROUNDS), first(PATTERNS, "plain")
    straight = motion in VECTORS
    optional = {"shape": sprite.shape, "size": sprite.size, "direction": straight, "background": background}
    optional["speed"] = sprite.speed if straight else ""
    says = {"color", "count", *(name for name, said in optional.items() if said)}
    return Scene(pattern, background, "static", (sprite,)), says


def adherence(clip: np.ndarray, prompt: str) -> float:
    """Share of what the prompt names that the clip (F, 128, 128, 3) shows, in [0, 1]; nan for other prompts."""
    found = named(prompt)
    if found is None or clip.shape[1:3] != (SIZE, SIZE) or len(clip) < 9:
        return float("nan")
    scene, says = found
    right = judge(read(clip), scene)
    return sum(right[name] for name in says) / len(says)
