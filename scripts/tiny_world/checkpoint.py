"""Stage checkpoints, and what every stage's loop needs: a budget, a schedule, an average of the weights."""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


class TrainingError(Exception):
    """A stage cannot run as asked; the message says why and what to do."""


def save_stage(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, Any]) -> None:
    """Write `name.safetensors`. The file is complete before it takes its predecessor's place.

    Raises `TrainingError` where it cannot be written (a full disk, say); the predecessor is then still there.
    """
    path = folder / f"{name}.safetensors"
    temporary = path.with_suffix(".tmp")
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"sizes": json.dumps(dict(sizes))})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = f"; the last good '{path}' is kept" if path.exists() else ""
        raise TrainingError(f"'{path}' ({len(data) / 2**20:.0f} MiB) cannot be written: {error}{kept}") from error


def load_stage(folder: Path, name: str, sizes: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """The tensors of a stage, or None where it has not run yet.

    Raises `TrainingError` for a file that is damaged, or of a model of other sizes.
    """
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            held = json.loads((file.metadata() or {}).get("sizes", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainingError(
            f"'{path}' is damaged or cut short ({error}); put back a good copy, or delete it to start the stage anew"
        ) from error
    if held != dict(sizes):
        raise TrainingError(
            f"'{path}' holds a model of sizes {held}, the config asks for {dict(sizes)}; "
            "use the config it was trained with, or another --out"
        )
    return tensors


def need_stage(folder: Path, name: str, sizes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a stage that a later one builds on."""
    tensors = load_stage(folder, name, sizes)
    if tensors is None:
        raise TrainingError(f"there is no '{folder / name}.safetensors': run the {name} stage first")
    return tensors


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys with `prefix.` in front."""
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def strip(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under `prefix.`, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def record(folder: Path, stage: str, **values: Any) -> None:
    """Append one line to `metrics.jsonl`, so that a run that is cut still tells what it measured."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"stage": stage, **values}) + "\n")


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
