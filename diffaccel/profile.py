"""Profiles: what calibration measured of one model, a number for each layer and head, in a small JSON."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import DiffaccelError
from .report import write_json

if TYPE_CHECKING:
    from .backbone import Geometry

Axes = dict[str, tuple[float, ...]]
Tables = dict[str, NDArray[np.float64]]

FORMAT = 1
SAMPLES = 8
"""Elements of a parameter that go into a fingerprint."""


class ProfileError(DiffaccelError):
    """A file cannot be used as the profile it was named as."""


@dataclass(frozen=True)
class Model:
    """Which denoiser a profile was measured on. `weights` is alike for one checkpoint in float32 and in bfloat16; in
    float16, quantised, or with an adapter it counts as another."""

    backbone: str
    layers: int
    heads: int
    head_dim: int
    weights: str

    @classmethod
    def of(cls, geometry: "Geometry", denoiser: nn.Module) -> "Model":
        return cls(geometry.backbone, geometry.layers, geometry.heads, geometry.head_dim, fingerprint(denoiser))

    def __str__(self) -> str:
        shape = f"{self.layers} layers of {self.heads} heads of {self.head_dim} channels"
        return f"{self.backbone}, {shape}, weights {self.weights[:12]}"


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and shapes of all parameters and `SAMPLES` elements of each, rounded to bfloat16."""
    names, picks = [], []
    for name, weight in _parameters(module):
        flat = weight.detach().reshape(-1)
        names.append((name, *weight.shape))
        picks.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES])
    home = picks[0].device
    picked = torch.cat([pick.to(home, torch.bfloat16) for pick in picks]).cpu()  # the one wait for the device
    return sha256(json.dumps(names).encode() + picked.view(torch.uint8).numpy().tobytes()).hexdigest()


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, child in module.named_modules():
        hook = getattr(child, "_hf_hook", None)
        maps = [found for one in getattr(hook, "hooks", [hook]) if (found := getattr(one, "weights_map", None))]
        for name, weight in child.named_parameters(recurse=False):
            # sequential offload leaves an empty tensor in the module and keeps the weight in its hook
            yield f"{prefix}.{name}", maps[-1][name] if weight.is_meta and maps else weight


@dataclass(frozen=True, eq=False)
class Profile:
    """What `diffaccel calibrate` measured for `method` on one model.

    `axes` has the places measured along the first axes of every table, ascending, as {"density": (0.1, 0.3), "step":
    (3, 4)}; each of `tables` is (*axes, layers, heads). Steps count from 0 of `shape["steps"]`; the clean pass is the
    one after the last. `shape` also has width and height in pixels and pixel frames. `knobs` are those of the method
    while it was measured, `prompts` how many videos were averaged over, `versions` those of the packages.
    """

    method: str
    model: Model
    shape: dict[str, int]
    prompts: int
    knobs: dict[str, Any]
    versions: dict[str, str]
    axes: Axes
    tables: Tables

    def save(self, path: str | Path) -> None:
        """Write it as JSON, numbers rounded to four digits, all or nothing."""
        tables = {name: table.round(4).tolist() for name, table in self.tables.items()}
        content = vars(self) | {"model": asdict(self.model), "tables": tables}
        write_json(Path(path), {"format": FORMAT} | content, indent=None)

    @classmethod
    def load(cls, path: str | Path, method: str, axes: Sequence[str], tables: Sequence[str]) -> "Profile":
        """The profile of `method` in the file, with those axes and at least those tables.

        Raises `ProfileError` for a file that is absent, no profile, of another format or method, or damaged.
        """

        def refuse(rule: str) -> NoReturn:
            remedy = f"make one with diffaccel calibrate --method {method.lower()} -o {path}"
            raise ProfileError(f"the profile '{path}' {rule}; {remedy}") from None

        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            refuse(f"cannot be read ({error.strerror})")
        except ValueError as error:
            refuse(f"is not JSON ({error})")
        if not isinstance(content, dict) or "format" not in content:
            refuse("is some other JSON: it names no format")
        if content["format"] != FORMAT:
            refuse(f"has format {content['format']!r}, and this diffaccel reads format {FORMAT}")
        if content.get("method") != method:
            refuse(f"must be of the method {method}, and is of {content.get('method')}")
        parts: dict[str, Any] = {name: content.get(name) for name in cls.__dataclass_fields__}
        absent = [name for name, value in parts.items() if value is None]
        if absent:
            refuse(f"lacks {', '.join(absent)}")
        try:
            parts["model"] = Model(**parts["model"])
            parts["axes"] = {name: tuple(map(float, places)) for name, places in parts["axes"].items()}
            parts["tables"] = {name: np.array(table, float) for name, table in parts["tables"].items()}
            found = cls(**parts)
            size = (*map(len, found.axes.values()), int(found.model.layers), int(found.model.heads))
            steps = int(found.shape["steps"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            refuse(f"is damaged ({error})")
        if list(found.axes) != list(axes) or not set(tables) <= set(found.tables):
            have = f"{', '.join(found.tables)} by {', '.join(found.axes)}"
            refuse(f"must hold {', '.join(tables)} by {', '.join(axes)}, and holds {have}")
        for name, places in found.axes.items():
            if not places or not all(a < b for a, b in pairwise(places)) or not all(map(isfinite, places)):
                refuse(f"must have ascending places along {name}, and has {places}")
        for name, table in found.tables.items():
            if table.shape != size:
                refuse(f"must have a table {name} of {_by(size)} numbers, and has {_by(table.shape)}")
            if not np.isfinite(table).all():
                refuse(f"must have finite numbers in the table {name}, and {(~np.isfinite(table)).sum()} are not")
        if steps < 1:
            refuse(f"must have been measured over at least one step, and names {steps}")
        return found

    def about(self) -> str:
        """What it was measured on, in a line."""
        size = f"{self.shape['width']}x{self.shape['height']}, {self.shape['frames']} frames"
        return f"{self.model}: {self.prompts} prompts, {size}, {self.shape['steps']} steps"

    def mismatch(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        """Why these denoisers are not the one it was measured on, or None."""
        if len(models) != 1:
            return f"a profile is of one denoiser, and this pipeline has {len(models)}: leave the profile out"
        found = Model.of(*models[0])
        if found == self.model:
            return None
        return f"the profile is of another model ({self.model}), and this is {found}: calibrate this one"

    def place(self, step: int, steps: int) -> float:
        """Where step `step` of `steps` lies among the steps measured, at the same share of the way."""
        if step >= steps:  # the clean pass
            return float("inf")
        return step / max(1, steps - 1) * (self.shape["steps"] - 1)

    def at(self, table: str, **where: float) -> NDArray[np.float64]:
        """The numbers (layers, heads) at a place along every axis: interpolated, the nearest end outside."""
        values = self.tables[table]
        for name, places in self.axes.items():
            wanted = min(where[name], places[-1])
            above = bisect_left(places, wanted)
            below = max(0, above - 1)
            share = (wanted - places[below]) / (places[above] - places[below]) if above else 0.0
            values = values[below] + share * (values[above] - values[below])
        return values


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size)) or "no"
