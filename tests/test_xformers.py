"""The kernel that calls xFormers: by a stand-in for the library here, by the library itself on a GPU."""

import sys

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel import KernelError, Plan
from diffaccel.kernel import KERNELS, resolve, xformers

CUDA = torch.device("cuda")

# What xFormers 0.0.35 documents: BMHK tensors, (B, H, M) lse, fp32 unless told otherwise; it takes no odd rows.
FMHA = """
import torch
from collections import namedtuple

Inputs = namedtuple("Inputs", "query key value scale is_partial")

def _dispatch_fw(inputs, needs_gradient):
    assert needs_gradient and inputs.is_partial
    if inputs.query.dtype not in (torch.float32, torch.bfloat16) or inputs.query.shape[-1] > 256:
        raise NotImplementedError("No operator with inputs:\\n  q\\n`fa2F` is not supported because:\\n    too wide")

def memory_efficient_attention_partial(query, key, value, attn_bias=None, *, scale, output_dtype=None):
    assert attn_bias is None and query.shape[2:] == key.shape[2:] == value.shape[2:]
    assert all(x.stride(-1) == 1 and x.stride(-2) % 8 == 0 for x in (query, key, value))
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
    scores = q @ k.mT * scale
    out = (scores.softmax(-1) @ v).transpose(1, 2).to(output_dtype or torch.float32)
    lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, -q.shape[2] % 32), value=torch.nan)
    return out, lse
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A function that writes the stand-in, with a reason why its compiled parts do not load."""
    metadata = tmp_path / "xformers-0.0.35.dist-info" / "METADATA"
    files = {
        tmp_path / "xformers" / "__init__.py": "",
        tmp_path / "xformers" / "ops" / "__init__.py": "",
        tmp_path / "xformers" / "ops" / "fmha.py": FMHA,
        tmp_path / "xformers" / "cpp_lib.json": '{"version": {"torch": "2.10.0+cu128"}}',
        metadata: "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\nRequires-Dist: torch>=2.10\n",
    }

    def write(failed=None, fmha=FMHA):
        files[tmp_path / "xformers" / "ops" / "fmha.py"] = fmha
        files[tmp_path / "xformers" / "_cpp_lib.py"] = f"_cpp_library_load_exception = {failed}"
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def forget():
        xformers._broken.cache_clear()
        xformers._refused.cache_clear()
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "xformers"}

    real = forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    forget()
    sys.modules.update(real)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "weights", "plan", "shared heads", "odd rows"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_is_attention(kind, dtype, device, request):
    if device == "cpu":
        request.getfixturevalue("library")()
    elif reason := xformers.unusable(CUDA, dtype, 64):
        pytest.skip(f"xformers: {reason}")
    shared, options = (2 if kind == "shared heads" else 4), {}
    q, k, v = (torch.randn(2, n, h, 64).to(device, dtype) for n, h in ((33, 4), (61, shared), (61, shared)))
    if kind == "weights":
        options["log_weight"] = torch.randint(1, 6, (61,)).float().log().to(device)
    if kind == "plan":
        keep = torch.rand(3, 8) < 0.5
        keep[0] = False
        options["plan"] = Plan(keep, 33, 61, 16, 8)
    if kind == "odd rows":
        k, v = (torch.nn.functional.pad(x, (0, 3))[..., :64] for x in (k, v))
    found = xformers.partial(q, k, v, scale=0.3, **options)
    mask = options["plan"].mask().to(device) if "plan" in options else None
    each = [x.repeat_interleave(4 // shared, 2) for x in (k, v)]
    out, lse = attention64(q, *each, scale=0.3, log_weight=options.get("log_weight"), mask=mask)
    assert found.out.dtype == dtype
    assert found.lse.dtype == torch.float32
    assert_within(found.out, out, dtype, inputs=float(v.abs().max()))
    assert_within(found.lse, lse, torch.float32)


def test_why_it_cannot_run(library):
    assert xformers.unusable(torch.device("cpu"), torch.float32, 64) == "it runs on cuda, not on cpu"
    library()
    assert xformers._broken() is None
    assert xformers._refused(torch.device("cpu"), torch.float32, 64) is None
    reason = "none of its operators takes torch.float32 and 512 channels there: fa2F is not supported because: too wide"
    assert xformers._refused(torch.device("cpu"), torch.float32, 512) == reason


def test_it_is_not_installed(monkeypatch):
    def absent(_):
        raise xformers.metadata.PackageNotFoundError

    monkeypatch.setattr(xformers.metadata, "version", absent)
    xformers._broken.cache_clear()
    with pytest.raises(KernelError, match=r"'xformers' cannot run here: .*pip install diffaccel\[xformers\]"):
        resolve("xformers", CUDA, torch.bfloat16, 64)
    xformers._broken.cache_clear()


@pytest.mark.parametrize(
    ("failed", "fmha", "said"),
    [
        (
            "RuntimeError('xFormers can\\'t load C++ extensions. xFormers was built for:\\nmore')",
            FMHA,
            "can't load C++ ext",
        ),
        (None, "raise ImportError('Requires Flash-Attention version >=2.7.1')", "Requires Flash-Attention version"),
        (None, "import flash_attn_of_another_kind", "No module named 'flash_attn_of_another_kind'"),
        (None, "raise OSError('undefined symbol')", "undefined symbol"),
    ],
)
def test_it_does_not_load_beside_this_torch(library, failed, fmha, said):
    library(failed, fmha)
    reason = xformers.unusable(CUDA, torch.bfloat16, 64)
    assert reason.startswith(f"xformers 0.0.35 does not load beside torch {torch.__version__}: ")
    assert said in reason
    assert reason.endswith("; it was built for torch 2.10.0+cu128 and asks for torch>=2.10: install that pair")


def test_it_is_a_kernel_to_ask_for():
    assert KERNELS["xformers"] is xformers
