"""What one layer and branch of a generation remembers of earlier blocks."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..site import Site
from .tiers import ExactTier, Fixed, Tier

if TYPE_CHECKING:
    from ..observe import Observer


class Memory:
    """An ordered list of tiers: `older` ones that a policy filled, then the exact tier with the block at work.

    `seen` counts the tokens of all finished blocks, kept or not; `version` rises with every change of what is kept,
    so that partials computed against it can tell when they are stale. `renewed` are entries that the model itself makes
    anew with every block: they are read with the past, and no policy moves them.
    """

    def __init__(
        self,
        expected_tokens: int = 0,
        sample: Callable[[Tensor, Site], Tensor] | None = None,
        observer: "Observer | None" = None,
    ) -> None:
        self.exact = ExactTier(expected_tokens)
        self.sample, self.queries = sample, torch.empty(0)
        self.observer = observer
        self.older: list[Tier] = []
        self.renewed: list[Tier] = []
        self._finished = 0
        self.version = 0

    def place(self, k: Tensor, v: Tensor, site: Site, queries: Tensor | None = None) -> None:
        """Take the keys and values (B, S, H, D) of the block at work; they are not part of the past yet.

        What `sample` takes of the queries of a clean pass is held until the next one, for policies that look at them.
        """
        self.exact.place(k, v, site.grid.frame_of_token(site.start))
        if queries is not None and site.phase == "clean":
            if self.sample is not None:
                self.queries = self.sample(queries, site)
            if self.observer is not None:
                self.observer.see(self, queries, k, site)

    def past(self) -> list[Tier]:
        return [*self.older, self.exact.past(), *self.renewed]

    def block(self) -> Fixed:
        return self.exact.block()

    def past_and_block(self) -> list[Tier]:
        """As `past`, with the block at work read in the same call as the exact tier before it."""
        return [*self.older, self.exact.past_and_block(), *self.renewed]

    def finish_block(self, tokens: int) -> None:
        self.exact.keep_placed()
        self._finished += tokens
        self.version += 1

    def crop(self, frame: int, tokens: int) -> None:
        """The newest `tokens`, of latent frame `frame` and later ones, never came, as far as the exact tier knows."""
        frames = self.exact.past().entries.frames
        assert frames is not None
        self.exact.drop(int((frames < frame).sum()), self.exact.count)
        self._finished -= tokens
        self.version += 1

    @property
    def seen(self) -> int:
        return self._finished + sum(tier.count for tier in self.renewed)

    @property
    def count(self) -> int:
        """Entries kept, of the longest batch row."""
        return self.exact.count + sum(tier.count for tier in (*self.older, *self.renewed))

    @property
    def bytes(self) -> int:
        return self.exact.bytes + sum(tier.bytes for tier in (*self.older, *self.renewed))
