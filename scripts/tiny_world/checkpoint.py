"""Checkpoints as safetensors bytes cut into parts of at most 15 MiB, and the optimiser's schedule."""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save

PART = 15 * 2**20


def save_parts(folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `name.part0`, `name.part1`, ...; each is complete before it replaces its predecessor."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    for index in range(math.ceil(len(data) / PART)):
        path = folder / f"{name}.part{index}"
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(data[index * PART : (index + 1) * PART])
        temporary.replace(path)


def load_parts(folder: Path, name: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a checkpoint, or None where there is none."""
    paths = sorted(folder.glob(f"{name}.part*"), key=lambda path: int(path.suffix.removeprefix(".part")))
    if not paths:
        return None
    return load(b"".join(path.read_bytes() for path in paths))


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys with `prefix.` in front."""
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def strip(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under `prefix.`, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


class Clock:
    """A wall-clock budget; its progress drives the learning rate, so that every run ends annealed."""

    def __init__(self, minutes: float, steps: int | None) -> None:
        self.start = time.monotonic()
        self.seconds = minutes * 60
        self.steps = steps

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def progress(self, step: int) -> float:
        """0 at the start, 1 at the end of the budget (of time, or of steps where given)."""
        return step / self.steps if self.steps else self.elapsed() / self.seconds


def learning_rate(peak: float, step: int, progress: float, warmup: int = 150) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * cosine)


class Average:
    """Exponential moving average of parameters, with a short memory at the start."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float = 0.999) -> None:
        self.parameters = list(parameters)
        self.shadow = [p.detach().clone() for p in self.parameters]
        self.decay = decay
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current weights."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights with their averages; call again to undo."""
        for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(held)
