"""Settings as text: a preset's name and `slot.knob=value` become an `Accel`, and an `Accel` becomes a line to read."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Union

from .errors import DiffaccelError

if TYPE_CHECKING:
    from .accel import Accel
    from .policy import Policy


class UsageError(DiffaccelError):
    """A mistake in the command line or in a file of settings, as one sentence with its remedy."""


def build_accel(preset: "str | Accel", changes: Sequence[str] = ()) -> "Accel":
    """The preset of that name, or what is given, with `--set` changes.

    A change is `slot=Method`, `slot=none`, `slot.knob=value` or `kernel=name`.
    A knob of an empty slot brings in the slot's technique where there is one only. Later changes win. Raises
    `UsageError` or `KnobError` with the choices.
    """
    from .pipelines.presets import PRESETS
    from .policy import SLOTS
    from .suggest import choose
    from .techniques import TECHNIQUES

    accel = PRESETS[choose(preset, PRESETS, "preset")]() if isinstance(preset, str) else preset
    slots: dict[str, Any] = {slot: getattr(accel, slot) for slot in SLOTS}
    knobs: dict[str, dict[str, Any]] = {}
    kernel = accel.kernel
    for change in changes:
        target, equals, text = (part.strip() for part in change.partition("="))
        if not (target and equals and text):
            raise UsageError(f"--set takes slot=Method, slot.knob=value or kernel=name, got '{change}'")
        if target == "kernel":
            kernel = text
            continue
        slot, dot, name = target.partition(".")
        choose(slot, (*SLOTS, "kernel"), "slot")
        here = {technique.__name__: technique for technique in TECHNIQUES if technique.slot == slot}
        if not dot:
            knobs.pop(slot, None)
            none = text.lower() == "none"
            if not none and not here:
                raise UsageError(f"no technique fills the slot {slot} yet; leave --set {change} out")
            text = next((name for name in here if name.lower() == text.lower()), text)
            slots[slot] = None if none else here[choose(text, [*here, "none"], f"method for the slot {slot}")]()
            continue
        if slots[slot] is None:
            having = {method: kind for method, kind in here.items() if name in kind.knobs()} or here
            if len(having) != 1:
                choices = " or ".join(f"--set {slot}={method}" for method in having) or "leave it out"
                raise UsageError(f"the slot {slot} is empty, so '{target}' sets nothing; first say {choices}")
            slots[slot] = next(iter(having.values()))()
        policy = slots[slot]
        choose(name, policy.knobs(), f"knob of {type(policy).__name__} (slot {slot})")
        knobs.setdefault(slot, {})[name] = parse_knob(type(policy), name, text)
    for slot, values in knobs.items():
        slots[slot] = dataclasses.replace(slots[slot], **values)
    return dataclasses.replace(accel, **slots, kernel=kernel)


def parse_knob(technique: "type[Policy]", name: str, text: str) -> Any:
    """`text` as a value of the knob's declared type. Raises `UsageError` saying what the knob takes."""
    kind = typing.get_type_hints(technique)[name]
    try:
        return _parse(kind, text)
    except ValueError:
        about = technique.knobs()[name].metadata.get("help", "")
        raise UsageError(
            f"{technique.slot}.{name} takes {type_name(kind)}, got '{text}' ({technique.__name__}.{name}: {about})"
        ) from None


def _parse(kind: Any, text: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        order = (type(None), bool, int, float)  # the narrowest that fits; tuples before plain text
        for part in sorted(parts, key=lambda p: order.index(p) if p in order else len(order) + (p is str)):
            try:
                return _parse(part, text)
            except ValueError:
                continue
        raise ValueError(text)
    if origin is Literal:
        found = [choice for choice in parts if str(choice) == text]
        if not found:
            raise ValueError(text)
        return found[0]
    if origin is tuple:
        items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
        if not items or (parts[-1] is not Ellipsis and len(items) != len(parts)):
            raise ValueError(text)
        each = [parts[0]] * len(items) if parts[-1] is Ellipsis else parts
        return tuple(_parse(one, item) for one, item in zip(each, items, strict=True))
    if kind is type(None):
        if text.lower() != "none":
            raise ValueError(text)
        return None
    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    raise UsageError(f"a knob of type {type_name(kind)} cannot be set on the command line; set it in Python")


def type_name(kind: Any) -> str:
    """What a knob of that type takes, in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in parts)
    if origin is Literal:
        return " or ".join(str(choice) for choice in parts)
    if origin is tuple:
        return f"{type_name(parts[0]).removeprefix('a ')}s with commas between"
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "none",
    }
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def describe_technique(technique: "type[Policy]") -> dict[str, Any]:
    hints = typing.get_type_hints(technique)
    return {
        "name": technique.__name__,
        "slot": technique.slot,
        "paper": technique.paper,
        "summary": technique.summary,
        "exact": dict(technique.exact),
        "needs": technique.needs,
        "needs_blocks": technique.needs_blocks,
        "knobs": [
            {
                "name": name,
                "default": None if knob.default is dataclasses.MISSING else knob.default,
                "type": type_name(hints[name]),
                "choices": knob.metadata.get("choices"),
                "help": knob.metadata.get("help", ""),
            }
            for name, knob in technique.knobs().items()
        ],
    }


def describe_slots(accel: "Accel") -> dict[str, Any]:
    return {slot: {"method": type(p).__name__, "knobs": p.values()} for slot, p in accel.policies().items()}


def describe_accel(accel: "Accel") -> str:
    """Every filled slot with the knobs that are not at their default."""
    parts = []
    for slot, policy in accel.policies().items():
        changed = [
            f"{name}={value!r}" for name, value in policy.values().items() if value != policy.defaults().get(name)
        ]
        parts.append(f"{slot} {type(policy).__name__}" + (f"({', '.join(changed)})" if changed else ""))
    return f"{', '.join(parts) or 'dense everywhere'}; kernel {accel.kernel}"
