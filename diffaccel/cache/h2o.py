"""H2O: keep what queries attended to most, over all blocks so far."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..policy import knob
from .look import Look
from .scored import Scored


@dataclass(frozen=True)
class H2O(Scored):
    """Of tokens that are no longer new, keep the heavy hitters: those with most attention over all blocks so far.

    H2O (arXiv 2306.14048, section 4): the probabilities a token got, added up over queries; the newest tokens are kept
    beside. The sum favours tokens that have been there for longer. `normalised` divides it by the blocks that could
    see the token, as ZipCache does (arXiv 2405.14256, section 4.2). Here a sum runs over the probes of every block
    instead of all queries.
    """

    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    summary: ClassVar[str] = "keeps the tokens of the past that got most attention over all blocks so far"
    columns: ClassVar[tuple[str, ...]] = ("mass", "seen")

    normalised: bool = knob(True, "divide what a token got by the number of blocks that could see it")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(isinstance(self.normalised, bool), "normalised is True or False", normalised=self.normalised)

    def observe(self, look: Look) -> dict[str, Tensor]:
        """Add the mean probability over this block's probes."""
        return {"mass": look.columns["mass"] + look.p.mean(2), "seen": look.columns["seen"] + 1}

    def score(self, look: Look) -> Tensor:
        """The sum, or the mean over blocks."""
        mass = look.columns["mass"]
        return mass / look.columns["seen"] if self.normalised else mass
