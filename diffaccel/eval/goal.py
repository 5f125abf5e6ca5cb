"""What `tune` is to reach, and how far a setting is from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from ..cache.budget import readable
from ..errors import KnobError
from .frontier import memory

IDENTICAL = 200.0
"""What clips that are alike bit for bit count as, in dB, where a number is needed."""


@dataclass(frozen=True)
class Figures:
    """What is known of a setting. `psnr`: the least over prompts, in dB, inf if identical; `speedups`: dense seconds
    over its own, a round; `bytes`: the most it held. None or nothing where it was not measured."""

    psnr: float | None = None
    speedups: tuple[float, ...] = ()
    bytes: int | None = None


@dataclass(frozen=True)
class Goal:
    """A target: least "psnr" in dB, least "speedup" of denoising, or most "memory" in bytes.

    With "psnr" the fastest setting that reaches it is the best one, else that of the highest PSNR. Raises `KnobError`
    for a value that cannot be one.
    """

    kind: Literal["psnr", "speedup", "memory"]
    value: float

    def __post_init__(self) -> None:
        least, most, unit = {"psnr": (0, IDENTICAL, "dB"), "speedup": (1, 1000, "times"), "memory": (0, math.inf, "B")}[
            self.kind
        ]
        if not least < self.value < most:
            raise KnobError(f"a target of {self.kind} lies between {least:g} and {most:g} {unit}, got {self.value:g}")

    def missing(self, found: Figures) -> float:
        """By how much it is missed, in its own unit; 0 or less where it is reached, inf where that is not known."""
        if self.kind == "psnr":
            return math.inf if found.psnr is None else self.value - found.psnr
        if self.kind == "speedup":
            return self.value - median(found.speedups) if found.speedups else math.inf
        return math.inf if found.bytes is None else found.bytes - self.value

    def hopeless(self, found: Figures) -> bool:
        """Whether no further prompt or round can make it reach the target. One round of a speed has no spread yet."""
        if self.kind == "speedup":
            return len(found.speedups) > 1 and max(found.speedups) < self.value
        return 0 < self.missing(found) < math.inf

    def score(self, found: Figures) -> float:
        """Higher is better; below 0 where the target is missed."""
        missed = self.missing(found)
        if missed > 0:
            return -min(missed / self.value, 1e3)
        if self.kind == "psnr":
            return median(found.speedups) if found.speedups else 0.0
        return 0.0 if found.psnr is None else min(found.psnr, IDENTICAL)

    def __str__(self) -> str:
        return {
            "psnr": f"{self.value:g} dB to dense",
            "speedup": f"{self.value:g} times dense's speed",
            "memory": f"{readable(round(self.value))} of memory",
        }[self.kind]

    def missed_by(self, found: Figures) -> str:
        """How far that is from the target, in words."""
        if self.kind == "psnr" and found.psnr is not None:
            return f"{found.psnr:.1f} dB, {self.missing(found):.1f} too few"
        if self.kind == "speedup" and found.speedups:
            return f"{median(found.speedups):.2f} times dense, {self.missing(found):.2f} too little"
        if self.kind == "memory" and found.bytes is not None:
            return f"{readable(found.bytes)}, {readable(round(self.missing(found)))} too much"
        return "not measured"


@dataclass(frozen=True)
class Final:
    """A setting after the last measurement, its rounds alternating with dense and the others'. Seconds of denoising."""

    name: str
    figures: Figures
    seconds: tuple[float, float, float]  # least, median, most
    dense: tuple[float, float, float]

    @property
    def faster(self) -> bool:
        """Than dense, beyond the spread."""
        return self.seconds[2] < self.dense[0]


def best(goal: Goal, finals: Sequence[Final]) -> Final | None:
    """The one to keep, or None where none reaches the target.

    Seconds that overlap are no difference: among settings that reach a PSNR as fast as the fastest, up to the spread,
    the one of the highest PSNR is kept, and one that is no faster than dense beyond it is not kept at all.
    """
    reached = [final for final in finals if goal.missing(final.figures) <= 0]
    if goal.kind == "psnr":
        reached = [final for final in reached if final.faster]
        fastest = min(reached, key=lambda final: final.seconds[1], default=None)
        if fastest is None:
            return None
        reached = [final for final in reached if final.seconds[0] <= fastest.seconds[2]]
    return max(reached, key=lambda final: (_decibel(final.figures), -final.seconds[1]), default=None)


def _decibel(figures: Figures) -> float:
    return -math.inf if figures.psnr is None else min(figures.psnr, IDENTICAL)


def final_of(point: dict[str, Any], way: str, speed: dict[str, Any], identical: bool) -> Final:
    """Of a row of frontier.jsonl and the summarised speed of its length; `identical`: each clip to its dense one."""
    worst = math.inf if identical else point["worst"][way]["psnr_pooled"]
    own, dense = (
        (found["least"], found["median"], found["most"])
        for found in (speed[name]["seconds"]["denoise"] for name in (point["arm"], "dense"))
    )
    return Final(point["arm"], Figures(worst, (dense[1] / own[1],), memory(point)), own, dense)
