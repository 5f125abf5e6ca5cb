"""What is evaluated: named settings, over prompts and seeds, on one pipeline with one set of arguments."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..accel import Accel
from ..settings import describe_slots
from .store import EvalError

_OURS = ("generator", "output_type", "history", "latents", "prompt", "image", "video")


@dataclass(frozen=True)
class Arm:
    """A setting, and how it was asked for: the preset and the knobs that were set, as text."""

    accel: Accel
    preset: str | None = None
    changes: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        slots = describe_slots(self.accel)
        return {"preset": self.preset, "set": dict(self.changes), "slots": slots, "kernel": self.accel.kernel}


@dataclass(frozen=True)
class Setup:
    """One evaluation: `arms` by name against dense attention, on `prompts` x `seeds`, written into `out`.

    `arguments` are those of the pipeline's call (height, width, num_frames, ...); `model` and `command` are noted as
    they are. Raises `EvalError` for what cannot be evaluated together.
    """

    pipe: Any
    arms: Mapping[str, Arm]
    out: Path
    prompts: Sequence[str]
    seeds: Sequence[int]
    arguments: Mapping[str, Any]
    model: str = ""
    command: str = ""
    fps: float = 16.0

    def __post_init__(self) -> None:
        if not self.arms or not self.prompts or not self.seeds:
            raise EvalError(
                "an evaluation needs at least one arm, one prompt and one seed, "
                f"got {len(self.arms)}, {len(self.prompts)} and {len(self.seeds)}"
            )
        for what, values in (("prompts", self.prompts), ("seeds", self.seeds)):
            twice = [value for value in dict.fromkeys(values) if list(values).count(value) > 1]
            if twice:
                raise EvalError(f"{what} are evaluated once each, and {twice[0]!r} is there twice; leave one out")
        if "dense" in self.arms:
            raise EvalError("'dense' is what every arm is held against, and no arm's name; name it otherwise")
        files = [file_name(arm) for arm in self.arms]
        if len(set(files)) < len(files):
            raise EvalError(f"the names of arms become names of files, and two of {', '.join(self.arms)} are alike")
        kernels = sorted({arm.accel.kernel for arm in self.arms.values()})
        if len(kernels) > 1:
            raise EvalError(
                f"all arms and the dense one run the same kernel, got {' and '.join(kernels)}; set one for all"
            )
        taken = [name for name in _OURS if name in self.arguments]
        if taken:
            raise EvalError(f"an evaluation sets {taken[0]!r} itself, or makes no such videos; leave it out")

    @property
    def causal(self) -> bool:
        return bool(getattr(self.pipe, "block_causal", False))

    @property
    def dense(self) -> Accel:
        """Dense attention by the kernel of the arms."""
        return Accel(kernel=next(iter(self.arms.values())).accel.kernel)

    @cached_property
    def device(self) -> Any:
        return self.pipe._execution_device

    def argument(self, name: str) -> Any:
        """What the pipeline is called with, by default its own."""
        found = inspect.signature(self.pipe.__call__).parameters.get(name)
        return self.arguments.get(name, None if found is None else found.default)

    def asked(self, what: str) -> dict[str, Any]:
        """The content of `asked.json`."""
        from ..report import environment

        where = environment(self.device, self.pipe.transformer.dtype)
        versions = {name: where.pop(name) for name in ("diffaccel", "torch", "diffusers", "python")}
        return {
            "what": what,
            "command": self.command,
            "model": self.model,
            "size": [self.argument("height"), self.argument("width")],
            "frames": self.argument("num_frames"),
            "steps": self.argument("num_inference_steps"),
            "guidance": self.argument("guidance_scale"),
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "arms": {name: arm.to_dict() for name, arm in self.arms.items()},
            "environment": where,
            "versions": versions,
        }


def file_name(arm: str) -> str:
    """The name of an arm as part of a file's."""
    return re.sub(r"[^\w.,=+-]+", "-", arm).strip("-.") or "arm"


def peak_bytes(device: Any, report: Any) -> int | None:
    """The peak of one generation; None on the CPU, where the peak of the process is that of all before it as well."""
    return int(report.peak_memory_bytes) if device.type == "cuda" else None


def cache_bytes(report: Any) -> int | None:
    """The most bytes that all caches held together; None where no block was finished."""
    return max((int(block["bytes"]) for block in report.blocks), default=None)
