"""Lightning Attention (TransNormerLLM, arXiv 2405.17381) and Lightning Attention-2 (arXiv 2401.04658)."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .mixer import Mixer, Tokens


class Lightning(Mixer):
    """Linear attention with a decay, without a normaliser: o_t = sum_s decay_h^|t - s| (q_t . k_s) v_s.

    Computed in tiles: inside one by the left product, (Q K^T * M) V, between them by the right one, Q (K^T V). Here all
    tiles' K^T V are made at once; `Lightning2` goes from tile to tile with one. SiLU on queries and keys, RMS norm
    without weights and a gate on the output are the papers'; decays are those of their code, exp(-2^(-8h/H) * (1 -
    depth)), fixed. The papers' models are causal; tokens of a block here see both ways, at a decay of their distance.

    Args:
        tile: tokens of a tile, >= 1.
        depth: place of the layer in the model, 0 to below 1: deeper layers forget less.
    """

    paper: ClassVar[str] = "Lightning Attention, arXiv 2405.17381"
    summary: ClassVar[str] = "linear attention with a decay, all tiles' states made at once"
    schedule: ClassVar[Literal["at once", "carried"]] = "at once"
    decay: Tensor

    def __init__(self, layer: nn.Module, block: int | None = None, tile: int = 64, depth: float = 0.0) -> None:
        super().__init__(layer, block)
        self.require(tile >= 1, "tile is a number of tokens >= 1", tile=tile)
        self.require(0 <= depth < 1, "depth is in [0, 1)", depth=depth)
        heads = self.layer.count
        slope = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float32) / heads) * (1 - depth)
        self.register_buffer("decay", -slope)
        self.tile = tile
        self.gate = nn.Linear(self.layer.width, self.layer.width)

    def mix(self, tokens: Tokens, state: Any) -> tuple[Tensor, Any]:
        q, k = nn.functional.silu(tokens.q), nn.functional.silu(tokens.k)
        out, state = self.scan(q, k, tokens.v, state)
        out = nn.functional.rms_norm(out.flatten(2), (self.layer.width,)) * self.gate(tokens.x)
        return out.unflatten(2, (self.layer.count, -1)), state

    def scan(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The recurrence over one block in which tokens see both ways, after `state` (B, H, D, D)."""
        ahead, state = self._one_way(q, k, v, state)
        back, _ = self._one_way(q.flip(1), k.flip(1), v.flip(1), None)
        own = (q * k).sum(-1, keepdim=True) * v  # which both ways count
        return ahead + back.flip(1) - own, state

    def _one_way(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Every token sees itself and those before it; the state lies one step before the first."""
        state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if state is None else state
        walk = self._at_once if self.schedule == "at once" else self._carried
        return walk([x.split(self.tile, 1) for x in (q, k, v)], state)

    def _carried(self, tiles: list[tuple[Tensor, ...]], state: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for q, k, v in zip(*tiles, strict=True):
            found.append(self._inside(q, k, v) + self._read(q, state))
            state = self._decayed(state, q.shape[1]) + self._made(k, v)
        return torch.cat(found, 1), state

    def _at_once(self, tiles: list[tuple[Tensor, ...]], state: Tensor) -> tuple[Tensor, Tensor]:
        made = [self._made(k, v) for k, v in zip(*tiles[1:], strict=True)]
        states = [state]
        for tile, new in zip(tiles[0], made, strict=True):
            states.append(self._decayed(states[-1], tile.shape[1]) + new)
        parts = zip(*tiles, states, strict=False)
        return torch.cat([self._inside(q, k, v) + self._read(q, s) for q, k, v, s in parts], 1), states[-1]

    def _inside(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[1], device=q.device)
        apart = place[:, None] - place
        mask = (self.decay * apart.clamp(min=0)[..., None]).exp() * (apart >= 0)[..., None]
        scores = torch.einsum("bshd,bnhd->bsnh", q, k) * mask
        return torch.einsum("bsnh,bnhd->bshd", scores, v)

    def _read(self, q: Tensor, state: Tensor) -> Tensor:
        steps = torch.arange(1, q.shape[1] + 1, device=q.device)
        return torch.einsum("bshd,bhde->bshe", q * (steps[:, None] * self.decay).exp()[..., None], state)

    def _made(self, k: Tensor, v: Tensor) -> Tensor:
        left = torch.arange(k.shape[1] - 1, -1, -1, device=k.device)
        return torch.einsum("bshd,bshe->bhde", k * (left[:, None] * self.decay).exp()[..., None], v)

    def _decayed(self, state: Tensor, steps: int) -> Tensor:
        return state * (steps * self.decay).exp()[:, None, None]


class Lightning2(Lightning):
    """The same function as `Lightning`: one state is carried from tile to tile, as Lightning Attention-2 keeps it in
    fast memory, in place of the states of all tiles at once."""

    paper: ClassVar[str] = "Lightning Attention-2, arXiv 2401.04658"
    summary: ClassVar[str] = "the same, one state carried from tile to tile"
    schedule: ClassVar[Literal["at once", "carried"]] = "carried"
