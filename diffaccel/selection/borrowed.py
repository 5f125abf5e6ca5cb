"""The skeleton of selectors that read, in some layers or heads, what an earlier layer chose."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..kernel.block_sparse import BlockLists
from ..policy import knob
from ..profile import Profile
from ..profiled import Profiled
from .asked import Asked
from .ranked import Ranked


class Borrowed(NamedTuple):
    """A choice, and what it was made for."""

    of: tuple[int, ...]
    step: int
    lists: BlockLists


@dataclass(frozen=True)
class Borrowing(Profiled, Ranked):
    """What a layer that chooses ranks by is estimated as for `AnnSA`. A choice is read by a later layer, or at a later
    step, only for the block, the entries and the queries that it was made for; else the layer chooses for itself."""

    axes: ClassVar[tuple[str, ...]] = ("gap", "source")
    tables: ClassVar[tuple[str, ...]] = ("overlap", "mass")
    remembers: ClassVar[str] = "a plan says who chooses when"
    across_heads: ClassVar[str] = "a head reads what the head of its number chose in another layer"

    profile: str | None = knob(None, "file that diffaccel calibrate wrote for this model")

    def __post_init__(self) -> None:
        super().__post_init__()
        measured = None if self._profile is None else self._profile.knobs.get("density")
        self.require(
            measured in (None, self.density),
            f"density must be {measured}, as while the profile was measured, or calibrate again",
            density=self.density,
        )

    def whole_frames(self) -> str:
        return "layers go by the same tokens"

    def rank(self, asked: Asked) -> Tensor:
        return asked.mass()

    def made_for(self, asked: Asked) -> tuple[int, ...]:
        """What a choice holds for; the keys of a video that is made at once (start 0) are others at every step."""
        site, keys = asked.site, asked.keys
        version = asked.lasting.version if site.start else 0
        return site.block, site.start, version, keys.count, keys.block, *asked.q.shape[:3], asked.given.shape[1]

    def measured(self, name: str) -> NDArray[np.float64]:
        """Of a profile: [g, i, j, h], of head h in layer j and what it chose in layer i, g steps before."""
        found = self.table(name)
        return found[:, : found.shape[2]]

    def lines(self, profile: Profile) -> Iterator[str]:
        yield "steps since  overlap with its own choice  with the layer before  attention held, own  layer before"
        for gap in range(len(profile.axes["gap"])):
            tables = [profile.tables[name][gap].mean(-1) for name in ("overlap", "mass")]
            (own, before), (held, other) = ((table.diagonal().mean(), table.diagonal(1).mean()) for table in tables)
            yield f"{gap:<11g}  {own:<24.3f}  {before:<21.3f}  {held:<19.3f}  {other:.3f}"
