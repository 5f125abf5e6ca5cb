"""RKV: keep what the newest queries attend to and no other key resembles."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from ..policy import knob
from .look import Look
from .scored import Scored


@dataclass(frozen=True)
class RKV(Scored):
    """Of tokens that are no longer new, keep those of most attention, less of those that many keys are like.

    FlowCache (arXiv 2602.10825) takes this from R-KV for chunks of video: balance x importance - (1 - balance) x
    redundancy. Importance is the mean probability over queries, the largest of 7 neighbours in a row; redundancy is
    the softmax over all tokens of a key's mean cosine with the others. Both sum to about one, so with its balance of
    0.07 redundancy says most.

    Differences from its code: importance is a mean over neighbours in time and in the frame, as in `SnapKV`, and its
    queries are spread over the block; it also chooses whole frames or chunks, here tokens are chosen. The mean cosine
    is a product with the sum of all directions, so pairs of keys are never formed.
    """

    paper: ClassVar[str] = "FlowCache, arXiv 2602.10825"
    summary: ClassVar[str] = "keeps the tokens of the past that are attended to and unlike the others"

    balance: float = knob(0.07, "weight of attention beside that of redundancy, in [0, 1]")
    pool: int = knob(3, "frames, rows and columns over which attention is averaged, odd; 1: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.balance <= 1, "balance is a share in [0, 1]", balance=self.balance)
        self.require_odd("pool")

    def score(self, look: Look) -> Tensor:
        importance = look.pooled(look.p.mean(2), self.pool)
        return self.balance * importance - (1 - self.balance) * redundancy(look)


def redundancy(look: Look) -> Tensor:
    """Softmax over the entries of a key's mean cosine with all keys of its head, (B, H, N).

    That of a key with itself is the same for all, which their softmax does not see.
    """
    keys = normalize(look.k.transpose(1, 2).float(), dim=-1) * look.there[..., None]
    total, count = keys.sum(2), look.there.sum(-1, keepdim=True)
    cosine = (keys @ total[..., None])[..., 0] / count
    return cosine.masked_fill(~look.there, -float("inf")).softmax(-1)
