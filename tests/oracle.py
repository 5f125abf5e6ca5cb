"""Attention written out in fp64, and error budgets derived from it."""

import torch


def attention64(q, k, v, *, scale=None, log_weight=None, mask=None):
    """Plain softmax attention in fp64: out (B, S, H, D) and lse (B, S, H)."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bshd,bnhd->bshn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if log_weight is not None:
        scores = scores + log_weight.double()
    if mask is not None:
        scores = scores.masked_fill(~mask[None, :, None, :], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return torch.einsum("bshn,bnhd->bshd", weights, v), lse


def budget(exact, dtype, *, inputs=1.0):
    """How far a correct result in `dtype` may lie from the fp64 one, largest absolute difference.

    Twice what rounding the result itself costs, plus one rounding of probabilities of the size of `inputs`: a kernel
    keeps scores and sums in fp32, so only these two roundings are in `dtype`.
    """
    eps = torch.finfo(dtype).eps
    finite = exact[torch.isfinite(exact)].abs()
    size = float(finite.max()) if finite.numel() else 1.0
    fp32 = 64 * torch.finfo(torch.float32).eps * max(size, 1.0)  # sums of up to a few thousand terms, in fp32
    return 2 * eps * max(size, inputs) + fp32


def assert_within(found, exact, dtype, *, inputs=1.0):
    found, exact = found.double(), exact.double()
    assert found.shape == exact.shape, f"shapes differ: {tuple(found.shape)} and {tuple(exact.shape)}"
    same_infinite = torch.equal(torch.isinf(found), torch.isinf(exact))
    assert same_infinite, "infinities differ"
    assert not torch.isnan(found).any(), "NaN in the result"
    finite = torch.isfinite(exact)
    error = float((found - exact)[finite].abs().max()) if finite.any() else 0.0
    allowed = budget(exact, dtype, inputs=inputs)
    assert error <= allowed, f"largest error {error:.3g} exceeds the budget {allowed:.3g} of {dtype}"
