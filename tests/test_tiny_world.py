"""The procedural world of the bundled model: seeded, described in full, held-out combinations kept out; its trainer."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffaccel.pipelines.loading import load

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from tiny_world.metrics import judge  # noqa: E402
from tiny_world.prompts import describe, unknown_words  # noqa: E402
from tiny_world.world import HELD_OUT, draw_scene, held_out_scenes, is_held_out, render  # noqa: E402


def test_a_seed_is_a_clip():
    scenes = [draw_scene(seed) for seed in (3, 4)]
    clips = render(scenes, 9)
    assert clips.shape == (2, 9, 3, 128, 128) or clips.shape == (2, 3, 9, 128, 128)
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
            assert 8 <= len(text.split()) <= 60, text
            assert unknown_words(text) == []
            for sprite in scene.sprites:
                assert sprite.color in text, text
                assert sprite.shape in text, text
            assert scene.background in text, text
    assert unknown_words("a large red dodecahedron") == ["dodecahedron"]


def test_the_scores_pass_the_truth_and_fail_other_clips():
    scenes = held_out_scenes(24)
    clips = render(scenes, 33)
    channels = clips.shape.index(3)
    clips = clips.movedim(channels, -1).float().div(255).numpy()
    truth = judge(clips, scenes)
    assert truth["color"] > 0.95
    assert truth["direction"] > 0.95
    others = judge(clips, [*scenes[5:], *scenes[:5]])
    assert others["direction"] < 0.5 < truth["direction"]
    blank = judge(np.zeros_like(clips), scenes)
    assert blank["color"] == 0


@pytest.mark.slow
def test_the_trainer_runs_resumes_and_exports_what_the_pipeline_loads(tmp_path):
    def stage(*arguments):
        command = [sys.executable, str(SCRIPTS / "train_tiny_world.py"), *arguments, "--toy", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    stage("vae", "--steps", "2")
    first = stage("flow", "--steps", "2")
    again = stage("flow", "--steps", "2")
    assert "flow step 1 " in first
    assert "flow step 1 " not in again  # it went on from the parts the first run left
    assert "exported to" in stage("export", "--to", str(tmp_path / "model"))
    pipe = load(tmp_path / "model", device="cpu")
    assert type(pipe).__name__ == "CausalWanPipeline"
    frames = pipe("a large red circle moves left", num_frames=5, height=32, width=32, num_inference_steps=1).frames
    assert np.isfinite(frames).all()
