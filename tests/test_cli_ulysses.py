"""`diffaccel generate --ulysses N`: processes of torchrun share one video, and a sentence where that cannot be."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from diffusers import WanPipeline
from tiny import tiny_components
from typer.testing import CliRunner

from diffaccel.cli import app, sharing
from diffaccel.ranks import Ranks
from diffaccel.video import read_video

PROMPT = "a large red circle moves left over a teal checkerboard"
BUNDLED = [PROMPT, "--frames", "17", "--steps", "2", "--preset", "fast", "--set", "reuse.min_past=0"]
BUNDLED += ["--set", "cache=none"]
SMALL = ["a red circle", "--size", "48x32", "--frames", "5", "--steps", "2", "--guidance", "1"]
LAUNCHED = """
import os, sys, time
import torch
torch.set_num_threads(1)
torch.accelerator.device_count = lambda: 2  # diffusers divides by it, which has nothing to split on a CPU
from diffaccel.cli import app
from diffaccel.video import VideoWriter
close = VideoWriter.close
def slowly(self):
    time.sleep(2)  # the process that does not write is done before
    return close(self)
VideoWriter.close = slowly
try:
    app(sys.argv[1:])
except SystemExit as end:
    if os.environ["RANK"] == "1":
        os._exit(end.code)  # at once: the interpreter takes seconds to end
    raise
"""


def launch(folder, *arguments, processes=2):
    script = folder / "launched.py"
    script.write_text(LAUNCHED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(script), "generate", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def alone(*arguments, code=0):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments), "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == code, result.output


def same_video(one, other):
    one, other = (read_video(path) for path in (one, other))
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 2


def test_two_processes_write_the_video_of_one_once(tmp_path):
    done = launch(tmp_path, *BUNDLED, "--ulysses", "2", "-o", "two.mp4", "--report", "two.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.mp4: 17 frames") == 1
    alone(*BUNDLED, "-o", tmp_path / "one.mp4", "--report", tmp_path / "one.json")
    same_video(tmp_path / "one.mp4", tmp_path / "two.mp4")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert (one["devices"], two["devices"]) == (1, 2)
    assert two["slots"]["reuse"]["engaged"]
    assert 0.4 < two["blocks"][-1]["bytes"] / one["blocks"][-1]["bytes"] < 0.6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("launched.py", "one.json", "one.mp4", "two.json", "two.mp4")
    ]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "stock"
    WanPipeline(**tiny_components()).save_pretrained(folder)
    return folder


def test_a_video_that_is_made_at_once_is_shared_and_kept_where_a_technique_never_fired(tmp_path, stock):
    asked = [*SMALL, "--model", str(stock), "--preset", "exact", "--set", "window=InwardWindow"]
    done = launch(tmp_path, *asked, "--ulysses", "2", "-o", "two.gif")
    assert done.returncode == 1
    assert done.stderr.count("asked for and never engaged: InwardWindow") == 1
    alone(*asked, "-o", tmp_path / "one.gif", code=1)
    same_video(tmp_path / "one.gif", tmp_path / "two.gif")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ulysses", "1"], "at least 2, got 1"),
        (["--ulysses", "2"], "--ulysses 2 is for as many processes, and 1 runs: torchrun --nproc-per-node 2 -m diffac"),
    ],
)
def test_one_process_alone_is_refused(arguments, sentence, tmp_path):
    result = CliRunner().invoke(app, ["generate", "a red circle", "-o", str(tmp_path / "v.mp4"), *arguments])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ulysses", "3"], "--ulysses 3 is for as many processes, and 2 run: torchrun --nproc-per-node 3"),
        (["a blue square", "-o", "."], "--ulysses shares one video, and 2 prompts were given"),
        (["--compare", "-o", "out"], "leave one of --compare and --ulysses out"),
        (["--plots", "out"], "--plots looks at what all heads read"),
        (["--device", "cpu"], "takes a device of its own; leave --device cpu out"),
        (["--offload", "model"], "--offload model is for one process"),
    ],
)
def test_what_goes_not_with_it_is_refused(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sharing, "ranks", lambda: Ranks(0, 2))
    result = CliRunner().invoke(app, ["generate", "a red circle", "--ulysses", "2", *arguments])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert list(tmp_path.iterdir()) == []
