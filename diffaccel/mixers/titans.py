"""Titans (arXiv 2501.00663): a memory that learns keys' values by gradient descent while it reads."""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .mixer import Mixer, Tokens, softmax

Weights = tuple[Tensor, ...]  # of the memories, (B, H, ...) each


class State(NamedTuple):
    memory: Weights
    surprise: Weights  # the momentum


class Rates(NamedTuple):
    """Of each token, (B, S, H), in (0, 1): what it forgets, keeps of the momentum, and learns."""

    forget: Tensor
    momentum: Tensor
    learn: Tensor


def recall(memory: Weights, x: Tensor) -> Tensor:
    """What the memory answers to (B, S, H, D): M x, or of two matrices x + W2 silu(W1 x)."""
    if len(memory) == 1:
        return torch.einsum("bhed,bshd->bshe", memory[0], x)
    return x + torch.einsum("bhef,bshf->bshe", memory[1], nn.functional.silu(_hidden(memory, x)))


def _hidden(memory: Weights, x: Tensor) -> Tensor:
    return torch.einsum("bhfd,bshd->bshf", memory[0], x)


def gradient(memory: Weights, k: Tensor, v: Tensor, weight: Tensor) -> Weights:
    """Of sum_t weight_t / 2 |M(k_t) - v_t|^2, (B, S, H) weights."""
    off = (recall(memory, k) - v) * weight[..., None]
    if len(memory) == 1:
        return (torch.einsum("bshe,bshd->bhed", off, k),)
    hidden = _hidden(memory, k)
    gate = hidden.sigmoid()
    back = torch.einsum("bhef,bshe->bshf", memory[1], off) * gate * (1 + hidden * (1 - gate))
    return torch.einsum("bshf,bshd->bhfd", back, k), torch.einsum("bshe,bshf->bhef", off, hidden * gate)


def learn(
    state: State, k: Tensor, v: Tensor, rates: Rates, start: Weights | None = None, most: float | None = None
) -> State:
    """The state after tokens (B, S, H, D): S_t = momentum S - learn grad(M), M_t = (1 - forget) M + S_t.

    Gradients are those at the memory before the tokens (section 3.2, chunks), so the recurrence is linear in them and
    the tokens' shares in its end are weights of one gradient. With one token it is the recurrence itself.
    What is forgotten falls back to `start`, zero by default; a step of a tile is no longer than `most`.
    """
    ends, kept = torch.ones_like(rates.forget[:, 0]), torch.ones_like(rates.forget[:, 0])
    in_surprise, in_memory, reach = [], [], torch.zeros_like(ends)
    for t in range(k.shape[1] - 1, -1, -1):
        # of what is added to the momentum at t: `ends` is left in it at the end, `reach` of it is in the memory
        reach = kept + reach
        in_surprise.append(ends)
        in_memory.append(reach)
        reach = reach * rates.momentum[:, t]
        ends, kept = ends * rates.momentum[:, t], kept * (1 - rates.forget[:, t])
    in_memory_of, in_surprise_of = (torch.stack(x[::-1], 1) * rates.learn for x in (in_memory, in_surprise))
    steps = (gradient(state.memory, k, v, w) for w in (in_memory_of, in_surprise_of))
    to_memory, to_surprise = (step if most is None else _shortened(step, most) for step in steps)
    start = tuple(map(torch.zeros_like, state.memory)) if start is None else start

    def at(share: Tensor, x: Tensor) -> Tensor:
        return share[..., None, None] * x

    pairs = list(zip(start, state.memory, state.surprise, to_memory, to_surprise, strict=True))
    memory = tuple(first + at(kept, m - first) + at(reach, s) - g for first, m, s, g, _ in pairs)
    return State(memory, tuple(at(ends, s) - g for _, _, s, _, g in pairs))


def _shortened(step: Weights, most: float) -> Weights:
    """The same direction, its length over all matrices of a head at most `most`."""
    length = torch.stack([each.square().sum((-2, -1)) for each in step]).sum(0).add(1e-12).sqrt()[..., None, None]
    return tuple(each * (most / length).clamp(max=1.0) for each in step)


class Titans(Mixer):
    """A token's tile and learned tokens by attention, all tiles before it by the memory, added through a gate (MAG).

    Keys, queries and values of the memory have length one, and what it recalls a learned scale. Its rates are learned
    functions of the hidden state; what a token learns is at most one over the tile's tokens, and a step of an MLP has
    at most length one, without which it diverges. Forgetting falls back to the learned first memory (the paper's: to
    zero, where an MLP would stay). Tiles after a token's own are not seen: in a model that makes the whole video at
    once that is half of the context.

    Args:
        tile: tokens between two updates of the memory, >= 1; a block that is shorter is a tile.
        memory: "linear", a matrix a head, or "mlp", two of them with a residual.
        persistent: learned keys and values that every token reads, >= 0.
    """

    paper: ClassVar[str] = "Titans, arXiv 2501.00663"
    summary: ClassVar[str] = "attention to a tile, and a memory of the rest that learns as it reads"

    def __init__(
        self,
        layer: nn.Module,
        block: int | None = None,
        tile: int = 64,
        memory: Literal["linear", "mlp"] = "linear",
        persistent: int = 4,
    ) -> None:
        super().__init__(layer, block)
        self.require(tile >= 1, "tile is a number of tokens >= 1", tile=tile)
        self.require(memory in ("linear", "mlp"), "memory is 'linear' or 'mlp'", memory=memory)
        self.require(persistent >= 0, "persistent is a number of tokens >= 0", persistent=persistent)
        heads, dim = self.layer.count, self.layer.dim
        self.tile, self.most = tile, None if memory == "linear" else 1.0
        first = torch.randn(2, heads, dim, dim) * dim**-0.5
        shapes = [torch.zeros(heads, dim, dim)] if memory == "linear" else [first[0], torch.zeros(heads, dim, dim)]
        self.start = nn.ParameterList(nn.Parameter(each) for each in shapes)
        self.to_rates = nn.Linear(self.layer.width, 4 * heads)
        self.scale = nn.Parameter(torch.full((heads, 1), dim**0.5))
        self.extra = nn.Parameter(0.02 * torch.randn(2, persistent, heads, dim))

    def mix(self, tokens: Tokens, state: State | None) -> tuple[Tensor, Any]:
        batch = tokens.x.shape[0]
        if state is None:
            memory = tuple(each.expand(batch, *each.shape) for each in self.start)
            state = State(memory, tuple(torch.zeros_like(each) for each in memory))
        found = []
        for at in range(0, tokens.x.shape[1], self.tile):
            part = tokens.part(at, at + self.tile)
            forget, momentum, rate, gate = self.to_rates(part.x).unflatten(2, (4, -1)).unbind(2)
            q, k, v = (nn.functional.normalize(x, dim=-1) for x in (part.q, part.k, part.v))
            keys, values = (
                torch.cat([more.expand(batch, *more.shape), x], 1)
                for more, x in zip(self.extra, (part.k, part.v), strict=True)
            )
            found.append(
                softmax(part.q, keys, values).out + gate.sigmoid()[..., None] * self.scale * recall(state.memory, q)
            )
            rates = Rates((forget - 4).sigmoid(), momentum.sigmoid(), rate.sigmoid() / part.k.shape[1])
            state = learn(state, k, v, rates, tuple(self.start), self.most)
        return torch.cat(found, 1), state
