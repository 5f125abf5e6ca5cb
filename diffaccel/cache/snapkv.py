"""SnapKV: keep what the newest queries attend to."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..policy import knob
from .look import Look
from .scored import Scored


@dataclass(frozen=True)
class SnapKV(Scored):
    """Of tokens that are no longer new, keep those that queries of the newest block attend to most.

    SnapKV (arXiv 2404.14469, section 4): probabilities of an observation window, summed over its queries and averaged
    over neighbours. Beside the authors' code: the window is spread over the block instead of its last 32 tokens, its
    neighbours are those in time and in the frame instead of a line of 5, and the choice is made anew at every block
    among what is left, instead of once at the end of a prompt.
    """

    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    summary: ClassVar[str] = "keeps the tokens of the past that the newest block attends to most"

    pool: int = knob(3, "frames, rows and columns over which scores are averaged, odd; 1: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_odd("pool")

    def score(self, look: Look) -> Tensor:
        """Summed probabilities, averaged over neighbours."""
        return look.pooled(look.p.sum(2), self.pool)
