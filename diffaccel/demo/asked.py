"""What a page asks for, as data that can be shared: checked JSON, and limits on what anybody may ask for."""

import dataclasses
import json
import math
import typing
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import KnobError
from ..settings import UsageError
from ..suggest import choose

VERSION = 1
"""Of shared settings; others are refused."""

MOST_SEED = 2**32 - 1
FILE_KNOBS = ("profile",)
"""Knobs that name a file of the server, which nobody on a page may choose."""

_MOST_JSON = 20_000  # characters


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for: pixel frames, pixels of a side, denoising steps, characters of a prompt,
    tokens of a text; and how many requests may wait for a model."""

    frames: int = 161
    side: int = 1280
    steps: int = 50
    prompt: int = 400
    tokens: int = 256
    waiting: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise KnobError(f"the limit on {name} is at least 1, got {value}")


@dataclass(frozen=True)
class Video:
    """A video, made with the techniques of a preset with `--set` changes, densely, or both."""

    tab: ClassVar[str] = "video"
    prompt: str = ""
    model: str = ""
    preset: str = "balanced"
    set: tuple[str, ...] = ()
    frames: int = 49
    width: int = 128
    height: int = 128
    steps: int = 8
    guidance: float = 1.0
    negative: str = ""
    seed: int = 0
    arms: str = "both"

    ARMS: ClassVar[dict[str, tuple[str, ...]]] = {
        "both": ("accelerated", "dense"),
        "accelerated": ("accelerated",),
        "dense": ("dense",),
    }

    def check(self, limits: Limits) -> None:
        """Refuse what no model may be asked for. Raises `UsageError` or `KnobError`."""
        _check_prompt("the prompt", self.prompt, limits)
        if self.negative:
            _check_prompt("what not to show", self.negative, limits)
        _check_count("frames", self.frames, limits.frames)
        _check_count("width", self.width, limits.side)
        _check_count("height", self.height, limits.side)
        _check_count("steps", self.steps, limits.steps)
        _check_number("guidance", self.guidance, 0, 20)
        _check_seed(self.seed)
        choose(self.arms, self.ARMS, "choice of what to make")
        check_changes(self.set)


@dataclass(frozen=True)
class Larger:
    """A video larger than the model was trained for, by FreeSwim."""

    tab: ClassVar[str] = "larger"
    prompt: str = ""
    model: str = ""
    scale: float = 2.0
    frames: int = 13
    steps: int = 8
    guidance: float = 1.0
    strength: float = 0.7
    guide: bool = True
    seed: int = 0

    def check(self, limits: Limits) -> None:
        """As of `Video`."""
        _check_prompt("the prompt", self.prompt, limits)
        _check_count("frames", self.frames, limits.frames)
        _check_count("steps", self.steps, limits.steps)
        _check_number("scale", self.scale, 1, 8)
        _check_number("guidance", self.guidance, 0, 20)
        _check_number("strength", self.strength, 0, 1)
        _check_seed(self.seed)


@dataclass(frozen=True)
class Text:
    """A text, with or without the dense one beside it."""

    tab: ClassVar[str] = "text"
    prompt: str = ""
    model: str = ""
    preset: str = "exact"
    set: tuple[str, ...] = ()
    tokens: int = 104
    threshold: float = 0.9
    temperature: float = 0.0
    seed: int = 0
    compare: bool = False

    def check(self, limits: Limits) -> None:
        """As of `Video`."""
        _check_prompt("the prompt", self.prompt, limits)
        _check_count("tokens", self.tokens, limits.tokens)
        _check_number("threshold", self.threshold, 0, 2)
        _check_number("temperature", self.temperature, 0, 5)
        _check_seed(self.seed)
        check_changes(self.set)


Asked = Video | Larger | Text
TABS: dict[str, type[Any]] = {kind.tab: kind for kind in (Video, Larger, Text)}


def as_dict(asked: Asked) -> dict[str, Any]:
    """Settings to share, as plain data."""
    return {"version": VERSION, "tab": asked.tab, **dataclasses.asdict(asked)}


def to_json(asked: Asked) -> str:
    """One line that `from_json` reads."""
    return json.dumps(as_dict(asked), ensure_ascii=False)


def from_json(text: str, usual: Callable[[str, str | None], Asked]) -> Asked:
    """The settings in `text`; what it leaves out is as in `usual(tab, model)`. Raises `UsageError` or `KnobError`."""
    if len(text) > _MOST_JSON:
        raise UsageError(f"settings are at most {_MOST_JSON} characters long, got {len(text)}")
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"these settings are no JSON ({error}); copy them whole from the page") from None
    if not isinstance(content, dict):
        raise UsageError("settings are a JSON object; copy them whole from the page")
    version = content.pop("version", None)
    if version != VERSION or isinstance(version, bool):
        met = "name no version" if version is None else f"are of version {json.dumps(version)[:20]}"
        raise UsageError(f"these settings {met}, and this page reads version {VERSION}; set them by hand here")
    tab = choose(str(content.pop("tab", "video")), TABS, "tab in the settings")
    kinds = typing.get_type_hints(TABS[tab])
    names = [item.name for item in dataclasses.fields(TABS[tab])]
    for name in content:
        choose(name, names, f"setting of the tab {tab}")
    values = {name: _typed(name, kinds[name], value) for name, value in content.items()}
    check_changes(values.get("set", ()))
    return dataclasses.replace(usual(tab, values.get("model")), **values)


def from_fields(asked: Asked, **values: Any) -> Asked:
    """`asked` with what the fields of a page hold, which may be empty or of another type. Raises `UsageError`."""
    kinds = typing.get_type_hints(type(asked))
    return dataclasses.replace(asked, **{name: _typed(name, kinds[name], value) for name, value in values.items()})


def check_changes(changes: tuple[str, ...]) -> None:
    """Refuse knobs that name files."""
    for change in changes:
        target = change.partition("=")[0].strip()
        if target.rpartition(".")[2] in FILE_KNOBS:
            raise UsageError(f"{target} names a file of the server, which is not for a page to choose; leave it out")


def _typed(name: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`, where it is that without loss."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int and number and math.isfinite(value) and value == int(value):
        return int(value)
    if kind is float and number:
        return float(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind == tuple[str, ...] and isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return tuple(value)
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "a list of texts")
    met = "nothing" if value is None else json.dumps(value, default=str)[:80]
    raise UsageError(f"{name} is {wanted}, got {met}")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _check_prompt(what: str, prompt: str, limits: Limits) -> None:
    if not prompt.strip():
        raise UsageError(f"{what} is empty; say what to make")
    if len(prompt) > limits.prompt:
        raise UsageError(f"{what} has {len(prompt)} characters, and at most {limits.prompt} are allowed here")
    strange = [letter for letter in prompt if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t"]
    if strange:
        raise UsageError(f"{what} holds the control character U+{ord(strange[0]):04X}; take it out")


def _check_count(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise UsageError(f"{name} lies in [1, {most}] here, got {value}")


def _check_number(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UsageError(f"{name} lies in [{least}, {most}], got {value:g}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MOST_SEED:
        raise UsageError(f"a seed is a whole number in [0, {MOST_SEED}], got {seed}")
