"""The kernel that calls SageAttention: by a stand-in for the library here, by the library itself on a GPU."""

import sys

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel import KernelError, Plan
from diffaccel.kernel import EXACT, KERNELS, resolve, sage

CUDA = torch.device("cuda")

# As version 2 documents it: "NHD" tensors, the natural log-sum-exp (B, H, S) on demand; one scale a block and head.
LIBRARY = """
import torch
from torch.nn.functional import pad

def rounded(x, block):
    blocks = pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
    step = blocks.abs().amax((-1, -2), keepdim=True).clamp(min=1e-9) / 127
    return ((blocks / step).round() * step).flatten(2, 3)[:, :, : x.shape[2]]

def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD" and return_lse and q.shape[2] == k.shape[2] and not kwargs
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    mean = k.mean(2, keepdim=True)
    scores = (rounded(q, 32) @ rounded(k - mean, 64).mT + q @ mean.mT) * sm_scale
    return (scores.softmax(-1) @ v).transpose(1, 2).to(dtype), scores.logsumexp(-1)
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A function that writes the stand-in, of some version."""

    def write(version="2.2.0", text=LIBRARY):
        about = tmp_path / f"sageattention-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sageattention\nVersion: {version}\n")
        (tmp_path / "sageattention.py").write_text(text)

    def forget():
        sage._broken.cache_clear()
        sage._fits.clear()
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "sageattention"}

    real = forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    forget()
    sys.modules.update(real)


def tensors(shape, dtype, device="cpu", shared=None):
    b, s, n, h, d = shape
    return [
        torch.randn(b, tokens, heads, d).to(device, dtype)
        for tokens, heads in ((s, h), (n, shared or h), (n, shared or h))
    ]


@pytest.mark.parametrize("kind", ["plain", "weights", "plan", "shared heads"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_is_attention_within_its_budget(kind, device, request):
    if device == "cpu":
        request.getfixturevalue("library")()
    elif reason := sage.unusable(CUDA, torch.bfloat16, 64):
        pytest.skip(f"sage: {reason}")
    shared, options = (2 if kind == "shared heads" else 4), {}
    q, k, v = tensors((2, 133, 261, 4, 64), torch.bfloat16, device, shared)
    k += 3  # a common offset is taken off before rounding
    if kind == "weights":
        options["log_weight"] = torch.randint(1, 6, (261,)).float().log().to(device)
    if kind == "plan":
        keep = torch.rand(9, 33) < 0.5
        keep[0], keep[1:, 0] = False, True
        options["plan"] = Plan(keep, 133, 261, 16, 8)
    found = sage.partial(q, k, v, scale=0.125, **options)
    mask = options["plan"].mask().to(device) if "plan" in options else None
    each = [x.repeat_interleave(4 // shared, 2) for x in (k, v)]
    out, lse = attention64(q, *each, scale=0.125, log_weight=options.get("log_weight"), mask=mask)
    assert (found.out.dtype, found.lse.dtype) == (torch.bfloat16, torch.float32)
    error = float((found.out - out).norm() / out.norm())
    assert 1e-4 < error < sage.BUDGET
    finite = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(found.lse), finite)
    assert float((found.lse - lse)[finite].abs().max()) < sage.BUDGET
    with pytest.raises(AssertionError, match="exceeds the budget"):  # of an exact kernel
        assert_within(found.lse, lse, torch.float32)


def test_tensors_that_8_bits_do_not_hold_are_refused(library):
    library()
    q, k, v = tensors((1, 70, 200, 2, 64), torch.bfloat16)
    sage.partial(q, k, v, scale=0.125)
    wild = [torch.randn(1, n, 2, 64, dtype=torch.bfloat16) for n in (300, 200, 200)]
    wild[0][:, :, 1, 0], wild[1][:, ::7, 1, 0] = 200.0, 200.0  # a channel that leaves no digits to the others
    rule = r"'sage' is off by [\d.e+]+ of its result and by .* at 320 x 192 x 2 x 64 in bfloat16, and 0\.05 is allowed"
    for _ in range(2):  # a size that was refused is looked at again
        with pytest.raises(KernelError, match=rule):
            sage.partial(*wild, scale=0.125)


def test_only_the_first_call_of_a_size_is_compared(library, monkeypatch):
    library()
    compared = []
    monkeypatch.setattr(sage, "_compare", lambda *arguments: compared.append(arguments[-1].queries))
    for queries in (64, 65, 128, 64):
        sage.partial(*tensors((1, queries, 100, 2, 64), torch.bfloat16), scale=0.1)
    assert compared == [64, 128]


@pytest.mark.parametrize(
    ("version", "text", "said"),
    [
        (
            "1.0.6",
            LIBRARY,
            r"^sageattention 1\.0\.6 gives no log-sum-exp, 2 and later do \(`pip install .*SageAttention`",
        ),
        ("2.2.0", "import of_another_torch", r"^sageattention 2\.2\.0 does not load beside torch .*: No module named"),
    ],
)
def test_why_it_cannot_run(library, version, text, said):
    assert sage.unusable(torch.device("cpu"), torch.float16, 64) == "it runs on cuda, not on cpu"
    library(version, text)
    with pytest.raises(KernelError, match=f"'sage' cannot run here: {said[1:]}"):
        resolve("sage", CUDA, torch.bfloat16, 64)


def test_what_it_takes(library, monkeypatch):
    library()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert sage.unusable(CUDA, torch.bfloat16, 128) is None
    assert sage.unusable(CUDA, torch.float32, 128) == "it takes float16 and bfloat16, not torch.float32"
    assert sage.unusable(CUDA, torch.bfloat16, 136) == "it takes head dimensions up to 128, not 136"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert "compute capabilities 8.0, 8.6, 8.9, 9.0, 12.0, not 10.0" in sage.unusable(CUDA, torch.bfloat16, 128)


def test_auto_never_takes_it():
    assert KERNELS["sage"] is sage
    assert sage not in EXACT
