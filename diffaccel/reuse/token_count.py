"""FlashBlock for language models: what was computed outside the block is reused until enough tokens changed."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..policy import Policy, knob


@dataclass(frozen=True)
class TokenCount(Policy):
    """Reuse attention to finished blocks until `tau` tokens of the block at work have changed since it was computed.

    The queries of a block-diffusion language model are token embeddings: those of tokens that stay masked hardly move
    from step to step, those of a token that was just unmasked ("dirty") are other queries altogether. The first step
    of a block always computes, and so does the pass that writes a finished block into the cache.

    Differences from the paper: there a dirty token loses its external term until the next refresh (`dirty="drop"`);
    here it keeps the one that was computed while it was masked, which costs as little and gave more right answers on
    the bundled model, in blocks of 4 from tau = 2 on. `dirty="recompute"` computes its row anew, which reads the past
    at every step. In a batch the row that changed most decides for all of them.
    """

    slot: ClassVar[str] = "reuse"
    paper: ClassVar[str] = "FlashBlock, arXiv 2602.05305, section 3, for language models"
    summary: ClassVar[str] = "computes attention to finished blocks anew once tau tokens of the block changed"
    exact: ClassVar[dict[str, Any]] = {"tau": 1}
    needs_blocks: ClassVar[bool] = True

    tau: int = knob(2, "recompute once at least this many tokens changed since it was last computed, >= 1")
    dirty: str = knob(
        "keep",
        "what a token that changed since then gets of it: what was computed before, nothing, or its own row recomputed",
        choices=("keep", "drop", "recompute"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.tau, int) and not isinstance(self.tau, bool)
        self.require(whole and self.tau >= 1, "tau is a number of tokens >= 1", tau=self.tau)

    def answer(self, changed: int | None) -> Literal["together", "store", "reuse"]:
        """What to do at a step with so many tokens changed since the last refresh; None at the first of a block."""
        if self.is_exact:
            return "together"
        return "store" if changed is None or changed >= self.tau else "reuse"
