"""Flowformer (arXiv 2202.06258): linear attention whose flow into and out of tokens is conserved."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .mixer import Mixer, Tokens

_EPS = 1e-6  # the authors' code


class Flows(NamedTuple):
    """Sums over the tokens seen, (B, H, D) unless told; `n` is their number."""

    n: float
    k: Tensor
    q: Tensor
    k_by_out: Tensor  # phi(k) over what flows out of its token, times n
    q_by_in: Tensor
    competing: Tensor  # (B, H)
    kv: Tensor  # (B, H, D, D)


class Flowformer(Mixer):
    """Flow-Attention (section 3.2), phi = sigmoid:

        I_i = phi(q_i) . sum_j phi(k_j)             O_j = phi(k_j) . sum_i phi(q_i)
        conserved I_i = phi(q_i) . sum_j phi(k_j) / O_j, and O_j likewise
        out_i = sigmoid(conserved I_i) phi(q_i) / I_i . sum_j phi(k_j)^T softmax_j(conserved O) v_j

    Conserved flows have a mean of one. As in the authors' causal code the sums run over the tokens seen so far, here
    block by block, their numbers scale the sums, and epsilon is 1e-6; with one block this is their bidirectional form
    for as many queries as keys. The weights compete among all sources, so states do not merge and there is no tier.
    """

    paper: ClassVar[str] = "Flowformer, arXiv 2202.06258"
    summary: ClassVar[str] = "linear attention in which sources compete and sinks allocate, by conservation of flow"

    def mix(self, tokens: Tokens, state: Any) -> tuple[Tensor, Any]:
        q, k, v = tokens.q.sigmoid(), tokens.k.sigmoid(), tokens.v
        was = state or Flows(0.0, *(0.0,) * 6)  # type: ignore[arg-type]
        n, k_sum, q_sum = was.n + q.shape[1], was.k + k.sum(1), was.q + q.sum(1)
        into, out = n / _flow(q, k_sum), n / _flow(k, q_sum)
        k_by_out = was.k_by_out + (k * out[..., None]).sum(1)
        q_by_in = was.q_by_in + (q * into[..., None]).sum(1)
        sink, source = _flow(q, k_by_out) / n, _flow(k, q_by_in) / n
        weight = source.exp()
        competing = was.competing + weight.sum(1)
        weight = weight / competing[:, None] * n
        kv = was.kv + torch.einsum("bshd,bshe->bhde", k, v * weight[..., None])
        found = torch.einsum("bshd,bhde->bshe", q * into[..., None] / n, kv) * sink.sigmoid()[..., None]
        return found, Flows(n, k_sum, q_sum, k_by_out, q_by_in, competing, kv)


def conserved(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Conserved flows into queries and out of keys of one block, (B, S, H) each, of phi(q) and phi(k)."""
    into, out = _flow(q, k.sum(1)), _flow(k, q.sum(1))
    return _flow(q, (k / out[..., None]).sum(1)), _flow(k, (q / into[..., None]).sum(1))


def _flow(x: Tensor, total: Tensor) -> Tensor:
    return torch.einsum("bshd,bhd->bsh", x + _EPS, total + _EPS)
