"""What families share whose attention is joint over video and text, with the text last."""

from typing import Any

import torch
from torch import Tensor

from diffaccel.rotary import rotate

from .common import ToSeam

KEEPS_PROMPT = "its prompt is read in one attention with the video and changed by every layer, so all of it stays"


class JointToSeam(ToSeam):
    """Mixed into a stock processor: its call, with its kernel call replaced by the seam, which leaves padding out."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        both = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k
        own = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        q, k, v = project(attn, hidden_states, *both)
        if image_rotary_emb is not None:
            q, k = self.turned(q, image_rotary_emb), self.turned(k, image_rotary_emb)
        # dual-stream blocks have weights of the text's own, single-stream ones the same for both
        text = project(attn, encoder_hidden_states, *(both if attn.add_q_proj is None else own))
        q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), text, strict=True))
        out = self.attend(q, k, v).flatten(2, 3).type_as(q)
        video, words = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        to_words = getattr(attn, "to_add_out", None)  # a last layer may have none
        return video, words if to_words is None else to_words(words)

    def turned(self, x_BSHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """The video's queries or keys in their rotary positions; tables are (S, D)."""
        cos, sin = rotary
        return rotate(x_BSHD, cos[:, None], sin[:, None])


def project(
    attn: Any, x_BSC: Tensor, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normalised head by head, and values, all (B, S, H, D)."""
    q, k, v = (to(x_BSC).unflatten(2, (attn.heads, -1)) for to in (to_q, to_k, to_v))
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v
