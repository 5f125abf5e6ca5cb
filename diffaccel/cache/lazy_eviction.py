"""LazyEviction: keep what comes back."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..policy import knob
from .look import Look
from .scored import Scored


@dataclass(frozen=True)
class LazyEviction(Scored):
    """Of tokens that are no longer new, keep those whose attention recurs: a place the camera returns to.

    LazyEviction (arXiv 2506.15969, section 4): a token is hit where a probability reaches `alpha`. TS is the block it
    was hit last, MRI its longest interval between hits. It is worth H1 = 2 sigmoid(-(now - TS) / MRI), which falls once
    it stays away for longer than it ever did, plus H2 = 2 sigmoid(-1 / (MRI - 1)), which favours long intervals. The
    authors' code has H1 = 2 / (1 + exp(1 + (now - TS) / MRI)) and H2 = 2 / (1 + exp(MRI - 1)), which *falls* with the
    interval: any token hit right after it came outranks all that recur. `h2` takes the paper's, none, or both of the
    code's. Time is counted in blocks of video instead of generated tokens, and every block decides.
    """

    paper: ClassVar[str] = "LazyEviction, arXiv 2506.15969"
    summary: ClassVar[str] = "keeps the tokens of the past whose attention recurs"
    columns: ClassVar[tuple[str, ...]] = ("seen", "last", "interval")

    alpha: float = knob(1e-4, "probability from which a token counts as hit, in (0, 1)")
    h2: str = knob("paper", "what long intervals are worth", choices=("paper", "off", "official"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.alpha < 1, "alpha is a probability in (0, 1)", alpha=self.alpha)

    def observe(self, look: Look) -> dict[str, Tensor]:
        """Note what this block's probes hit; "last" counts the blocks from a token's own to its last hit."""
        seen, last, interval = (look.columns[name] for name in self.columns)
        hit = look.p.amax(2) >= self.alpha
        return {
            "seen": seen + 1,
            "last": torch.where(hit, seen, last),
            "interval": torch.where(hit, torch.maximum(interval, seen - last), interval),
        }

    def score(self, look: Look) -> Tensor:
        """H1 + H2."""
        seen, last, interval = (look.columns[name] for name in self.columns)
        away = seen - 1 - last
        if self.h2 == "official":
            recurs = torch.where(interval > 0, 2 * torch.sigmoid(1 - interval), 0.0)
            return 2 * torch.sigmoid(-1 - away / (interval + 1e-5)) + recurs
        recency = 2 * torch.sigmoid(-away / (interval + 1e-5))
        if self.h2 == "off":
            return recency
        return recency + torch.where(interval > 1, 2 * torch.sigmoid(-1 / (interval - 1).clamp(min=1e-5)), 0.0)
