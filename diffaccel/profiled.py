"""Techniques that go by what was measured of a model beforehand."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .policy import Policy
from .profile import Profile

if TYPE_CHECKING:
    from torch import nn

    from .backbone import Geometry


class Profiled(Policy):
    """Mixed into a technique with a knob `profile`, None until one was made."""

    needs: ClassVar[str] = "calibration"
    axes: ClassVar[tuple[str, ...]] = ()
    tables: ClassVar[tuple[str, ...]]
    profile: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._profile  # a file that is no profile is refused now

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
            return self._profile.mismatch(models) or super().refuses_model(models)
        if self.is_exact:
            return super().refuses_model(models)
        name = type(self).__name__
        return (
            f"{name} goes by what was measured of a model: make a profile with diffaccel calibrate --method "
            f"{name.lower()} and pass it as profile"
        )

    def table(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(*axes, layers, heads)."""
        assert self._profile is not None
        return self._profile.tables[name]
