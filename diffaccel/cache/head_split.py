"""Heads that keep everything, and heads that keep the first and the newest frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..policy import knob
from ..profile import Profile
from .budget import Extent
from .calibrated import Calibrated
from .look import Look
from .ragged import Counts
from .share_out import whole_first

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class HeadSplit(Calibrated):
    """A profile says how much each head needs of the middle of a video; a share of all heads keeps it.

    With a `budget` fewer heads keep everything once that would take more, and what they leave goes to the newest tokens
    of the others.
    """

    exact: ClassVar[dict[str, Any]] = {"share": 1.0, "budget": None}
    tables: ClassVar[tuple[str, ...]] = ("reach",)

    budget: int | str | None = knob(
        None, 'tokens a layer keeps at most, mean over layers and heads: 40000, "12 frames" or "8GB"; None: no limit'
    )
    share: float = knob(0.25, "share of all heads that keep everything, in [0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.share <= 1, "share is a share of the heads in [0, 1]", share=self.share)

    def score(self, look: Look) -> Tensor:
        """The newest first."""
        return look.token.double()

    def shares(self, look: Look) -> Tensor:
        """What the profile says of the layer's heads."""
        return self.of_layer("reach", look).expand(look.k.shape[0], -1)

    def capacity(self, extent: Extent, middle: int) -> int:
        return middle if self.budget is None else super().capacity(extent, middle)

    def allocate(self, shares: Sequence[Tensor | None], available: Sequence[Counts], capacity: int) -> Sequence[Counts]:
        """All for the heads that reach farthest, of all layers together."""
        reach = torch.cat([share[0] for share in shares if share is not None])
        order, heads = reach.argsort(descending=True, stable=True).tolist(), len(available[0][0])
        whole = order[: round(self.share * len(order))]
        rows = []
        for row in range(len(available[0])):
            there = [count for layer in available for count in layer[row]]
            if self.budget is None:
                kept = [count if head in whole else 0 for head, count in enumerate(there)]
            else:
                kept = whole_first(there, whole, capacity * len(there))
            rows.append(kept)
        return [tuple(tuple(row[start : start + heads]) for row in rows) for start in range(0, len(order), heads)]

    def why_idle(self, run: "Run") -> str:
        if self.budget is None and self.share < 1:
            return "no frame was neither first nor new: generate more frames, or keep fewer recent_frames"
        return super().why_idle(run)

    def lines(self, profile: Profile) -> Iterator[str]:
        """The share of each quarter of the heads in what all of them reach, and where the first of them are."""
        reach = profile.tables["reach"]
        order = reach.ravel().argsort()[::-1]
        total = max(float(reach.sum()), 1e-12)
        yield "heads   share of what all reach  least of them"
        for part in (0.25, 0.5, 0.75, 1.0):
            some = reach.ravel()[order[: max(1, round(part * len(order)))]]
            yield f"{part:<6.0%}  {some.sum() / total:<23.3f}  {some[-1]:.4f}"
        first = [divmod(int(head), reach.shape[1]) for head in order[:8]]
        yield "farthest: " + ", ".join(f"layer {layer} head {head}" for layer, head in first)
