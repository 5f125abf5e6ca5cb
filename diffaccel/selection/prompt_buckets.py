"""Which prompt token each video token is nearest to: the buckets of cross-attention, for self-attention to group by."""

import torch
from torch import Tensor

from ..cache.entries import Entries
from ..site import Site


class PromptBuckets:
    """Buckets of the tokens of one layer and branch, head by head (FAST-AR, arXiv 2602.01801, section 5.4).

    A token's bucket is the prompt token whose key has the largest product with its query, the padding left out. In a
    transformer block self-attention comes first: queries go by the step before, keys of the past by their clean pass.
    """

    def __init__(self) -> None:
        self._finished: dict[int, Tensor] = {}  # by the first latent frame of their block
        self._latest: tuple[int, Tensor] | None = None  # block at work, and its buckets

    def see(self, q: Tensor, prompt: Entries, site: Site) -> None:
        """Take the queries (B, S, H, D) of a cross-attention and what they read, padding last."""
        keys = prompt.k.permute(0, 2, 3, 1)
        padding = (keys == keys[..., -1:]).all(2, keepdim=True)  # (B, H, 1, N)
        collapsed = prompt.multiplicity is not None and prompt.multiplicity[-1][1] > 1
        padding &= collapsed | (padding.sum(-1, keepdim=True) > 1)  # a full prompt's last token is none
        scores = (q.transpose(1, 2) @ keys).masked_fill(padding, -torch.inf)
        found = scores.argmax(-1).short()
        self._latest = site.block, found
        if site.phase == "clean":
            self._finished[site.start] = found

    def of_past(self, start: int) -> Tensor:
        """(B, H, N) of the blocks before latent frame `start`."""
        return torch.cat([self._finished[first] for first in sorted(self._finished) if first < start], 2)

    def of_queries(self, block: int) -> Tensor | None:
        """(B, H, S) of the block at work, None before its first cross-attention."""
        return None if self._latest is None or self._latest[0] != block else self._latest[1]
