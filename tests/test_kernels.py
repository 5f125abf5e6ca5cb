"""Every kernel computes what `reference` defines, and `reference` computes softmax attention."""

from math import log
from types import SimpleNamespace

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel import KernelError, KnobError, Plan
from diffaccel.cache import Entries
from diffaccel.kernel import KERNELS, Partial, merge, nothing, resolve
from diffaccel.kernel.merge import merge_eager
from diffaccel.kernel.weighted import grouped, launches, log_channels, over_entries

SHAPES = [  # B, S, N, H, D
    (1, 1, 1, 1, 8),
    (2, 7, 5, 3, 16),
    (1, 63, 129, 2, 64),
    (2, 100, 61, 1, 40),
    (1, 33, 1000, 2, 128),
]
HERE = [name for name in KERNELS if KERNELS[name].unusable(torch.device("cpu"), torch.float32, 64) is None]
CASES = [(name, "cpu") for name in HERE] + [
    pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("reference", "sdpa", "split", "fa3", "fa4")
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


@pytest.mark.parametrize(("name", "device"), CASES)
@pytest.mark.parametrize("layout", [(0, 2, 3, 1), (0, 3, 2, 1), (2, 1, 0, 3)], ids=str)
def test_tensors_may_be_laid_out_in_any_order(name, device, layout):
    if device == "cuda":
        skip_if_unusable(name, device, torch.bfloat16, 64)
    q, k, v = (
        x.permute(layout).contiguous().permute([layout.index(axis) for axis in range(4)])
        for x in tensors((2, 33, 49, 2, 64), torch.bfloat16, device)
    )
    out, lse = attention64(q, k, v, scale=0.3)
    found = KERNELS[name].partial(q, k, v, scale=0.3)
    assert_within(found.out, out, torch.bfloat16, inputs=float(v.abs().max()))
    assert_within(found.lse, lse, torch.float32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "device"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (3, 1)], ids=str)
def test_neighbouring_heads_may_share_keys(name, device, dtype, kind, heads, shared):
    shape = (2, 37, 61, heads, 64)
    if device == "cuda":
        skip_if_unusable(name, device, dtype, shape[-1])
    q, k, v = tensors(shape, dtype, device)
    k, v = k[:, :, :shared], v[:, :, :shared]
    extra = options(kind, shape, device)
    found = KERNELS[name].partial(q, k, v, scale=0.3, **extra)
    mask = extra["plan"].mask().to(device) if "plan" in extra else None
    each = [x[:, :, [head // (heads // shared) for head in range(heads)]] for x in (k, v)]
    out, lse = attention64(q, *each, scale=0.3, log_weight=extra.get("log_weight"), mask=mask)
    assert found.out.shape == q.shape
    assert_within(found.out, out, dtype, inputs=float(v.abs().max()))
    assert_within(found.lse, lse, torch.float32)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("shape", [(2, 5, 0, 2, 16), (0, 5, 3, 2, 16), (2, 0, 3, 2, 16), (2, 5, 3, 0, 16)], ids=str)
def test_of_nothing_comes_nothing(name, shape):
    q, k, v = tensors(shape, torch.float32)
    found = KERNELS[name].partial(q, k, v, scale=1.0)
    assert torch.equal(found.out, torch.zeros_like(q))
    assert torch.equal(found.lse, torch.full(q.shape[:3], -torch.inf))


@pytest.mark.parametrize("name", HERE)
def test_inputs_that_do_not_fit_are_named(name):
    q, k, v = tensors((2, 5, 7, 4, 16), torch.float32)
    for bad, match in (
        ((q, k[:, :, :3], v[:, :, :3]), "multiple of those of keys, got 4 and 3"),
        ((q, k[:, :, :0], v[:, :, :0]), "multiple of those of keys, got 4 and 0"),
        ((q, k[:, :, :2], v), r"of the same batch.*got \(2, 5, 4, 16\), \(2, 7, 2, 16\), \(2, 7, 4, 16\)"),
        ((q, k[:1], v[:1]), r"of the same batch.*got \(2, 5, 4, 16\), \(1, 7"),
        ((q, k, v[:, :6]), r"\(2, 6, 4, 16\)"),
        ((q, k[..., :8], v), "as wide as queries"),
        ((q[0], k[0], v[0]), r"got \(5, 4, 16\)"),
        ((q, k.half(), v), "one dtype on one device, got torch.float32 on cpu, torch.float16 on cpu"),
        ((q, k, v.to("meta")), "torch.float32 on meta: move or convert"),
    ):
        with pytest.raises(KernelError, match=match):
            KERNELS[name].partial(*bad, scale=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["reference", "sdpa", "split", "fa3", "fa4"])
def test_another_device_is_named(name):
    skip_if_unusable(name, "cuda", torch.bfloat16, 64)
    q, k, v = tensors((2, 5, 7, 4, 64), torch.bfloat16, "cuda")
    with pytest.raises(KernelError, match=r"on cuda:0, torch\.bfloat16 on cpu, torch\.bfloat16 on cuda:0: move"):
        KERNELS[name].partial(q, k.cpu(), v, scale=0.3)


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
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 7, 3, 24), (1, 21, 2, 128)], ids=str)
def test_the_fused_merge_equals_the_written_out_one(device, dtype, count, shape, first):
    """However the partials are laid out, and whichever comes first."""
    from diffaccel.kernel.fused_merge import merged

    batch, queries, heads, dim = shape
    parts = []
    for number in range(count):
        out, lse = torch.randn(batch, queries, heads, dim).to(device, dtype), 5 * torch.randn(shape[:3], device=device)
        if (number + first) % 3 != 1:
            lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # by head, as most kernels write it
        if (number + first) % 3 == 2:  # part of something larger, in no common order
            out = torch.nn.functional.pad(out, (0, 8)).transpose(1, 2).contiguous().transpose(1, 2)[..., :dim]
            lse = torch.nn.functional.pad(lse.transpose(1, 2), (0, 5))[..., :queries].transpose(1, 2)
        empty = torch.rand(lse.shape, device=device) < (0.3 if number else 0.6)
        empty[:, 0] = True  # the first query has no key anywhere
        out[empty], lse[empty] = 0, -torch.inf
        parts.append(Partial(out, lse))
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


# Kinds of multiplicity as ((entries, tokens each), ...), and how many launches they take.
GROUPS = {
    "all small": (tuple((3, m) for m in (*range(1, 24), 1000)), 1),
    "one key each": (tuple((1, m) for m in (*range(1, 24), 1000)), 1),
    "small ones around a large one": (((2, 1), (9, 2), (60, 3), (1, 4), (7, 1000)), 2),
    "small ones between large ones": (((40, 1), (3, 2), (40, 3), (1, 1000), (40, 4), (2, 5), (1, 7)), 4),
    "some without entries": (((0, 1), (50, 2), (0, 3), (1, 4), (1, 1000)), 2),
    "none with entries": (((0, 1), (0, 2)), 2),
    "a single small one": (((50, 1), (2, 1000)), 2),
    "one": (((13, 1000),), 1),
    "eight of an eighth": (tuple((2, m) for m in range(1, 9)), 8),
    "nine of a ninth": (tuple((2, m) for m in range(1, 10)), 1),
}


def counted(kernel, width=None):
    """`kernel`, keeping the widths of keys and values of its calls; `width` in place of its own `value_width`."""
    calls = []

    def partial(q, k, v, **options):
        assert "log_weight" not in options
        calls.append((k.shape[-1], v.shape[-1]))
        return kernel.partial(q, k, v, **options)

    return SimpleNamespace(partial=partial, value_width=width or kernel.value_width, calls=calls)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["reference", "reference, padded values", "sdpa"])
@pytest.mark.parametrize("kind", GROUPS)
def test_small_groups_in_one_launch_equal_a_bias(kind, name, dtype, dim):
    """The log-weight as channels of the keys, against fp64 and the same bounds as any kernel."""
    sizes, count = GROUPS[kind]
    q, k, v = tensors((2, 9, sum(n for n, _ in sizes), 2, dim), dtype)
    entries = Entries(k, v, multiplicity=sizes)
    padded = (lambda device, dtype, key_dim, value_dim: key_dim) if "padded" in name else None
    kernel = counted(KERNELS[name.split(",")[0]], padded)
    found = grouped(kernel, q, entries, dim**-0.5)
    weight = torch.tensor([log(m) for n, m in sizes for _ in range(n)], dtype=torch.float64)
    out, lse = attention64(q, k, v, log_weight=weight)
    assert found.out.dtype == dtype
    assert found.lse.dtype == torch.float32
    # each launch rounds its result to the dtype, and the merge once more
    assert_within(found.out, out, dtype, inputs=(2 if count > 1 else 1) * float(v.abs().max()) if v.numel() else 0.0)
    assert_within(found.lse, lse, torch.float32)
    assert len(kernel.calls) == count
    wide = dim if name == "reference" else dim + 8
    assert sorted(kernel.calls)[:-1] == [(dim, dim)] * (count - 1)
    assert max(kernel.calls) in ((dim, dim), (dim + 8, wide))


def test_a_kernel_without_room_reads_every_group_alone():
    sizes, _ = GROUPS["small ones between large ones"]
    q, k, v = tensors((1, 9, sum(n for n, _ in sizes), 2, 64), torch.float32)
    entries = Entries(k, v, multiplicity=sizes)
    kernel = counted(KERNELS["sdpa"], lambda *_: None)
    found = grouped(kernel, q, entries, 0.3)
    out, lse = attention64(q, k, v, scale=0.3, log_weight=entries.log_weight())
    assert kernel.calls == [(64, 64)] * len(sizes)
    assert_within(found.out, out, torch.float32, inputs=2 * float(v.abs().max()))
    assert_within(found.lse, lse, torch.float32)


def test_groups_of_an_eighth_are_read_alone():
    alone, together = launches(((2, 1), (10, 2), (9, 3), (0, 4), (59, 5)))  # of 80
    assert alone == [(slice(2, 12), 2), (slice(21, 80), 5)]
    assert together == [(slice(0, 2), 1), (slice(12, 21), 3), (slice(21, 21), 4)]
    alone, together = launches(((71, 1), (9, 2)))  # one of the two is small: nothing to share a launch with
    assert alone == [(slice(0, 71), 1), (slice(71, 80), 2)]
    assert together == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [8, 64, 128, 256])
def test_three_parts_hold_a_log_weight_as_fp32_does(dim, dtype):
    tokens, scale = (*range(1, 200), 1000, 10**6), dim**-0.5
    groups = [(slice(2 * i, 2 * i + 2), m) for i, m in enumerate(tokens)]
    channels = log_channels(groups, scale, torch.empty(0, dtype=dtype))
    assert channels.dtype == dtype
    assert channels.shape == (2 * len(tokens), 8)
    exact = torch.tensor([log(m) for m in tokens for _ in range(2)], dtype=torch.float64)
    # a bfloat16 rounds by up to 2^-8 of a number, three leave 2^-24; a float16 has no digits below 2^-24
    allowed = 2**-24 * exact + (2**-25 * scale if dtype == torch.float16 else 0) + 1e-15
    assert ((channels.double().sum(-1) * scale - exact).abs() <= allowed).all()


def test_which_kernel_takes_keys_wider_than_values(monkeypatch):
    cuda, half = torch.device("cuda"), torch.bfloat16
    fa3, sdpa = KERNELS["fa3"].value_width, KERNELS["sdpa"].value_width
    assert [fa3(cuda, half, dim + 8, dim) for dim in (64, 96, 128, 192, 256)] == [72, 104, 128, 200, None]
    assert sdpa(cuda, torch.float32, 264, 256) == 256
    for capability, version, widest in (((9, 0), 91000, 128), ((9, 0), 90800, None), ((8, 0), 91000, None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda found=version: found)
        assert [sdpa(cuda, half, dim + 8, dim) for dim in (64, 120, 128)] == [72, 128, widest]


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
    with pytest.raises(KernelError, match=r"float64 on cpu, not torch\.float8_e4m3fn"):
        resolve("sdpa", cpu, torch.float8_e4m3fn, 64)
    with pytest.raises(KnobError, match=r"did you mean 'sdpa'"):
        resolve("sdqa", cpu, torch.float32, 64)
