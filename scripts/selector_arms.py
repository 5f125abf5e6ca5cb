"""Arms of `cache_quality.py --suite selectors`: selectors that read as many keys each, between lot and oracle."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel import Accel, NeighborhoodAttention, SinkRecent
from diffaccel.selection.asked import Asked
from diffaccel.selection.mass_router import MassRouter
from diffaccel.selection.ranked import Choosing, Ranked
from diffaccel.techniques import TECHNIQUES

DENSITIES = (0.3, 0.1)


@dataclass(frozen=True)
class ByLot(Ranked):
    """Reads blocks drawn by lot: what a rank must beat."""

    paper: ClassVar[str] = "a control"
    summary: ClassVar[str] = "reads blocks drawn by lot"

    def rank(self, asked: Asked) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * asked.site.layer + 10 * asked.site.block + asked.site.step)
        shape = (*asked.q.shape[:3], asked.keys.choices)
        return torch.rand(shape, generator=generator).to(asked.q.device)


@dataclass(frozen=True)
class BestBlocks(Ranked):
    """Reads the blocks that hold most of the attention, found by computing all of it: what no shortcut can beat."""

    paper: ClassVar[str] = "a control"
    summary: ClassVar[str] = "reads the blocks that hold most of the attention"
    by: ClassVar[str] = "place"

    def sorting(self) -> str:
        return self.by

    def rank(self, asked: Asked) -> Tensor:
        q = asked.q.float() * asked.q.shape[-1] ** -0.5
        mass = []
        for block in q.unbind(2):
            scores = asked.scores(block)
            mass.append(scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:]).sum(-1).mean(2))
        return torch.stack(mass, 2)


@dataclass(frozen=True)
class BestOfSorted(BestBlocks):
    """The same, of blocks of near keys."""

    by: ClassVar[str] = "kmeans"


def arms(profiles: dict[str, str]) -> list[tuple[str, Accel]]:
    """Names and settings; `profiles` has files of techniques that go by one, without which they are left out."""
    found: list[tuple[str, Accel]] = []
    chosen = [technique for technique in TECHNIQUES if issubclass(technique, Choosing)]
    for density in DENSITIES:
        for technique in [ByLot, BestBlocks, BestOfSorted, *chosen]:
            knobs: dict[str, Any] = {"density": density}
            if technique.needs == "calibration":
                if technique.__name__ not in profiles or density != technique.defaults()["density"]:
                    continue  # a profile is of the density that it was made at
                knobs["profile"] = profiles[technique.__name__]
            if issubclass(technique, Ranked) or "density" in technique.knobs():
                for summaries in (True, False) if density == DENSITIES[0] else (True,):
                    name = f"{density}: {technique.__name__}{'' if summaries else ', no means'}"
                    if "summaries" in technique.knobs():
                        found.append((name, Accel(selection=technique(**knobs, summaries=summaries))))
    found += [
        (f"outside {outside}: MassRouter", Accel(selection=MassRouter(outside=outside))) for outside in (0.1, 0.3, 0.5)
    ]
    for kernel, stride in (
        ((3, 0, 0), (1, 1, 1)),
        ((0, 4, 4), (1, 1, 1)),
        ((0, 4, 4), (1, 2, 2)),
        ((0, 4, 4), (1, 4, 4)),
    ):
        window: Any = NeighborhoodAttention(kernel, stride)
        found.append((f"window {kernel}, stride {stride}: NeighborhoodAttention", Accel(window=window)))
    return [*found, ("a plain window of 9 frames: SinkRecent", Accel(cache=SinkRecent(9, 1)))]
