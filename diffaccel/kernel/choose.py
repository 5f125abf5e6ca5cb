"""Which exact dense kernel is fastest for calls of about one size: measured once on a GPU, kept on disk.

Sizes are rounded to quarters of an octave and cut to a bounded amount of work, beyond which no kernel overtakes
another: so there are few of them, and measuring one takes some 50 ms (and the first time what FA4 takes to compile).
Where nothing may be measured, while a CUDA graph is captured or torch.compile traces, the order of preference stands.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from math import log2
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_KEYS = 32768
MOST_LANES = 32
MOST_OPERATIONS = 1.2e12
"""Of a call that is measured: one or two milliseconds on a Hopper GPU."""

LEAST_OPERATIONS = 2e9
"""Of a call that is measured; smaller ones take some microseconds by any kernel."""

MARGIN = 1.03
"""How many times as fast as the preferred kernel another has to be."""

_ROUNDS, _CALLS = 3, 4
_AHEAD = 2_000_000  # cycles that the GPU waits, so that calls are queued by then: what they take the host is not meant
_PACKAGES = ("fa3-fwd", "flash-attn-4", "xformers")
_ENVIRONMENTS = 16  # that the file remembers

Timer = Callable[[ModuleType, "Size"], float]


class Size(NamedTuple):
    """About how large a call is; `lanes` are batch rows x heads."""

    dtype: torch.dtype
    queries: int
    keys: int
    lanes: int
    head_dim: int

    @property
    def operations(self) -> int:
        return 4 * self.queries * self.keys * self.lanes * self.head_dim

    def __str__(self) -> str:
        return f"{self.queries} x {self.keys} x {self.lanes} x {self.head_dim} in {str(self.dtype)[6:]}"


class Choice(NamedTuple):
    """A kernel by its name, and why that one, as the report says it."""

    kernel: str
    why: str


def size_of(q_BSHD: Tensor, keys: int) -> Size:
    """The class of a call, by its queries and the number of its keys."""
    batch, queries, heads, head_dim = q_BSHD.shape
    return _size(q_BSHD.dtype, queries, keys, batch * heads, head_dim)


@lru_cache(maxsize=4096)
def _size(dtype: torch.dtype, queries: int, keys: int, lanes: int, head_dim: int) -> Size:
    lanes, keys, queries = min(lanes, MOST_LANES), min(_near(keys), MOST_KEYS), _near(queries)
    while queries > 1 and 4 * queries * keys * lanes * head_dim > MOST_OPERATIONS:
        queries //= 2
    return Size(dtype, queries, keys, lanes, head_dim)


def _near(count: int) -> int:
    """The nearest power of two, by ratio, or a quarter, a half or three quarters on the way to the next one.

    Tiles of queries are dealt out to processors in rounds, so sizes further apart would decide for one another wrongly.
    """
    below = 1 << (max(count, 1).bit_length() - 1)
    steps = [below * quarters // 4 for quarters in range(4, 9) if below * quarters % 4 == 0]
    return min(steps, key=lambda step: abs(log2(step / max(count, 1))))


class Table:
    """Milliseconds of kernels by the size of a call, in `path`; those of other environments stay there untouched."""

    def __init__(self, path: Path, environment: str) -> None:
        self.path, self.environment = path, environment
        self.found: dict[str, dict[str, float]] = self._read().get(environment, {})

    def choose(self, candidates: Sequence[ModuleType], size: Size, timer: Timer) -> Choice:
        """The fastest of `candidates`, the preferred one first; measured where one of them is not known yet."""
        known = self.found.get(str(size), {})
        missing = [kernel for kernel in candidates if kernel.name not in known]
        if missing:
            known = {kernel.name: timer(kernel, size) for kernel in candidates}
            self.keep(size, known)
        times = {kernel.name: known[kernel.name] for kernel in candidates}
        best = min(times, key=times.__getitem__)
        if times[best] * MARGIN > times[candidates[0].name]:
            best = candidates[0].name
        rest = sorted((ms, name) for name, ms in times.items() if name != best)
        others = "".join(f", {name} {_said(ms)}" for ms, name in rest)
        return Choice(best, f"{best}: {_said(times[best])}{others} at {size}")

    def keep(self, size: Size, times: Mapping[str, float]) -> None:
        """Remember milliseconds, here and on disk; infinite where a kernel failed."""
        self.found[str(size)] = {**self.found.get(str(size), {}), **times}
        content = self._read()
        mine = content.pop(self.environment, {})
        content[self.environment] = {**mine, **self.found}
        latest = dict(list(content.items())[-_ENVIRONMENTS:])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".json", delete=False) as file:
                json.dump(latest, file, indent=1)
            os.replace(file.name, self.path)  # whoever reads it meanwhile finds the old one or the new one
        except OSError as error:
            warnings.warn(
                f"what was measured of kernels could not be kept in '{self.path}' ({error}): it is measured again next "
                "time; set DIFFACCEL_CACHE to a folder that can be written",
                stacklevel=2,
            )

    def _read(self) -> dict[str, dict[str, dict[str, float]]]:
        try:
            content: Any = json.loads(self.path.read_text(encoding="utf-8"))
            return {
                str(environment): {
                    str(size): {str(k): float(ms) for k, ms in times.items()} for size, times in of.items()
                }
                for environment, of in content.items()
            }
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"'{self.path}' could not be read ({error}): kernels are measured again", stacklevel=2)
            return {}


def fastest(candidates: Sequence[ModuleType], device: torch.device, size: Size) -> Choice:
    """The fastest of `candidates`, all usable on that GPU; the first of them where nothing can be measured."""
    first = candidates[0].name
    if len(candidates) == 1 or size.operations < LEAST_OPERATIONS:
        return Choice(first, "")
    if torch.cuda.is_current_stream_capturing() or torch.compiler.is_compiling():
        return Choice(first, f"{first}: not measured at {size}, first met in a captured or compiled forward")
    try:
        return table(device).choose(candidates, size, lambda kernel, size: milliseconds(kernel, size, device))
    except torch.cuda.OutOfMemoryError:
        return Choice(first, f"{first}: not measured at {size}, there was no memory for it")


def table(device: torch.device) -> Table:
    """What is known of a GPU."""
    return _table(cache_folder() / "kernels.json", _environment(device))


@lru_cache(maxsize=16)
def _table(path: Path, environment: str) -> Table:
    return Table(path, environment)


def cache_folder() -> Path:
    """$DIFFACCEL_CACHE, else diffaccel in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("DIFFACCEL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffaccel"


@lru_cache(maxsize=16)
def _environment(device: torch.device) -> str:
    """A GPU's name and the versions that decide how fast kernels are on it."""
    parts = [torch.cuda.get_device_name(device), f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    parts.append(f"cuDNN {torch.backends.cudnn.version()}")
    for package in _PACKAGES:
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def milliseconds(kernel: ModuleType, size: Size, device: torch.device) -> float:
    """The median of a few calls on random tensors, after one that does not count; infinite where it raises."""
    with torch.cuda.device(device), torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(1, n, size.lanes, size.head_dim, dtype=size.dtype, device=device, generator=generator)
            for n in (size.queries, size.keys, size.keys)
        )
        took = []
        for _ in range(1 + _ROUNDS):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_AHEAD)
            began.record()
            try:
                for _ in range(_CALLS):
                    kernel.partial(q, k, v, scale=size.head_dim**-0.5)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # of somebody else's kernel, which may raise anything
                warnings.warn(f"kernel {kernel.name} fails at {size} and is not chosen: {error}", stacklevel=2)
                return float("inf")
            ended.record()
            ended.synchronize()
            took.append(began.elapsed_time(ended) / _CALLS)
    return median(took[1:])


def _said(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < float("inf") else "failed"
