"""Several pipelines in one process: in threads, and around one transformer."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from composition import KINDS, LOSSY, opened, video
from diffusers import WanPipeline
from tiny import tiny_pipeline

from diffaccel import Accel, UnsupportedError, backbone
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.port import Port


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_threads_with_a_pipeline_each():
    """Videos and counts are those of one after the other."""
    kinds = [*KINDS, *KINDS]
    pipes = [opened(kind) for kind in kinds]

    def one(kind, pipe, ready=None):
        with LOSSY[kind](pipe) as run:
            if ready is not None:
                ready.wait()
            frames = video(pipe)
        return frames, run.report().slots

    expected = [one(kind, pipe) for kind, pipe in zip(kinds, pipes, strict=True)]
    ready = Barrier(len(pipes))
    with ThreadPoolExecutor(len(pipes)) as pool:
        found = list(pool.map(one, kinds, pipes, [ready] * len(pipes)))
    for (frames, slots), (other, counts) in zip(found, expected, strict=True):
        assert torch.equal(frames, other)
        assert slots == counts


def test_ports_made_in_threads_have_handles_of_their_own():
    """Compiled code finds the layer by it; two layers of one handle would answer for each other."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _: [Port(None, 0, "self") for _ in range(500)], range(4)))
    finally:
        sys.setswitchinterval(switch)
    handles = [int(port.handle) for ports in made for port in ports]
    assert len(set(handles)) == len(handles)


def test_the_first_acceleration_may_come_from_two_threads(monkeypatch):
    """Families are loaded then, once."""
    loaded = []

    def load(name):
        time.sleep(0.05)
        loaded.append(name)

    pipe = opened("stock")
    backbone.find(pipe)
    monkeypatch.setattr(backbone, "_PLUGINS", ["families"])
    monkeypatch.setattr(backbone, "importlib", SimpleNamespace(import_module=load))
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda _: backbone.find(pipe), range(4)))) == 4
    assert loaded == ["families"]


def test_one_causal_pipeline_makes_one_video_at_a_time():
    pipe = tiny_pipeline()
    with Accel()(pipe):
        stream = pipe.stream("a red circle", height=32, width=48, num_frames=33, num_inference_steps=2)
        next(stream)
        with pytest.raises(UnsupportedError, match="in the middle of a stream"):
            video(pipe)
        stream.close()
        video(pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_accel_around_a_shared_transformer_is_refused(kind):
    pipe = opened(kind)
    other = quiet((WanPipeline if kind == "causal" else CausalWanPipeline)(**pipe.components))
    with Accel()(pipe), pytest.raises(UnsupportedError, match=f"{type(other).__name__} is accelerated already"):
        Accel().apply(other)


def test_a_causal_pipeline_does_not_run_under_the_accel_of_a_stock_one():
    pipe = opened("stock")
    other = quiet(CausalWanPipeline(**pipe.components))
    expected = video(other)
    with (
        Accel()(pipe),
        pytest.raises(UnsupportedError, match="WanPipeline is accelerated and shares its transformer with this Causal"),
    ):
        video(other)
    assert torch.equal(video(other), expected)


def test_a_stock_pipeline_runs_as_ever_under_the_accel_of_a_causal_one():
    pipe = opened("causal")
    other = quiet(WanPipeline(**pipe.components))
    expected = video(other)
    with LOSSY["causal"](pipe):
        lossy = video(pipe)
        torch.testing.assert_close(video(other), expected, atol=1e-5, rtol=0)
        assert torch.equal(video(pipe), lossy)
