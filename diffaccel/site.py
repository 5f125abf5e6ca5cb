"""Where in a generation one attention call happens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .grid import Grid

if TYPE_CHECKING:
    from .joint import Text

Part = Literal["self", "cross"]
Phase = Literal["denoise", "clean"]
FIELD = ", whole field"
"""Behind a branch's name: its forwards over the whole field, where their tokens and so their past are others."""


@dataclass(frozen=True)
class Site:
    """One attention call: everything a policy may decide by.

    `layer` counts transformer blocks from 0. `step` of `steps` counts denoising steps from 0; the clean pass, which
    runs a finished block once more at t = 0 to write its keys, has `step == steps` and `phase == "clean"`. `block`
    counts chunks of the video and `start` is the latent frame its first token belongs to; a bidirectional model has
    one block that starts at 0. `branch` keeps the passes of classifier-free guidance apart ("cond", "uncond").
    `noise` is the noise level of the block's latents, from 1, noise alone, to 0. `text` says where, in a self-attention
    joint with it, the text lies; `grid` is of the video's tokens alone. `full_field`: a forward that no window holds
    for, run to steer the one that follows.
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
    text: "Text | None" = None
    noise: float = 0.0
    full_field: bool = False
