"""Presets in files: what `diffaccel tune` writes and `--preset FILE` takes, as TOML; `Accel.save_pretrained` writes the
same as JSON.

    version = 1
    kernel = "auto"

    [reuse]
    method = "FlashBlock"
    refresh = [0, 3]

A table for each slot that is filled; a knob that is left out has its default, and "none" is None. A profile that is
named in JSON lies beside the file.
"""

import json
import os
import shutil
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from .errors import DiffaccelError
from .settings import UsageError, type_name
from .suggest import choose
from .version import __version__

if TYPE_CHECKING:
    from .accel import Accel
    from .policy import Policy

VERSION = 1

CONFIG_FILE = "diffaccel_config.json"
"""Beside a pipeline: the setting to run it with."""


def is_preset_file(preset: str) -> bool:
    """Whether that names a file, and no preset of this package."""
    return preset.lower().endswith((".toml", ".json")) or "/" in preset or os.sep in preset


def given_preset(preset: str) -> "str | Accel":
    """The name of a preset as it is, a file read: what `build_accel` takes. Raises `UsageError` for a bad file."""
    return read_preset(Path(preset)) if is_preset_file(preset) else preset


def read_preset(file: Path) -> "Accel":
    """The setting in a file. Raises `UsageError`, naming the file and what is wrong in it."""
    as_json = file.suffix.lower() == ".json"
    try:
        text = file.read_text("utf-8")
        content = json.loads(text) if as_json else tomllib.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:  # what JSON, TOML and UTF-8 raise are ValueErrors
        raise UsageError(f"the preset file '{file}' cannot be read: {error}") from error
    version = content.pop("version", None)
    if version != VERSION:
        raise UsageError(
            f"the preset file '{file}' is of version {version!r}, and diffaccel {__version__} reads version {VERSION}; "
            "upgrade diffaccel, or write the file anew with diffaccel tune or Accel.save_pretrained"
        )
    saved_by = content.pop("diffaccel", __version__)
    if as_json:
        for table in content.values():
            if isinstance(table, dict) and table.get("profile", "none") not in ("none", None):
                table["profile"] = str(file.parent / str(table["profile"]))
    try:
        return _accel(content)
    except DiffaccelError as error:
        other = "" if saved_by == __version__ else f" (saved by diffaccel {saved_by}, and this is {__version__})"
        raise UsageError(f"in the preset file '{file}'{other}: {error}") from error


def write_preset(file: Path, accel: "Accel", comments: Sequence[str] = ()) -> None:
    """Write a setting with all its knobs, so that a later default does not change it; `comments` go on top."""
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    for name, value in _content(accel).items():
        table = isinstance(value, dict)
        lines += ["", f"[{name}]"] if table else []
        lines += [f"{key} = {_toml(item)}" for key, item in (value if table else {name: value}).items()]
    _replace(file, "\n".join(lines) + "\n")


def write_config(folder: Path, accel: "Accel") -> Path:
    """Write a setting as `CONFIG_FILE` into a folder, and beside it the profiles that it names; gives the file."""
    folder.mkdir(parents=True, exist_ok=True)
    content = _content(accel)
    for slot in accel.policies():
        profile = content[slot].get("profile")
        if profile is not None:
            content[slot]["profile"] = f"diffaccel_{slot}_profile.json"
            beside = folder / content[slot]["profile"]
            if not (beside.exists() and beside.samefile(profile)):
                shutil.copyfile(profile, beside)
    _replace(folder / CONFIG_FILE, json.dumps({"diffaccel": __version__} | content, indent=2) + "\n")
    return folder / CONFIG_FILE


def find_config(source: Any) -> Path:
    """The `CONFIG_FILE` of a folder, of a hub name `owner/name`, or of where a pipeline was opened from.

    Raises `UsageError` where there is none.
    """
    given = source if isinstance(source, (str, Path)) else getattr(source, "name_or_path", None)
    if not given:
        raise UsageError(
            f"this {type(source).__name__} was opened from no folder, so no {CONFIG_FILE} lies beside it; "
            "name the folder that has one"
        )
    folder = Path(given)
    if not folder.exists() and isinstance(given, str) and given.count("/") == 1:
        folder = _from_hub(given)
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UsageError(
            f"'{given}' holds no {CONFIG_FILE}; save a setting there with Accel(...).save_pretrained, or write one here"
        )
    return file


def _from_hub(name: str) -> Path:
    """The files that `write_config` wrote, of a hub repository."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns="diffaccel_*.json"))
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"there is no folder '{name}', and it cannot be had from the hub: {said}; check the name and the connection"
        ) from error


def _content(accel: "Accel") -> dict[str, Any]:
    from .techniques import TECHNIQUES

    content: dict[str, Any] = {"version": VERSION, "kernel": accel.kernel}
    for slot, policy in accel.policies().items():
        if type(policy) not in TECHNIQUES:
            raise UsageError(
                f"a file names techniques of diffaccel, and {type(policy).__name__} (slot {slot}) is none of them; "
                f"save the rest, and add {slot}= in Python"
            )
        content[slot] = {"method": type(policy).__name__, **policy.values()}
    return content


def _replace(file: Path, text: str) -> None:
    """Write a file that has its name only once it is whole."""
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    partial.write_text(text, "utf-8")
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
    elif kind is type(None) and value in ("none", None):
        return None
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif kind in (bool, int, str) and type(value) is kind:
        return value
    raise ValueError(value)


def _toml(value: Any) -> str:
    """Text of a knob's value; JSON's and TOML's are alike for those."""
    return json.dumps("none" if value is None else value, ensure_ascii=False)
