"""Plans and log-weights for kernels that know neither: gather the keys, attend densely, put the rows back."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..plan import Plan
from .inputs import check
from .merge import Partial, merge, nothing

Dense = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Partial]


def planned(
    dense: Dense,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    log_weight: Tensor | None,
    plan: Plan | None,
    shares_heads: bool = False,
) -> Partial:
    """`dense` under a plan. The plan's groups are walked on the host: one dense call a distinct set of keys.

    `shares_heads` is whether `dense` takes keys of fewer heads than queries.
    """
    check(q, k, v)
    if 0 in (q.numel(), k.shape[1]):
        return nothing(q)
    if q.shape[2] != k.shape[2] and not shares_heads:
        dense = _folded(dense)
    # channels that do not lie side by side: some kernels refuse them, PyTorch's on the CPU reads others
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if plan is None:
        return dense(q, k, v, scale, log_weight)
    if plan.keep.shape[0] == 1:  # every query reads the same keys: nothing to scatter
        kept = next(plan.groups())[1].to(q.device)
        return _gathered(dense, q, k, v, scale, log_weight, kept)
    result = nothing(q)
    for rows, kept in plan.groups():
        rows, kept = rows.to(q.device), kept.to(q.device)
        part = _gathered(dense, q.index_select(1, rows), k, v, scale, log_weight, kept)
        result.out.index_copy_(1, rows, part.out)
        result.lse.index_copy_(1, rows, part.lse)
    return result


def _gathered(
    dense: Dense, q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor | None, kept: Tensor
) -> Partial:
    if kept.numel() == 0:
        return nothing(q)
    weight = None if log_weight is None else torch.index_select(log_weight, 0, kept)
    return dense(q, k.index_select(1, kept), v.index_select(1, kept), scale, weight)


def _folded(dense: Dense) -> Dense:
    """`dense` where several heads share a key: they become queries of that one head, and no key is copied."""

    def fold(q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor | None) -> Partial:
        batch, queries, heads, _ = q.shape
        shared, each = k.shape[2], heads // k.shape[2]
        rows = q.unflatten(2, (shared, each)).transpose(2, 3).flatten(1, 2)
        out, lse = dense(rows, k, v, scale, log_weight)
        out = out.unflatten(1, (queries, each)).transpose(2, 3).reshape(batch, queries, heads, -1)
        return Partial(out, lse.unflatten(1, (queries, each)).transpose(2, 3).reshape(batch, queries, heads))

    return fold


def by_weight(dense: Dense, q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor) -> Partial:
    """One dense call for each distinct log-weight, which then only moves that call's log-sum-exp; exact."""
    parts = []
    for weight in torch.unique(log_weight):  # read on the host: entries grouped beforehand do without (weighted.py)
        part = _gathered(dense, q, k, v, scale, None, (log_weight == weight).nonzero().squeeze(1))
        parts.append(Partial(part.out, part.lse + weight))
    return merge(parts)
