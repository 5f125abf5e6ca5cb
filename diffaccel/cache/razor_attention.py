"""RazorAttention: heads that look back keep everything, the others one mean of what they lose."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..policy import knob
from .head_split import HeadSplit
from .look import Look
from .remainder import REMAINDERS


@dataclass(frozen=True)
class RazorAttention(HeadSplit):
    """Heads with most attention on the middle of a video keep it; of the others one key stands for what they lose.

    RazorAttention (arXiv 2407.15891): retrieval heads keep everything, the others the first and the newest tokens and a
    compensation token, the mean of all others with log(their number) added to its score (section 3.3).

    There a retrieval head is one that finds repeated random tokens again: the top 14 % by attention to the token after
    an earlier copy, and 1 % by attention to the copy (section 3.2). Video has no such tokens: what a head reaches is
    the share of its attention, in clean passes of dense videos, on frames that the others would lose. That measure is
    ours, and so is the `share` of heads.
    """

    paper: ClassVar[str] = "RazorAttention, arXiv 2407.15891"
    summary: ClassVar[str] = "heads that look back keep everything, the others one mean of what they lose"

    dropped: str | None = knob(
        "mean",
        "what becomes of what the other heads lose, as in the other caches; None: it is gone",
        choices=tuple(REMAINDERS),
    )

    def measure(self, look: Look) -> dict[str, Tensor]:
        """The share of attention on frames that may be dropped, (H,)."""
        lost = self.droppable(look)
        return {"reach": (look.p.mean(2) * lost).sum(-1).mean(0)} if lost.any() else {}
