"""`diffaccel doctor`: kernels that are wrong are found, the shape is the model's, and what is broken is named."""

import json
import os
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from oracle import attention64
from tiny import HEIGHT, WIDTH, tiny_components, tiny_pipeline
from typer.testing import CliRunner

from diffaccel import Accel, doctor
from diffaccel.cli import app
from diffaccel.doctor import check, kernel_problems, machine, memory_problems
from diffaccel.doctor.check import Arm, Check, check_kernels, compare, dense_truth, judge, sparse_arm
from diffaccel.doctor.machine import Problem
from diffaccel.doctor.shape import Shape, of_model, of_pipeline
from diffaccel.kernel import KERNELS, Partial
from diffaccel.kernel.merge import HAS_TRITON
from diffaccel.pipelines.outline import outline

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = Shape(
    *("tiny", "CausalWanPipeline", "WanTransformer3DModel", True),
    layers=2,
    heads=2,
    head_dim=32,
    width=48,
    height=32,
    frames=9,
    tokens_per_frame=6,
    block=40,
    past=300,
    parameters=1000,
    branches=2,
)


@pytest.fixture
def quick(monkeypatch):
    """Imports one small module in place of all; that takes most of the command's time and is tested below."""
    monkeypatch.setattr(machine, "modules", lambda extras: {"wave": "wave"})


@pytest.fixture
def invoke(quick):
    return lambda *arguments: CliRunner().invoke(app, ["doctor", "--device", "cpu", *arguments], catch_exceptions=False)


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_healthy_cpu(invoke):
    done = invoke("--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "tiny-world at 128x128, 49 frames, bfloat16 on cpu" in done.stdout
    assert "4 heads of 64 channels; a block of 192 tokens reads itself and 640 before it" in done.stdout
    assert "fa3: it runs on Hopper GPUs" in done.stdout
    assert "auto uses sdpa;" in done.stdout
    assert 'pip install "diffaccel[xformers]"' in done.stdout or machine.version("xformers")
    assert "no problems were found" in done.stdout


def test_json_has_it_all(invoke):
    done = invoke("--json", "--size", "64x32", "--frames", "9")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"healthy", "machine", "device", "dtype", "shape", "kernels", "problems", "budget"}
    assert found["healthy"] is True
    assert found["problems"] == []
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert {extra["name"]: extra["installed"] for extra in found["machine"]["extras"]}["fa4"] is False
    assert (found["shape"]["block"], found["shape"]["past"]) == (24, 0)  # 3 latent frames are one block
    assert [row["kernel"] for row in found["kernels"]["dense"]] == list(KERNELS)
    assert found["kernels"]["auto"] == "sdpa"
    sdpa = found["kernels"]["dense"][1]
    assert sdpa["status"] == "right"
    assert 0 < sdpa["out_share"] < 1
    assert 0 < sdpa["fastest"] <= sdpa["milliseconds"] <= sdpa["slowest"]
    assert sdpa["tflops"] == pytest.approx(4 * 24 * 24 * 4 * 64 / sdpa["milliseconds"] / 1e9)


def off_by_a_little(q, k, v, *, scale, **options):
    part = KERNELS["reference"].partial(q, k, v, scale=1.02 * scale, **options)
    return Partial(part.out, part.lse)


def raises(*arguments, **options):
    raise RuntimeError("no kernel image is available\nand more")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (off_by_a_little, "kernel sdpa, which auto chooses here, is wrong: out is off by up to"),
        (raises, "kernel sdpa, which auto chooses here, does not run: RuntimeError: no kernel image is available"),
    ],
)
def test_what_auto_chooses_must_be_right(invoke, monkeypatch, fault, said):
    monkeypatch.setattr(KERNELS["sdpa"], "partial", fault)
    done = invoke("--frames", "13")
    assert done.exit_code == 1
    assert said in done.stdout
    assert "until then: --set kernel=reference" in done.stdout
    assert ("FAILED" if fault is raises else "WRONG") in done.stdout


def test_another_kernel_may_be_wrong(invoke, monkeypatch):
    monkeypatch.setattr(KERNELS["split"], "partial", off_by_a_little)
    done = invoke("--frames", "13", "--json")
    assert done.exit_code == 0
    [problem] = json.loads(done.stdout)["problems"]
    assert problem["what"].startswith("kernel split is wrong")


def test_a_kernel_that_cannot_even_be_asked(monkeypatch):
    monkeypatch.setattr(KERNELS["fa4"], "unusable", raises)
    monkeypatch.setattr(check, "sparse_unusable", lambda *_: None)
    monkeypatch.setattr(check, "sparse_arm", raises)
    found = check_kernels(SHAPE, CPU, torch.float32, seconds=0.0)
    for row in (found.of("fa4"), found.sparse):
        assert (row.status, row.reason) == ("failed", "RuntimeError: no kernel image is available")
    fixes = {problem.what.split()[1]: problem.fix for problem in kernel_problems(found)}
    assert fixes["fa4"] == "pip install --force-reinstall --no-deps flash-attn-4"
    assert fixes["triton"].startswith("pip install --force-reinstall --no-deps triton; until then leave AnnSA out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "big"], "--size takes width x height in pixels, such as 832x480, got 'big'"),
        (["--size", "100x128"], "the width in --size is a multiple of 16"),
        (["--frames", "8"], "--frames is 1 + 4k"),
        (["--frames", "0"], "--frames is 1 + 4k"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--device", "cuda:99"], "was asked for and this machine has"),
        (["--model", "nowhere"], "there is no folder 'nowhere'"),
        (["--model", "tiny-lm"], "is a language model, and this makes videos"),
    ],
)
def test_bad_arguments_are_one_sentence(invoke, monkeypatch, arguments, said):
    monkeypatch.setattr(doctor, "look", lambda: pytest.fail("something was looked at first"))
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_where_no_model_opens_the_rest_is_still_said(invoke, monkeypatch):
    def broken(*_):
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor, "of_model", broken)
    done = invoke()
    assert done.exit_code == 1
    assert f"torch {torch.__version__}, built for" in done.stdout
    assert "no model can be opened: ImportError: libGL.so.1" in done.stdout


# -- the shape -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_the_shape_is_what_the_model_attends_with(monkeypatch, kind):
    from diffusers import WanPipeline

    pipe = tiny_pipeline() if kind == "causal" else WanPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    calls = []

    def spied(q, k, v, **options):
        if k.shape[1] != 512:  # the prompt
            calls.append((q.shape[1], k.shape[1], q.shape[2], q.shape[3]))
        return sdpa(q, k, v, **options)

    sdpa = KERNELS["sdpa"].partial
    monkeypatch.setattr(KERNELS["sdpa"], "partial", spied)
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": 17}  # 5 latent frames: blocks of 2 and 3
    with Accel()(pipe):
        pipe("a red circle", **size, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    found = of_pipeline(pipe, "tiny", WIDTH, HEIGHT, 17)
    keys = 30
    assert max(calls, key=lambda call: (call[1], call[0])) == (found.block, found.keys, found.heads, found.head_dim)
    assert (found.block, found.past, found.keys) == ((18, 12, keys) if kind == "causal" else (30, 0, keys))
    assert found.causal is (kind == "causal")


def test_a_bidirectional_model_is_opened_without_its_weights(tmp_path):
    from diffusers import WanPipeline

    WanPipeline(**tiny_components()).save_pretrained(tmp_path)
    pipe = outline(tmp_path)
    assert {weight.device.type for part in (pipe.transformer, pipe.vae) for weight in part.parameters()} == {"meta"}
    assert (pipe.text_encoder, pipe.tokenizer) == (None, None)
    found = of_model(tmp_path, width=WIDTH, height=HEIGHT, frames=9)
    assert (found.pipeline, found.causal, found.block, found.past) == ("WanPipeline", False, 18, 0)
    assert (found.heads, found.head_dim, found.layers, found.branches) == (2, 24, 2, 2)
    assert found.parameters == sum(weight.numel() for weight in tiny_components()["transformer"].parameters())


def test_the_bundled_models_have_their_own_size_and_components():
    first, few = of_model(), of_model("tiny-world-few-step")  # the latter's autoencoder lies with the former
    assert (first.width, first.height, first.frames, first.tokens_per_frame) == (128, 128, 49, 64)
    assert (first.block, first.past, first.keys, first.branches) == (192, 640, 832, 2)
    assert (few.block, few.past, few.branches) == (192, 640, 1)
    assert first.cache_bytes(torch.bfloat16) == 2 * 8 * 2 * 832 * 256 * 2


# -- right and wrong -------------------------------------------------------------------------------------------------


def draw(dtype, queries=33, keys=1000, heads=2, dim=64):
    q, k, v = (torch.randn(1, n, heads, dim).to(dtype) for n in (queries, keys, keys))
    return 3 * q, k, v


def shares(compute, dtype, **sizes):
    q, k, v = draw(dtype, **sizes)
    scale = q.shape[-1] ** -0.5
    found = compare(compute(q, k, v, scale), dense_truth(q, k, v, scale), dtype)
    return found.out_share, found.lse_share


def test_the_truth_is_attention():
    q, k, v = draw(torch.float32)
    truth = dense_truth(q, k, v, 0.1)
    for values, found in ((v, truth.out), (v.abs(), truth.size)):
        out, lse = attention64(q, k, values, scale=0.1)
        assert torch.allclose(found.double(), out, atol=1e-5)
        assert torch.allclose(truth.lse.double(), lse, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [{}, {"queries": 1, "keys": 1}, {"keys": 6, "dim": 24}, {"dim": 256}], ids=str)
@pytest.mark.parametrize("name", ["reference", "sdpa", "split"])
def test_right_kernels_are_within_the_budget(name, sizes, dtype):
    out, lse = shares(lambda q, k, v, scale: KERNELS[name].partial(q, k, v, scale=scale), dtype, **sizes)
    assert out < 0.7
    assert lse < 0.7


def rounded(x, bits):
    """To so many binary digits after the first, as TF32 (10) and bfloat16 (7) do."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)


def attend(q, k, v, scale):
    part = KERNELS["reference"].partial(q.float(), k.float(), v.float(), scale=scale)
    return Partial(part.out.to(q.dtype), part.lse)


FAULTS = {
    "the scale off by a hundredth": (lambda q, k, v, s: attend(q, k, v, 1.01 * s), DTYPES),
    "64 keys not read": (lambda q, k, v, s: attend(q, k[:, :-64], v[:, :-64], s), DTYPES),
    "the last key not read": (lambda q, k, v, s: attend(q, k[:, :-1], v[:, :-1], s), DTYPES),
    "heads exchanged": (lambda q, k, v, s: attend(q, k.flip(2), v, s), DTYPES),
    "values of another head": (lambda q, k, v, s: attend(q, k, v.flip(2), s), DTYPES),
    "zeros": (lambda q, k, v, s: Partial(q * 0, attend(q, k, v, s).lse), DTYPES),
    "a base-2 lse": (lambda q, k, v, s: Partial((a := attend(q, k, v, s)).out, a.lse / 0.6931), DTYPES),
    "not divided by the sum": (lambda q, k, v, s: Partial((a := attend(q, k, v, s)).out * 1.02, a.lse), DTYPES),
    "TF32 products": (lambda q, k, v, s: attend(rounded(q, 10), rounded(k, 10), v, s), [torch.float32]),
    "bfloat16 values": (lambda q, k, v, s: attend(q, k, rounded(v, 7), s), [torch.float32, torch.float16]),
    "8-bit values": (lambda q, k, v, s: attend(q, k, rounded(v, 3), s), DTYPES),
}


@pytest.mark.parametrize(("fault", "dtype"), [(name, dtype) for name in FAULTS for dtype in FAULTS[name][1]], ids=str)
def test_wrong_results_are_over_budget(fault, dtype):
    assert max(shares(FAULTS[fault][0], dtype)) > 1


def judged(compute, dtype=torch.float32):
    q, k, v = draw(dtype)
    arm = Arm(lambda: compute(q, k, v, 0.125), torch.arange(0, 33, 4), dense_truth(q[:, ::4], k, v, 0.125), 33, 1e6)
    return judge({"it": arm}, CPU, dtype, 0.0)["it"]


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (lambda *a: Partial((x := attend(*a)).out * torch.nan, x.lse), "out is not finite"),
        (lambda *a: Partial((x := attend(*a)).out, x.lse.double()), "torch.float64"),
        (lambda *a: Partial((x := attend(*a)).out, x.lse.transpose(1, 2)), r"\(1, 2, 33\)"),
        (lambda *a: Partial((x := attend(*a)).out[:, :9], x.lse[:, :9]), r"\(1, 9, 2, 64\)"),
    ],
)
def test_results_of_no_use_are_wrong(compute, said):
    import re

    found = judged(compute)
    assert found.status == "wrong"
    assert re.search(said, found.reason)
    json.dumps(vars(found), allow_nan=False)


def test_only_the_sampled_rows_are_compared():
    def off_elsewhere(row, *given):
        part = attend(*given)
        part.out[:, row] += 1
        return part

    assert judged(attend).status == "right"
    assert judged(partial(off_elsewhere, 3)).status == "right"
    assert judged(partial(off_elsewhere, 4)).status == "wrong"


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_block_sparse_kernel_is_checked_the_same_way():
    q, k, v = draw(torch.float32, queries=130, keys=300, heads=1, dim=16)
    arm = sparse_arm(q, k, v, 0.25)
    assert arm.rows.tolist() == list(range(130))
    # one block of keys of three for each of two blocks of queries, of which the last have 44 and 2
    assert arm.operations in {4 * 16 * (128 * a + 2 * b) for a in (128, 44) for b in (128, 44)}
    once = arm.call()  # interpreted: a second and more a call
    arms = {"right": arm._replace(call=lambda: once)}
    arms["wrong"] = arms["right"]._replace(truth=sparse_arm(q, k, v * 1.01, 0.25).truth)
    found = judge(arms, CPU, torch.float32, 0.0)
    assert [row.status for row in found.values()] == ["right", "wrong"]


# -- how it is cut, and what is faster -------------------------------------------------------------------------------


def test_what_would_take_too_long_is_cut_and_said(monkeypatch):
    monkeypatch.setattr(check, "_CPU_OPERATIONS", 4.0 * 256 * 1300 * 32)
    found = check_kernels(replace(SHAPE, block=1000), CPU, torch.float32, seconds=0.0, per_call=1e-9)
    assert (found.queries, found.keys, found.heads) == (256, 1300, 1)
    assert found.cut == (
        "2 heads cut to 1: a CPU would take too long",
        "1000 queries cut to 256, so that a call takes about 1e-09 s at most",
    )
    assert [row.status for row in found.dense if row.status != "unusable"] == ["right"] * 3


def test_nothing_is_cut_that_need_not_be():
    found = check_kernels(replace(SHAPE, block=300), CPU, torch.float32, seconds=0.0, per_call=1e9)
    assert (found.queries, found.keys, found.heads, found.cut) == (300, 600, 2, ())
    assert {row.kernel: row.queries for row in found.dense if row.queries} == {
        "reference": 256,
        "sdpa": 300,
        "split": 300,
    }


def timed(kernel, middle, least, most, status="right"):
    return Check(kernel, status, milliseconds=middle, fastest=least, slowest=most, tflops=10 / middle, queries=9)


@pytest.mark.parametrize(
    ("other", "faster"),
    [
        (timed("fa4", 0.8, 0.7, 0.85), ("fa4",)),
        (timed("fa4", 0.8, 0.7, 0.95), ()),  # its slowest call is slower than the other's fastest
        (timed("fa4", 0.8, 0.7, 0.85, "wrong"), ()),
        (timed("fa4", 1.0, 0.9, 1.1), ()),
        (Check("fa4", "unusable", "not here"), ()),
    ],
)
def test_faster_is_what_was_faster_in_every_call(other, faster):
    assert check._faster({"sdpa": timed("sdpa", 1.0, 0.9, 1.1), "fa4": other}, "sdpa") == faster


def test_a_faster_kernel_is_named(invoke, monkeypatch):
    import time

    def slow(*given, **options):
        time.sleep(0.005)
        return sdpa(*given, **options)

    sdpa = KERNELS["sdpa"].partial
    monkeypatch.setattr(KERNELS["sdpa"], "partial", slow)
    done = invoke("--frames", "9", "--size", "32x32")
    assert done.exit_code == 0
    assert "auto uses sdpa; measurably faster here: reference (--set kernel=reference)" in done.stdout


# -- the installation ------------------------------------------------------------------------------------------------


def test_every_extra_is_explained_and_missing_ones_have_their_command(monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(machine.EXTRAS) == set(declared)
    real = machine.version
    monkeypatch.setattr(machine, "version", lambda name: None if name in ("matplotlib", "fa3-fwd") else real(name))
    extras = {extra.name: extra for extra in machine.installed_extras()}
    assert set(extras) == set(declared)
    assert extras["hopper"].missing == ("fa3-fwd",)
    assert extras["plots"].missing == ("matplotlib",)
    assert not extras["plots"].installed
    assert extras["plots"].command == 'pip install "diffaccel[plots]"'
    assert extras["fa4"].requirements == ("flash-attn-4",)
    assert "matplotlib" not in machine.modules(tuple(extras.values())).values()
    monkeypatch.undo()
    assert {extra.name: extra.installed for extra in machine.installed_extras()}["plots"] is True


def test_what_is_imported_is_what_diffaccel_needs_and_has():
    found = machine.modules(machine.installed_extras())
    assert {"diffusers", "transformers", "cv2", "imageio_ffmpeg", "matplotlib"} <= set(found)
    assert not {"pytest", "ruff", "flash_attn.cute.interface", "xformers"} & set(found)


def test_another_version_than_asked_for_is_a_problem(monkeypatch):
    assert machine.unmet_requirements(machine.installed_extras()) == []
    real = machine.version
    monkeypatch.setattr(machine, "version", lambda name: "0.31.0" if name == "diffusers" else real(name))
    [problem] = machine.unmet_requirements(machine.installed_extras())
    assert problem.what.startswith("diffusers 0.31.0 is installed, and diffaccel was made for diffusers")
    assert problem.fix in ('pip install "diffusers>=0.42,<0.43"', 'pip install "diffusers<0.43,>=0.42"')


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of libraries, for this process and those that it starts."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_broken_imports_are_reported_whatever_they_do(site):
    (site / "good.py").write_text("print('noise on stdout')")
    (site / "bad.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file\\nmore')")
    (site / "deadly.py").write_text("import os; os._exit(3)")
    (site / "late.py").write_text("undefined")
    wanted = {name: name for name in ("good", "bad", "deadly", "late", "absent")}
    problems = {problem.what.split()[0]: problem for problem in machine.broken_imports(wanted)}
    assert set(problems) == {"bad", "deadly", "late", "absent"}
    assert problems["bad"].what.endswith("ImportError: libcudart.so.12: cannot open shared object file")
    assert "it ended the process with code 3" in problems["deadly"].what
    assert "NameError" in problems["late"].what
    assert problems["absent"].fix == 'pip install "absent"'


def test_a_hanging_import_is_given_up(site):
    (site / "hangs.py").write_text("import time; time.sleep(60)")
    (site / "good.py").write_text("")
    [problem] = machine.broken_imports({"hangs": "hangs", "good": "good"}, seconds=0.5)
    assert "it took more than 0.5 s" in problem.what


def test_xformers_for_another_torch_says_for_which(site):
    package = site / "xformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    cannot = "RuntimeError('xFormers can\\'t load C++/CUDA extensions. xFormers was built for:\\nPyTorch 2.10.0')"
    (package / "_cpp_lib.py").write_text(f"_cpp_library_load_exception = {cannot}")
    about = site / "xformers-0.0.35.dist-info"
    about.mkdir()
    text = "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\nRequires-Dist: numpy\nRequires-Dist: torch>=2.10\n"
    (about / "METADATA").write_text(text)
    [problem] = machine.broken_imports({"xformers": "xformers"})
    assert problem.what.startswith(
        "xformers 0.0.35 is installed and does not load: RuntimeError: xFormers can't load C++/CUDA extensions; it"
    )
    assert f"torch of another version and asks for torch>=2.10, and this is torch {torch.__version__}" in problem.what
    (package / "cpp_lib.json").write_text('{"version": {"torch": "2.10.0+cu128", "cuda": 1208}}')
    [problem] = machine.broken_imports({"xformers": "xformers"})
    assert (
        f"built for torch 2.10.0+cu128 and asks for torch>=2.10, and this is torch {torch.__version__}" in problem.what
    )
    assert problem.fix == 'pip uninstall xformers, or pip install "torch==2.10.0"'
    (package / "_cpp_lib.py").write_text("_cpp_library_load_exception = None")
    assert machine.broken_imports({"xformers": "xformers"}) == []


def fake_tool(folder, monkeypatch, script):
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_gpu_that_torch_was_not_built_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    fake_tool(tmp_path, monkeypatch, "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'")
    [problem] = machine.torch_problems()
    assert "this machine has 1 NVIDIA GPU (GPU 0: NVIDIA H100), and torch" in problem.what
    assert "is built without CUDA" in problem.what
    assert "torch" in problem.fix
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    [problem] = machine.torch_problems()
    assert "built for CUDA 12.8, cannot use it: " in problem.what
    fake_tool(tmp_path, monkeypatch, "echo 'GPU 0: lost'; exit 15")
    assert machine.torch_problems() == []


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ("9.0", ["sm_80", "sm_90"], True),
        ("9.0", ["sm_90a"], True),
        ("8.6", ["sm_80"], True),
        ("8.0", ["sm_86"], False),
        ("12.0", ["sm_80", "sm_90"], False),
        ("12.0", ["sm_90", "compute_90"], True),
        ("7.0", ["sm_75", "compute_90"], False),
    ],
)
def test_what_runs_on_which_gpu(capability, built, runs):
    assert machine.runs_on(capability, built) is runs


def test_a_gpu_newer_than_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(machine, "gpus", lambda: (machine.Gpu("B200", "10.0", 1, 1), machine.Gpu("H100", "9.0", 1, 1)))
    [problem] = machine.torch_problems()
    assert "is built for sm_80, sm_90, and cuda:0 (B200) is of compute capability 10.0" in problem.what


def test_files_that_cannot_be_written(tmp_path):
    def fails(*_):
        raise OSError("Unknown encoder 'libx264'")

    assert machine.video_problems() == []
    [problem] = machine.video_problems(fails)
    assert problem.what == "no mp4 can be written: Unknown encoder 'libx264'"
    (tmp_path / "file").write_text("")
    folders = {"HF_HUB_CACHE": tmp_path / "file" / "hub", "TRITON_CACHE_DIR": tmp_path / "new" / "folder"}
    [problem] = machine.cache_problems(folders)
    assert problem == Problem(
        f"the cache folder '{tmp_path / 'file' / 'hub'}' is not writable", "export HF_HUB_CACHE=/a/writable/folder"
    )
    assert set(machine.cache_folders(cuda=False)) == {"HF_HUB_CACHE"}


def test_too_little_gpu_memory_for_the_shape():
    weights, cache = SHAPE.weight_bytes(torch.bfloat16), SHAPE.cache_bytes(torch.bfloat16)
    call = 4 * SHAPE.keys * 64 * 2
    assert memory_problems(SHAPE, CPU, torch.bfloat16, free=weights + cache + call) == []
    [problem] = memory_problems(SHAPE, CPU, torch.bfloat16, free=weights + cache + call - 1)
    assert "a dense cache of" in problem.what
    assert problem.fix.startswith('--set cache.budget="24 frames"')
    [problem] = memory_problems(replace(SHAPE, causal=False), CPU, torch.bfloat16, free=0)
    assert "cache" not in problem.what
    assert problem.fix.startswith("--offload model")
    assert memory_problems(SHAPE, CPU, torch.bfloat16) == []


def test_the_kernel_auto_chooses_is_named_first():
    found = check_kernels(SHAPE, CPU, torch.float32, seconds=0.0)
    assert kernel_problems(found) == []
    wrong = [
        replace(row, status="wrong", reason="off") if row.kernel in ("reference", "sdpa") else row
        for row in found.dense
    ]
    bad = replace(found, dense=tuple(reversed(wrong)), sparse=Check("triton", "failed", "it broke"))
    what = [problem.what for problem in kernel_problems(bad)]
    assert what[0] == "kernel sdpa, which auto chooses here, is wrong: off"
    assert set(what[1:]) == {"kernel reference is wrong: off", "kernel triton does not run: it broke"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kernel_is_right_on_a_gpu(quick, dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    found = doctor.examine(device="cuda", dtype=dtype, frames=161, width=256, height=256)
    [kept] = json.loads((tmp_path / "kernels.json").read_text()).values()  # for "auto", which measures nothing again
    [times] = kept.values()
    assert times == {row.kernel: row.milliseconds for row in found.kernels.dense if row.kernel in times}
    assert found.kernels.auto in times
    assert found.healthy, found.problems
    assert not [row for row in (*found.kernels.dense, found.kernels.sparse) if row.status in ("wrong", "failed")]
    assert found.kernels.sparse.status == "right"
    assert found.kernels.sparse.tflops > 0
    assert found.machine.gpus[0].memory > found.machine.gpus[0].free > 0
