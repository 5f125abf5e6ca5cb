"""How a family of models meets the seam. Families live in `diffaccel.pipelines.backbones`, one file each."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from .errors import UnsupportedError
from .run import Run


@dataclass(frozen=True)
class Geometry:
    """What an accelerated model looks like, for `diffaccel info`."""

    backbone: str
    layers: int
    heads: int
    head_dim: int
    patch: tuple[int, int, int]
    parts: tuple[str, ...]


class Backbone(Protocol):
    """One family of denoisers."""

    name: str

    def denoisers(self, pipe: Any) -> list[nn.Module]:
        """The modules of `pipe` this family knows, none if it knows none."""
        ...

    def geometry(self, denoiser: nn.Module) -> Geometry: ...

    def refuses(self, denoiser: nn.Module, slot: str) -> str | None:
        """Why this denoiser cannot take a technique of that slot, or None."""
        ...

    def install(self, denoiser: nn.Module, run: Run, first_layer: int) -> Callable[[], None]:
        """Bring its attention to `attend`, layers numbered from `first_layer`; returns what undoes it exactly."""
        ...


_FAMILIES: list[Backbone] = []
_PLUGINS = ["diffaccel.pipelines.backbones"]  # loaded by name: diffaccel/ does not import from pipelines/


def register(family: Backbone) -> None:
    """Make a family known. The first registered that knows a pipeline's denoiser serves it."""
    _FAMILIES.append(family)


def find(pipe: Any) -> tuple[Backbone, list[nn.Module]]:
    """The family of a pipeline and its denoisers."""
    while _PLUGINS:
        importlib.import_module(_PLUGINS[-1])
        _PLUGINS.pop()
    for family in _FAMILIES:
        denoisers = family.denoisers(pipe)
        if denoisers:
            return family, denoisers
    denoiser = getattr(pipe, "transformer", None)
    met = type(pipe).__name__ + (f" with {type(denoiser).__name__}" if denoiser is not None else "")
    raise UnsupportedError(
        f"diffaccel knows pipelines of these families: {', '.join(f.name for f in _FAMILIES)}; got {met}"
    )
