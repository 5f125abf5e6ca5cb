"""xFormers: memory-efficient attention in whatever kernel it has for a GPU; `pip install diffaccel[xformers]`."""

import json
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor

from ..plan import Plan
from .gather import by_weight, planned
from .merge import Partial

name = "xformers"


def unusable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel cannot run there, or None."""
    if device.type != "cuda":
        return f"it runs on cuda, not on {device.type}"
    return _broken() or _refused(device, dtype, head_dim)


def value_width(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> int | None:
    """As `reference.value_width`."""
    return key_dim if unusable(device, dtype, key_dim) is None else None


def partial(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_weight: Tensor | None = None, plan: Plan | None = None
) -> Partial:
    """As `reference.partial`. Keys go by weight: of its operators for a dense call none takes a bias."""
    return planned(_dense, q, k, v, scale, log_weight, plan)


def built_for() -> tuple[str | None, str]:
    """The torch that an installed xFormers was built with, where it says so, and what its metadata asks for.

    Its metadata may take later versions than its compiled parts load with.
    """
    asked = [str(one) for one in map(Requirement, metadata.requires("xformers") or ()) if one.name == "torch"]
    try:
        notes = metadata.distribution("xformers").locate_file("xformers/cpp_lib.json")
        built = json.loads(Path(str(notes)).read_text(encoding="utf-8"))["version"]["torch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, ", ".join(asked) or "any torch"
    return str(built), ", ".join(asked) or "any torch"


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor | None) -> Partial:
    if log_weight is not None:
        return by_weight(_dense, q, k, v, scale, log_weight)
    # its operators refuse rows that do not begin at multiples of 8 numbers
    q, k, v = (x if all(step % 8 == 0 for step in x.stride()[:3]) else x.contiguous() for x in (q, k, v))
    out, lse = _fmha().memory_efficient_attention_partial(q, k, v, scale=scale, output_dtype=q.dtype)
    return Partial(out, lse[..., : q.shape[1]].transpose(1, 2))  # some pad it


@lru_cache(maxsize=1)
def _broken() -> str | None:
    """Why it is not there or does not load. It may import without its compiled parts, and only warns."""
    try:
        version = metadata.version("xformers")
    except metadata.PackageNotFoundError:
        return "the package xformers is not installed (`pip install diffaccel[xformers]`)"
    try:
        _fmha()
        from xformers import _cpp_lib

        failed = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    except Exception as error:  # of somebody else's module, which may raise anything
        failed = error
    if failed is None:
        return None
    said = (str(failed).strip().splitlines() or [type(failed).__name__])[0].partition(" xFormers was built for")[0]
    built, asked = built_for()
    return (
        f"xformers {version} does not load beside torch {torch.__version__}: {said.rstrip('.')}; "
        f"it was built for torch {built or 'of another version'} and asks for {asked}: install that pair"
    )


@lru_cache(maxsize=64)
def _refused(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What it says of one query of such a kind."""
    one = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    try:
        _fmha()._dispatch_fw(_fmha().Inputs(one, one, one, scale=1.0, is_partial=True), True)
    except NotImplementedError as error:
        reasons = " ".join(" ".join(str(error).split("\n`")[1:]).replace("`", "").split())
        return f"none of its operators takes {dtype} and {head_dim} channels there: {reasons or error}"
    return None


def _fmha() -> Any:
    from xformers.ops import fmha

    return fmha
