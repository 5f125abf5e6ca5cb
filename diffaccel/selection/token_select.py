"""TokenSelect: one choice for all heads, by their votes (arXiv 2411.02886)."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..policy import knob
from ..site import Site
from .asked import Asked
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
    frame: a mean over a whole block of video would stand for no query. `similarity` is the paper's Selection Cache, at
    0.9 there.

    Differences from the paper: blocks of neighbouring tokens are read, not single ones, as that is what kernels read;
    what stays in any case is `sink_frames` and `recent_frames`, not 128 and 512 tokens; positions are not changed.
    """

    paper: ClassVar[str] = "TokenSelect, arXiv 2411.02886"
    across_heads: ClassVar[str] = "all heads vote together"
    summary: ClassVar[str] = "lets all heads read the same keys, those that their summed votes are for"

    _: KW_ONLY
    pool: str = knob(
        "mean",
        'what a tile of queries votes with: its "mean" query, or the "max" over its quarters of a key\'s probability',
        choices=("mean", "max"),
    )

    def rank(self, asked: Asked) -> Tensor:
        """Summed probabilities of the tokens of each block, (B, 1, QB, KB)."""
        scores = asked.scores(asked.means(1 if self.pool == "mean" else _PARTS))
        votes = scores.flatten(3).softmax(-1).view_as(scores).sum(1, keepdim=True)
        return votes.unflatten(2, (asked.q.shape[2], -1)).amax(3).sum(-1)

    def query_buckets(self, q: Tensor, entries: "Entries", site: Site) -> Tensor | None:
        return nearby(site.grid, q)
