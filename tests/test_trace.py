"""A trace names the parts of the seam, each in what it is part of, and leaves nothing behind."""

import json

import pytest
import torch
from diffusers import WanPipeline
from tiny import tiny_components, tiny_pipeline
from torch.profiler import profile
from typer.testing import CliRunner

from diffaccel import Accel, AnnCA, FlashBlock, FrameWindow, TempCache, call
from diffaccel import run as run_module
from diffaccel.cache import Memory
from diffaccel.cli import app
from diffaccel.port import Port
from diffaccel.trace import PREFIX, TraceError, summary, traced

CALL = {"height": 32, "width": 48, "num_frames": 49, "num_inference_steps": 3, "output_type": "latent"}
FOUR = Accel(
    cache=TempCache(threshold=0.3),
    reuse=FlashBlock(refresh=2, min_past=0),
    prompt=AnnCA(bits=4, tables=1),
    window=FrameWindow(frames=4, sink_frames=1),
)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def generate(pipe, run, **changes):
    return pipe("a red circle moves left", generator=torch.Generator().manual_seed(0), **(CALL | changes)).frames


def ranges(path):
    """Every range as the names it lies in, from the outermost, its own last."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if str(e.get("name")).startswith(PREFIX)]
    found, stack = [], []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = [e for e in stack if e["ts"] + e["dur"] > event["ts"]] + [event]
        assert all(e["ts"] + e["dur"] >= event["ts"] + event["dur"] for e in stack), "ranges that overlap"
        found.append([e["name"].removeprefix(PREFIX) for e in stack])
    return found


@pytest.mark.parametrize("compiled", [False, True])
def test_ranges_lie_in_each_other_also_in_compiled_blocks(pipe, tmp_path, compiled):
    if compiled:
        pipe = tiny_pipeline()
        torch._dynamo.reset()
        pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with FOUR(pipe) as run:
        plain = generate(pipe, run)
    with FOUR(pipe) as run, traced(run, pipe, tmp_path / "trace.json", blocks=2) as trace:
        assert torch.equal(generate(pipe, run), plain)
    found = ranges(tmp_path / "trace.json")
    assert {path[0] for path in found} == {"block 3", "block 4"}  # of 0 to 4
    within = {
        "step 2, uncond": 1, "clean pass, cond": 1, "layer 1, self": 2, "layer 0, cross": 2, "kernel": 3, "merge": 3,
        "prompt: prepare": 2, "prompt: near": 3, "cache: place": 3, "cache: commit": 2, "window: plan": 3,
        "reuse: store": 3, "reuse: recall": 3,
    }  # fmt: skip
    for name, depth in within.items():
        depths = {len(path) - 1 for path in found if path[-1] == name}
        assert depths == {depth}, name
    assert all("clean pass" in path[1] for path in found if path[-1] == "cache: commit")
    assert all(path[2].endswith("self") for path in found if path[-1] == "window: plan")
    forwards = 2 * (2 * 3 + 1)  # two branches, steps of both blocks, and the clean pass of one
    rows = {row.path: row for row in trace.rows}
    assert rows["block",].count == forwards
    assert rows["block", "step", "self-attention"].count == 2 * 2 * 2 * 3
    assert rows["block", "step", "self-attention", "reuse: recall"].count == 2 * 2 * 2  # step 1 of 3
    top = rows["block",]
    assert 0 < top.own_seconds < top.seconds
    assert sum(row.own_seconds for row in trace.rows) == pytest.approx(top.seconds)
    assert "self-attention" in trace.table()


def test_nothing_is_left_and_nothing_is_named_unless_a_trace_is_taken(pipe, tmp_path):
    before = [Port.attend, Memory.place, call.over_entries, run_module.merge, FrameWindow.plan, AnnCA.near]
    with FOUR(pipe) as run:
        own = set(vars(run))
        with traced(run, pipe, tmp_path / "trace.json"):
            assert Port.attend is not before[0]
        assert set(vars(run)) == own
        assert not (tmp_path / "trace.json").exists()  # nothing was generated
        assert [Port.attend, Memory.place, call.over_entries, run_module.merge, FrameWindow.plan, AnnCA.near] == before
        with profile() as plain:
            generate(pipe, run, num_frames=33)
    assert not [event for event in plain.events() if event.name.startswith(PREFIX)]


def test_one_generation_is_traced_also_if_it_is_interrupted(pipe, tmp_path):
    def interrupt(_pipe, step, _t, _tensors):
        if step == 2 * 3 + 1:  # in the third of four blocks
            raise KeyboardInterrupt
        return {}

    path = tmp_path / "trace.json"
    with pytest.raises(KeyboardInterrupt), Accel()(pipe) as run, traced(run, pipe, path):
        generate(pipe, run, num_frames=41, callback_on_step_end=interrupt)
    assert {way[1] for way in ranges(path) if len(way) > 1} >= {"step 0, cond", "step 1, cond"}
    assert {way[0] for way in ranges(path)} == {"block 2"}
    with Accel()(pipe) as run, traced(run, pipe, path, blocks=1):
        generate(pipe, run, num_frames=33)
        generate(pipe, run, num_frames=97)
    assert {way[0] for way in ranges(path)} == {"block 2"}


def test_a_video_that_is_made_at_once_has_its_last_steps_traced(tmp_path):
    pipe = WanPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    with Accel()(pipe) as run, traced(run, pipe, tmp_path / "trace.json", blocks=2):
        generate(pipe, run, num_frames=9, num_inference_steps=4)
    found = ranges(tmp_path / "trace.json")
    assert {path[0] for path in found} == {"step 2", "step 3"}
    assert ["step 3", "layer 1, self", "kernel"] in found


def test_seconds_on_a_gpu_belong_to_the_part_they_were_launched_in():
    def event(name, ts, dur, number, cat="user_annotation", tid=1):
        return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur,
                "args": {"External id": number}}  # fmt: skip

    host = [event("step 0, cond", 0, 100, 1), event("layer 0, self", 10, 50, 2), event("kernel", 20, 10, 3),
            event("layer 1, self", 60, 40, 4), event("decode", 20, 9, 5, tid=2)]  # fmt: skip
    there = "gpu_user_annotation"
    gpu = [event("layer 0, self", 90, 2e6, 2, there), event("kernel", 90, 2e6, 3, there),
           event("layer 1, self", 3e6, 1e6, 4, there)]  # fmt: skip
    for e in (*host, *gpu):
        e["name"] = PREFIX + e["name"]
    rows = {row.path: row for row in summary({"traceEvents": [*gpu, *host, {"ph": "M", "name": "process_name"}]})}
    assert [row.gpu_seconds for row in rows.values()] == [0, 3, 2, 0]
    assert list(rows) == [("step",), ("step", "self-attention"), ("step", "self-attention", "kernel"), ("decode",)]
    assert rows["step",].own_seconds == pytest.approx(10e-6)


def test_a_mistake_is_one_sentence(pipe, tmp_path):
    with Accel()(pipe) as run:
        with pytest.raises(TraceError, match="of 1 or more blocks, got 0"), traced(run, pipe, "t.json", blocks=0):
            pass
        with profile(), pytest.raises(TraceError, match="at work already"), traced(run, pipe, "t.json"):
            pass


@pytest.fixture
def command(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        small = ["--size", "48x32", "--frames", "17", "--steps", "2", "--device", "cpu", "--model", "model"]
        return CliRunner().invoke(app, ["generate", "a red circle", *small, *arguments], catch_exceptions=False)

    return invoke


def test_on_the_command_line(command, tmp_path):
    found = command("--profile", "trace.json", "--profile-blocks", "1")
    assert found.exit_code == 0, found.output
    assert "trace.json: a trace for chrome://tracing" in found.stdout
    assert {"block", "self-attention", "kernel"} <= {line.split()[0] for line in found.stdout.splitlines() if line}
    assert {path[0] for path in ranges(tmp_path / "trace.json")} <= {"block 1", "decode"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "t.json", "--compare", "-o", "out"], "--profile traces one generation"),
        (["--profile", "t.txt"], "--profile names a .json file, got 't.txt'"),
        (["--profile", "no/t.json"], "does not exist"),
        (["--profile", "t.json", "--profile-blocks", "0"], "--profile-blocks must be at least 1, got 0"),
    ],
)
def test_what_is_asked_wrongly_is_found_before_anything_is_computed(command, arguments, message):
    found = command(*arguments)
    assert found.exit_code == 2
    assert message in found.stderr
