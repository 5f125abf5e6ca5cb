"""The demo without a browser: who may compute and when, what may be asked for, what comes of it, and the server."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from tiny import tiny_components, tiny_pipeline
from typer.testing import CliRunner

pytest.importorskip("gradio", reason="demo: gradio is not installed (pip install 'diffaccel[demo]')")

from diffaccel import Accel, KnobError
from diffaccel.accel import active_run
from diffaccel.cli import app
from diffaccel.demo.asked import FILE_KNOBS, MOST_SEED, Larger, Limits, Text, Video, from_fields, from_json, to_json
from diffaccel.demo.clips import Clip
from diffaccel.demo.desk import Desk
from diffaccel.demo.enlarging import check_larger
from diffaccel.demo.making import check_video
from diffaccel.demo.models import Models
from diffaccel.demo.result import OVERLAP, disturbed, verdict
from diffaccel.demo.server import POLICY, build_server, listen
from diffaccel.demo.worker import Worker
from diffaccel.errors import DiffaccelError
from diffaccel.pipelines.presets import PRESETS
from diffaccel.settings import UsageError, build_accel
from diffaccel.techniques import TECHNIQUES
from diffaccel.video import read_video, to_uint8

ROOT = Path(__file__).resolve().parent.parent
GENERATION = {"width": 48, "height": 32, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 2, "fps": 16}
ENGAGES = ("cache.threshold=0", "cache.recent_frames=0", "reuse.refresh=0,2", "reuse.min_past=1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from diffusers import WanPipeline

    root = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    pipe.save_pretrained(root / "causal")
    WanPipeline(**tiny_components()).save_pretrained(root / "stock")
    for name in ("causal", "stock"):
        (root / name / "generation.json").write_text(json.dumps(GENERATION))
    return root


@pytest.fixture(scope="module")
def models(folders):
    made = Models([str(folders / "causal"), str(folders / "stock")], limits=Limits(frames=2001, steps=50))
    yield made
    made.close()


@pytest.fixture
def desk(models, tmp_path):
    return Desk(models, tmp_path / "out")


def asked(desk, tab="video", **values):
    return dataclasses.replace(desk.models.usual(tab), **{"prompt": "a red circle", **values})


def made(desk, request):
    assert request.ticket.wait(60)
    return request.state()


# -- who may compute, and when -----------------------------------------------------------------------------------------


@pytest.fixture
def worker():
    made = Worker("one", most_waiting=4)
    yield made
    made.close()


def held(ticket_started, let_go):
    def work(ticket):
        ticket_started.set()
        while not let_go.wait(0.005):
            ticket.check()

    return work


def test_tickets_are_worked_on_in_their_order_and_know_how_many_are_ahead(worker):
    started, go, order = threading.Event(), threading.Event(), []
    first = worker.submit(held(started, go))
    assert started.wait(5)
    second, third = (worker.submit(lambda _, name=name: order.append(name)) for name in "bc")
    assert [worker.ahead(ticket) for ticket in (first, second, third)] == [0, 1, 2]
    go.set()
    assert third.wait(5)
    assert order == ["b", "c"]
    assert [ticket.state for ticket in (first, second, third)] == ["done"] * 3


def test_a_ticket_that_waits_is_cancelled_at_once_and_one_at_work_at_its_next_step(worker):
    started, go = threading.Event(), threading.Event()
    first = worker.submit(held(started, go))
    assert started.wait(5)
    second, third = worker.submit(lambda _: None), worker.submit(lambda _: None)
    worker.cancel(second)
    assert second.over
    assert second.state == "cancelled"
    assert worker.ahead(third) == 1
    worker.cancel(first)
    assert first.wait(5)
    assert first.state == "cancelled"
    assert third.wait(5)
    assert third.state == "done"


def test_a_queue_is_no_longer_than_it_may_be(worker):
    started, go = threading.Event(), threading.Event()
    worker.submit(held(started, go))
    assert started.wait(5)
    for _ in range(4):
        worker.submit(lambda _: None)
    with pytest.raises(UsageError, match="4 others wait for one already"):
        worker.submit(lambda _: None)
    go.set()


def test_what_goes_wrong_is_a_sentence_and_the_next_is_worked_on(worker, caplog):
    def fails(error):
        def work(_):
            raise error

        return work

    known = worker.submit(fails(KnobError("threshold is at most 1")))
    memory = worker.submit(fails(torch.OutOfMemoryError("CUDA out of memory")))
    unknown = worker.submit(fails(RuntimeError("/a/path/of/the/server")))
    after = worker.submit(lambda _: None)
    assert after.wait(5)
    assert after.state == "done"
    assert [ticket.state for ticket in (known, memory, unknown)] == ["failed"] * 3
    assert known.problem == "threshold is at most 1"
    assert "fewer frames" in memory.problem
    assert "path" not in unknown.problem
    assert "/a/path/of/the/server" in caplog.text


def test_work_of_two_models_at_one_time_is_told(worker):
    started, go = threading.Event(), threading.Event()
    alone = worker.submit(lambda _: None)
    assert alone.wait(5)
    first = worker.submit(held(started, go))
    assert started.wait(5)
    other = Worker("other", most_waiting=1)
    second = other.submit(lambda _: None)
    assert second.wait(5)
    go.set()
    assert first.wait(5)
    other.close()
    assert (alone.overlapped, first.overlapped, second.overlapped) == (False, True, True)


# -- what may be asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        Video(
            prompt='"><img src=x> ünï', model="m", set=("reuse.refresh=0,2",), frames=5, seed=MOST_SEED, arms="dense"
        ),
        Larger(prompt="a", model="m", scale=1.5, guide=False),
        Text(prompt="b", model="m", compare=True, temperature=0.25),
    ],
)
def test_settings_come_back_as_they_were(settings):
    assert from_json(to_json(settings), lambda tab, model: type(settings)()) == settings


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "no JSON"),
        ("[1]", "JSON object"),
        ('{"tab": "video"}', "name no version, and this page reads version 1"),
        ('{"version": 2, "tab": "video"}', "version 2"),
        ('{"version": true}', "version true"),
        ('{"version": "<b>1</b>"}', "version"),
        ('{"version": 1, "tab": "vido"}', "did you mean 'video'"),
        ('{"version": 1, "frame": 9}', "did you mean 'frames'"),
        ('{"version": 1, "frames": "9"}', 'frames is a whole number, got "9"'),
        ('{"version": 1, "frames": 9.5}', "frames is a whole number, got 9.5"),
        ('{"version": 1, "frames": true}', "frames is a whole number"),
        ('{"version": 1, "guidance": NaN}', "NaN is no number"),
        ('{"version": 1, "guidance": null}', "guidance is a number, got nothing"),
        ('{"version": 1, "set": "reuse=none"}', "set is a list of texts"),
        ('{"version": 1, "prompt": ["a"]}', "prompt is text"),
        ('{"version": 1, "set": ["reuse.profile=/etc/passwd"]}', "names a file of the server"),
        ("[" * 5000, "no JSON"),
        ('{"version": 1, "prompt": "' + "a" * 20000 + '"}', "at most 20000 characters"),
    ],
)
def test_settings_that_are_none_are_refused(text, sentence):
    with pytest.raises((UsageError, KnobError)) as found:
        from_json(text, lambda tab, model: Video())
    assert sentence in str(found.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "a" * 401}, "has 401 characters, and at most 400"),
        ({"prompt": "a\x1b[2J"}, "control character U+001B"),
        ({"negative": "\x00"}, "control character U+0000"),
        ({"seed": -1}, "a seed is a whole number in [0, 4294967295], got -1"),
        ({"seed": MOST_SEED + 1}, "got 4294967296"),
        ({"frames": 0}, "frames lies in [1, 161] here"),
        ({"frames": 165}, "frames lies in [1, 161] here, got 165"),
        ({"frames": 10}, "nearest valid values are 9 and 13"),
        ({"steps": 51}, "steps lies in [1, 50]"),
        ({"width": 4096}, "width lies in [1, 1280]"),
        ({"height": 40}, "height is a multiple of 16"),
        ({"guidance": float("nan")}, "guidance lies in"),
        ({"arms": "all"}, "choose one of both, accelerated, dense"),
        ({"preset": "fats"}, "did you mean 'fast'"),
        ({"set": ("cache.treshold=1",)}, "did you mean 'threshold'"),
        ({"set": ("cache.threshold=much",)}, "cache.threshold takes a number"),
        ({"set": ("cache.threshold=2",)}, "threshold"),
        ({"set": ("reuse.profile=/etc/passwd",)}, "names a file of the server"),
        (
            {
                "set": (
                    "reuse=FlashBlock",
                    " reuse.profile =x",
                )
            },
            "names a file of the server",
        ),
    ],
)
def test_what_may_not_be_asked_for_is_refused_at_once(models, values, sentence):
    model = models.videos["causal"]
    settings = dataclasses.replace(Video(prompt="a red circle", model="causal", frames=9), **values)
    with pytest.raises((UsageError, KnobError)) as found:
        check_video(settings, model, Limits())
    assert sentence in str(found.value)


def test_limits_are_at_least_one():
    with pytest.raises(KnobError, match="limit on steps is at least 1, got 0"):
        Limits(steps=0)


def test_fields_of_a_page_may_be_empty_or_of_another_type():
    assert from_fields(Video(), frames=9.0, guidance=2).frames == 9
    with pytest.raises(UsageError, match="seed is a whole number, got nothing"):
        from_fields(Video(), seed=None)


def test_every_knob_that_names_a_file_is_kept_from_pages():
    knobs = [knob for technique in TECHNIQUES for knob in technique.knobs().items()]
    named = {name for name, knob in knobs if knob.metadata.get("help", "").startswith("file")}
    assert named == set(FILE_KNOBS)


def test_knobs_of_a_page_say_what_was_changed_from_the_preset():
    from diffaccel.demo.knobs import changes, held

    for preset in PRESETS:
        assert changes(preset, held(build_accel(preset))) == ()
    for technique in TECHNIQUES:
        accel = Accel(**{technique.slot: technique()})
        assert build_accel("fast", changes("fast", held(accel))) == accel
    accel = build_accel("balanced", ["cache.threshold=0.5", "reuse.refresh=0,2", "kernel=sdpa", "prompt=none"])
    assert build_accel("balanced", changes("balanced", held(accel))) == accel


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "a table of methods and one of knobs"),
        ({"methods": ["TempCache"], "knobs": {}}, "a table of methods and one of knobs"),
        ({"methods": {}, "knobs": {"cache": "threshold"}}, "a table of texts for each slot"),
        ({"methods": {"cache": "TempCash"}, "knobs": {}}, "did you mean 'TempCache'"),
        ({"methods": {"cash": "TempCache"}, "knobs": {}}, "did you mean 'cache'"),
        ({"methods": {"cache": "TempCache"}, "knobs": {"cache": {"treshold": 1}}}, "did you mean 'threshold'"),
    ],
)
def test_what_no_page_sends_is_one_sentence(value, sentence):
    from diffaccel.demo.knobs import changes

    with pytest.raises((UsageError, DiffaccelError), match=sentence):
        build_accel("balanced", changes("balanced", value))


# -- what comes of it --------------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_pipeline_and_both_arms_are_measured(desk):
    request = desk.submit("page", asked(desk, set=ENGAGES, seed=3))
    state = made(desk, request)
    assert state["state"] == "done", state
    assert [(clip["name"], clip["parts"], clip["size"]) for clip in state["clips"]] == [
        ("dense", [1, 4, 4], (48, 32)),
        ("accelerated", [1, 4, 4], (48, 32)),
    ]
    pipe = desk.models.videos["causal"].pipe
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 2.0}
    for clip, accel in zip(request.result.clips, (Accel(), build_accel("balanced", ENGAGES)), strict=True):
        with accel(pipe):
            wanted = to_uint8(pipe("a red circle", **call, generator=torch.Generator().manual_seed(3)).frames[0])
        rows = [cv2.imdecode(np.frombuffer(clip.strip(n), np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for n in range(3)]
        shown = np.concatenate(rows).reshape(9, 32, 48, 3)
        assert np.abs(shown.astype(int) - wanted).mean() < 4  # JPEG
        assert np.abs(shown[1:].astype(int) - wanted[:-1]).mean() > 4
        assert len(read_video(clip.file)) == 9
    figures = {row[0]: row[1:] for row in state["figures"]["rows"]}
    assert state["figures"]["columns"] == ["dense", "accelerated"]
    for arm, name in enumerate(("dense", "accelerated")):
        report = request.result.reports[name]
        assert figures["frames/s"][arm] == f"{report['fps']:.2f}"
        assert figures["seconds"][arm] == f"{report['seconds']['total']:.2f}"
        assert figures["cache, tokens a layer"][arm] == f"{report['blocks'][-1]['tokens']:,}"
    assert [row[:3] for row in state["techniques"]] == [
        ["cache", "TempCache", "yes"],
        ["prompt", "PadCollapse", "yes"],
        ["reuse", "FlashBlock", "yes"],
    ]
    assert "as fast as dense" in state["verdict"]


def test_a_technique_that_never_engaged_is_told(desk):
    state = made(desk, desk.submit("page", asked(desk, set=("cache.threshold=1", "reuse=none"), arms="accelerated")))
    assert state["state"] == "done"
    assert any("never engaged: TempCache" in warning for warning in state["warnings"]), state["warnings"]
    assert ["cache", "TempCache", "NO"] in [row[:3] for row in state["techniques"]]


def test_words_that_the_model_does_not_know_are_told(desk):
    state = made(desk, desk.submit("page", asked(desk, prompt="a red zebra", arms="dense")))
    assert any('"zebra"' in note for note in state["notes"])


def test_a_pipeline_that_knows_no_blocks_makes_its_video_at_once(desk):
    state = made(desk, desk.submit("page", asked(desk, model="stock", preset="exact")))
    assert state["state"] == "done", state
    assert [clip["parts"] for clip in state["clips"]] == [[9], [9]]
    state = made(desk, desk.submit("page", asked(desk, model="stock", preset="fast")))
    assert state["state"] == "failed"
    assert "acts on earlier blocks" in state["error"]


def test_cancelling_ends_within_a_step_keeps_frames_and_frees_the_pipeline(desk, monkeypatch):
    pipe, steps = desk.models.videos["causal"].pipe, []
    request = desk.submit("page", asked(desk, frames=2001, steps=2, arms="dense", preset="exact"))
    while request.result.clips == [] or request.result.clips[0].frames < 9:
        assert not request.ticket.wait(0.005), request.state()
    predict = pipe._predict
    monkeypatch.setattr(pipe, "_predict", lambda *a, **k: steps.append(0) or predict(*a, **k))
    desk.cancel("page")
    assert request.ticket.wait(10)
    assert len(steps) <= 2  # the step at work, and perhaps the pass that writes a finished block
    state = request.state()
    assert state["state"] == "cancelled"
    kept = sum(state["clips"][0]["parts"])
    assert 9 <= kept < 2001
    assert len(read_video(request.result.clips[0].file)) == kept
    assert active_run(pipe) is None
    assert made(desk, desk.submit("page", asked(desk, arms="dense")))["state"] == "done"


def test_one_page_waits_for_one_thing_and_two_pages_wait_in_line(desk):
    first = desk.submit("one", asked(desk, frames=2001, steps=2, arms="dense"))
    with pytest.raises(UsageError, match="waiting for something already"):
        desk.submit("one", asked(desk))
    second = desk.submit("two", asked(desk, arms="dense"))
    assert second.state()["headline"] == "Waiting for causal: 1 ahead of you"
    desk.leave("one")
    assert made(desk, second)["state"] == "done"
    assert first.state()["state"] == "cancelled"


def test_files_of_hostile_prompts_stay_in_the_folder(desk):
    for prompt in ("../../etc/passwd", "<script>alert(1)</script>", "..", "a/b\\c\n:*?", "\u202etxt.exe"):
        request = desk.submit("page", asked(desk, prompt=prompt, arms="dense", frames=1))
        assert made(desk, request)["state"] == "done"
        assert request.result.clips[0].file.resolve().parent == desk.folder.resolve()
        assert set(request.result.clips[0].file.name) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
        )


def test_a_larger_video_is_made_beside_the_native_one(desk):
    request = desk.submit("page", asked(desk, "larger", frames=5, steps=2, strength=1.0))
    state = made(desk, request)
    assert state["state"] == "done", state
    assert [(clip["name"], clip["size"]) for clip in state["clips"]] == [("enlarged", (96, 64)), ("larger", (96, 64))]
    assert {row[1]: row[2] for row in state["techniques"]} == {"InwardWindow": "yes", "FullFieldGuide": "yes"}
    limited = dataclasses.replace(desk.models.limits, side=300)
    with pytest.raises(UsageError, match="width would be 384 pixels, and at most 300"):
        check_larger(asked(desk, "larger", scale=8.0), desk.models.larger["causal"], limited)
    with pytest.raises(KnobError, match="no larger than the window"):
        desk.submit("page", asked(desk, "larger", scale=1.0))


def reports(fast, dense, decode=(1.0, 1.0)):
    def one(total, decoding):
        seconds = {"attention": None, "denoise": total / 2, "decode": decoding, "total": total}
        return SimpleNamespace(seconds=seconds)

    return one(fast, decode[0]), one(dense, decode[1])


def test_the_verdict_says_so_where_it_is_slower():
    assert "slower" not in verdict(*reports(2.0, 3.0))
    assert "1.50x" in verdict(*reports(2.0, 3.0))
    assert "slower here, 0.50x" in verdict(*reports(4.0, 2.0))
    assert disturbed(*reports(2.0, 3.0)) is None
    assert "says little" in disturbed(*reports(2.0, 3.0, decode=(1.0, 1.5)))


def test_an_overlap_is_told_beside_the_figures(desk):
    request = desk.submit("page", asked(desk, arms="dense"))
    assert OVERLAP not in made(desk, request)["notes"]
    request.ticket.overlapped = True
    assert OVERLAP in request.state()["notes"]


def test_strips_are_no_higher_than_browsers_draw():
    clip = Clip("a", "A")
    clip.append(np.zeros((9, 2000, 16, 3), np.uint8))
    assert clip.parts == [4, 4, 1]
    assert cv2.imdecode(np.frombuffer(clip.strip(0), np.uint8), cv2.IMREAD_COLOR).shape == (8000, 16, 3)
    for number in (-1, 3):
        with pytest.raises(IndexError):
            clip.strip(number)


def test_old_results_go_and_their_files_with_them(models, monkeypatch):
    monkeypatch.setattr("diffaccel.demo.desk.MOST_KEPT", 1)
    desk = Desk(models)
    first = desk.submit("page", asked(desk, arms="dense", frames=1))
    assert made(desk, first)["state"] == "done"
    file = first.result.clips[0].file
    assert file.is_file()
    assert made(desk, desk.submit("page", asked(desk, arms="dense", frames=1)))["state"] == "done"
    assert not file.exists()
    with pytest.raises(KeyError):
        desk.result(first.result.key)
    desk.close()
    assert not desk.folder.exists()


# -- the server --------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_refused_with_one_that_is_free():
    with closing(listen("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} of 127.0.0.1 is in use.*--port \d+") as found:
            listen("127.0.0.1", port)
        free = int(str(found.value).split()[-1])
        with closing(listen("127.0.0.1", free)) as other:
            assert other.getsockname()[1] == free
        result = CliRunner().invoke(app, ["demo", "--port", str(port)])
        assert result.exit_code == 2
        assert "is in use" in result.stderr
        assert "Traceback" not in result.output
    with pytest.raises(UsageError, match=r"lies in \[0, 65535\]"):
        listen("127.0.0.1", 70000)
    with pytest.raises(UsageError, match="no address of this machine"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-frames", "0"], "limit on frames is at least 1"),
        (["--out", "no/such/folder"], "does not exist"),
        (["--model", "no-such-model", "--port", "0"], "there is no folder 'no-such-model'"),
        (["--model", "tiny-world", "--model", "tiny-world", "--port", "0"], "two models are called tiny-world"),
    ],
)
def test_mistakes_of_the_command_are_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo", "--port", "0"])
    assert result.exit_code == 2
    assert "pip install 'diffaccel[demo]'" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as SIGINT")
def test_ctrl_c_ends_the_server(folders, tmp_path):
    command = [sys.executable, "-m", "diffaccel", "demo", "--model", folders / "causal", "--text-model", "none"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--port", "0"], cwd=tmp_path, env=environment, text=True, start_new_session=True, **pipes
    ) as process:
        try:
            address = process.stdout.readline().split()[2]
            deadline = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(address, timeout=60) as answer:
                        assert b"gradio" in answer.read()
                    break
                except ConnectionError:
                    assert time.monotonic() < deadline
            os.killpg(process.pid, signal.SIGINT)
            said, complained = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, said) == (0, "")
    assert "Traceback" not in complained
    assert "interrupted" not in complained


def test_results_are_served_by_their_keys_alone(desk):
    from fastapi.testclient import TestClient

    request = desk.submit("page", asked(desk, prompt="a red circle", arms="dense"))
    assert made(desk, request)["state"] == "done"
    client, key = TestClient(build_server(desk)), request.result.key
    strip = client.get(f"/results/{key}/dense/1.jpg")
    assert strip.content == request.result.clips[0].strip(1)
    assert strip.headers["content-security-policy"] == POLICY
    assert client.get("/").headers["content-security-policy"] == POLICY
    video = client.get(f"/results/{key}/dense.mp4")
    assert video.content == request.result.clips[0].file.read_bytes()
    assert "a-red-circle" in video.headers["content-disposition"]
    assert client.get(f"/results/{key}/report.json").json()["settings"]["prompt"] == "a red circle"
    for path in ("dense/9.jpg", "dense/-1.jpg", "other.mp4", "other/0.jpg", "..%2f..%2fpyproject.toml", "%2e%2e.mp4"):
        assert client.get(f"/results/{key}/{path}").status_code == 404, path
    assert client.get("/results/none/report.json").status_code == 404
    request.result.clips[0].file = None  # as long as it is made
    assert client.get(f"/results/{key}/dense.mp4").status_code == 404
