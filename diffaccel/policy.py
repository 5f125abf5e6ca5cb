"""What a technique is: a frozen dataclass whose fields are its knobs, answering the one question of its slot."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import Tensor

from .cache.tiers import Fixed
from .errors import KnobError
from .suggest import choose

if TYPE_CHECKING:
    from torch import nn

    from .backbone import Geometry
    from .cache import Entries, Extent, Lasting, Memory, Tier
    from .grid import Grid
    from .kernel import Partial
    from .kernel.boxes import Boxes, Dilated
    from .plan import Plan
    from .run import Run
    from .selection.blocks import Chosen
    from .site import Site


def knob(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:  # noqa: A002
    """A dataclass field that says what it does; `choices`, and None where its type says so, are all it takes."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Policy(ABC):
    """One technique with its knobs. It holds no state: all state lives in the `Run`, so two runs share nothing."""

    slot: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[dict[str, Any]]  # knob values at which the technique is dense attention
    needs: ClassVar[str] = "nothing"  # before it can run on a model: "nothing" or a "calibration" of its own
    least_steps: ClassVar[int] = 1  # denoising steps below which it is refused
    needs_blocks: ClassVar[bool] = False  # only block-causal generation has earlier blocks to keep or reuse

    def __post_init__(self) -> None:
        for item in fields(self):
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            if choices is not None and not (value is None and type(None) in get_args(item.type)):
                choose(value, choices, f"{type(self).__name__}.{item.name}")

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

    def conflict(self, others: "Iterable[Policy]") -> str | None:
        """Why this technique cannot run beside one of the others, or None."""
        return None

    def refuses_model(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        """Why its knobs do not fit these denoisers of a pipeline, whose layers are counted through, or None."""
        return None

    def require(self, ok: bool, rule: str, **met: Any) -> None:
        """Refuse a knob: the rule and the values that broke it."""
        if not ok:
            values = ", ".join(f"{name}={value!r}" for name, value in met.items())
            raise KnobError(f"{type(self).__name__}: {rule}, got {values}")

    def require_frames(self, name: str, least: int = 0, none: str | None = None) -> None:
        """Refuse a knob that is no number of latent frames; `none` says what None is for, where it is allowed."""
        value = getattr(self, name)
        unless = "" if none is None else f", or None {none}"
        ok = none is not None if value is None else value >= least
        self.require(ok, f"{name} is a number of latent frames >= {least}{unless}", **{name: value})


class CachePolicy(Policy):
    """Slot cache: what is kept of earlier blocks?"""

    slot = "cache"
    needs_blocks = True
    keeps_frames_whole: ClassVar[bool] = False  # what is kept are whole latent frames, in their order

    @property
    def needs_queries(self) -> bool:
        """Whether `Memory.queries` of the clean pass are kept for `commit`."""
        return False

    def sample(self, q: Tensor, site: "Site") -> Tensor:
        """Which of the queries (B, S, H, D)."""
        return q

    def check(self, extent: "Extent") -> None:
        """Refuse a generation that the knobs do not fit with `KnobError`, before anything is computed."""

    @abstractmethod
    def expected_tokens(self, video_tokens: int, block: "Grid") -> int:
        """Tokens the exact tier should make room for at once, for a video of `video_tokens` in such blocks."""

    @abstractmethod
    def commit(self, memories: "Sequence[Memory]", site: "Site", run: "Run") -> None:
        """Move entries between the tiers of every layer; called once a finished block and branch."""

    def describe(self, run: "Run") -> dict[str, Any]:
        """What the report says of the cache beyond its size, as plain data."""
        return {}


Answer = Literal["together", "store", "reuse"] | tuple[int, ...]


class ReusePolicy(Policy):
    """Slot reuse: is attention outside the block needed again at this step?"""

    slot = "reuse"
    needs_blocks = True
    residual: bool = False  # beside a selection: reuse only what that leaves out
    extrapolate: float = 0.0  # damping of what the last two computations show

    @abstractmethod
    def answer(self, site: "Site") -> Answer:
        """Read past and block in one call, compute the past apart and store its partial, or reuse what is stored; a
        tuple: compute these heads and reuse the others."""

    def cross(self, site: "Site", run: "Run", compute: Callable[[], Tensor]) -> Tensor:
        """Attention to the prompt, (B, S, H, D): computed, or what was kept of it.

        Where several devices share the model (`run.spread`) the queries are a device's own, of all heads.
        """
        return compute()

    def forward(self, latents: Tensor, site: "Site", run: "Run", compute: Callable[[], Any]) -> Any:
        """A whole forward of the denoiser on latents (B, ...), at `site` (of no layer yet): computed, or what was kept
        of an earlier one (`run.skip` counts it)."""
        return compute()

    def looks_first(self, site: "Site", run: "Run") -> bool:
        """Whether the forward at `site` (of no layer yet) comes after one that reads the whole field, of which nothing
        is used but what `cross` kept. Asked once a forward."""
        return False

    def field(self, grid: "Grid") -> "Grid":
        """Of such a forward, where the one that follows has `grid`."""
        return grid

    def bytes_held(self, run: "Run") -> int:
        """What it keeps on the device beside stored partials."""
        return 0

    def saw(self, site: "Site", outside: "Partial", inside: "Partial") -> None:
        """Look at the two parts of a call that computed or reused them apart."""


class PromptPolicy(Policy):
    """Slot prompt: which prompt tokens are worth reading?"""

    slot = "prompt"
    engaged_by_preparing: ClassVar[bool] = True  # a collapsed prompt is what the technique was asked for

    @abstractmethod
    def prepare(self, text_BND: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...] | None]:
        """The prompt embeddings to use instead of (B, N, D), and their multiplicity as in `Entries`."""

    def near(self, q: Tensor, prompt: "Entries", site: "Site", run: "Run") -> "Tier":
        """What queries (B, S, H, D) of one cross-attention read of the prompt's keys."""
        return Fixed(prompt)


class Selector(Policy):
    """Slots window (by position) and selection (by content): what may a query read?"""

    @abstractmethod
    def plan(self, q: Tensor, entries: "Entries", site: "Site") -> "Plan | Chosen | Boxes | Dilated | None":
        """Which of `entries` the queries (B, S, H, D) read; None for all of them.

        A plan holds for all heads. What is chosen head by head is given as lists of blocks of reordered keys, and what
        lies near on the grid of tokens as boxes.
        """

    def scale(self, site: "Site") -> float:
        """A factor on the logits of a self-attention."""
        return 1.0

    def see_prompt(self, q: Tensor, prompt: "Entries", site: "Site", lasting: "Lasting") -> None:
        """Look at a cross-attention of queries (B, S, H, D); `lasting` is of what that layer's self-attention reads."""

    def apart(self, site: "Site") -> bool:
        """Whether this call should read past and block at work apart, as what is read of the past is kept in `notes`
        of its entries, which stay as they are while the block is denoised."""
        return False


SLOTS: dict[str, type[Policy]] = {
    "cache": CachePolicy,
    "selection": Selector,
    "prompt": PromptPolicy,
    "reuse": ReusePolicy,
    "window": Selector,
}
