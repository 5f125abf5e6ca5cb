"""The tiny world's judge of text: what it reads in prompts, and that truth passes and other clips do not."""

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from tiny_world.adherence import adherence, named
from tiny_world.metrics import truth
from tiny_world.prompts import describe
from tiny_world.world import draw_scene, held_out_scenes


def test_what_every_wording_names_is_what_the_scene_has():
    rng, speeds = random.Random(0), 0
    for scene in held_out_scenes(200):
        prompt = describe(scene, rng)
        found = named(prompt)
        assert found is not None, prompt
        read, says = found
        sprite, given = read.sprites[0], scene.sprites[0]
        assert (sprite.shape, sprite.color, sprite.size, sprite.motion) == (
            given.shape,
            given.color,
            given.size,
            given.motion,
        )
        assert (read.background, read.pattern) == (scene.background, scene.pattern), prompt
        assert says >= {"color", "count", "shape", "size", "direction", "background"}
        if "speed" in says:
            assert sprite.speed == given.speed
            speeds += 1
    assert 100 < speeds < 200  # the others leave it out


def test_other_prompts_are_not_judged():
    clip = np.zeros((9, 128, 128, 3), np.uint8)
    rng = random.Random(0)
    for seed in range(40):
        scene = draw_scene(seed)
        if len(scene.sprites) > 1 or scene.camera != "static" or scene.event:
            assert math.isnan(adherence(clip, describe(scene, rng)))
    assert math.isnan(adherence(clip[:, :64], "a red circle"))
    assert named("a large red circle moves in a circle over teal")[0].sprites[0].motion == "circles"
    assert "direction" not in named("a red ring stays still on a navy backdrop")[1]


def test_truth_has_all_that_is_named_and_others_have_less():
    scenes = held_out_scenes(8)
    prompts = [describe(scene, random.Random(scene.seed)) for scene in scenes]
    clips = list(truth(scenes, 49))
    assert [adherence(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)] == [1.0] * 8
    others = [adherence(clip, prompt) for clip, prompt in zip(clips, prompts[3:] + prompts[:3], strict=True)]
    assert np.mean(others) < 0.6
    assert max(adherence(np.full_like(clip, 128), prompt) for clip, prompt in zip(clips, prompts, strict=True)) == 0
    assert adherence(clips[0] / 255.0, prompts[0]) == pytest.approx(1.0)
