"""Presets in files: what `diffaccel tune` writes and `--preset FILE` takes, as TOML.

    version = 1
    kernel = "auto"

    [reuse]
    method = "FlashBlock"
    refresh = [0, 3]

A table for each slot that is filled; a knob that is left out has its default, and "none" is None.
"""

import json
import os
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from .errors import KnobError
from .settings import UsageError, type_name
from .suggest import choose

if TYPE_CHECKING:
    from .accel import Accel
    from .policy import Policy

VERSION = 1


def is_preset_file(preset: str) -> bool:
    """Whether that names a file, and no preset of this package."""
    return preset.lower().endswith(".toml") or "/" in preset or os.sep in preset


def given_preset(preset: str) -> "str | Accel":
    """The name of a preset as it is, a file read: what `build_accel` takes. Raises `UsageError` for a bad file."""
    return read_preset(Path(preset)) if is_preset_file(preset) else preset


def read_preset(file: Path) -> "Accel":
    """The setting in a file. Raises `UsageError`, naming the file and what is wrong in it."""
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:  # a TOMLDecodeError and a UnicodeDecodeError are ValueErrors
        raise UsageError(f"the preset file '{file}' cannot be read: {error}") from error
    version = content.pop("version", None)
    if version != VERSION:
        raise UsageError(
            f"the preset file '{file}' is of version {version!r}, and this diffaccel reads version {VERSION}; "
            "write it anew with diffaccel tune"
        )
    try:
        return _accel(content)
    except (KnobError, UsageError) as error:
        raise UsageError(f"in the preset file '{file}': {error}") from error


def write_preset(file: Path, accel: "Accel", comments: Sequence[str] = ()) -> None:
    """Write a setting with all its knobs, so that a later default does not change it; `comments` go on top."""
    lines = [*(f"# {' '.join(comment.split())}" for comment in comments), f"version = {VERSION}"]
    lines.append(f"kernel = {_toml(accel.kernel)}")
    for slot, policy in accel.policies().items():
        lines += ["", f"[{slot}]", f"method = {_toml(type(policy).__name__)}"]
        lines += [f"{name} = {_toml(value)}" for name, value in policy.values().items()]
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    partial.write_text("\n".join(lines) + "\n", "utf-8")
    os.replace(partial, file)


def _accel(content: dict[str, Any]) -> "Accel":
    from .accel import Accel
    from .policy import SLOTS

    kernel = content.pop("kernel", "auto")
    policies: dict[str, Any] = {}
    if not isinstance(kernel, str):
        raise UsageError(f"kernel takes text, got {kernel!r}")
    for slot, table in content.items():
        choose(slot, SLOTS, "key")
        if not isinstance(table, dict):
            raise UsageError(f"{slot} is a table, [{slot}], with a method and its knobs, got {table!r}")
        policies[slot] = _policy(slot, table)
    return Accel(**policies, kernel=kernel)


def _policy(slot: str, table: dict[str, Any]) -> "Policy":
    from .techniques import TECHNIQUES

    here = {technique.__name__: technique for technique in TECHNIQUES if technique.slot == slot}
    technique = here[choose(str(table.pop("method", None)), here, f"method in [{slot}]")]
    hints = typing.get_type_hints(technique)
    values = {}
    for name, value in table.items():
        choose(name, technique.knobs(), f"knob of {technique.__name__} in [{slot}]")
        try:
            values[name] = _typed(hints[name], value)
        except ValueError:
            raise UsageError(f"{slot}.{name} takes {type_name(hints[name])}, got {value!r}") from None
    return technique(**values)


def _typed(kind: Any, value: Any) -> Any:
    """A value of a TOML file as one of that type. Raises `ValueError` for one that is not."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        for part in sorted(parts, key=lambda part: (part is not type(None), part is not int)):  # 2 stays an int
            try:
                return _typed(part, value)
            except ValueError:
                continue
    elif origin is Literal and value in parts:
        return value
    elif origin is tuple and isinstance(value, list):
        each = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if value and len(each) == len(value):
            return tuple(_typed(part, item) for part, item in zip(each, value, strict=True))
    elif kind is type(None) and value == "none":
        return None
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif kind in (bool, int, str) and type(value) is kind:
        return value
    raise ValueError(value)


def _toml(value: Any) -> str:
    """Text of a knob's value; JSON's and TOML's are alike for those."""
    return json.dumps("none" if value is None else value, ensure_ascii=False)
