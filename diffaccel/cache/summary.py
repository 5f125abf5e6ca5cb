"""Tiers of one-key summaries: what is dropped stays as its mean, weighted by the number of tokens it stands for."""

from abc import ABC, abstractmethod
from itertools import groupby, pairwise

import torch
from torch import Tensor

from ..kernel.merge import Partial
from .entries import Entries, Reader

MOST = 64
"""Entries of a `FrameSummary`: however long the video, what it holds and the host's lists beside it stay this long."""


class Summary(ABC):
    """Means of keys, as they are read, and of values, with log(tokens) added to their scores.

    Exact where the tokens of an entry are identical; else the score of a mean key is below what its tokens add up to.
    The means are kept in fp32 (`_means`, keys and values stacked, (2, B, N, H, D)) beside the copies in the model's
    dtype that are read, so that rounding does not add up over the frames of a long video. How many tokens an entry
    stands for and its newest frame are known to the host: nothing here waits for the device.
    """

    def __init__(self) -> None:
        self._means = torch.empty(0, 0)
        self._tokens: list[int] = []  # of each entry, ascending
        self._frames: list[int] = []
        self.entries = Entries(self._means, self._means)

    @property
    def count(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> int:
        """Tokens that all entries of a batch row stand for."""
        return sum(self._tokens)

    @property
    def bytes(self) -> int:
        """The means, and the copies that are read where those are others."""
        copies = self.entries.bytes if self.entries.k.dtype != self._means.dtype else 0
        return self._means.numel() * self._means.element_size() + copies

    def partial(self, q: Tensor, read: Reader) -> Partial:
        return read(q, self.entries)

    def frames(self) -> list[Tensor]:
        return [] if self.entries.frames is None else [self.entries.frames]

    def take(self, dropped: Entries, per_frame: int) -> None:
        """Add whole frames of `per_frame` tokens each, oldest first; they are copied."""
        assert dropped.frames is not None
        self._add(dropped.k, dropped.v, dropped.frames[::per_frame].tolist(), per_frame)
        k, v = self._means.to(dropped.k.dtype)
        multiplicity = tuple((len(list(same)), tokens) for tokens, same in groupby(self._tokens))
        self.entries = Entries(k, v, torch.tensor(self._frames), multiplicity)

    @abstractmethod
    def _add(self, k: Tensor, v: Tensor, frames: list[int], per_frame: int) -> None:
        """Bring the means, tokens and frames up to date with keys and values (B, N, H, D) of these frames."""


class CellSummary(Summary):
    """One entry for each place of the frame: the mean over all frames dropped so far."""

    def _add(self, k: Tensor, v: Tensor, frames: list[int], per_frame: int) -> None:
        seen = self._tokens[0] if self._tokens else 0
        for parts in zip(k.split(per_frame, 1), v.split(per_frame, 1), strict=True):
            frame = torch.stack(parts).to(_wide(k))
            seen += 1
            # by the difference, not by a sum: of identical frames the mean is that frame, bit for bit
            self._means = frame if seen == 1 else self._means.lerp_(frame, 1 / seen)
        self._tokens, self._frames = [seen] * per_frame, frames[-1:] * per_frame


class FrameSummary(Summary):
    """One entry for each dropped frame, the newest first; over MOST of them neighbours become one.

    Of two neighbours that stand for equally many tokens the oldest pair of the smallest ones is pooled. So each stands
    for a power of two of frames, older ones for no fewer than newer ones, and there are few different numbers.
    """

    def _add(self, k: Tensor, v: Tensor, frames: list[int], per_frame: int) -> None:
        new = torch.stack([x.unflatten(1, (-1, per_frame)).mean(2, dtype=_wide(k)) for x in (k, v)]).flip(2)
        self._means = torch.cat([new, self._means], 2) if self._tokens else new
        self._tokens = [per_frame] * len(frames) + self._tokens
        self._frames = frames[::-1] + self._frames
        while len(self._tokens) > MOST:
            self._pool()

    def _pool(self) -> None:
        """Two entries become one."""
        tokens, x = self._tokens, self._means
        smallest = next(a for a, b in pairwise(tokens) if a == b)
        at = tokens.index(smallest) + tokens.count(smallest) - 2
        pooled = x[:, :, at : at + 1].lerp(x[:, :, at + 1 : at + 2], 0.5)  # they stand for equally many tokens
        self._means = torch.cat([x[:, :, :at], pooled, x[:, :, at + 2 :]], 2)
        tokens[at : at + 2] = [2 * smallest]
        del self._frames[at + 1]


SUMMARIES: dict[str, type[Summary]] = {"frame": FrameSummary, "cell": CellSummary}


def _wide(x: Tensor) -> torch.dtype:
    """What means of `x` are kept in: fp32, or fp64 where that is what it is in."""
    return torch.promote_types(x.dtype, torch.float32)
