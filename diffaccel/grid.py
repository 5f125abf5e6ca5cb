"""Where tokens lie in space and time."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .errors import KnobError


@dataclass(frozen=True)
class Grid:
    """The token grid of one forward: `frames` latent frames of `height` x `width` tokens, width fastest.

    That is the order of every diffusers video model; a token's index is `(frame * height + row) * width + column`.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise KnobError(
                f"a grid needs at least one token on each axis, got {self.frames}x{self.height}x{self.width}"
            )

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    def frame_of_token(self, start: int = 0) -> Tensor:
        """Latent frame index of every token, (S,) int64 on the host; the first frame of the grid is `start`."""
        return _frame_of_token(self, start)


@lru_cache(maxsize=256)
def _frame_of_token(grid: Grid, start: int) -> Tensor:
    return torch.arange(start, start + grid.frames).repeat_interleave(grid.tokens_per_frame)
