"""Where in a generation one attention call happens."""

from dataclasses import dataclass
from typing import Literal

from .grid import Grid

Part = Literal["self", "cross"]
Phase = Literal["denoise", "clean"]


@dataclass(frozen=True)
class Site:
    """One attention call: everything a policy may decide by.

    `layer` counts transformer blocks from 0. `step` of `steps` counts denoising steps from 0; the clean pass, which
    runs a finished block once more at t = 0 to write its keys, has `step == steps` and `phase == "clean"`. `block`
    counts chunks of the video and `start` is the latent frame its first token belongs to; a bidirectional model has
    one block that starts at 0. `branch` keeps the passes of classifier-free guidance apart ("cond", "uncond").
    """

    layer: int
    part: Part
    step: int
    steps: int
    block: int
    start: int
    phase: Phase
    branch: str
    grid: Grid
