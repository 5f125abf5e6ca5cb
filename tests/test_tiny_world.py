"""The procedural world of the bundled model: seeded, described in full, held-out combinations kept out; its trainer."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffaccel.pipelines.loading import load

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import train_tiny_world  # noqa: E402
from tiny_world.bank import LatentBank, choose_prompts, gapped  # noqa: E402
from tiny_world.checkpoint import TrainingError, load_stage, save_stage  # noqa: E402
from tiny_world.config import load_config  # noqa: E402
from tiny_world.flow import FlowNet, Masks, teacher_forcing  # noqa: E402
from tiny_world.models import build_text_encoder, build_transformer, build_vae  # noqa: E402
from tiny_world.muon import Muon, orthogonalise  # noqa: E402
from tiny_world.parallel_vae import ParallelVAE  # noqa: E402
from tiny_world.prompts import describe, describe_twice, normalize, unknown_words  # noqa: E402
from tiny_world.train_few_step import Teacher, check_path  # noqa: E402
from tiny_world.train_flow import self_check  # noqa: E402
from tiny_world.world import (  # noqa: E402
    EVENTS,
    HELD_OUT,
    SWITCHES,
    draw_scene,
    held_out_scenes,
    is_held_out,
    render,
)


def test_a_seed_is_a_clip():
    scenes = [draw_scene(seed) for seed in (3, 4)]
    clips = render(scenes, 9)
    assert clips.shape == (2, 9, 3, 128, 128)
    assert torch.equal(clips, render([draw_scene(3), draw_scene(4)], 9))
    assert torch.equal(clips[:1], render(scenes[:1], 9))
    assert not torch.equal(clips[0], clips[1])


def test_held_out_combinations_are_never_drawn_for_training():
    assert len(HELD_OUT) > 20
    assert not any(is_held_out(draw_scene(seed)) for seed in range(3000))
    assert all(is_held_out(scene) for scene in held_out_scenes(64))


def test_prompts_describe_everything_in_known_words_and_many_wordings():
    for seed in range(200):
        scene = draw_scene(seed)
        wordings = {describe(scene, random.Random(number)) for number in range(6)}
        assert len(wordings) > 1
        for text in wordings:
            assert 10 <= len(text.split()) <= 60, text
            assert unknown_words(text) == []
            for sprite in scene.sprites:
                assert sprite.color in text, text
                assert sprite.shape in text, text
            assert scene.background in text, text
    assert unknown_words("a large red dodecahedron") == ["dodecahedron"]


def test_every_event_is_in_the_world_and_in_its_prompt():
    said = {
        "return": ("back", "returns"),
        "behind": ("behind",),
        "pan_return": ("returns", "back"),
        "recolor": ("turns", "changes", "becomes"),
        "turn": ("then", "turns"),
        "twins": ("left",),
    }
    assert set(said) == set(EVENTS)
    for event, words in said.items():
        for seed in range(20):
            scene = draw_scene(seed, (event,))
            text = describe(scene, random.Random(seed))
            assert set(words) & set(normalize(text)), text
            if event == "twins":
                one, other = scene.sprites
                assert (one.shape, one.size) == (other.shape, other.size)
                assert one.color != other.color


def test_a_prompt_may_change_where_the_scene_does():
    pairs = [(draw_scene(seed, (event,)), seed) for event in SWITCHES for seed in range(40)]
    changed = 0
    for scene, seed in pairs:
        before, after = describe_twice(scene, random.Random(seed))
        if before != after:
            changed += 1
            new = scene.event_color if scene.event == "recolor" else scene.event_motion
            assert new in after, (before, after)
            assert "then" not in normalize(before), before
    assert 20 < changed < 60
    assert len(set(describe_twice(draw_scene(1, (None,)), random.Random(1)))) == 1


def test_slots_read_the_second_prompt_from_the_block_of_the_change_on():
    layout = teacher_forcing(7, 1)  # blocks: 0 | 1 2 3 | 4 5 6, clean and noisy
    choice = choose_prompts(layout, torch.arange(7), torch.tensor([10**6, 5, 3]))
    assert choice[0].tolist() == [0] * 14
    assert choice[1].tolist() == [0, 0, 0, 0, 1, 1, 1] * 2
    assert choice[2].tolist() == [0, 1, 1, 1, 1, 1, 1] * 2


def test_gapped_sequences_keep_the_beginning_and_whole_blocks():
    seen = set()
    for seed in range(200):
        first = 1 + seed % 3
        frames = gapped(81, 21, first, random.Random(seed))
        assert len(frames) == 21
        assert int(frames[-1]) < 81
        steps = frames.diff()
        assert (steps >= 1).all()
        assert (steps > 1).sum() <= 1
        if (steps > 1).any():
            assert (int((steps > 1).nonzero()) + 1 - first) % 3 == 0
        seen.add(int(frames[-1]))
    assert max(seen) > 75


def test_a_masked_sequence_is_the_library_forward_block_by_block():
    torch.manual_seed(0)
    sizes = load_config("toy").sizes
    transformer, encoder = build_transformer(sizes).eval(), build_text_encoder(sizes).eval()
    assert self_check(transformer) < 1e-5
    # The teacher with its context kept, and the whole sequence in one forward.
    layouts = [teacher_forcing(5, first) for first in (1, 2, 3)]
    guide = Teacher(FlowNet(transformer), layouts, torch.device("cpu"), flex=False)
    vae, stats = build_vae(sizes).eval(), (torch.zeros(16), torch.ones(16))
    bank = LatentBank(ParallelVAE(vae), stats, 2, 17, seed=5, batch=2)
    masks = Masks(layouts, 64, torch.device("cpu"), flex=False)
    assert "against the whole sequence" in check_path(guide, masks, layouts, bank, encoder, 2)
    wrong = Masks([teacher_forcing(5, 1) for _ in range(3)], 64, torch.device("cpu"), flex=False)
    wrong.allowed = {name: torch.ones_like(layouts[0].allowed) for name in masks.allowed}
    with pytest.raises(TrainingError, match="kept context differs"):
        check_path(guide, wrong, layouts, bank, encoder, 2)


def test_muon_steps_are_orthogonal_and_of_the_size_of_an_adam_step():
    matrices = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    Muon([weight], lr=0.01, weight_decay=0.0).step()
    assert 0.1 < float(weight.detach().square().mean().sqrt()) / 0.01 < 0.3
    assert float((weight.detach() * weight.grad).sum()) < 0


def train(*arguments):
    command = [sys.executable, str(SCRIPTS / "train_tiny_world.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_trainer_runs_resumes_and_exports_what_the_pipeline_loads(tmp_path):
    def stage(*arguments):
        done = train(*arguments, "--config", "toy", "--out", tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    stage("vae", "--steps", 2)
    first = stage("flow", "--steps", 2)
    again = stage("flow", "--steps", 2)
    assert "flow step 1 " in first
    assert "flow step 1 " not in again  # it went on from what the first run left
    assert "validation, later blocks" in again
    stage("few_step", "--steps", 2)
    assert "model-few-step" in stage("export", "--to", tmp_path / "model")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["vae", "flow", "flow", "few_step"]
    assert sorted(path.suffix for path in tmp_path.glob("f*-*.png")) == [".png"] * 3
    size = {"num_frames": 5, "height": 32, "width": 32}
    for name, steps in (("model", 1), ("model-few-step", 4)):
        pipe = load(tmp_path / name, device="cpu")
        assert type(pipe).__name__ == "CausalWanPipeline"
        frames = pipe("a large red circle moves left", num_inference_steps=steps, **size).frames
        assert np.isfinite(frames).all()


@pytest.mark.slow
def test_training_without_a_gpu_says_so_and_lowers_the_loss(tmp_path):
    done = train("vae", "--config", "full", "--steps", 6, "--batch", 1, "--clips", 4, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout
    [first] = re.findall(r"vae step 1 loss ([\d.]+)", done.stdout)
    [later] = re.findall(r"vae step 5 loss ([\d.]+)", done.stdout)
    assert float(later) < float(first)


def test_mistakes_of_training_are_one_sentence(tmp_path, monkeypatch):
    def fails(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_tiny_world.py", *map(str, arguments), "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            train_tiny_world.main()
        assert isinstance(ended.value.code, str)  # exit code 1, and this on stderr
        assert "\n" not in ended.value.code
        return ended.value.code

    assert "run the vae stage first" in fails("flow", "--config", "toy")
    assert "no config 'tiny'; take one of full, toy" in fails("vae", "--config", "tiny")
    assert "--to names the folder" in fails("export", "--config", "toy")
    (tmp_path / "odd.json").write_text('{"sizes": {"vae_dim": 8}}')
    assert "cannot be used" in fails("vae", "--config", tmp_path / "odd.json")
    sizes = load_config("toy").describe()
    save_stage(tmp_path, "vae", {"x": torch.zeros(4)}, sizes)
    message = fails("vae", "--config", "full")
    assert "holds a model of sizes" in message
    file = tmp_path / "vae.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert "damaged or cut short" in fails("flow", "--config", "toy")


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    save_stage(tmp_path, "vae", {"x": torch.ones(4)}, {})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiny_world.checkpoint.os.fsync", full)
    with pytest.raises(TrainingError, match=r"No space left.*last good .* is kept"):
        save_stage(tmp_path, "vae", {"x": torch.zeros(4)}, {})
    assert load_stage(tmp_path, "vae", {})["x"].tolist() == [1.0] * 4
    assert list(tmp_path.iterdir()) == [tmp_path / "vae.safetensors"]
