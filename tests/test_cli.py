"""The command line: what it makes, what it prints, and one sentence for every mistake."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from profiles import assert_nothing_but_profiles_is_missing
from tiny import tiny_components, tiny_pipeline
from typer.testing import CliRunner

from diffaccel import Accel, FlashBlock, KnobError, PadCollapse, TempCache
from diffaccel.cli import app
from diffaccel.cli.show import progress_bar
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.presets import PAYS, PRESETS
from diffaccel.settings import UsageError, build_accel, parse_knob
from diffaccel.video import read_video, to_uint8, write_video

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--size", "48x32", "--frames", "9", "--steps", "3", "--guidance", "2", "--device", "cpu", "--seed", "3"]
ENGAGES = ["--set", "cache.threshold=0", "--set", "cache.recent_frames=0", "--set", "reuse.refresh=0,2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from diffusers import WanPipeline

    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    pipe.save_pretrained(folder / "causal")
    WanPipeline(**tiny_components()).save_pretrained(folder / "stock")
    return folder


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """Runs the command in an empty folder, with the tiny causal model unless another is named."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments, model="causal"):
        arguments = [str(argument) for argument in arguments]
        if arguments[0] == "generate" and "--model" not in arguments and model:
            arguments += ["--model", str(models / model)]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    return invoke


@pytest.fixture
def nothing_computed(monkeypatch):
    from diffusers import WanPipeline

    def forbid(pipeline, name):
        @functools.wraps(getattr(pipeline, name))
        def computed(*_arguments, **_named):
            raise AssertionError("this mistake was found only when computing began")

        monkeypatch.setattr(pipeline, name, computed)

    forbid(CausalWanPipeline, "__call__")
    forbid(CausalWanPipeline, "stream")
    forbid(WanPipeline, "encode_prompt")


def left_in(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# -- what it makes -----------------------------------------------------------------------------------------------------


def test_the_frames_are_those_of_the_pipeline_and_the_report_says_what_happened(run, models, tmp_path):
    result = run("generate", "a red circle", *SMALL, *ENGAGES, "-o", "frames", "--report", "r.json")
    assert result.exit_code == 0, result.output
    from diffaccel.pipelines.loading import load

    pipe = load(models / "causal", device="cpu")
    accel = Accel(
        cache=TempCache(threshold=0.0, recent_frames=0), reuse=FlashBlock(refresh=(0, 2)), prompt=PadCollapse()
    )
    with accel(pipe):
        call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 2.0}
        wanted = pipe("a red circle", **call, generator=torch.Generator().manual_seed(3)).frames[0]
    assert np.array_equal(read_video(tmp_path / "frames"), to_uint8(wanted))

    report = json.loads((tmp_path / "r.json").read_text())
    assert {slot: (s["method"], s["engaged"]) for slot, s in report["slots"].items()} == {
        "cache": ("TempCache", True),
        "prompt": ("PadCollapse", True),
        "reuse": ("FlashBlock", True),
    }
    assert report["slots"]["reuse"]["knobs"]["refresh"] == [0, 2]
    assert (report["file"], report["prompt"], report["seed"], report["frames"]) == ("frames", "a red circle", 3, 9)
    assert all(report["seconds"][name] > 0 for name in ("attention", "denoise", "decode", "total"))
    share = report["slots"]["reuse"]["keys_read"] / report["slots"]["reuse"]["keys_total"]
    assert f"{share:.1%}" in result.stdout
    assert "frames: 9 frames" in result.stdout
    assert result.stdout.count("yes") == 3
    assert "frames/s" in result.stdout
    assert left_in(tmp_path) == [*(f"frames/{i:05d}.png" for i in range(9)), "r.json"]


@pytest.mark.parametrize(("pays", "slots"), [(0.0, {"prompt", "cache", "reuse"}), (1e9, set())])
def test_preset_auto_says_what_it_is_and_takes_changes(pays, slots, run, tmp_path, monkeypatch):
    monkeypatch.setitem(PAYS, "cpu", pays)
    result = run("generate", "a red circle", *SMALL, "--preset", "auto", "-o", "v.mp4", "--report", "r.json")
    assert result.exit_code == 0, result.output
    assert f"note: preset auto is {'techniques on' if slots else 'dense'}: attention to the past is" in result.stderr
    assert set(json.loads((tmp_path / "r.json").read_text())["slots"]) == slots
    result = run("generate", "a red circle", *SMALL, "--preset", "auto", "--set", "prompt=none", "-o", "v.mp4")
    assert ("PadCollapse" in result.stdout) is False


def test_what_the_default_preset_cannot_use_is_told_and_no_mistake(run, tmp_path):
    result = run("generate", "a red circle", *SMALL, "--frames", "5", "-o", "v.mp4", "--report", "r.json")
    assert result.exit_code == 0, result.output
    assert "note: of the preset, never engaged: TempCache" in result.stderr
    assert not json.loads((tmp_path / "r.json").read_text())["slots"]["cache"]["engaged"]
    result = run("generate", "a red circle", *SMALL, "--frames", "5", "--preset", "balanced", "-o", "v.mp4")
    assert result.exit_code == 1


def test_an_idle_technique_keeps_the_video_and_exits_with_1(run, tmp_path):
    result = run("generate", "a red circle", *SMALL, "--set", "cache.threshold=1", "-o", "v.mp4", "--report", "r.json")
    assert result.exit_code == 1
    assert len(read_video(tmp_path / "v.mp4")) == 9
    assert "TempCache (cache)" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "NO" in result.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["slots"]["cache"]["engaged"] is False
    assert "TempCache" in report["idle"]


def test_several_prompts_make_a_file_each(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  A red circle!\n")
    options = ["--preset", "exact", "--frames", "5", "--size", "48x32", "--steps", "1", "--device", "cpu"]
    result = run("generate", "--prompts", "prompts.txt", *options, "-o", "videos", "--report", "r.json")
    assert result.exit_code == 0, result.output
    assert left_in(tmp_path / "videos") == ["a-red-circle-2.mp4", "a-red-circle.mp4"]
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [one["prompt"] for one in runs] == ["a red circle", "A red circle!"]
    assert all(one["seed"] == 0 and one["frames"] == 5 for one in runs)


def test_a_stock_pipeline_is_exact_by_default_and_writes_a_gif(run, tmp_path):
    result = run("generate", "a red circle", *SMALL, "-o", "v.gif", model="stock")
    assert result.exit_code == 0, result.output
    assert len(read_video(tmp_path / "v.gif")) == 9
    assert "preset exact" in result.stdout
    assert "PadCollapse" in result.stdout
    assert "TempCache" not in result.stdout


def test_a_first_frame_is_kept(run, tmp_path):
    write_video(tmp_path / "images", np.full((1, 32, 48, 3), 0.5))
    result = run(
        *("generate", "a red circle", *SMALL, "--preset", "exact"),
        *("--image", tmp_path / "images" / "00000.png", "-o", "v.mp4"),
    )
    assert result.exit_code == 0, result.output
    assert len(read_video(tmp_path / "v.mp4")) == 9


def test_compare_writes_what_it_measured(run, tmp_path):
    result = run("generate", "a red circle", *SMALL, *ENGAGES, "--compare", "-o", "out", "--report", "r.json")
    assert result.exit_code == 0, result.output
    assert left_in(tmp_path / "out") == ["accelerated.mp4", "dense.mp4", "report.json", "side_by_side.mp4"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == json.loads((tmp_path / "r.json").read_text())
    assert set(report["quality"]) == {"free_running", "shared_history", "noise_floor", "other_seed"}
    for words in ("rounded otherwise", "another seed", "history", "denoising:", "end to end, decoding included:"):
        assert words in result.stdout


def test_words_the_model_does_not_know_are_said_once(run):
    result = run("generate", "a red zebra", *SMALL, "--preset", "exact", "-o", "v.mp4")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("zebra") == 1


def test_an_interrupt_between_chunks_keeps_the_frames_so_far(run, tmp_path, monkeypatch):
    original = CausalWanPipeline.stream

    def stops(self, **arguments):
        yield next(original(self, **arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(CausalWanPipeline, "stream", stops)
    result = run("generate", "a red circle", *SMALL, "-o", "v.mp4", "--report", "r.json")
    assert result.exit_code == 130
    assert "interrupted after 1 of 9 frames" in result.stderr
    assert len(read_video(tmp_path / "v.mp4")) == 1
    assert json.loads((tmp_path / "r.json").read_text())["interrupted"] is True
    assert left_in(tmp_path) == ["r.json", "v.mp4"]


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as SIGINT")
def test_ctrl_c_in_a_real_process_leaves_a_playable_file(models, tmp_path):
    command = [sys.executable, "-m", "diffaccel", "generate", "a red circle", "--model", models / "causal"]
    command += ["--size", "48x32", "--frames", "1601", "--steps", "2", "--preset", "exact", "-o", tmp_path / "v.mp4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, start_new_session=True, **pipes
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob(".v.partial*")):  # the encoder has begun
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline, "no frame was written in a minute"
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
            said, complained = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, complained
    assert "interrupted after" in complained
    assert "Traceback" not in complained
    frames = len(read_video(tmp_path / "v.mp4"))
    assert 1 <= frames < 1601
    assert f"{frames} frames" in said
    assert left_in(tmp_path) == ["v.mp4"]


def test_ctrl_c_that_was_swallowed_ends_the_run_at_the_next_step(monkeypatch):
    before, swallowed = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: swallowed.append(found.exc_type))

    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with progress_bar("") as show:
        show(1, 3, None)
        held = Swallows()
        del held
        assert swallowed == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            show(2, 3, None)
    assert signal.getsignal(signal.SIGINT) is before


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no prompt": ([], "no prompt was given"),
    "empty prompt": (["  "], "a prompt is empty"),
    "empty prompts file": (["--prompts", "empty.txt"], "'empty.txt' is empty"),
    "absent prompts file": (["--prompts", "gone.txt"], "'gone.txt' cannot be read"),
    "binary prompts file": (["--prompts", "binary"], "cannot be read as text"),
    "frames": (["p", "--frames", "10"], "the nearest valid values are 9 and 13"),
    "no frames": (["p", "--frames", "0"], "nearest valid values"),
    "width": (["p", "--size", "50x32"], "nearest valid values are 48 and 64"),
    "height": (["p", "--size", "48x40"], "nearest valid values are 32 and 48"),
    "no size": (["p", "--size", "0x0"], "a multiple of 16"),
    "size": (["p", "--size", "wide"], "--size takes width x height"),
    "steps": (["p", "--steps", "0"], "--steps must be at least 1"),
    "fps": (["p", "--fps", "0"], "--fps must lie in"),
    "preset": (["p", "--preset", "exakt"], "exact, balanced, fast, auto; did you mean 'exact'"),
    "method": (["p", "--set", "cache=TempCash"], "did you mean 'TempCache'"),
    "knob": (["p", "--set", "cache.treshold=0.5"], "did you mean 'threshold'"),
    "slot": (["p", "--set", "cash.threshold=0.5"], "did you mean 'cache'"),
    "kernel": (["p", "--set", "kernel=spda"], "did you mean 'sdpa'"),
    "set": (["p", "--set", "cache"], "--set takes slot=Method"),
    "knob type": (
        ["p", "--set", "cache.threshold=high"],
        "cache.threshold takes a number or numbers with commas between or none, got 'high'",
    ),
    "knob range": (["p", "--set", "cache.threshold=1.5"], "threshold is a similarity in [0, 1]"),
    "plots": (["p", "--plots", "empty.txt"], "--plots names a folder, and 'empty.txt' is a file"),
    "unit": (["p", "--set", "cache.budget=3 parsecs"], "a budget is a number of tokens (40000), of latent frames"),
    "small budget": (
        ["p", "--set", "cache.budget=1 frame"],
        "(0 + 1 + 1) x 6 = 12 tokens, or 31.3 kB of buffers in all layers",
    ),
    "knob choice": (["p", "--set", "cache.match=celll"], "did you mean 'cell'"),
    "suffix": (["p", "-o", "v.avi"], "not '.avi'"),
    "output folder": (["p", "-o", "gone/v.mp4"], "does not exist; create it first"),
    "report folder": (["p", "--report", "gone/r.json"], "does not exist; create it first"),
    "two prompts": (["p", "q", "-o", "v.mp4"], "-o must name a folder"),
    "compare two": (["p", "q", "--compare", "-o", "d"], "--compare takes one prompt, got 2"),
    "compare to file": (["p", "--compare", "-o", "v.mp4"], "-o must name a folder"),
    "image": (["p", "--image", "binary"], "cannot be read as an image"),
    "no image": (["p", "--image", "gone.png"], "there is no image"),
    "sampler": (["p", "--sampler", "euler"], "multistep, few_step"),
    "dtype": (["p", "--dtype", "float12"], "float32, bfloat16, float16"),
    "device": (["p", "--device", "warp"], "unknown device 'warp'"),
    "offload": (["p", "--offload", "disk"], "none, model, sequential"),
    "offload on cpu": (["p", "--offload", "model"], "the device is the CPU"),
    "compile": (["p", "--compile", "always"], "auto, on, off"),
    "graphs on cpu": (["p", "--graphs"], "weights that stay on a GPU, and these are on cpu"),
    "graphs compared": (["p", "--graphs", "--compare", "-o", "d"], "leave one of the two out"),
    "pipeline": (["p", "--pipeline", "causual"], "did you mean 'causal'"),
    "model folder": (["p", "--model", "./gone"], "there is no folder"),
    "not a checkpoint": (["p", "--model", "."], "is not a diffusers checkpoint"),
    "negative": (["p", "--negative", "q", "--guidance", "1"], "--negative acts through guidance"),
    "negative few step": (["p", "--negative", "q", "--sampler", "few_step"], "--negative acts through guidance"),
}


def refused(result, sentence, folder, before):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("diffaccel: ")
    assert sentence in lines[0]
    assert left_in(folder) == before


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(run, nothing_computed, tmp_path, mistake):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    arguments, sentence = MISTAKES[mistake]
    usual = {"--size": "48x32", "--frames": "9", "--steps": "2", "--device": "cpu", "-o": "v.mp4"}
    for option, value in usual.items():
        if option not in arguments:
            arguments = [*arguments, option, value]
    refused(run("generate", *arguments), sentence, tmp_path, ["binary", "empty.txt"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--preset", "balanced"], "(here: --preset exact, or --set cache=none --set reuse=none)"),
        (["--set", "reuse.refresh=4"], "(here: --preset exact, or --set reuse=none)"),
        (["--sampler", "few_step"], "--sampler is for block-by-block generation"),
        (["--image", "i/00000.png"], "--image is for block-by-block generation"),
    ],
)
def test_a_stock_pipeline_refuses_what_it_cannot_take(run, nothing_computed, tmp_path, arguments, sentence):
    write_video(tmp_path / "i", np.zeros((1, 32, 48, 3)))
    result = run("generate", "p", *SMALL, *arguments, "-o", "v.mp4", model="stock")
    refused(result, sentence, tmp_path, ["i/00000.png"])


def test_a_truncated_weight_file_is_named(run, nothing_computed, models, tmp_path):
    broken = shutil.copytree(models / "causal", tmp_path / "broken")
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = left_in(tmp_path)
    refused(run("generate", "p", "--model", broken, "-o", "v.mp4"), "vae/diffusion_pytorch_model", tmp_path, before)


def test_cuda_is_refused_where_there_is_none(run, nothing_computed, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("generate", "p", "--device", "cuda", "-o", "v.mp4")
    refused(result, "has no CUDA device; use --device cpu", tmp_path, [])


def test_a_folder_that_is_not_writable_is_named(run, nothing_computed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a super-user may write anywhere
    refused(run("generate", "p", "-o", "v.mp4"), "is not writable; write elsewhere", tmp_path, [])


def test_a_model_that_cannot_be_found_is_one_sentence(run, nothing_computed, tmp_path, monkeypatch):
    import huggingface_hub

    def gone(name, **_how):
        raise OSError("no such repository\nTraceback of theirs")

    monkeypatch.setattr(huggingface_hub, "model_info", gone)
    result = run("generate", "p", "--model", "owner/gone", "-o", "v.mp4")
    refused(result, "cannot be had from the hub: no such repository", tmp_path, [])


def test_a_programming_error_keeps_its_traceback_and_leaves_no_file(run, tmp_path, monkeypatch):
    def broken(self, **arguments):
        yield np.zeros((1, 1, 32, 48, 3))
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(CausalWanPipeline, "stream", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("generate", "p", *SMALL, "-o", "v.mp4")
    assert left_in(tmp_path) == []


# -- settings ----------------------------------------------------------------------------------------------------------


def test_changes_are_laid_over_the_preset():
    assert build_accel("balanced") == PRESETS["balanced"]()
    changed = build_accel("balanced", ["cache.threshold=0.5", "reuse=none", "kernel=sdpa", "cache.sink_frames=1"])
    assert changed.cache == TempCache(threshold=0.5, sink_frames=1)
    assert (changed.reuse, changed.kernel, changed.prompt) == (None, "sdpa", PadCollapse())
    assert build_accel("exact", ["cache=TempCache"]).cache == TempCache()
    assert build_accel("exact", ["reuse.refresh=0,3,6"]).reuse == FlashBlock(refresh=(0, 3, 6))
    assert build_accel("balanced", ["cache.threshold=0.5", "cache=TempCache"]).cache == TempCache()


@pytest.mark.parametrize(
    ("technique", "knob", "text", "value"),
    [
        (TempCache, "threshold", "0.5", 0.5),
        (TempCache, "threshold", "none", None),
        (TempCache, "sink_frames", "2", 2),
        (TempCache, "match", "nearest", "nearest"),
        (FlashBlock, "refresh", "4", 4),
        (FlashBlock, "refresh", "0,3,6", (0, 3, 6)),
        (FlashBlock, "refresh", "(0, 3)", (0, 3)),
    ],
)
def test_values_are_read_by_the_type_of_the_knob(technique, knob, text, value):
    parsed = parse_knob(technique, knob, text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_values_of_the_wrong_type_are_refused_with_what_the_knob_takes():
    with pytest.raises(UsageError, match=r"reuse.refresh takes a whole number or whole numbers with commas between"):
        parse_knob(FlashBlock, "refresh", "often")
    with pytest.raises(UsageError, match=r"cache.sink_frames takes a whole number, got '1.5'"):
        parse_knob(TempCache, "sink_frames", "1.5")
    with pytest.raises(KnobError, match="unknown knob of TempCache"):
        build_accel("balanced", ["cache.size=3"])


# -- the other commands ------------------------------------------------------------------------------------------------


def test_methods_lists_every_technique_with_its_exact_setting(run):
    from diffaccel.mixers import MIXERS
    from diffaccel.techniques import TECHNIQUES

    text = run("methods").stdout
    listed = json.loads(run("methods", "--json").stdout)
    assert [about["name"] for about in listed["techniques"]] == [technique.__name__ for technique in TECHNIQUES]
    for technique, about in zip(TECHNIQUES, listed["techniques"], strict=True):
        assert (about["slot"], about["paper"], about["exact"]) == (technique.slot, technique.paper, technique.exact)
        defaults = json.loads(json.dumps(technique.defaults()))  # tuples are lists there
        assert {knob["name"]: knob["default"] for knob in about["knobs"]} == defaults
        assert about["name"] in text
        assert about["needs"] in ("nothing", "calibration")
        assert all(f"{about['slot']}.{knob['name']} = " in text for knob in about["knobs"])
        for knob, value in technique.exact.items():
            changes = [f"{technique.slot}={technique.__name__.lower()}", f"{technique.slot}.{knob}={value}"]
            assert f"--set {changes[1]}" in text
            assert getattr(getattr(build_accel("exact", changes), technique.slot), knob) == value
    assert [about["name"] for about in listed["mixers"]] == [mixer.__name__ for mixer in MIXERS]
    assert all(f"{mixer.__name__}  (diffaccel.mixers)\n  {mixer.summary}" in text for mixer in MIXERS)
    assert set(listed["presets"]) == set(PRESETS)


def test_info_says_what_would_be_patched_and_what_is_refused(run, models):
    row = json.loads(run("info", models / "causal", "--size", "96x32", "--json").stdout)[0]
    assert (row["layers"], row["heads"], row["head_dim"], row["causal"]) == (2, 2, 24, True)
    assert row["tokens_per_frame"] == 6 * 2
    assert_nothing_but_profiles_is_missing(row["refuses"])
    text = run("info", models / "stock").stdout
    assert "the whole video at once" in text
    assert "TempCache: no" in text
    assert "PadCollapse: yes" in text


def test_a_stock_pipeline_that_goes_by_blocks_is_run_as_it_is_and_its_cache_is_drawn(run, tmp_path):
    from families import anyflow_far

    anyflow_far().save_pretrained(tmp_path / "far")
    of_far = ("--model", tmp_path / "far", "--size", "256x128", "--frames", 33, "--steps", 4)
    asked = ("--set", "cache=sinkrecent", "--set", "cache.recent_frames=3", "--plots", "drawn", "--report", "r.json")
    result = run("generate", "a red circle", *of_far, *asked, model=None)
    assert result.exit_code == 0, result.stderr
    report = json.loads(Path("r.json").read_text())
    assert report["frames"] == len(read_video("out.mp4")) == 33
    assert report["slots"]["cache"]["engaged"]
    assert [block["frame"] for block in report["blocks"]] == [1, 3, 4, 5, 6]  # those that are finished
    assert list(Path("drawn").glob("*.png"))
    result = run("generate", "a red circle", *of_far, "--preset", "auto", model=None)
    assert "dense: the blocks of AnyFlowFARPipeline are its own" in result.stderr


def test_the_sampler_rolling_takes_no_reuse_and_says_so_before_anything_is_computed(run, models, nothing_computed):
    pipe = CausalWanPipeline.from_pretrained(models / "causal")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    pipe.register_to_config(sampler="rolling")
    pipe.save_pretrained("rolling")
    small = ("--frames", 33, "--size", "48x32", "--steps", 3)
    refused = run("generate", "a red circle", "--model", "rolling", *small, "--preset", "balanced")
    assert refused.exit_code == 2
    assert "others at every forward: leave reuse out" in refused.stderr


def test_without_a_preset_the_sampler_rolling_has_one_without_reuse(run, models):
    small = ("--frames", 33, "--size", "48x32", "--steps", 3)
    pipe = CausalWanPipeline.from_pretrained(models / "causal")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    pipe.save_pretrained("rolling")
    made = run("generate", "a red circle", "--model", "rolling", *small, "--sampler", "rolling")
    assert made.exit_code == 0, made.stderr
    assert "balanced without reuse" in made.stderr
    assert "reuse" not in made.stdout


def test_help_is_quick():
    code = (
        "import sys; from diffaccel.cli import app\n"
        "try: app(['generate', '--help'])\n"
        "except SystemExit: print('diffusers' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--compare" in done.stdout
    assert done.stderr.strip() == "False"
