"""`diffaccel doctor`: what is installed, and whether every kernel is right and fast on a model's own shape.

`machine` looks at the installation, `shape` at the model, `check` at the kernels; `show` makes it text.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DiffaccelError
from .check import BUDGET, Check, Checks, check_kernels, said
from .machine import Machine, Problem, look
from .shape import Shape, of_model
from .show import lines


@dataclass(frozen=True)
class Findings:
    """All that was found. `device` and `dtype` as given to the kernels; no `shape` or `kernels` where the model could
    not be opened. `problems` are all of them, those of the machine first.
    """

    machine: Machine
    device: str
    dtype: str
    shape: Shape | None
    kernels: Checks | None
    problems: tuple[Problem, ...]

    @property
    def healthy(self) -> bool:
        """Whether the kernel that "auto" chooses runs and is right."""
        return self.kernels is not None and self.kernels.of(self.kernels.auto).status == "right"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        content = asdict(self)
        del content["machine"]["problems"]
        for extra, plain in zip(self.machine.extras, content["machine"]["extras"], strict=True):
            plain["installed"] = extra.installed
        return {"healthy": self.healthy, **content, "budget": BUDGET}


def examine(
    model: str | Path | None = None,
    *,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    seconds: float = 10.0,
) -> Findings:
    """Look at the installation, then compare and time every kernel at the model's shape, for about `seconds`.

    Arguments are those of `diffaccel generate`: sizes in pixels, pixel frames, names of dtype and device; what is not
    given is the model's own. Raises `DiffaccelError` for arguments that nothing can be examined with.
    """
    from ..pipelines.loading import resolve_device, resolve_dtype

    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    shape, unopened = None, []
    try:
        shape = of_model(model, width, height, frames)
    except DiffaccelError:
        raise
    except (ImportError, RuntimeError, OSError) as error:  # of a library: which one is broken, `look` says
        unopened = [Problem(f"no model can be opened: {said(error)}", "mend the libraries named here, or: pip check")]
    machine = look()
    found, kernels = [*machine.problems, *unopened], None
    if shape is not None:
        memory = memory_problems(shape, where, kind)  # before the kernels fill it
        kernels = check_kernels(shape, where, kind, seconds=seconds)
        found += [*kernel_problems(kernels), *memory]
    return Findings(machine, str(where), str(kind).removeprefix("torch."), shape, kernels, tuple(found))


def kernel_problems(kernels: Checks) -> list[Problem]:
    """Kernels that are wrong or do not run, first the one that "auto" chooses."""
    right = [check.kernel for check in kernels.dense if check.status == "right" and check.kernel != "split"]
    auto = kernels.auto
    problems = []
    for check in sorted((*kernels.dense, kernels.sparse), key=lambda check: check.kernel != auto):
        if check.status not in ("wrong", "failed"):
            continue
        verb = "is wrong" if check.status == "wrong" else "does not run"
        chosen = ", which auto chooses here," if check.kernel == auto else ""
        what = f"kernel {check.kernel}{chosen} {verb}: {check.reason}"
        problems.append(Problem(what, _remedy(check, kernels, right)))
    return problems


def _remedy(check: Check, kernels: Checks, right: list[str]) -> str:
    package = {"fa3": "fa3-fwd", "fa4": "flash-attn-4", "xformers": "xformers", "triton": "triton"}.get(
        check.kernel, "torch"
    )
    again = f"pip install --force-reinstall --no-deps {package}"
    if check is kernels.sparse:
        return f"{again}; until then leave AnnSA out: --set selection=none"
    if check.kernel == kernels.auto and right:
        best = min(right, key=lambda name: kernels.of(name).milliseconds or float("inf"))
        return f"{again}; until then: --set kernel={best}"
    return again


def memory_problems(shape: Shape, device: torch.device, dtype: torch.dtype, free: int | None = None) -> list[Problem]:
    """Where the denoiser's weights and a dense cache of that shape are more than the GPU has free; `free` in bytes."""
    if free is None:
        if device.type != "cuda":
            return []
        free = torch.cuda.mem_get_info(device)[0]
    weights, cache = shape.weight_bytes(dtype), shape.cache_bytes(dtype)
    call = 4 * shape.keys * shape.heads * shape.head_dim * dtype.itemsize
    if weights + cache + call <= free:
        return []
    held = f"weights of {_gib(weights)}" + (f" and a dense cache of {_gib(cache)}" if cache else "")
    what = f"{shape.model} at {shape.width}x{shape.height}, {shape.frames} frames, holds {held}"
    fix = (
        '--set cache.budget="24 frames", or fewer --frames'
        if cache > weights
        else "--offload model, or a smaller --size"
    )
    return [Problem(f"{what}, and {_gib(free)} of GPU memory are free", fix)]


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


__all__ = ["Findings", "Problem", "examine", "lines"]
