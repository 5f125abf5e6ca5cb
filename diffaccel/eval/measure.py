"""All measures of one clip against the dense one, as a row holds them."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..quality import Clip, ClipError, Lpips, MetricError, compare_clips, drift, motion, ms_ssim, warp_error, windows
from .store import EvalError

OWN = ("warp_error", "flicker", "seam", "drift_colour", "drift_sharpness", "drift_similarity", "text")
"""Measures that the dense clip has as well."""

SCORES = ("psnr_pooled", "psnr_worst", "ssim", "ms_ssim", "lpips", *OWN)

Adherence = Callable[[Clip, str], float]
"""`adherence(clip, prompt)`: how well a clip shows what the prompt says, higher is better."""


@dataclass(frozen=True)
class Judge:
    """A function of one's own that judges text, by the name it was loaded by."""

    name: str
    function: Adherence

    def __call__(self, clip: Clip, prompt: str) -> float:
        return self.function(clip, prompt)

    def __str__(self) -> str:
        return self.name


def load_judge(name: str) -> Judge:
    """The function `MODULE:FUNCTION`. Raises `EvalError` where there is none."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise EvalError(f"--judge takes MODULE:FUNCTION, such as my_scores:adherence, got '{name}'")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise EvalError(f"--judge {name} cannot be had: {error}; is its folder in PYTHONPATH?") from error
    if not callable(found):
        raise EvalError(f"--judge {name} is no function of a clip and a prompt, but {type(found).__name__}")
    return Judge(name, found)


@dataclass(frozen=True)
class Measures:
    """What is measured beside what always is: `lpips` and `text`, or for each the reason why not."""

    lpips: Lpips | str = "not asked for"
    text: Adherence | str = "no judge of the text was named (--clip or --judge)"

    def to_dict(self) -> dict[str, Any]:
        """What is measured, for `asked.json`: rows that lack a measure are not mixed with rows that have it."""
        lpips = None if isinstance(self.lpips, str) else "alexnet"
        return {"lpips": lpips, "text": None if isinstance(self.text, str) else str(self.text)}

    def against(self, dense: Clip, borders: Sequence[int], prompt: str) -> "Reference":
        """Measure against this clip, whose later chunks begin at `borders` (none where it was made at once)."""
        return Reference(self, dense, tuple(borders), prompt)


@dataclass
class Scored:
    """What one clip has: `scores` and `reference` by name, `frames` one number a frame, `drift` one a later block, and
    for every number that is None the reason in `unmeasured`."""

    scores: dict[str, float | None] = field(default_factory=dict)
    reference: dict[str, float | None] = field(default_factory=dict)
    frames: dict[str, list[float | None]] = field(default_factory=dict)
    drift: dict[str, list[float | None]] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)


class Reference:
    """A dense clip, whose own motion and measures are taken once."""

    def __init__(self, measures: Measures, dense: Clip, borders: tuple[int, ...], prompt: str) -> None:
        self.measures, self.dense, self.borders, self.prompt = measures, dense, borders, prompt
        self.motion = motion(dense) if len(dense) > 1 else None
        self.own = self._own(dense)

    def score(self, clip: Clip) -> Scored:
        """Every measure of `clip`. Raises `ClipError` for a clip of another length or size."""
        found = self._own(clip)
        found.reference = {name: self.own.scores[name] for name in OWN}
        plain = compare_clips(self.dense, clip, self.borders)
        found.frames = {"psnr": _finite(plain.psnr), "ssim": list(plain.ssim)}
        for name, value in (("psnr_pooled", plain.psnr_pooled), ("psnr_worst", plain.psnr_worst)):
            found.scores[name] = _number(value)
            if math.isinf(value):
                found.unmeasured[name] = "identical"
        found.scores["ssim"] = plain.ssim_mean
        self._of_frames(found, "ms_ssim", lambda: ms_ssim(self.dense, clip))
        lpips = self.measures.lpips
        if isinstance(lpips, str):
            found.scores["lpips"], found.unmeasured["lpips"] = None, lpips
        else:
            self._of_frames(found, "lpips", lambda: lpips.frames(self.dense, clip))
        found.scores = {name: found.scores[name] for name in SCORES}
        for name in OWN:
            if found.reference[name] is None and found.scores[name] is not None:
                found.unmeasured[f"reference.{name}"] = self.own.unmeasured[name]
        return found

    def _own(self, clip: Clip) -> Scored:
        """What needs no other clip."""
        from ..quality import flicker, seam

        found = Scored()
        values = {
            "warp_error": (
                warp_error(clip, self.motion) if self.motion else math.nan,
                "no pixel can be followed from one frame to the next",
            ),
            "flicker": (flicker(clip), "it takes three frames"),
            "seam": (
                seam(clip, self.borders),
                "only a video made in two chunks or more has seams, beside frames that are none, and moves elsewhere",
            ),
        }
        for name, (value, reason) in values.items():
            found.scores[name] = _number(value)
            if found.scores[name] is None:
                found.unmeasured[name] = reason
        self._drift(found, clip)
        text = self.measures.text
        if isinstance(text, str):
            found.scores["text"], found.unmeasured["text"] = None, text
        else:
            found.scores["text"] = _number(text(clip, self.prompt))
            if found.scores["text"] is None:
                found.unmeasured["text"] = "the judge has no score for this prompt"
        return found

    def _drift(self, found: Scored, clip: Clip) -> None:
        borders = self.borders or windows(len(clip))
        names = ("drift_colour", "drift_sharpness", "drift_similarity")
        if not borders:
            found.scores |= dict.fromkeys(names)
            found.unmeasured |= dict.fromkeys(names, "a video of one block has nothing to drift from")
            return
        drifted = drift(clip, borders)
        for name in names:
            values = getattr(drifted, name.removeprefix("drift_"))
            found.drift[name] = _finite(values)
            found.scores[name] = _number(float(np.mean(values)))
            if found.scores[name] is None:
                found.unmeasured[name] = "the first block is flat"

    @staticmethod
    def _of_frames(found: Scored, name: str, measure: Callable[[], Any]) -> None:
        try:
            values = measure()
        except (ClipError, MetricError) as error:
            found.scores[name], found.unmeasured[name] = None, str(error)
            return
        found.frames[name] = _finite(values)
        found.scores[name] = _number(float(np.mean(values)))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]
