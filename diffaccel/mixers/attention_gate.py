"""Attention-Gate (arXiv 2410.12876): before attention, a small network says which tokens a head drops."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .mixer import Mixer, Past, Tokens, extended


class AttentionGate(Mixer):
    """Hidden states to a gate for every token and head; gates at or below 0.5 drop the key for that layer.

    The gradient of a drop is that of the gate (straight-through), and `penalty` draws the share of open gates to
    `keep`. A token always reads itself, so no query is without a key. The paper's gate is a small attention of
    unspecified width; here it is an MLP of width `hidden`, and only it is trained. Gates start open: the layer is as it
    was.

    Args:
        keep: share of the gates that shall stay open, in (0, 1].
        hidden: width of the gate's MLP, >= 1.
        pull: weight of the penalty, >= 0.
    """

    paper: ClassVar[str] = "Attention-Gate, arXiv 2410.12876"
    summary: ClassVar[str] = "drops keys that a learned gate closes before attention"

    def __init__(
        self, layer: nn.Module, block: int | None = None, keep: float = 0.5, hidden: int = 16, pull: float = 1.0
    ) -> None:
        super().__init__(layer, block)
        self.require(0 < keep <= 1, "keep is a share in (0, 1]", keep=keep)
        self.require(hidden >= 1, "hidden is a width >= 1", hidden=hidden)
        self.require(pull >= 0, "pull is a weight >= 0", pull=pull)
        self.keep, self.pull = keep, pull
        self.layer.requires_grad_(False)
        last = nn.Linear(hidden, self.layer.count)
        nn.init.constant_(last.bias, 2.0)
        self.gate = nn.Sequential(nn.Linear(self.layer.width, hidden), nn.SiLU(), last)
        self._open: list[Tensor] = []  # of the blocks of the last forward

    def scores(self, x: Tensor) -> Tensor:
        """The gate's logits (B, S, H) of hidden states: how much a cache should want to keep a token."""
        logits: Tensor = self.gate(x)
        return logits

    def kept(self, x: Tensor) -> Tensor:
        """Which tokens a head keeps, bool (B, S, H)."""
        return self.scores(x) > 0

    def mix(self, tokens: Tokens, state: Past | None) -> tuple[Tensor, Any]:
        gate = self.scores(tokens.x).sigmoid()
        flags = (gate > 0.5).to(gate) + gate - gate.detach()  # 0 or 1, with the gradient of the gate
        self._open = ([] if state is None else self._open) + [flags]
        seen = extended(state, tokens.k, tokens.v, flags)
        assert seen.weight is not None
        new, total = tokens.q.shape[1], seen.k.shape[1]
        own = torch.eye(new, total, device=gate.device, dtype=torch.bool).roll(total - new, 1)[:, None]
        found = softmax_gated(tokens.q, seen.k, seen.v, seen.weight.mT[:, None], own)
        return found, seen

    def penalty(self) -> Tensor | float:
        return self.pull * (torch.cat(self._open, 1).mean() - self.keep) ** 2


def softmax_gated(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, always: Tensor) -> Tensor:
    """Attention whose weights get a factor (B, 1, H, N), 1 where `always` (S, 1, N), before they are normalised."""
    scores = torch.einsum("bshd,bnhd->bshn", q, k) * q.shape[-1] ** -0.5
    factor = torch.where(always, 1.0, factor)
    top = scores.masked_fill(factor <= 0, -torch.inf).amax(-1, keepdim=True)
    weights = (scores - top).clamp(max=20.0).exp() * factor  # dropped keys may score higher: only their gradient counts
    return torch.einsum("bshn,bnhd->bshd", weights / weights.sum(-1, keepdim=True), v)
