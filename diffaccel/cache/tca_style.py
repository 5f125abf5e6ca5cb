"""TCA-style: each small part of a frame keeps as many tokens as its attention is spread over."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..policy import knob
from .look import Look
from .scored import Scored


@dataclass(frozen=True)
class TCAStyle(Scored):
    """Budgets of parts: of older tokens, those first that are within the budget of their own part of a frame.

    After the idea of TCA-Attention (arXiv 2512.09238): blocks of tokens keep 1, 2, 4 ... core tokens by how redundant
    they are. How the paper measures redundancy and calibrates budgets by head was not at hand, so this is not that
    method, and none of its results are claimed. Here a block is a square of `side` by `side` tokens of one frame, and
    its budget is the exponential of the entropy of the probes' mean attention within it, rounded up to a power of two:
    a block in which one token takes all attention keeps one. Tokens within their block's budget come before all others,
    and each kind in the order of attention.
    """

    paper: ClassVar[str] = "after TCA-Attention, arXiv 2512.09238"
    summary: ClassVar[str] = "keeps in each small part of a frame as many tokens as attention is spread over there"

    side: int = knob(4, "rows and columns of a part, >= 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.side >= 1, "side is a number of rows and columns >= 1", side=self.side)

    def score(self, look: Look) -> Tensor:
        """Mean attention, and 1 more within the budget."""
        mass = look.p.mean(2)
        return mass + (self.rank(look, mass) < self.budgets(look, mass))

    def budgets(self, look: Look, mass: Tensor) -> Tensor:
        """Of each entry, what its block may keep, (B, H, N)."""
        block, count = self._block(look)
        sums = mass.new_zeros(*mass.shape[:2], count)
        total = sums.scatter_add(-1, block, mass).gather(-1, block).clamp(min=1e-30)
        share = mass / total
        entropy = sums.scatter_add(-1, block, -torch.xlogy(share, share)).gather(-1, block)
        return torch.exp2((entropy / torch.log(mass.new_tensor(2.0)) - 1e-4).ceil())

    def rank(self, look: Look, mass: Tensor) -> Tensor:
        """Of each entry, how many of its block get more attention, (B, H, N)."""
        block, _ = self._block(look)
        order = mass.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, block.gather(-1, order).argsort(dim=-1, stable=True))  # by block, then by mass
        blocks, at = block.gather(-1, order), torch.arange(mass.shape[-1], device=mass.device)
        first = torch.where(blocks != blocks.roll(1, -1), at, 0)
        first[..., 0] = 0
        return torch.empty_like(order).scatter_(-1, order, at - first.cummax(-1).values)

    def _block(self, look: Look) -> tuple[Tensor, int]:
        """The number of each entry's block, (B, H, N), and how many numbers there are."""
        width, cell = look.grid.width, look.token % look.grid.tokens_per_frame
        across, down = -(-width // self.side), -(-look.grid.height // self.side)
        place = cell // width // self.side * across + cell % width // self.side
        return look.frame * across * down + place, (look.start + look.grid.frames) * across * down
