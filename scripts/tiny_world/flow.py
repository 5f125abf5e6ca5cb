"""The Wan transformer over frame slots: the same function as the library's forward, shaped for training.

A sequence is S frame slots of P tokens. Slots carry their own frame number (rotary position), their own noise
level and a frame-by-frame attention pattern, so one sequence can hold a clean and a noisy copy of a clip
(teacher forcing) or two noisy copies (bidirectional). Modulation stays per slot instead of per token, which
saves most of the memory traffic of the library's per-token timesteps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .prompts import CONTEXT

Cache = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Attention pattern of a sequence of S slots.

    `allowed[q, k]` between slots (S, S); the block of each slot (S,), `count` of them; the last slot of its block (S,);
    the weight of its loss (S,), 1 on average. `first` is the length of the first block.
    """

    name: str
    causal: bool
    first: int
    count: int
    allowed: torch.Tensor
    blocks: torch.Tensor
    ends: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device) -> "Layout":
        """The same on another device."""
        tensors = {name: getattr(self, name).to(device) for name in ("allowed", "blocks", "ends", "weight")}
        return replace(self, **tensors)


def block_ids(frames: int, first: int, block: int = 3) -> torch.Tensor:
    """Block of every frame: `first` frames, then `block` at a time, the last possibly shorter."""
    return torch.tensor([0 if i < first else 1 + (i - first) // block for i in range(frames)])


def teacher_forcing(frames: int, first: int) -> Layout:
    """Slots [clean | noisy]: a noisy block sees itself and earlier clean blocks, a clean block clean ones up to it."""
    blocks = block_ids(frames, first)
    q, k = blocks[:, None], blocks[None, :]
    nothing = torch.zeros(frames, frames, dtype=torch.bool)
    allowed = torch.cat([torch.cat([k <= q, nothing], 1), torch.cat([k < q, k == q], 1)], 0)
    ends = torch.tensor([int((blocks == block).nonzero().max()) for block in blocks])
    # All later blocks take their looks from the first one, which alone has nothing to copy from.
    noisy = torch.where(blocks == 0, 3.0, 1.0)
    weight = torch.cat([torch.zeros(frames), 2 * noisy / noisy.mean()])
    count = int(blocks.max()) + 1
    both = torch.cat([blocks, blocks])
    return Layout(f"causal{first}", True, first, count, allowed, both, torch.cat([ends, ends + frames]), weight)


def bidirectional(frames: int, length: int) -> Layout:
    """Slots [noisy | noisy]: one copy whole, one cut to `length` frames (what is cut off carries no loss)."""
    blocks = torch.cat([torch.zeros(frames), 1 + (torch.arange(frames) >= length)]).long()
    weight = (blocks < 2).float()
    count = int(blocks.max()) + 1
    allowed = blocks[:, None] == blocks[None, :]
    return Layout(
        f"full{length}", False, frames, count, allowed, blocks, torch.arange(2 * frames), weight / weight.mean()
    )


def text_bias(lengths: torch.Tensor, width: int, choice: torch.Tensor) -> torch.Tensor:
    """Score bias (B, S, P * (width + 1)) of P prompts, each cut to `width` words plus one padding key.

    The library pads a prompt with zeros to 512 and does not mask it. All those keys are equal, so a single one with
    the log of their number as bias gives the same attention.

    Args:
        lengths: words of each prompt, (B, P).
        choice: the prompt that each slot reads, (B, S).
    """
    prompts = lengths.shape[1]
    index = torch.arange(width + 1, device=lengths.device)
    bias = torch.where(index < lengths[..., None], 0.0, -1e9)
    bias[..., width] = torch.log((CONTEXT - lengths).float())
    others = choice[..., None] != torch.arange(prompts, device=choice.device)
    return (bias[:, None] - 1e9 * others[..., None].float()).flatten(2)


def block_weights(block: nn.Module) -> list[torch.Tensor]:
    """Parameters of a transformer block in the order `block_forward` reads them."""
    weights = [block.scale_shift_table]
    for attention in (block.attn1, block.attn2):
        for name in ("to_q", "to_k", "to_v"):
            linear = getattr(attention, name)
            weights += [linear.weight, linear.bias]
        weights += [attention.norm_q.weight, attention.norm_k.weight]
        weights += [attention.to_out[0].weight, attention.to_out[0].bias]
    weights += [block.norm2.weight, block.norm2.bias]
    weights += [
        block.ffn.net[0].proj.weight,
        block.ffn.net[0].proj.bias,
        block.ffn.net[2].weight,
        block.ffn.net[2].bias,
    ]
    return weights


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _layer_norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), eps=1e-6)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * weight.float()).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def block_forward(
    weights: Sequence[torch.Tensor],
    heads: int,
    hidden: torch.Tensor,
    modulation: torch.Tensor,
    context: torch.Tensor,
    bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: BlockMask | torch.Tensor | None,
    past: Cache | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One block: hidden (B, S, P, D), modulation (B, S, 6, D), context (B, T, D), bias (B, S, T).

    Also returns its keys and values.

    `past` holds the rotated keys and the values (B, heads, L, hd) of earlier frames, put before this call's own.
    """
    (table, wq, bq, wk, bk, wv, bv, nq, nk, wo, bo, cq, cbq, ck, cbk, cv, cbv, cnq, cnk, co, cbo) = weights[:21]
    n2w, n2b, f1, fb1, f2, fb2 = weights[21:]
    b, s, p, d = hidden.shape
    parts = (table.float().view(1, 1, 6, d) + modulation.float()).unsqueeze(2).unbind(3)
    shift, scale, gate, shift2, scale2, gate2 = parts

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(b, -1, heads, d // heads).transpose(1, 2)

    h = (_layer_norm(hidden) * (1 + scale) + shift).to(hidden.dtype)
    q = _rotate(split(_rms_norm(_linear(h, wq, bq), nq)), cos, sin)
    k = _rotate(split(_rms_norm(_linear(h, wk, bk), nk)), cos, sin)
    v = split(_linear(h, wv, bv))
    keys, values = (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
    if isinstance(mask, BlockMask):
        y: Any = flex_attention(q, keys, values, block_mask=mask)
    else:
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    y = _linear(y.transpose(1, 2).reshape(b, s, p, d), wo, bo)
    hidden = (hidden.float() + y.float() * gate).to(hidden.dtype)

    h = (_layer_norm(hidden) * n2w.float() + n2b.float()).to(hidden.dtype)
    q = split(_rms_norm(_linear(h, cq, cbq), cnq))
    ck_, cv_ = split(_rms_norm(_linear(context, ck, cbk), cnk)), split(_linear(context, cv, cbv))
    # So few keys that the plain product beats a fused kernel with a bias.
    scores = (q @ ck_.transpose(-1, -2)).float() * (d // heads) ** -0.5
    scores = scores.view(b, heads, s, p, -1) + bias[:, None, :, None, :]
    y = scores.softmax(-1).to(q.dtype).flatten(2, 3) @ cv_
    hidden = hidden + _linear(y.transpose(1, 2).reshape(b, s, p, d), co, cbo)

    h = (_layer_norm(hidden) * (1 + scale2) + shift2).to(hidden.dtype)
    y = _linear(F.gelu(_linear(h, f1, fb1), approximate="tanh"), f2, fb2)
    return (hidden.float() + y.float() * gate2).to(hidden.dtype), k, v


class FlowNet:
    """Runs `transformer` over frame slots, sharing its parameters."""

    def __init__(self, transformer: WanTransformer3DModel, dtype: torch.dtype = torch.float32, compiled: bool = False):
        self.model = transformer
        self.dtype = dtype
        self.heads = int(transformer.config.num_attention_heads)
        self.weights = [block_weights(block) for block in transformer.blocks]
        self.block = torch.compile(block_forward, dynamic=False) if compiled else block_forward

    def rotary(self, positions: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (S * P, hd / 2) of slots at frame numbers `positions` (S,)."""
        rope, (height, width) = self.model.rope, grid
        out = []
        for table in (rope.freqs_cos, rope.freqs_sin):
            t, y, x = table.split([rope.t_dim, rope.h_dim, rope.w_dim], dim=1)
            frames = len(positions)
            parts = (
                t[positions].view(frames, 1, 1, -1).expand(frames, height, width, -1),
                y[:height].view(1, height, 1, -1).expand(frames, height, width, -1),
                x[:width].view(1, 1, width, -1).expand(frames, height, width, -1),
            )
            # The tables repeat every angle for the two halves of its pair.
            out.append(torch.cat(parts, dim=-1).reshape(frames * height * width, -1)[:, 0::2].float())
        return out[0], out[1]

    def __call__(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        bias: torch.Tensor,
        positions: torch.Tensor,
        mask: BlockMask | torch.Tensor | None = None,
        past: Sequence[Cache] | None = None,
        keep: list[Cache] | None = None,
    ) -> torch.Tensor:
        """Velocity (B, C, S, H, W) of normalised latents at `timesteps` (B, S) in 0..1000.

        `embeddings` (B, T, text_dim) are the prompts' words, zero past each prompt; `bias` (B, S, T) is `text_bias`.
        Keys and values of every layer are appended to `keep`.
        """
        model, embedder = self.model, self.model.condition_embedder
        b, c, s, height, width = latents.shape
        gh, gw = height // 2, width // 2
        x = latents.reshape(b, c, s, gh, 2, gw, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, s, gh * gw, c * 4)
        weight = model.patch_embedding.weight
        hidden = _linear(x.to(self.dtype), weight.reshape(weight.shape[0], -1), model.patch_embedding.bias)
        wave = embedder.timesteps_proj(timesteps.reshape(-1).float())
        time = embedder.time_embedder(wave).view(b, s, -1)
        modulation = embedder.time_proj(embedder.act_fn(time)).view(b, s, 6, -1)
        context = embedder.text_embedder(embeddings.float()).to(self.dtype)
        cos, sin = self.rotary(positions, (gh, gw))
        for index, weights in enumerate(self.weights):
            hidden, k, v = self.block(
                weights,
                self.heads,
                hidden,
                modulation,
                context,
                bias,
                cos,
                sin,
                mask,
                None if past is None else past[index],
            )
            if keep is not None:
                keep.append((k, v))
        table = model.scale_shift_table.view(1, 1, 2, -1) + time.unsqueeze(2)
        shift, scale = table.unbind(2)
        hidden = (_layer_norm(hidden) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).to(self.dtype)
        out = _linear(hidden, model.proj_out.weight, model.proj_out.bias).float()
        return out.view(b, s, gh, gw, 2, 2, c).permute(0, 6, 1, 2, 4, 3, 5).reshape(b, c, s, height, width)


class Masks:
    """Attention masks of layouts: flex block masks on CUDA, dense booleans elsewhere.

    All flex masks of one size read one buffer, so that they are the same function and need one compiled graph.
    """

    def __init__(self, layouts: Sequence[Layout], tokens: int, device: torch.device, flex: bool) -> None:
        self.allowed = {layout.name: layout.allowed.to(device) for layout in layouts}
        self.tokens = tokens
        self.buffer = torch.zeros_like(next(iter(self.allowed.values())))
        self.flex: dict[str, BlockMask] = {}
        if flex:
            buffer = self.buffer

            def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
                return buffer[q // tokens, k // tokens]

            queries, keys = (side * tokens for side in buffer.shape)
            for name, allowed in self.allowed.items():
                self.buffer.copy_(allowed)
                self.flex[name] = create_block_mask(visible, None, None, queries, keys, device=device)

    def select(self, name: str) -> BlockMask | torch.Tensor:
        """The mask of a layout; valid until the next call."""
        if self.flex:
            self.buffer.copy_(self.allowed[name])
            return self.flex[name]
        return self.dense(name)

    def dense(self, name: str) -> torch.Tensor:
        """The mask between tokens, booleans."""
        return self.allowed[name].repeat_interleave(self.tokens, 0).repeat_interleave(self.tokens, 1)


def shifted(uniform: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise level of a uniform draw under the scheduler's shift."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def latent_frames(count: int) -> int:
    """Latent frames of a clip of `count` frames."""
    return (count + 2) // 4 + 1
