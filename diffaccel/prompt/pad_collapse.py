"""PadCollapse: the padding of a prompt becomes one key, exactly."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..policy import PromptPolicy

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class PadCollapse(PromptPolicy):
    """Keep the prompt's own tokens and one padding token that stands for all of them.

    Wan pads a prompt to 512 tokens with zeros and does not mask them, so every padding token has the same key and
    value. By FAST-AR's Lemma 5.1 (arXiv 2602.01801) one entry with log(count) added to its score is exactly equal;
    dropping the padding would not be. Projections and cross-attention then run over the prompt's own length.
    """

    paper: ClassVar[str] = "FAST-AR, arXiv 2602.01801, lemma 5.1, applied to padding"
    summary: ClassVar[str] = "reads the identical padding tokens of a prompt as one key; lossless"
    exact: ClassVar[dict[str, Any]] = {}

    def prepare(self, text_BND: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...] | None]:
        """The prompt embeddings to use instead of (B, N, D), and the multiplicity of their tokens.

        Rows of a batch share the length of the longest prompt; a shorter one keeps the padding up to there.
        """
        used = (text_BND != 0).any(dim=-1)
        length = int((used * torch.arange(1, used.shape[1] + 1, device=used.device)).max())
        padding = text_BND.shape[1] - length
        if padding < 2:
            return text_BND, None
        groups = ((length, 1), (1, padding)) if length else ((1, padding),)
        return text_BND[:, : length + 1], groups

    def why_idle(self, run: "Run") -> str:
        return "no prompt embedding ended in zero padding, as Wan's do: there is nothing to collapse"
