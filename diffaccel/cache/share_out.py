"""A budget shared out by weights, where nobody takes more than there is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ragged import Counts


def share_out(shares_LBH: Tensor, available: Sequence[Counts], capacity: int) -> list[Counts]:
    """Entries for each layer, row and head: in proportion to `shares`, at most what is `available`, and in each row
    `capacity` on average over layers and heads at most. What one cannot take goes to the others.

    A share below a thousandth of the mean is a thousandth, so that nobody is left without while others overflow.
    """
    shares = shares_LBH.double().cpu()
    most = torch.tensor(available, dtype=torch.float64)
    shares = torch.maximum(shares, shares.mean(dim=(0, 2), keepdim=True).clamp(min=1e-30) / 1000)
    found = torch.zeros_like(most)
    total = float(capacity * shares.shape[0] * shares.shape[2])
    for row in range(shares.shape[1]):
        share, room = shares[:, row], most[:, row]
        full = torch.zeros_like(room, dtype=torch.bool)
        left = min(total, float(room.sum()))
        while True:  # at least one more is full each time, or it is done
            rest = left - float(room[full].sum())
            wanted = share * (~full) * (rest / max(float(share[~full].sum()), 1e-300))
            over = (wanted >= room) & ~full
            if not over.any():
                break
            full |= over
        found[:, row] = torch.where(full, room, (wanted + 1e-9).floor())
    return [tuple(tuple(int(n) for n in row) for row in layer) for layer in found.tolist()]


def whole_first(available: Sequence[int], first: Sequence[int], budget: int) -> list[int]:
    """Entries of each head, `budget` in all: the heads that come `first` keep all they have as long as that fits, one
    after the other, and the others get equal numbers of the rest."""
    whole: list[int] = []
    for head in first:
        if available[head] <= budget:
            whole.append(head)
            budget -= available[head]
    kept = [count if head in whole else 0 for head, count in enumerate(available)]
    others = sorted({*range(len(available))} - {*whole}, key=lambda head: available[head])
    for number, head in enumerate(others):
        kept[head] = min(available[head], budget // (len(others) - number))
        budget -= kept[head]
    return kept
