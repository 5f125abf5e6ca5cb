"""How a family of models meets the seam. Families live in `diffaccel.pipelines.backbones`, one file each."""

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from .errors import UnsupportedError
from .peer import building_on_diffusers
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
    coarse_past: bool = False  # blocks that are old enough are kept in larger patches than the one at work


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


_DENOISERS = ("transformer", "transformer_2", "unet")
_FAMILIES: list[Backbone] = []
_LOADING = threading.Lock()
_PLUGINS = ["diffaccel.pipelines.backbones"]  # loaded by name: diffaccel/ does not import from pipelines/


def register(family: Backbone) -> None:
    """Make a family known. The first registered that knows a pipeline's denoiser serves it."""
    _FAMILIES.append(family)


def find(pipe: Any) -> tuple[Backbone, list[nn.Module]]:
    """The family of a pipeline and its denoisers."""
    with _LOADING:
        while _PLUGINS:
            with building_on_diffusers():
                importlib.import_module(_PLUGINS[-1])
            _PLUGINS.pop()
    for family in _FAMILIES:
        denoisers = family.denoisers(pipe)
        if denoisers:
            return family, denoisers
    raise UnsupportedError(
        f"{_unknown(pipe)}; diffaccel knows pipelines of these families: {', '.join(f.name for f in _FAMILIES)}"
    )


def _unknown(pipe: Any) -> str:
    """What of a pipeline was recognised, and what is missing."""
    name = type(pipe).__name__
    if isinstance(pipe, nn.Module):
        return f"{name} is a model: pass the pipeline that holds it"
    parts = {part: getattr(pipe, part, None) for part in _DENOISERS if hasattr(pipe, part)}
    for part, model in parts.items():
        if (original := getattr(model, "_orig_mod", None)) is not None:
            return (
                f"{name} denoises with a {type(original).__name__} that torch.compile wrapped as a whole: set "
                f"pipe.{part} = pipe.{part}._orig_mod and take its compile_repeated_blocks(fullgraph=True)"
            )
    met = [f"{type(model).__name__} ({part})" for part, model in parts.items() if model is not None]
    if met:
        return f"{name} denoises with {' and '.join(met)}, which is of no known family"
    if parts:
        return f"{name} has no {' and no '.join(parts)} loaded: load its weights first"
    return f"{name} has no model that denoises ({', '.join(_DENOISERS)}): pass a diffusers pipeline"
