"""Families whose heads several devices share: two processes, one video, and a sentence for those that cannot."""

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, GRID, cosmos, noise, prompt, skyreels_v2
from test_spread import join, leave, together
from tiny import tiny_hunyuan_video, tiny_transformer

from diffaccel import Accel, AnnSA, FullFieldGuide, InwardWindow
from diffaccel.errors import UnsupportedError
from diffaccel.pipelines import share_heads
from diffaccel.pipelines.backbones.plans import PLANS, plan_of

WINDOW = InwardWindow((3, 3))
ARMS = {
    "dense": Accel(),
    "AnnSA": Accel(selection=AnnSA(0.5, dense_steps=0, min_past=0, sink_frames=0)),
    "InwardWindow": Accel(window=WINDOW),
    "FullFieldGuide, as published": Accel(window=WINDOW, reuse=FullFieldGuide(every=2)),
    "FullFieldGuide on a smaller grid": Accel(window=WINDOW, reuse=FullFieldGuide(every=2, shrink=2)),
}
SHARED = [family for family in FAMILIES if not family.causal and type(family.model()) in PLANS]
CASES = [
    (family, name) for family in SHARED for name, accel in ARMS.items() if accel.reuse is None or family.takes_guide
]


def times_of_frames():
    """Forwards whose frames have a noise level each."""
    x, levels = noise(1, 4, GRID.frames, 2 * GRID.height, 2 * GRID.width), torch.tensor([[900.0, 500.0, 100.0]])
    yield skyreels_v2(), x, {"timestep": levels, "enable_diffusion_forcing": True}
    yield cosmos(), x, {"timestep": levels.view(1, 1, 3, 1, 1) / 1000}


@torch.no_grad()
def made_by_frame(model, x, given):
    with ARMS["InwardWindow"](SimpleNamespace(transformer=model)):
        return model(hidden_states=x, **given, **prompt(1, 0), return_dict=False)[0]


def made(family, pipe, accel):
    with accel(pipe) as run:
        found = family.generate(pipe, rows=2)
    counts = {slot: (c.engaged, c.calls, c.keys_total, c.keys_read) for slot, c in run.report().slots.items()}
    return found, counts


def worker(folder):
    join()
    found = {}
    for family, name in CASES:
        pipe = family.pipe()
        share_heads(pipe)
        found[family.name, name] = made(family, pipe, ARMS[name])
    for number, (model, x, given) in enumerate(times_of_frames()):
        share_heads(SimpleNamespace(transformer=model))
        found[number] = made_by_frame(model, x, given)
    leave(folder, found)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return together(tmp_path_factory.mktemp("ranks"), "test_share_heads")


@pytest.mark.parametrize(("family", "name"), CASES, ids=lambda case: getattr(case, "name", case))
def test_two_processes_make_the_video_of_one(family, name, ranks):
    expected, counts = made(family, family.pipe(), ARMS[name])
    for rank in ranks:
        found, counted = rank[family.name, name]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert counted == counts
        assert all(engaged for engaged, *_ in counts.values())


def test_frames_with_a_noise_level_each_are_split_too(ranks):
    for number, forward in enumerate(times_of_frames()):
        for rank in ranks:
            torch.testing.assert_close(rank[number], made_by_frame(*forward), atol=1e-5, rtol=0)


def test_every_family_is_shared_or_says_why_not():
    for family in FAMILIES:
        model = family.model()
        if type(model) in PLANS:
            assert plan_of(model)
            continue
        with pytest.raises(UnsupportedError, match=rf"cannot share this {type(model).__name__}: .*; run it on one"):
            plan_of(model)
    model = tiny_hunyuan_video()
    model.register_to_config(image_condition_type="token_replace")
    with pytest.raises(UnsupportedError, match="treat the first frame apart"):
        plan_of(model)


def test_one_process_has_nobody_to_share_with():
    with pytest.raises(UnsupportedError, match="this one is alone: start it with torchrun --nproc-per-node N"):
        share_heads(SimpleNamespace(transformer=tiny_transformer()))


@pytest.fixture
def two(monkeypatch):
    """As one of two processes, before they meet."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_what_does_not_divide_and_what_has_no_accelerator_is_refused(two, monkeypatch):
    with pytest.raises(UnsupportedError, match="3 heads of WanTransformer3DModel cannot be shared by 2 processes"):
        share_heads(SimpleNamespace(transformer=tiny_transformer(heads=3)))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(UnsupportedError, match="torch finds none here"):
        share_heads(SimpleNamespace(transformer=tiny_transformer()))
