"""Scored caches that go by what was measured of a model beforehand."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policy import knob
from ..profiled import Profiled
from .look import Look
from .scored import Scored


@dataclass(frozen=True)
class Calibrated(Profiled, Scored):
    """A technique says what of the clean passes of dense videos it goes by (`measure`); `table` gives it back."""

    profile: str | None = knob(None, "file that diffaccel calibrate wrote for this model")

    @abstractmethod
    def measure(self, look: Look) -> dict[str, Tensor]:
        """Of one layer at one block: tables (*axes, H), or none where there is nothing to see yet."""

    def of_layer(self, name: str, look: Look) -> Tensor:
        """Of the layer that is looked at, (*axes, H) fp32 on its device."""
        return torch.as_tensor(self.table(name)[..., look.layer, :], dtype=torch.float32, device=look.k.device)

    def droppable(self, look: Look) -> Tensor:
        """Entries (B, H, N) of which some may be gone when a block is made: neither first nor new frames then."""
        return (look.frame >= self.sink_frames) & (look.frame < look.start - self.recent_frames)
