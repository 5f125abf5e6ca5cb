"""Text tokens that share one attention with the video's: each of both reads both."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cache.entries import Entries
from .cache.tiers import Each, Fixed, Tier


@dataclass(frozen=True)
class Text:
    """Where the text lies in the sequence of a joint attention, and how much of it is no padding.

    It is the last `tokens` of the sequence, or the `first`. Of batch row b the first `valid[b]` of them are read and
    the rest never is; queries of padding read what the others do, as models leave their results aside.
    """

    tokens: int
    valid: tuple[int, ...]
    first: bool = False

    @property
    def padding(self) -> float:
        """Tokens that nobody reads, on average over the batch."""
        return self.tokens - sum(self.valid) / len(self.valid)

    def split(self, x_BSHD: Tensor) -> tuple[Tensor, Tensor]:
        """The video's part and the text's, both views."""
        if self.first:
            return x_BSHD[:, self.tokens :], x_BSHD[:, : self.tokens]
        video = x_BSHD.shape[1] - self.tokens
        return x_BSHD[:, :video], x_BSHD[:, video:]

    def join(self, video: Tensor, text: Tensor) -> Tensor:
        """Undo `split`."""
        return torch.cat([text, video] if self.first else [video, text], 1)

    def tier(self, k_BNHD: Tensor, v_BNHD: Tensor) -> Tier:
        """The text's keys without padding, row by row where rows differ; without frames, so no policy chooses there."""
        if len(set(self.valid)) == 1:
            return Fixed(Entries(k_BNHD[:, : self.valid[0]], v_BNHD[:, : self.valid[0]]))
        return Each([Entries(k_BNHD[b, None, :n], v_BNHD[b, None, :n]) for b, n in enumerate(self.valid)])
