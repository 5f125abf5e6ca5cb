"""The linear maps around an attention layer, copied: from hidden states to heads, and back."""

from copy import deepcopy
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..rotary import rotate

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, as the replaced layer is given them."""


class Projections(Protocol):
    width: int
    count: int  # heads
    dim: int  # of a head

    def heads(self, x: Tensor, pos: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, S, H, D) of hidden states (B, S, C), normalised and rotated."""
        ...

    def rotated(self, x: Tensor, pos: Rotary | None) -> Tensor:
        """Turn heads (B, S, any, D) to their positions."""
        ...

    def close(self, out: Tensor) -> Tensor:
        """The layer's output (B, S, C) of what its heads found."""
        ...


class _Diffusers(nn.Module):
    """Layout of diffusers: `to_q`, `norm_q`, ..., `to_out`; rotary pairs are neighbouring channels."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    norm_q: nn.Module
    norm_k: nn.Module
    to_out: nn.ModuleList

    def __init__(self, layer: Any) -> None:
        super().__init__()
        names = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out")
        for name in names:
            setattr(self, name, deepcopy(getattr(layer, name)))
        self.width, self.count = layer.to_q.in_features, layer.heads
        self.dim = layer.to_q.out_features // layer.heads

    def heads(self, x: Tensor, pos: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x)
        q, k, v = (each.unflatten(2, (self.count, -1)) for each in (q, k, v))
        return self.rotated(q, pos), self.rotated(k, pos), v

    def rotated(self, x: Tensor, pos: Rotary | None) -> Tensor:
        return x if pos is None else rotate(x, *pos)

    def close(self, out: Tensor) -> Tensor:
        return cast(Tensor, self.to_out[1](self.to_out[0](out.flatten(2))))


class _Transformers(nn.Module):
    """Layout of transformers' Llama and its kin: `q_proj`, ..., `o_proj`; rotary pairs are half a head apart."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, deepcopy(getattr(layer, name)))
        self.width, self.dim = layer.q_proj.in_features, layer.head_dim
        self.count = layer.q_proj.out_features // layer.head_dim

    def heads(self, x: Tensor, pos: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (each(x).unflatten(2, (-1, self.dim)) for each in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (each.repeat_interleave(self.count // each.shape[2], 2) for each in (k, v))
        return self.rotated(q, pos), self.rotated(k, pos), v

    def rotated(self, x: Tensor, pos: Rotary | None) -> Tensor:
        if pos is None:
            return x
        cos, sin = (table[:, :, None] for table in pos)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def close(self, out: Tensor) -> Tensor:
        return cast(Tensor, self.o_proj(out.flatten(2)))


def projections(layer: nn.Module) -> Any:
    """Copies of a layer's maps, trainable. Raises `UnsupportedError` for a layer of neither layout."""
    if all(hasattr(layer, name) for name in ("to_q", "norm_q", "to_out", "heads")):
        if getattr(layer, "add_k_proj", None) is not None:
            raise UnsupportedError(
                f"a mixer replaces self-attention, and this {type(layer).__name__} also reads an image: name another"
            )
        return _Diffusers(layer)
    if all(hasattr(layer, name) for name in ("q_proj", "o_proj", "head_dim")):
        odd = [name for name in ("q_norm", "k_norm") if hasattr(layer, name)]
        if odd:
            raise UnsupportedError(
                f"attention with {', '.join(odd)} is not known to mixers, got {type(layer).__name__}"
            )
        return _Transformers(layer)
    raise UnsupportedError(
        f"a mixer replaces attention with to_q, norm_q, to_out, heads (diffusers) or q_proj, o_proj, head_dim "
        f"(transformers), got {type(layer).__name__}"
    )
