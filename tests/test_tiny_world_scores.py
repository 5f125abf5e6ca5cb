"""The tiny world's scores: its own rendering passes each, and each is seen to fail on a clip made to fail it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import score_tiny_world  # noqa: E402
from tiny_world.drift import drift, drift_scenes, window_statistics  # noqa: E402
from tiny_world.metrics import Clip, heading, judge, memory_scenes, read, remembers, shares, truth  # noqa: E402
from tiny_world.world import COLORS, EVENTS, OPPOSITE, PATTERNS, SHAPES, held_out_scenes, sprite_path  # noqa: E402

from diffaccel.errors import DiffaccelError  # noqa: E402

SAID = ("color", "shape", "count", "direction", "speed", "size", "background")


def changed(scene, index=0, **values):
    """The scene with another sprite."""
    sprites = [replace(s, **values) if i == index else s for i, s in enumerate(scene.sprites)]
    return replace(scene, sprites=tuple(sprites))


def next_of(names, name):
    return names[(names.index(name) + 1) % len(names)]


def unused_color(scene):
    taken = {scene.background, scene.event_color, *(sprite.color for sprite in scene.sprites)}
    return next(color for color in COLORS if color not in taken)


def rendered(scene, frames=81):
    return next(iter(truth([scene], frames)))


@pytest.fixture(scope="module")
def held_out():
    scenes = held_out_scenes(24)
    return scenes, list(truth(scenes, 49))


@pytest.fixture(scope="module")
def memory():
    """Four unambiguous scenes of each event, with their rendering, and how many were drawn for it."""
    drawn = {event: memory_scenes(event, 4) for event in EVENTS}
    return {event: [(s, rendered(s)) for s in scenes] for event, (scenes, _) in drawn.items()}, drawn


def test_the_scores_pass_the_truth_and_fail_other_clips(held_out):
    scenes, clips = held_out
    readings = [read(clip) for clip in clips]
    assert shares([judge(r, s) for r, s in zip(readings, scenes, strict=True)]) == dict.fromkeys([*SAID, "all"], 1.0)
    others = shares([judge(r, s) for r, s in zip(readings, [*scenes[5:], *scenes[:5]], strict=True)])
    assert others["all"] == 0
    for name, most in {"color": 0.3, "shape": 0.4, "direction": 0.5, "background": 0.2, "speed": 0.8}.items():
        assert others[name] <= most, name
    # frames in 0..1 read as uint8 ones do
    assert judge(read(clips[0].astype(np.float32) / 255), scenes[0]) == judge(readings[0], scenes[0])


def test_a_blank_clip_shows_nothing_and_a_blurred_one_no_shape(held_out):
    scenes, clips = held_out
    blank = shares([judge(read(np.full_like(c, 128)), s) for c, s in zip(clips[:4], scenes[:4], strict=True)])
    assert set(blank.values()) == {0.0}
    blurred = [np.stack([cv2.GaussianBlur(frame, (0, 0), 5.0) for frame in clip]) for clip in clips]
    soft = [np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in clip]) for clip in clips]
    scores = shares([judge(read(c), s) for c, s in zip(blurred, scenes, strict=True)])
    assert scores["shape"] == 0
    assert scores["direction"] > 0.8  # it still moves, so the reading is not simply lost
    assert shares([judge(read(c), s) for c, s in zip(soft, scenes, strict=True)])["all"] == 1
    # a world of white, or of one sprite's colour, is no sprite
    assert not judge(read(np.full_like(clips[0], 247)), changed(scenes[0], color="white"))["color"]


@pytest.mark.parametrize("name", SAID)
def test_each_score_fails_on_its_own(held_out, name):
    for scene in held_out[0][:6]:
        sprite = scene.sprites[0]
        x, y = sprite.center
        second = replace(sprite, center=(x - 36, y) if sprite.motion in ("up", "down") else (x, y - 36), radius=15.5)
        other = {
            "color": changed(scene, color=unused_color(scene)),
            "shape": changed(scene, shape=next_of(SHAPES, sprite.shape)),
            "count": replace(changed(scene, radius=15.5), sprites=(replace(sprite, radius=15.5), second)),
            "direction": changed(scene, motion=OPPOSITE[sprite.motion]),
            "speed": changed(scene, rate=0.45 if sprite.speed == "quickly" else 1.05),
            "size": changed(scene, radius=16.0 if sprite.size == "large" else 24.5),
            "background": replace(scene, pattern=next_of(PATTERNS, scene.pattern)),
        }[name]
        scores = judge(read(rendered(other)), scene)
        assert not scores[name]
        assert not scores["all"]
        kept = [key for key in SAID if key != name and not (name == "count" and key in ("size", "shape"))]
        assert all(scores[key] for key in kept), scores


def test_a_frozen_sprite_moves_in_no_direction_and_at_no_speed(held_out):
    scenes, clips = held_out
    scores = judge(read(np.repeat(clips[0][20:21], 49, axis=0)), scenes[0])
    assert scores["color"]
    assert not scores["direction"]
    assert not scores["speed"]
    assert heading(np.array([0.5, 0.45])) is None
    assert heading(np.array([-0.5, 0.1])) == "left"


def test_nearly_every_memory_scene_is_unambiguous_and_none_is_a_training_one(memory):
    for event, (scenes, drawn) in memory[1].items():
        assert len(scenes) == 4
        assert drawn <= 5
        assert all(scene.event == event and 700_000_000 <= scene.seed < 780_000_000 for scene in scenes)


@pytest.mark.parametrize("event", EVENTS)
def test_a_memory_score_passes_the_truth_and_fails_blank_still_and_shortened_clips(memory, event):
    for scene, clip in memory[0][event]:
        assert remembers(clip, scene)
        assert remembers(Clip(clip, 2), scene)
        assert not remembers(np.full_like(clip, 128), scene)
        assert not remembers(np.repeat(clip[:1], 81, axis=0), scene)
        # what was before stays for ever: the event never comes
        assert not remembers(np.concatenate([clip[:30], np.repeat(clip[29:30], 51, axis=0)]), scene)


DAMAGES = ("another colour", "another size", "another shape", "another place", "not at all")


@pytest.mark.parametrize("event", ["return", "pan_return"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_comes_back_changed_did_not_return(memory, event, damage):
    for scene, clip in memory[0][event]:
        sprite = scene.sprites[0]
        x, y = sprite.center
        other = {
            "another colour": {"color": unused_color(scene)},
            "another size": {"radius": 16.0 if sprite.size == "large" else 24.5},
            "another shape": {"shape": next_of(SHAPES, sprite.shape)},
            "another place": {"center": (x + 12 if x < 64 else x - 12, y)},
            "not at all": {"center": (-500.0, y)},
        }[damage]
        # frame 40 has the sprite out of sight in both events
        assert not remembers(np.concatenate([clip[:40], rendered(changed(scene, **other))[40:]]), scene)


def test_a_pan_that_returns_to_another_background_did_not_return(memory):
    for scene, clip in memory[0]["pan_return"]:
        name = "maroon" if scene.background != "maroon" else "navy"
        if all(sprite.color != name for sprite in scene.sprites):
            other = rendered(replace(scene, background=name))
            assert not remembers(np.concatenate([clip[:40], other[40:]]), scene)


def test_behind_fails_in_front_lost_and_with_a_moving_occluder(memory):
    for scene, clip in memory[0]["behind"]:
        in_front = replace(scene, sprites=(replace(scene.sprites[0], size="small"), scene.sprites[1]), event=None)
        assert not remembers(rendered(in_front), scene)
        gone = changed(scene, center=(-500.0, scene.sprites[0].center[1]), motion="still")
        assert not remembers(np.concatenate([clip[:40], rendered(gone)[40:]]), scene)
        recolored = changed(scene, color=unused_color(scene))
        assert not remembers(np.concatenate([clip[:40], rendered(recolored)[40:]]), scene)
        x, y = scene.sprites[1].center
        moved = changed(scene, 1, center=(x, y + 12))
        assert not remembers(np.concatenate([clip[:40], rendered(moved)[40:]]), scene)


def test_recolor_fails_when_the_colour_comes_back_is_another_or_the_place_is_lost(memory):
    for scene, clip in memory[0]["recolor"]:
        unchanged = rendered(replace(scene, event=None))
        assert not remembers(unchanged, scene)
        assert not remembers(np.concatenate([clip[:68], unchanged[68:]]), scene)
        assert not remembers(rendered(replace(scene, event_color=unused_color(scene))), scene)
    straight = next(s for s, _ in memory[0]["recolor"] if s.sprites[0].motion not in ("bounces", "circles"))
    x, y = sprite_path(straight, 0, 81)[straight.event_frame]
    far = changed(straight, center=(30.0 if x > 64 else 98.0, 30.0 if y > 64 else 98.0), motion="still")
    at = straight.event_frame
    assert not remembers(np.concatenate([rendered(straight)[:at], rendered(far)[at:]]), straight)


def test_turn_fails_for_no_turn_and_another_turn(memory):
    for scene, _ in memory[0]["turn"]:
        assert not remembers(rendered(replace(scene, event=None)), scene)
        assert not remembers(rendered(replace(scene, event_motion=OPPOSITE[scene.event_motion])), scene)


def test_twins_fail_when_they_swap_colours_or_one_is_lost_or_changes_shape(memory):
    for scene, clip in memory[0]["twins"]:
        first, second = scene.sprites
        swapped = replace(scene, sprites=(replace(first, color=second.color), replace(second, color=first.color)))
        assert not remembers(np.concatenate([clip[:40], rendered(swapped)[40:]]), scene)
        lost = changed(scene, center=(-500.0, 0.0), motion="still")
        assert not remembers(np.concatenate([clip[:40], rendered(lost)[40:]]), scene)
        shaped = changed(scene, shape=next_of(SHAPES, first.shape))
        assert not remembers(np.concatenate([clip[:40], rendered(shaped)[40:]]), scene)


def test_drift_of_the_truth_is_flat_and_damage_is_seen():
    scenes = drift_scenes(4)
    clips = list(truth(scenes, 3 * 81))
    flat = drift(clips)
    assert flat["largest"] < 0.15
    assert flat["dissolved"] == flat["froze"] == 0
    assert max(flat["color_shift"]) < 0.02
    fade = np.linspace(1.0, 0.2, 3 * 81)[:, None, None, None]
    fading = drift([(clip * fade).astype(np.uint8) for clip in clips])
    assert fading["brightness"][1] < fading["brightness"][0] < 0.8
    assert fading["largest"] > 0.5
    assert max(fading["color_shift"]) > 0.05
    frozen = drift([np.concatenate([clip[:81], np.repeat(clip[80:81], 162, axis=0)]) for clip in clips])
    assert (frozen["froze"], frozen["dissolved"], frozen["motion"]) == (1, 0, [0, 0])
    empty = [rendered(replace(scene, sprites=()), 162) for scene in scenes]
    dissolved = drift([np.concatenate([clip[:81], void]) for clip, void in zip(clips, empty, strict=True)])
    assert dissolved["dissolved"] == 1
    soft = [np.concatenate([c[:81], [cv2.GaussianBlur(f, (0, 0), 2.0) for f in c[81:]]]) for c in clips]
    assert drift(soft)["sharpness"][0] < 0.8
    nothing = drift([np.full((162, 128, 128, 3), 90, np.uint8)])
    assert (nothing["dissolved"], nothing["froze"], nothing["area"]) == (1, 1, [])
    latents = np.random.default_rng(0).normal(size=(2, 4, 40, 8, 8))
    latents[:, :, 20:] *= 2
    scored = drift([clip[:162] for clip in clips[:2]], latents=latents)
    assert scored["latent_std"][0] == pytest.approx(2, rel=0.05)
    assert len(scored["latent_mean"]) == 2
    assert window_statistics(clips[0])["color"].shape == (3, 3)


def folder_of(path, scenes, clips):
    """A folder as --out writes it."""
    items = [
        score_tiny_world.Item(f"{i}.npy", "held_out", {"seed": 0, "index": i}, scene, "a prompt")
        for i, scene in enumerate(scenes)
    ]
    score_tiny_world.write_plan(path, items)
    for item, clip in zip(items, clips, strict=True):
        np.save(path / item.file, clip)
    return path


def test_a_folder_of_clips_is_scored_as_its_scenes_json_says(held_out, tmp_path, capsys):
    scenes, clips = held_out
    folder = folder_of(tmp_path / "clips", scenes[:4], clips[:4])
    out, sheet = tmp_path / "scores.json", tmp_path / "sheet.jpg"
    arguments = ["--clips", str(folder), "--json", str(out), "--sheet", str(sheet)]
    assert score_tiny_world.main(arguments) == 0
    assert "truth_of_others" in capsys.readouterr().out
    result = json.loads(out.read_text())
    scores = result["suites"]["held_out"]
    assert scores["clips"] == scores["truth"] == dict.fromkeys([*SAID, "all"], 1.0)
    assert set(scores["blank"].values()) == {0.0}
    assert scores["blurred"]["shape"] == 0
    assert result["settings"]["frames"] == {"held_out": 49}
    assert {"date", "device", "versions"} <= set(result)
    assert sheet.stat().st_size > 1000
    # an encoded video scores alike
    from diffaccel.video import write_video

    text = (folder / "scenes.json").read_text()
    write_video(folder / "0.mp4", clips[0])
    (folder / "scenes.json").write_text(text.replace("0.npy", "0.mp4"))
    assert score_tiny_world.main(["--clips", str(folder), "--no-controls", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["suites"]["held_out"]["clips"]["all"] == 1


def test_prompts_only_names_the_files_that_generate_writes(tmp_path):
    arguments = ["--prompts-only", "--suite", "held_out,memory", "--prompts", "5", "--events", "1"]
    assert score_tiny_world.main([*arguments, "--out", str(tmp_path / "asked")]) == 0
    entries = json.loads((tmp_path / "asked" / "scenes.json").read_text())
    lines = (tmp_path / "asked" / "prompts.txt").read_text().splitlines()
    assert [entry["prompt"] for entry in entries] == lines
    assert len({entry["file"] for entry in entries}) == len(lines) == 11
    assert all(entry["file"].endswith(".mp4") for entry in entries)
    scenes = [score_tiny_world.scene_of(entry) for entry in entries]
    assert scenes[:5] == held_out_scenes(5)
    assert [scene.event for scene in scenes[5:]] == list(EVENTS)
    said = ("slowly", "gently", "quickly", "fast")
    assert all(any(word in line for word in said) for line in lines[:5])  # what is scored was asked for


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "1.npy").unlink(), "lacks 1 of its 3 clips, first '1.npy'"),
        (lambda folder: (folder / "scenes.json").unlink(), "has no scenes.json"),
        (lambda folder: (folder / "scenes.json").write_text("{"), "is no list of scenes"),
        (lambda folder: (folder / "scenes.json").write_text("[]"), "names no clip"),
        (lambda folder: np.save(folder / "1.npy", np.zeros((33, 128, 128, 3), np.uint8)), "has 33 frames where"),
        (lambda folder: np.save(folder / "1.npy", np.zeros((49, 64, 64, 3), np.uint8)), "is 64x64"),
        (lambda folder: np.save(folder / "1.npy", np.zeros((49, 128, 128), np.uint8)), "must hold"),
        (lambda folder: np.save(folder / "1.npy", np.full((49, 128, 128, 3), np.nan)), "not finite"),
        (lambda folder: (folder / "1.npy").write_text("no array"), "cannot be read as an array"),
    ],
)
def test_a_bad_folder_is_one_sentence_and_exit_code_2(held_out, tmp_path, capsys, damage, says):
    scenes, clips = held_out
    folder = folder_of(tmp_path / "clips", scenes[:3], clips[:3])
    damage(folder)
    assert score_tiny_world.main(["--clips", str(folder), "--no-controls"]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name the folder of a model"),
        (["--clips", "nowhere"], "there is no folder 'nowhere'"),
        (["nowhere", "--prompts", "1", "--suite", "held_out"], "there is no folder 'nowhere'"),
        (["m", "--suite", "beauty"], "--suite takes"),
        (["m", "--prompts", "0"], "--prompts must be at least 1"),
        (["m", "--frames", "18"], "--frames must be"),
        (["m", "--json", "nowhere/a.json"], "does not exist"),
        (["--prompts-only"], "name it with --out"),
        (["--prompts-only", "--out", "x"], "longer than the others"),
        (["--clips", "x", "--vae-clips", "1"], "--vae-clips needs a model"),
    ],
)
def test_a_bad_command_line_is_one_sentence_and_exit_code_2(capsys, arguments, says):
    assert score_tiny_world.main(arguments) == 2
    assert says in capsys.readouterr().err
    assert issubclass(score_tiny_world.ScoreError, DiffaccelError)


def test_a_clip_of_the_wrong_length_for_its_suite_is_refused():
    short = np.zeros((33, 128, 128, 3), np.uint8)
    for suite in ("memory", "drift"):
        with pytest.raises(score_tiny_world.ScoreError, match="has 33 frames"):
            score_tiny_world.check_clip(short, suite, "a.npy")
