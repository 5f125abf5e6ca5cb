"""Keys and values that attention may read, with what travels beside them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernel.merge import Partial

Reader = Callable[[Tensor, "Entries"], Partial]  # (q, entries) -> attention of q over these entries


@dataclass(eq=False)
class Lasting:
    """Notes on entries that grow and change: while `version` stays, entries are only ever added behind the others.

    `shared` are notes of all layers of a branch together."""

    version: int = 0
    notes: dict[Any, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)


class Room(NamedTuple):
    """A buffer of which the first `used` entries count, keys with their log-multiplicity in channels of its own."""

    k: Tensor  # (B, C, H, D + CHANNELS): `kernel.weighted.log_channels`
    v: Tensor  # (B, C, H, as wide as the kernel needs), of which D channels count
    used: Tensor  # (B,) int32, at most C
    scale: float  # of the scores for which the channels are


@dataclass(frozen=True, eq=False)
class Entries:
    """Keys and values (B, N, H, D) as attention reads them, keys rotated.

    `frames` is the latent frame of each entry, (N,) int64 on the host, None for prompt tokens. `multiplicity` says
    how many tokens each entry stands for, as consecutive groups ((entries, tokens each), ...): a score gets
    log(tokens each) added, which makes attention over identical keys exact (FAST-AR, Lemma 5.1). None: one each.
    `at_work` says that these are keys of the block at work, which change from step to step.
    `room` is the buffer that they are the beginning of, where it can be read in one launch.
    `notes` is for what a reader would work out again at every read of entries that stay as they are; `lasting` for
    what it carries over to what becomes of them.
    """

    k: Tensor
    v: Tensor
    frames: Tensor | None = None
    multiplicity: tuple[tuple[int, int], ...] | None = None
    notes: dict[Any, Any] = field(default_factory=dict)
    lasting: Lasting = field(default_factory=Lasting)
    at_work: bool = False
    room: Room | None = None

    @property
    def count(self) -> int:
        return self.k.shape[1]

    def of_heads(self, heads: slice | Tensor) -> "Entries":
        """The same entries of some heads."""
        return replace(self, k=self.k[:, :, heads], v=self.v[:, :, heads], lasting=Lasting(), room=None)

    @property
    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def log_weight(self) -> Tensor | None:
        """What is added to each entry's score, fp32 (N,), or None where every entry stands for one token."""
        if self.multiplicity is None or all(tokens == 1 for _, tokens in self.multiplicity):
            return None
        weights = [weight for count, tokens in self.multiplicity for weight in [log(tokens)] * count]
        return torch.tensor(weights, dtype=torch.float32, device=self.k.device)

    def groups(self) -> list[tuple[Tensor, Tensor, int]]:
        """Keys, values and the tokens each stands for, for every multiplicity; views."""
        groups, start = [], 0
        for count, tokens in self.multiplicity or ((self.count, 1),):
            groups.append((self.k[:, start : start + count], self.v[:, start : start + count], tokens))
            start += count
        return groups
