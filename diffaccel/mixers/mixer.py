"""What a mixer is: a module in place of an attention layer, with a state that its next call goes on from."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import KnobError
from ..kernel.merge import Partial
from .projections import Rotary, projections


class Tokens(NamedTuple):
    """Of some tokens: hidden states (B, S, C); queries, keys and values (B, S, H, D), rotated."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    def part(self, start: int, end: int) -> "Tokens":
        return Tokens(*(each[:, start:end] for each in self))


class Mixer(nn.Module, ABC):
    """An attention layer computed in another way, which distillation (`distil`) has to teach it.

    The maps to queries, keys, values and from the heads are copies of the layer's own. `block` is how many tokens see
    each other; every token also sees all blocks before its own. None: the tokens of a call are one block.

    Args:
        layer: attention of diffusers (`to_q`, ...) or transformers (`q_proj`, ...).
        block: tokens of a block, >= 1, or None.
    """

    slot: ClassVar[str] = "mixer"
    paper: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[str] = "distillation"

    def __init__(self, layer: nn.Module, block: int | None = None) -> None:
        super().__init__()
        self.require(block is None or block >= 1, "block is a number of tokens >= 1 or None", block=block)
        self.block = block
        self.layer = projections(layer)

    def require(self, ok: bool, rule: str, **met: Any) -> None:
        """Refuse a setting: the rule and the values that broke it."""
        if not ok:
            raise KnobError(f"{type(self).__name__}: {rule}, got {', '.join(f'{k}={v!r}' for k, v in met.items())}")

    def forward(self, x: Tensor, state: Any = None, pos: Rotary | None = None) -> tuple[Tensor, Any]:
        """Hidden states (B, S, C) to (B, S, C), and the state after them.

        `state` is that of the tokens before, None at the beginning; calls then begin and end at borders of blocks.
        `pos` are the rotary tables of these tokens as the replaced layer is given them.
        """
        tokens = Tokens(x, *self.layer.heads(x, pos))
        found = []
        for start in range(0, x.shape[1], self.block or x.shape[1]):
            out, state = self.mix(tokens.part(start, start + (self.block or x.shape[1])), state)
            found.append(out)
        return self.layer.close(torch.cat(found, 1)), state

    @abstractmethod
    def mix(self, tokens: Tokens, state: Any) -> tuple[Tensor, Any]:
        """One block: the heads' outputs (B, S, H, D), and the state with the block in it."""

    def penalty(self) -> Tensor | float:
        """What distillation adds to the error of the last forward."""
        return 0.0


class Past(NamedTuple):
    """Keys and values (B, N, H, D) of earlier tokens, with log-weights (B, N, H) where they have any."""

    k: Tensor
    v: Tensor
    weight: Tensor | None = None

    def followed_by(self, k: Tensor, v: Tensor, weight: Tensor | None = None) -> "Past":
        both = None if self.weight is None or weight is None else torch.cat([self.weight, weight], 1)
        return Past(torch.cat([self.k, k], 1), torch.cat([self.v, v], 1), both)


def extended(past: Past | None, k: Tensor, v: Tensor, weight: Tensor | None = None) -> Past:
    return Past(k, v, weight) if past is None else past.followed_by(k, v, weight)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The output of `softmax` alone, by PyTorch's fused kernels."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype).movedim(-2, -3)  # to (..., H, S, N)
    return nn.functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)


def softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Partial:
    """Attention with `bias` (broadcast to (B, S, H, N)) added to the scores; every query needs a key above -inf."""
    scores = torch.einsum("bshd,bnhd->bshn", q, k) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return Partial(torch.einsum("bshn,bnhd->bshd", scores.softmax(-1), v), scores.float().logsumexp(-1))
