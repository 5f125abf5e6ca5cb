"""TokenSelect: one choice for all heads, by their votes (arXiv 2411.02886)."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..policy import knob
from ..site import Site
from .asked import Asked
from .blocks import KeyBlocks
from .places import nearby
from .ranked import Ranked

if TYPE_CHECKING:
    from ..cache.entries import Entries

_PARTS = 4  # of a tile of queries, with pool="max"


@dataclass(frozen=True)
class TokenSelect(Ranked):
    """Every head votes with its attention probabilities; all heads read what the sum of the votes says.

    Softmax before the sum keeps a head of large scores from deciding alone (the paper's soft vote). What a tile of
    queries votes with is their mean, as in the paper for a chunk of a prompt, here of queries that are near in the
    frame: a mean over a whole block of video would stand for no query. `refresh="similar"` is the paper's Selection
    Cache: what was chosen is read again while the mean query of a video has a cosine of `similarity` to that of then.

    Differences from the paper: blocks of neighbouring tokens are read, not single ones, as that is what kernels read;
    what stays in any case is `sink_frames` and `recent_frames`, not 128 and 512 tokens; positions are not changed.
    """

    paper: ClassVar[str] = "TokenSelect, arXiv 2411.02886"
    across_heads: ClassVar[str] = "all heads vote together"
    summary: ClassVar[str] = "lets all heads read the same keys, those that their summed votes are for"

    _: KW_ONLY
    refresh: str = knob(
        "block",
        'when the keys to read are chosen anew: at every "step", once a "block" of the video, or within a block when '
        'queries are no longer "similar"',
        choices=("step", "block", "similar"),
    )
    similarity: float = knob(
        0.9, 'with refresh="similar": a choice stands while mean queries have this cosine, in [-1, 1]'
    )
    pool: str = knob(
        "mean",
        'what a tile of queries votes with: its "mean" query, or the "max" over its quarters of a key\'s probability',
        choices=("mean", "max"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(-1 <= self.similarity <= 1, "similarity is a cosine in [-1, 1]", similarity=self.similarity)

    def rank(self, asked: Asked) -> Tensor:
        """Summed probabilities of the tokens of each block, (B, 1, QB, KB)."""
        scores = asked.scores(asked.means(1 if self.pool == "mean" else _PARTS))
        votes = scores.flatten(3).softmax(-1).view_as(scores).sum(1, keepdim=True)
        return votes.unflatten(2, (asked.q.shape[2], -1)).amax(3).sum(-1)

    def query_buckets(self, q: Tensor, entries: "Entries", site: Site) -> Tensor | None:
        return nearby(site.grid, q)

    def stands(self, keys: KeyBlocks, q: Tensor, site: Site) -> bool:
        known = super().stands(keys, q, site)
        return known and (self.refresh != "similar" or bool(self._similar(keys, q).all()))

    def choose(self, asked: Asked) -> None:
        keys, before = asked.keys, asked.keys.lists
        known = self.refresh == "similar" and super().stands(keys, asked.given, asked.site) and before is not None
        similar = self._similar(keys, asked.given) if known else None
        super().choose(asked)
        mean = _mean(asked.given)
        if similar is not None and before is not None and keys.lists is not None:  # a video goes by its own queries
            keys.lists.lists[similar] = before.lists[similar]
            mean[similar] = keys.kept["query"][similar]
        keys.kept["query"] = mean

    def _similar(self, keys: KeyBlocks, q: Tensor) -> Tensor:
        """Of which videos what was chosen stands, bool (B,)."""
        return torch.cosine_similarity(_mean(q), keys.kept["query"]) >= self.similarity


def _mean(q: Tensor) -> Tensor:
    """Over tokens, of all heads, (B, H * D)."""
    return q.mean(1, dtype=torch.float32).flatten(1)
