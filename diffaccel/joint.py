"""Text tokens that share one attention with the video's: each of both reads both."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cache.entries import Entries
from .cache.tiers import Each, Fixed, Tier


@dataclass(frozen=True)
class Text:
    """Where the text lies in the sequence of a joint attention, and how much of it is no padding.

    It is the last `tokens` of the sequence, or the `first`. Of batch row b the first `valid[b]` of them are read and
    the rest never is; queries of padding read what the others do, as models leave their results aside.
    So many tokens `before` video and text, such as those of a history, are read and read in the same way.
    """

    tokens: int
    valid: tuple[int, ...]
    first: bool = False
    before: int = 0

    @property
    def padding(self) -> float:
        """Tokens that nobody reads, on average over the batch."""
        return self.tokens - sum(self.valid) / len(self.valid)

    def split(self, x_BSHD: Tensor) -> tuple[Tensor, Tensor]:
        """The video's part and the text's, both views unless something is `before` them."""
        if self.before:
            before, rest = x_BSHD.tensor_split([self.before], 1)
            video, text = replace(self, before=0).split(rest)
            return video, torch.cat([before, text], 1)
        if self.first:
            return x_BSHD[:, self.tokens :], x_BSHD[:, : self.tokens]
        end = x_BSHD.shape[1] - self.tokens
        return x_BSHD[:, :end], x_BSHD[:, end:]

    def join(self, video: Tensor, text: Tensor) -> Tensor:
        """Undo `split`."""
        if self.before:
            before, text = text.tensor_split([self.before], 1)
            return torch.cat([before, replace(self, before=0).join(video, text)], 1)
        return torch.cat([text, video] if self.first else [video, text], 1)

    def tier(self, k_BNHD: Tensor, v_BNHD: Tensor) -> Tier:
        """The text's keys without padding, row by row where rows differ; without frames, so no policy chooses there."""
        read = [self.before + n for n in self.valid]
        if len(set(read)) == 1:
            return Fixed(Entries(k_BNHD[:, : read[0]], v_BNHD[:, : read[0]]))
        return Each([Entries(k_BNHD[b, None, :n], v_BNHD[b, None, :n]) for b, n in enumerate(read)])
