"""DuoAttention: which heads keep everything is learned."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .head_split import HeadSplit
from .look import Look


@dataclass(frozen=True)
class DuoAttention(HeadSplit):
    """Heads whose past the model's output needs most keep everything; the others keep the first and the newest frames.

    DuoAttention (arXiv 2410.10819, section 2): each head gets a gate in [0, 1], beginning at 1, between attention to
    everything and to the first and the newest tokens alone. The gates are learned with all weights frozen, so that the
    output stays and the gates fall: squared distance plus 0.05 times the mean gate, Adam with a learning rate of 0.02.
    A share of the heads with the highest gates keeps everything.

    There 2000 steps go over long texts with passkeys, and the distance is of the last hidden states at the passkeys.
    Here they go over the model's own finished videos, in clean passes (`gates.py`), and the distance is that of the
    velocity, over what it would be with all gates closed, so that 0.05 means the same for every model. Nothing else is
    left of heads that lose.
    """

    paper: ClassVar[str] = "DuoAttention, arXiv 2410.10819"
    summary: ClassVar[str] = "heads keep everything, or first and newest frames alone, by gates learned beforehand"

    def measure(self, look: Look) -> dict[str, Tensor]:
        """Nothing: gates are learned, over all layers together."""
        return {}
