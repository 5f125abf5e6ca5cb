"""`diffaccel eval` on the command line, in two processes, after a kill, and beside VBench."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny import tiny_pipeline
from typer.testing import CliRunner

import diffaccel.eval.runs as runs
from diffaccel.cli import app
from diffaccel.eval import EvalError, Store
from diffaccel.eval.vbench import evaluate, lay_out, missing, video_name
from diffaccel.ranks import Ranks
from diffaccel.video import write_video

SMALL = ["--size", "48x32", "--steps", "2", "--guidance", "1", "--device", "cpu"]
ENGAGES = ["--set", "cache=none", "--set", "reuse.min_past=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "causal"
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Runs `diffaccel eval` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(command, *arguments):
        extra = [] if command == "videos" else [*SMALL, *ENGAGES, "--model", model]
        return CliRunner().invoke(app, ["eval", command, *map(str, (*arguments, *extra))], catch_exceptions=False)

    return invoke


# -- quality -----------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_a_file_and_what_was_left_out_is_said(run, tmp_path):
    Path("p.txt").write_text("a red circle\n\n  \na blue square\na red circle\n")
    result = run("quality", "--prompts", "p.txt", "--presets", "balanced", "--frames", 5, "-o", "out")
    assert result.exit_code == 0, result.output
    assert "note: 2 blank lines of 'p.txt' left out" in result.stderr
    assert "note: 1 repeated prompt(s) left out, first 'a red circle'" in result.stderr
    rows = Store("out").rows("quality")
    assert {row["text"] for row in rows} == {"a red circle", "a blue square"}
    assert "balanced  free-running    2 " in result.stdout
    assert "lpips was not measured in 8 rows: the weights of AlexNet" in result.stdout
    asked = json.loads(Path("out/asked.json").read_text())
    assert asked["size"] == [32, 48]
    assert asked["arms"]["balanced"]["set"] == {"cache": "none", "reuse.min_past": "0"}
    assert asked["arms"]["balanced"]["slots"]["reuse"]["knobs"]["min_past"] == 0.0
    assert asked["command"].split()[0] == "diffaccel"
    other = run("quality", "--prompts", "p.txt", "--presets", "balanced", "--frames", 13, "-o", "out")
    assert other.exit_code == 2
    assert "frames differ (frames there: 5; here: 13)" in other.stderr


def test_a_stock_pipeline_is_measured_with_the_preset_it_takes(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["eval", "quality", "a red circle", *SMALL, "--frames", "5", "--model", str(model), "--pipeline", "stock"]
    result = CliRunner().invoke(app, [*command, "-o", "out"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert {row["arm"] for row in Store("out").rows("quality")} == {"exact", "dense"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompts", "empty.txt"], "the prompts file 'empty.txt' is empty"),
        (["--prompts", "none.txt"], "cannot be read as text"),
        ([], "no prompt was given"),
        (["a", "--presets", "balanced,quick"], "unknown preset 'quick'"),
        (["a", "--presets", "fast,fast"], "--presets names one twice"),
        (["a", "--presets", ","], "--presets names none"),
        (["a", "--seeds", "0,x"], "--seeds takes whole numbers with commas between, got '0,x'"),
        (["a", "--seeds", "-1"], "--seeds must be 0 or more"),
        (["a", "--frames", "10"], "1 + 4"),
        (["a", "--lpips-weights", "none.pth"], "not at 'none.pth'"),
        (["a", "--clip", "no/clip/here"], "cannot be opened as a CLIP"),
        (["a", "--judge", "math"], "MODULE:FUNCTION"),
        (["a", "--clip", "x", "--judge", "math:floor"], "leave one of the two out"),
        (["a", "-o", "empty.txt"], "'empty.txt' is a file"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(run, tmp_path, arguments, sentence):
    Path("empty.txt").write_text("\n \n")
    result = run("quality", *(["-o", "out"] if "-o" not in arguments else []), *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert not Path("out").exists()


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(run, monkeypatch):
    original, count = runs.run_arm, [0]

    def interrupted(*arguments, **named):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(runs, "run_arm", interrupted)
    command = ("quality", "a red circle", "--presets", "balanced", "--frames", 5, "-o", "out")
    result = run(*command)
    assert result.exit_code == 130
    assert "interrupted; 'out' keeps 2 rows of quality, and the same command goes on from there" in result.stderr
    kept = Store("out").rows("quality")
    assert run(*command).exit_code == 0
    assert count[0] == 6  # the two that were missing
    rows = {row["key"]: row for row in Store("out").rows("quality")}
    assert len(rows) == 4
    assert all(rows[row["key"]] == row for row in kept)


# -- the other commands ------------------------------------------------------------------------------------------------


def test_a_frontier_on_the_command_line(run):
    swept = ("--sweep", "reuse.refresh=2;0,1", "--rounds", 1)
    result = run("frontier", "a red circle", *swept, "--frames", 5, "-o", "f")
    assert result.exit_code == 0, result.output
    assert "reuse.refresh=0,1" in result.stdout
    assert "frontier (shared history; dense: its noise floor)" in result.stdout
    assert {"asked.json", "asked.throughput.json", "frontier.jsonl", "frontier.png", "quality.jsonl"} <= set(
        os.listdir("f")
    )
    assert json.loads(Path("f/asked.json").read_text())["what"] == "frontier"
    for arguments, said in (
        (("--sweep", "reuse.refresh"), "--sweep takes"),
        ((), "add --sweep"),
        (("--sweep", "a.b=1", "--sweep", "a.b=2"), "names one knob twice"),
    ):
        wrong = run("frontier", "a", *arguments, "-o", "g")
        assert wrong.exit_code == 2
        assert said in wrong.stderr


def test_throughput_on_the_command_line(run):
    result = run("throughput", "a red circle", "--presets", "balanced", "--frames", "9,5", "--rounds", 1, "-o", "t")
    assert result.exit_code == 0, result.output
    assert "speed, median" in result.stdout
    assert result.stdout.index("quality, mean") < result.stdout.index("speed, median")
    assert "balanced, end to end: " in result.stdout
    for lengths, said in (("9,10", "--frames"), ("", "whole numbers"), ("5,5", "a number twice")):
        wrong = run("throughput", "a", "--frames", lengths, "-o", "u")
        assert wrong.exit_code == 2
        assert said in wrong.stderr


def test_videos_on_the_disk_are_compared_or_refused(run, tmp_path):
    clip = np.random.default_rng(0).random((6, 32, 48, 3))
    write_video("a.mp4", clip)
    write_video("b.mp4", clip[:, ::-1])
    write_video("short.mp4", clip[:4])
    write_video("small.mp4", clip[:, :16])
    Path("broken.mp4").write_bytes(Path("a.mp4").read_bytes()[:300])
    found = json.loads(run("videos", "a.mp4", "a.mp4", "--json").stdout)
    assert found["scores"]["psnr_pooled"] is None
    assert found["unmeasured"]["psnr_pooled"] == "identical"
    result = run("videos", "a.mp4", "b.mp4", "--prompt", "x", "--judge", "test_eval_cli:judge")
    assert result.exit_code == 0, result.output
    assert "  text: 6 " in result.stdout
    for other, said in (
        ("short.mp4", "'a.mp4' has 6 frames of 48x32, and 'short.mp4' has 4 frames of 48x32"),
        ("small.mp4", "'small.mp4' has 6 frames of 48x16"),
        ("broken.mp4", "cannot be read as a video"),
        ("none.mp4", "there is no video at 'none.mp4'"),
    ):
        wrong = run("videos", "a.mp4", other)
        assert wrong.exit_code == 2
        assert said in wrong.stderr


def judge(clip, prompt):
    return len(clip)


# -- several processes -------------------------------------------------------------------------------------------------


def test_shares_cover_everything_once_in_order():
    for count in (1, 2, 3, 5):
        shares = [Ranks(rank, count).share(range(7)) for rank in range(count)]
        assert sorted(item for share in shares for item in share) == list(range(7))
    assert Ranks().gather("ab") == ["a", "b"]


LAUNCHED = """
import json, os, sys
from pathlib import Path
Path(sys.argv[1], f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
import torch
torch.set_num_threads(1)
from diffaccel.cli import app
for command in json.loads(sys.argv[2]):
    app(command, standalone_mode=False)
"""


def launch(folder, *commands):
    """Two real processes under accelerate's launcher."""
    script = folder / "launched.py"
    script.write_text(LAUNCHED)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    arguments = [*accelerate, str(script), str(folder), json.dumps(commands)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_processes_share_prompts_and_a_killed_one_loses_only_what_it_was_doing(model, tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("a red circle\na blue square\n")
    asked = ["--prompts", str(prompts), "--frames", "5", "--model", str(model), *SMALL, *ENGAGES]
    measured = ["eval", "quality", "--presets", "balanced", "--seeds", "0,1", *asked, "-o", str(out)]
    first = launch(tmp_path, measured)
    try:
        until = time.monotonic() + 120
        while not (out / "quality.rank1.jsonl").is_file() or not Store(out).rows("quality"):
            assert first.poll() is None, first.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
        first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode != 0
    kept = Store(out).rows("quality")
    assert 1 <= len(kept) < 16
    second = launch(
        tmp_path, measured, ["generate", *asked, "-o", str(tmp_path / "made"), "--report", str(tmp_path / "r.json")]
    )
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert said.count("quality, mean (worst)") == 1
    assert sorted(path.name for path in out.glob("*.jsonl")) == ["quality.jsonl"]
    rows = {row["key"]: row for row in Store(out).rows("quality")}
    assert len(rows) == 16
    assert [row for row in kept if rows[row["key"]] != row] == []
    lines = [json.loads(line)["key"] for line in (out / "quality.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)
    assert len(list((out / "videos").glob("*/dense.mp4"))) == 4
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["a-blue-square.mp4", "a-red-circle.mp4"]
    report = json.loads((tmp_path / "r.json").read_text())
    assert [run["prompt"] for run in report["runs"]] == prompts.read_text().splitlines()


# -- VBench ------------------------------------------------------------------------------------------------------------


def test_names_are_those_that_vbench_looks_for():
    assert video_name("In a still frame, a stop sign", 3) == "In a still frame, a stop sign-3.mp4"
    assert video_name("a/b\\c\nd", 0) == "a b c d-0.mp4"
    assert video_name("..", 0) == "video-0.mp4"
    long = video_name("é" * 300, 12)
    assert len(long.encode()) <= 255
    assert long.endswith("é-12.mp4")


def rows_of(folder, texts, seeds=(4, 5)):
    (folder / "videos").mkdir(parents=True)
    rows = []
    for number, text in enumerate(texts):
        for seed in seeds:
            names = {}
            for name in ("video", "dense"):
                names[name] = f"videos/{number}-{seed}-{name}.mp4"
                (folder / names[name]).write_text(names[name])
            rows.append({"arm": "a b", "way": "free_running", "text": text, "seed": seed, **names})
            rows.append({"arm": "a b", "way": "shared_history", "text": text, "seed": seed, "video": "x", "dense": "x"})
    return rows


def test_videos_are_laid_out_by_arm_with_dense_beside(tmp_path):
    places = lay_out(tmp_path, rows_of(tmp_path, ["a red circle", "x/y"]), [4, 5])
    assert sorted(places) == ["a b", "dense"]
    names = ["a red circle-0.mp4", "a red circle-1.mp4", "x y-0.mp4", "x y-1.mp4"]
    for place in places.values():
        assert sorted(path.name for path in place.iterdir()) == names
    assert (places["a b"] / "x y-1.mp4").read_text() == "videos/1-5-video.mp4"
    assert (places["dense"] / "x y-1.mp4").read_text() == "videos/1-5-dense.mp4"
    assert json.loads((tmp_path / "vbench" / "a-b.prompts.json").read_text())["x y-1.mp4"] == "x/y"
    with pytest.raises(EvalError, match="two prompts become the one name"):
        lay_out(tmp_path / "two", rows_of(tmp_path / "two", ["x/y", "x y"]), [4, 5])


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Modules with the signatures of vbench 0.1.5, which note how they are called."""
    calls = []

    class VBench:
        def __init__(self, device, full_info_dir, output_path):
            self.output = Path(output_path)
            assert Path(full_info_dir).name == "VBench_full_info.json"

        def evaluate(
            self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,  # noqa: B006
            mode="vbench_standard", **kwargs,
        ):  # fmt: skip
            calls.append({"class": type(self).__name__, **locals()})
            self.output.mkdir(exist_ok=True)
            found = {dimension: [0.25, []] for dimension in dimension_list}
            (self.output / f"{name}_eval_results.json").write_text(json.dumps(found))

    class VBenchLong(VBench):
        pass

    for name, kind in (("vbench", VBench), ("vbench2_beta_long", VBenchLong)):
        module = ModuleType(name)
        module.__file__ = str(tmp_path / name / "__init__.py")
        (tmp_path / name).mkdir()
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)
    suite = [{"prompt_en": "a red circle", "dimension": ["color"]}]
    (tmp_path / "vbench" / "VBench_full_info.json").write_text(json.dumps(suite))
    return calls


@pytest.mark.parametrize("long", [False, True])
def test_vbench_is_called_by_its_signature_in_the_mode_of_the_prompts(packages, tmp_path, long):
    places = lay_out(tmp_path / "o", rows_of(tmp_path / "o", ["my own"]), [4, 5])
    scores = evaluate(places, tmp_path / "scores", device="cpu", long=long)
    own, _ = packages
    assert own["class"] == ("VBenchLong" if long else "VBench")
    assert own["mode"] == ("long_custom_input" if long else "custom_input")
    assert own["videos_path"] == str(places["a b"])
    assert "color" not in own["dimension_list"]  # of its own prompts only
    if long:
        assert own["kwargs"]["clip_length_config"] == "clip_length_mix.yaml"
        assert own["kwargs"]["slow_fast_eval_config"].endswith("vbench2_beta_long/configs/slow_fast_params.yaml")
    else:
        assert own["prompt_list"] == {"my own-0.mp4": "my own", "my own-1.mp4": "my own"}
        assert own["kwargs"] == {}
    assert scores["dense"]["subject_consistency"] == 0.25
    assert json.loads((tmp_path / "scores" / "scores.json").read_text()) == scores
    known = lay_out(tmp_path / "k", rows_of(tmp_path / "k", ["a red circle"]), [4, 5])
    evaluate(known, tmp_path / "scores", device="cpu", long=long, dimensions=["color"])
    assert packages[-1]["mode"] == ("long_vbench_standard" if long else "vbench_standard")
    assert packages[-1]["dimension_list"] == ["color"]


def test_where_vbench_is_not_installed_that_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "vbench", None)
    for long in (False, True):
        assert "not installed here, so its scores were not measured" in missing(long)
    result = run("quality", "a red circle", "--presets", "balanced", "--frames", 5, "--vbench", "-o", "out")
    assert result.exit_code == 0, result.output
    assert "VBench is not installed here" in result.stderr
    assert "vbench evaluate --mode=custom_input --videos_path out/vbench/balanced --prompt_file" in result.stdout
    assert os.listdir("out/vbench/balanced") == ["a red circle-0.mp4"]
