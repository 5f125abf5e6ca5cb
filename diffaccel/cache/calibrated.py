"""Scored caches that go by what was measured of a model beforehand."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..policy import knob
from ..profile import Profile
from .look import Look
from .scored import Scored

if TYPE_CHECKING:
    from torch import nn

    from ..backbone import Geometry


@dataclass(frozen=True)
class Calibrated(Scored):
    """A technique says what of the clean passes of dense videos it goes by (`measure`); `table` gives it back."""

    needs: ClassVar[str] = "calibration"
    axes: ClassVar[tuple[str, ...]] = ()
    tables: ClassVar[tuple[str, ...]]

    profile: str | None = knob(None, "file that diffaccel calibrate wrote for this model")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._profile  # a file that is no profile is refused now

    @abstractmethod
    def measure(self, look: Look) -> dict[str, Tensor]:
        """Of one layer at one block: tables (*axes, H), or none where there is nothing to see yet."""

    @abstractmethod
    def lines(self, profile: Profile) -> Iterator[str]:
        """What a profile says, to be read."""

    @cached_property
    def _profile(self) -> Profile | None:
        if self.profile is None:
            return None
        return Profile.load(self.profile, type(self).__name__, self.axes, self.tables)

    def refuses_model(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        if self._profile is not None:
            return self._profile.mismatch(models)
        if self.is_exact:
            return None
        name = type(self).__name__
        return (
            f"{name} goes by what was measured of a model: make a profile with diffaccel calibrate --method "
            f"{name.lower()} and pass it as profile"
        )

    def table(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(*axes, layers, heads)."""
        assert self._profile is not None
        return self._profile.tables[name]

    def of_layer(self, name: str, look: Look) -> Tensor:
        """Of the layer that is looked at, (*axes, H) fp32 on its device."""
        return torch.as_tensor(self.table(name)[..., look.layer, :], dtype=torch.float32, device=look.k.device)

    def droppable(self, look: Look) -> Tensor:
        """Entries (B, H, N) of which some may be gone when a block is made: neither first nor new frames then."""
        return (look.frame >= self.sink_frames) & (look.frame < look.start - self.recent_frames)
