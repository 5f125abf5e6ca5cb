"""What the techniques have in common: frozen dataclasses whose fields are the knobs, checked when they are made."""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import KnobError
from .suggest import choose

if TYPE_CHECKING:
    from .run import Run


def knob(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:  # noqa: A002
    """A dataclass field that says what it does; `choices` are checked when the policy is made."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Policy:
    """One technique with its knobs. It holds no state: all state lives in the `Run`, so two runs share nothing."""

    slot: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[dict[str, Any]]  # knob values at which the technique is dense attention
    needs_blocks: ClassVar[bool] = False  # only block-causal generation has earlier blocks to keep or reuse

    def __post_init__(self) -> None:
        for item in fields(self):
            choices = item.metadata.get("choices")
            if choices is not None:
                choose(getattr(self, item.name), choices, f"{type(self).__name__}.{item.name}")

    @classmethod
    def knobs(cls) -> dict[str, Field]:
        return {item.name: item for item in fields(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {name: item.default for name, item in cls.knobs().items() if item.default is not MISSING}

    def values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.knobs()}

    @property
    def is_exact(self) -> bool:
        """Whether the knobs make this dense attention."""
        return all(getattr(self, name) == value for name, value in self.exact.items())

    def why_idle(self, run: "Run") -> str:
        """Why the technique never fired in `run`, for the error that says so."""
        return "no attention call reached it"

    def require(self, ok: bool, rule: str, **met: Any) -> None:
        """Refuse a knob: the rule and the values that broke it."""
        if not ok:
            values = ", ".join(f"{name}={value!r}" for name, value in met.items())
            raise KnobError(f"{type(self).__name__}: {rule}, got {values}")
