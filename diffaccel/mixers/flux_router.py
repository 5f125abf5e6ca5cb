"""Flux Attention (arXiv 2604.07394): a small network a layer chooses between all keys and a window with sinks."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .mixer import Mixer, Past, Tokens, attend, extended


class State(NamedTuple):
    past: Past
    dense: Tensor  # (B,), 1: all keys, 0: the window; said by the first block


class FluxRouter(Mixer):
    """Mean queries of the first and last `pool` tokens pass an MLP (D, 8 D, 2 D), both answers another (4 D, D, 2).

    In training the choice is drawn with Gumbel noise and has the gradient of its probability (straight-through); else
    the likelier one alone is computed. A bias of 4.5 starts it at full attention. `penalty` is a linear and a square
    term of the distance to `density`, with a weight of one each (the authors': of their own, learned). Only the router
    is trained. D is the size of a head: queries are a mean over heads as well. The choice is made once, from the first
    block (the authors: from the prompt).

    Args:
        density: wanted share of choices that are dense, in [0, 1].
        window, sinks: newest and first tokens of the window, > 0 and >= 0 (the authors': 2048 and 128).
        pool: tokens at either end that are looked at, >= 1 (the authors': 100 to 150).
    """

    paper: ClassVar[str] = "Flux Attention, arXiv 2604.07394"
    summary: ClassVar[str] = "a learned router a layer: all keys, or a window with sinks"

    def __init__(
        self,
        layer: nn.Module,
        block: int | None = None,
        density: float = 0.55,
        window: int = 64,
        sinks: int = 4,
        pool: int = 100,
    ) -> None:
        super().__init__(layer, block)
        self.require(0 <= density <= 1, "density is a share in [0, 1]", density=density)
        self.require(window > 0, "window is a number of tokens > 0", window=window)
        self.require(sinks >= 0, "sinks is a number of tokens >= 0", sinks=sinks)
        self.require(pool >= 1, "pool is a number of tokens >= 1", pool=pool)
        self.density, self.window, self.sinks, self.pool = density, window, sinks, pool
        self.layer.requires_grad_(False)
        dim = self.layer.dim
        self.look = nn.Sequential(nn.Linear(dim, 8 * dim), nn.SiLU(), nn.Linear(8 * dim, 2 * dim))
        last = nn.Linear(dim, 2)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([4.5, 0.0]))
        self.choose = nn.Sequential(nn.Linear(4 * dim, dim), nn.SiLU(), last)
        self._chance: Tensor | float = 1.0  # of full attention, at the last choice

    def route(self, q: Tensor) -> Tensor:
        """Logits (B, 2) of full attention and of the window, from queries (B, S, H, D)."""
        ends = [part.mean((1, 2)) for part in (q[:, : self.pool], q[:, -self.pool :])]
        logits: Tensor = self.choose(torch.cat([self.look(end) for end in ends], -1))
        return logits

    def mix(self, tokens: Tokens, state: State | None) -> tuple[Tensor, Any]:
        seen = extended(state.past if state else None, tokens.k, tokens.v)
        if state is not None:
            dense = state.dense
        else:
            logits = self.route(tokens.q)
            self._chance = logits.softmax(-1)[:, 0].mean()
            drawn = nn.functional.gumbel_softmax(logits, hard=True)[:, 0]
            dense = drawn if self.training else (logits[:, 0] >= logits[:, 1]).to(logits)
        bias = self._window(seen.k.shape[1], tokens.q.shape[1]).to(tokens.q)
        if self.training:
            full, near = (attend(tokens.q, seen.k, seen.v, b) for b in (None, bias))
            return near.lerp(full, dense[:, None, None, None]), State(seen, dense)
        rows = zip(*(x.split(1) for x in (tokens.q, seen.k, seen.v)), dense.tolist(), strict=True)
        return torch.cat([attend(q, k, v, None if d else bias) for q, k, v, d in rows]), State(seen, dense)

    def _window(self, total: int, new: int) -> Tensor:
        """Bias (S, 1, N): a token reads tokens no more than `window` away, and the sinks."""
        place = torch.arange(total)
        far = (place[total - new :, None] - place).abs() > self.window
        return torch.zeros(far.shape).masked_fill_(far & (place >= self.sinks), -torch.inf)[:, None]

    def penalty(self) -> Tensor | float:
        off = torch.as_tensor(self._chance) - self.density
        return off.abs() + off**2
