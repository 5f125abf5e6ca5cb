"""Every kernel computes what `reference` defines, and `reference` computes softmax attention."""

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel import KernelError, KnobError, Plan
from diffaccel.cache import Entries
from diffaccel.kernel import KERNELS, Partial, merge, nothing, resolve
from diffaccel.kernel.merge import merge_eager
from diffaccel.kernel.weighted import over_entries

SHAPES = [  # B, S, N, H, D
    (1, 1, 1, 1, 8),
    (2, 7, 5, 3, 16),
    (1, 63, 129, 2, 64),
    (2, 100, 61, 1, 40),
    (1, 33, 1000, 2, 128),
]
HERE = [name for name in KERNELS if KERNELS[name].unusable(torch.device("cpu"), torch.float32, 64) is None]
CASES = [(name, "cpu") for name in HERE] + [
    pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("reference", "sdpa", "split", "fa3")
]
KINDS = ["plain", "weights", "columns", "plan", "plan and weights"]


def tensors(shape, dtype, device="cpu"):
    batch, queries, keys, heads, dim = shape
    sizes = (queries, keys, keys)
    return [torch.randn(batch, n, heads, dim).to(device, dtype) for n in sizes]


def options(kind, shape, device="cpu"):
    _, queries, keys, _, _ = shape
    found = {}
    if "weights" in kind:
        found["log_weight"] = torch.randint(1, 6, (keys,)).float().log().to(device)
    if kind == "columns":
        kept = torch.rand(keys) < 0.6
        kept[0] = True
        found["plan"] = Plan.columns(kept, queries)
    elif "plan" in kind:
        blocks = -(-queries // 16), -(-keys // 8)
        keep = torch.rand(*blocks) < 0.5
        keep[0] = False  # the first queries read nothing at all
        found["plan"] = Plan(keep, queries, keys, 16, 8)
    return found


def skip_if_unusable(name, device, dtype, dim):
    reason = KERNELS[name].unusable(torch.device(device), dtype, dim)
    if reason:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "device"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_attention(name, device, dtype, kind, shape):
    if device == "cuda":
        skip_if_unusable(name, device, dtype, shape[-1])
    q, k, v = tensors(shape, dtype, device)
    extra = options(kind, shape, device)
    found = KERNELS[name].partial(q, k, v, scale=0.3, **extra)
    mask = extra["plan"].mask().to(device) if "plan" in extra else None
    out, lse = attention64(q, k, v, scale=0.3, log_weight=extra.get("log_weight"), mask=mask)
    assert found.out.dtype == dtype
    assert found.lse.dtype == torch.float32
    assert_within(found.out, out, dtype, inputs=float(v.abs().max()))
    assert_within(found.lse, lse, torch.float32)


@pytest.mark.parametrize("name", HERE)
def test_no_keys_is_nothing(name):
    q, k, v = tensors((2, 5, 0, 2, 16), torch.float32)
    found = KERNELS[name].partial(q, k, v, scale=1.0)
    assert torch.equal(found.out, torch.zeros_like(q))
    assert torch.equal(found.lse, torch.full((2, 5, 2), -torch.inf))


@pytest.mark.parametrize("pieces", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_attention_over_the_union(pieces, dtype):
    q, k, v = tensors((2, 9, 40, 2, 32), dtype)
    cuts = torch.arange(40).tensor_split(pieces)
    parts = [KERNELS["sdpa"].partial(q, k[:, cut], v[:, cut], scale=0.2) for cut in cuts]
    out, lse = attention64(q, k, v, scale=0.2)
    found = merge([nothing(q), *parts, nothing(q)])
    assert_within(found.out, out, dtype, inputs=2 * float(v.abs().max()))
    assert_within(found.lse, lse, torch.float32)


def test_merge_needs_the_natural_logarithm():
    """The check above can fail: a base-2 lse, as some libraries return, is caught."""
    q, k, v = tensors((1, 9, 40, 2, 32), torch.float32)
    parts = [KERNELS["sdpa"].partial(q, k[:, cut], v[:, cut], scale=0.2) for cut in torch.arange(40).tensor_split(2)]
    wrong = merge([Partial(part.out, part.lse / torch.log(torch.tensor(2.0))) for part in parts])
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within(wrong.out, attention64(q, k, v, scale=0.2)[0], torch.float32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 7, 3, 24), (1, 21, 2, 128)], ids=str)
def test_the_fused_merge_equals_the_written_out_one(device, dtype, count, shape):
    from diffaccel.kernel.fused_merge import merged

    batch, queries, heads, dim = shape
    parts = []
    for number in range(count):
        out = torch.randn(batch, heads, queries, dim).to(device, dtype).transpose(1, 2)  # strided, as kernels return it
        lse = 5 * torch.randn(batch, heads, queries, device=device).transpose(1, 2)
        empty = torch.rand(lse.shape, device=device) < (0.3 if number else 0.6)
        empty[:, 0] = True  # the first query has no key anywhere
        parts.append(Partial(out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)))
    exact = merge_eager([Partial(part.out.double(), part.lse.double()) for part in parts])
    out, lse = merged([part.out for part in parts], [part.lse for part in parts])
    assert out.dtype == dtype
    assert_within(out, exact.out, dtype, inputs=4)
    assert_within(lse, exact.lse, torch.float32)


def test_merge_of_nothing_is_nothing():
    q = torch.randn(1, 3, 2, 8)
    found = merge([nothing(q), nothing(q)])
    assert torch.equal(found.out, torch.zeros_like(q))
    assert torch.isneginf(found.lse).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "sizes", [((30, 1), (20, 2), (7, 5)), ((700, 1), (3, 2), (2, 3), (600, 4)), ((600, 3),)], ids=str
)
def test_three_exact_routes_for_a_multiplicity(device, sizes):
    """Grouped entries == one bias per key == the tokens written out that often (FAST-AR, lemma 5.1)."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    count = sum(n for n, _ in sizes)
    q, k, v = tensors((1, 21, count, 2, 64), dtype, device)
    entries = Entries(k, v, multiplicity=sizes)
    times = torch.tensor([m for n, m in sizes for _ in range(n)], device=device)
    written_out = [x.repeat_interleave(times, 1) for x in (k, v)]
    out, lse = attention64(q, *written_out)
    scale = 64**-0.5
    for found in (
        over_entries(KERNELS["sdpa"], q, entries, scale, None),
        KERNELS["sdpa"].partial(q, k, v, scale=scale, log_weight=entries.log_weight()),
        KERNELS["sdpa"].partial(q, *written_out, scale=scale),
    ):
        assert_within(found.out, out, dtype, inputs=float(v.abs().max()))
        assert_within(found.lse, lse, torch.float32)


def test_a_batch_row_equals_the_row_alone():
    q, k, v = tensors((3, 17, 29, 2, 32), torch.float32)
    both = KERNELS["sdpa"].partial(q, k, v, scale=0.2)
    for row in range(3):
        alone = KERNELS["sdpa"].partial(q[row : row + 1], k[row : row + 1], v[row : row + 1], scale=0.2)
        assert torch.equal(alone.out[0], both.out[row])
        assert torch.equal(alone.lse[0], both.lse[row])


def test_auto_chooses_and_explicit_never_falls_back():
    cpu = torch.device("cpu")
    assert resolve("auto", cpu, torch.float32, 64).name == "sdpa"
    assert resolve("reference", cpu, torch.float32, 64).name == "reference"
    with pytest.raises(KernelError, match="Hopper"):
        resolve("fa3", cpu, torch.bfloat16, 64)
    with pytest.raises(KnobError, match=r"did you mean 'sdpa'"):
        resolve("sdqa", cpu, torch.float32, 64)
