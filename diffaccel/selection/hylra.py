"""HyLRA: layers read what an earlier layer chose, by a plan (arXiv 2602.00777)."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, ClassVar

from ..policy import knob
from .asked import Asked
from .blocks import KeyBlocks
from .borrowed import Borrowed, Borrowing
from .layer_plan import Floats, Span, plan

if TYPE_CHECKING:
    from torch import Tensor

    from ..run import Run
    from ..site import Site


@dataclass(frozen=True)
class HyLRA(Borrowing):
    """Full layers read everything and choose; the layers behind one read what it chose, as a plan says.

    The plan comes from a profile: how alike the choices of layers are, in dense videos. Of all plans in which no layer
    reads a choice less like its own than `least` it has the fewest full calls, found by dynamic programming
    (`layer_plan.py`). Layers and steps are planned together: at later steps of a block a choice may stand, if that is
    alike too, and then full layers read their own (with `refresh="step"` for `every` steps at most).

    Alike is `by` the overlap of the choices, the paper's measure, for which descriptions of it give 0.85; or, ours, the
    attention on a borrowed choice over that on a layer's own, as what overlaps little may hold as much. Both are of
    dense videos: in a chain of layers that borrow, features are others.

    Differences from the paper: blocks of keys are chosen, by an estimate; what layers do not read their means stand for
    (`summaries`). There the whole cache is kept as well.
    """

    paper: ClassVar[str] = "HyLRA, arXiv 2602.00777"
    summary: ClassVar[str] = "lets planned layers and steps read what an earlier layer chose, the others everything"

    by: str = knob(
        "mass", 'what makes choices alike: attention held ("mass"), or "overlap"', choices=("mass", "overlap")
    )
    least: float = knob(0.85, "likeness from which on a choice is read by another layer or step, in (0, 1]")
    dense_layers: tuple[int, ...] | None = knob(None, "sensitive layers, which read everything at every step, from 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.least <= 1, "least is a share in (0, 1]", least=self.least)
        self.require(
            self.dense_layers is None or (len(self.dense_layers) > 0 and min(self.dense_layers) >= 0),
            "dense_layers are numbers of layers >= 0, at least one, or None for none",
            dense_layers=self.dense_layers,
        )

    def stands(self, keys: KeyBlocks, q: "Tensor", site: "Site") -> bool:
        return False  # a full layer reads its own choice at later steps

    def choose(self, asked: Asked) -> None:
        site, keys = asked.site, asked.keys
        sets, of, span = asked.lasting.shared.setdefault("hylra", {}), self.made_for(asked), self.span(site)
        source, begin = span.sources[site.layer], ceil(self.dense_steps * site.steps) + span.start
        known: Borrowed | None = sets.get(source)
        full = source == site.layer and (begin == site.step or site.layer in (self.dense_layers or ()))
        if not full and known is not None and (known.of, known.step) == (of, begin):
            keys.lists, keys.read, keys.even = known.lists, asked.take, True
            return
        super().choose(asked)
        if full and keys.lists is not None:
            if begin == site.step:
                sets[site.layer] = Borrowed(of, site.step, keys.lists)
            keys.read = keys.choices  # it reads everything

    def span(self, site: "Site") -> Span:
        """What is planned for the steps among which this one is."""
        first = ceil(self.dense_steps * site.steps)
        spans = _spans(self, site.steps - first + (self.clean_pass == "sparse"))
        return next(span for span in reversed(spans) if span.start <= site.step - first)

    def likeness(self) -> Floats:
        """[g, i, j]: of layer j's choice to that of layer i, g steps before, mean over heads."""
        if self.by == "overlap":
            return self.measured("overlap").mean(-1)
        mass = self.measured("mass")
        return (mass / mass[0].diagonal().T.clip(1e-6)).mean(-1)

    def why_idle(self, run: "Run") -> str:
        like = self.likeness()
        layers = range(like.shape[1])
        most = max([0.0, *(float(like[0, i, j]) for j in layers for i in layers[:j]), *like[1:].max((1, 2))])
        return (
            f"{super().why_idle(run)}; or no choice is alike to another's: by {self.by!r} the nearest are {most:.3g}, "
            f"with least={self.least}: lower it"
        )


@lru_cache(maxsize=256)
def _spans(policy: HyLRA, steps: int) -> list[Span]:
    longest = policy.every if policy.refresh == "step" else None
    return plan(policy.likeness(), steps, policy.least, policy.dense_layers or (), longest)
