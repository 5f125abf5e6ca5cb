"""HyLRA and LycheeDecode: who reads whose choice, that it is the right one, and that the plan is the best there is."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from profiles import profile_of
from test_selectors import GRID, HEADS, field, site, smooth
from tiny import tiny_pipeline
from typer.testing import CliRunner

from diffaccel import (
    Accel,
    AnnSA,
    FlashBlock,
    HyLRA,
    KnobError,
    LycheeDecode,
    NotEngagedError,
    TempCache,
    UnsupportedError,
)
from diffaccel.calibrate import calibrate, summary
from diffaccel.cli import app
from diffaccel.overlap import OverlapRecorder
from diffaccel.pipelines.loading import load
from diffaccel.profile import Model, Profile
from diffaccel.selection.layer_plan import plan

KINDS = [HyLRA, LycheeDecode]
every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
PROMPT = "a red circle moves left"
CALL = {"width": 48, "height": 32, "num_frames": 49, "num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(layers=4)


@pytest.fixture(scope="module")
def measured(pipe):
    return calibrate(pipe, HyLRA(min_past=0), prompts=[PROMPT], **CALL)


def generate(pipe, accel, **changes):
    with accel(pipe) as run:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, **CALL | changes, generator=generator, output_type="latent").frames, run


def made_up(path, kind, overlap, mass=None, heads=HEADS, **knobs):
    """A policy with a profile of these tables [g, i, j]."""
    overlap = np.asarray(overlap, float)
    tables = {"overlap": overlap, "mass": overlap if mass is None else np.asarray(mass, float)}
    if overlap.ndim == 3:
        tables = {name: table[..., None].repeat(heads, -1) for name, table in tables.items()}
    gaps, layers = overlap.shape[:2]
    axes = {"gap": tuple(map(float, range(gaps))), "source": tuple(map(float, range(layers)))}
    model = Model("none", layers, heads, 16, "0" * 12)
    shape = {"width": 8, "height": 8, "frames": 9, "steps": 4}
    Profile(kind.__name__, model, shape, 1, {}, {}, axes, tables).save(path / "p.json")
    usual = {"density": 0.3, "recent_frames": 0, "sink_frames": 0, "dense_steps": 0, "summaries": False}
    return kind(**usual | {"profile": str(path / "p.json")} | knobs)


# -- the plan --------------------------------------------------------------------------------------------------------


def brute_force(like, steps, least, dense):
    """(full calls, likeness) of every plan that is allowed, the best of them."""
    gaps, layers = like.shape[:2]

    def span(length):
        for full in itertools.product([False, True], repeat=layers):
            if not full[0] or any(not full[layer] for layer in dense):
                continue
            count, total, allowed = 0, 0.0, True
            last = 0
            for layer in range(layers):
                last = layer if full[layer] else last
                for gap in range(length):
                    if full[layer] and (gap == 0 or layer in dense):
                        count += 1
                        continue
                    allowed &= like[gap, last, layer] >= least
                    total += like[gap, last, layer]
            if allowed:
                yield count, -total

    best = {length: min(span(length), default=None) for length in range(1, min(steps, gaps) + 1)}
    found = []
    for cuts in itertools.product([False, True], repeat=steps - 1):
        lengths = np.diff([0, *(at + 1 for at, cut in enumerate(cuts) if cut), steps])
        parts = [best.get(int(length)) for length in lengths]
        if None not in parts:
            found.append(tuple(map(sum, zip(*parts, strict=True))))
    return min(found)


def cost(spans, like, dense):
    count, total = 0, 0.0
    for span in spans:
        for gap in range(span.length):
            for layer, source in enumerate(span.sources):
                if source == layer and (gap == 0 or layer in dense):
                    count += 1
                else:
                    total += like[gap, source, layer]
    return count, -total


@pytest.mark.parametrize("seed", range(60))
def test_the_plan_is_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    layers, steps, gaps = random.integers(2, 6), random.integers(1, 5), random.integers(1, 4)
    like = random.uniform(0.2, 1, (gaps, layers, layers))
    like[0][np.diag_indices(layers)] = 1
    if seed % 2:
        like[1:, range(layers), range(layers)] = random.uniform(0.6, 1, (gaps - 1, layers))
    dense = {int(random.integers(layers))} if seed % 3 == 0 else set()
    least = random.uniform(0.3, 0.9)
    spans = plan(like, steps, least, dense)
    assert [span.start for span in spans] == [0, *np.cumsum([span.length for span in spans])[:-1]]
    assert sum(span.length for span in spans) == steps
    for span in spans:
        assert span.sources[0] == 0
        assert all(span.sources[source] == source for source in span.sources)  # who is read chose
    assert cost(spans, like, dense) == pytest.approx(brute_force(like, steps, least, dense), abs=1e-9)


def test_the_plan_of_one_step_never_spans_two():
    like = np.ones((4, 3, 3))
    assert [span.length for span in plan(like, 4, 0.5)] == [4]
    assert [span.length for span in plan(like, 4, 0.5, longest=1)] == [1] * 4
    assert [span.length for span in plan(like[:2], 5, 0.5)] in ([1, 2, 2], [2, 1, 2], [2, 2, 1])  # measured over two


# -- HyLRA ----------------------------------------------------------------------------------------------------------


def past(version=0, seed=1, shared=None, frames=21):
    """Entries of a layer of its own, beside others that share notes."""
    q, entries = smooth()
    if frames != 21:
        raise AssertionError
    k = field(frames + 3, seed)[:, : -GRID.tokens]
    entries = replace(entries, k=k, v=k.flip(1), lasting=type(entries.lasting)())
    entries.lasting.version, entries.lasting.shared = version, {} if shared is None else shared
    return q, entries


CHAIN = [[[1, 0.9, 0.2, 0.2], [0, 1, 0.2, 0.2], [0, 0, 1, 0.9], [0, 0, 0, 1]]]


def test_layers_read_what_the_full_layer_before_them_chose(tmp_path):
    policy, shared = made_up(tmp_path, HyLRA, CHAIN, by="overlap", refresh="step"), {}
    found = []
    for layer in range(4):
        q, entries = past(seed=layer + 1, shared=shared)
        found.append(policy.plan(q, entries, site(layer=layer)))
        own = AnnSA(0.3, groups="place", sink_frames=0, summaries=False, dense_steps=0).plan(
            *past(seed=layer + 1), site()
        )
        if layer in (0, 2):
            assert found[layer] is None  # it reads everything
            chosen = own.blocks.lists
        else:
            assert torch.equal(found[layer].blocks.lists, chosen)
            assert not torch.equal(found[layer].blocks.lists, own.blocks.lists)
            assert torch.equal(found[layer].k, own.k)  # of its own keys
            assert found[layer].keys_read == own.keys_read


@pytest.mark.parametrize("what", ["version", "block", "rows", "nothing"])
def test_a_choice_of_another_past_is_not_read(tmp_path, what):
    policy, shared = made_up(tmp_path, HyLRA, CHAIN, by="overlap"), {}
    q, entries = past(shared=shared)
    policy.plan(q, entries, site(layer=0))
    q, entries = past(seed=2, shared=shared, version=what == "version")
    if what == "rows":
        q, entries = q[:1], replace(entries, k=entries.k[:1], v=entries.v[:1])
    own = AnnSA(0.3, groups="place", sink_frames=0, summaries=False, dense_steps=0).plan(*past(seed=2), site())
    found = policy.plan(q, entries, site(layer=1, block=99 if what == "block" else None)).blocks.lists
    assert torch.equal(found, own.blocks.lists[: len(q)]) == (what != "nothing")


def test_at_later_steps_everybody_reads_what_was_chosen_and_dense_layers_everything(tmp_path):
    like = np.repeat(np.array(CHAIN), 2, 0)
    policy, shared = made_up(tmp_path, HyLRA, like, by="overlap", dense_layers=(2,)), {}
    layers = [past(seed=layer + 1, shared=shared) for layer in range(4)]
    found = [
        [
            policy.plan(q + 0.3 * step, entries, site(step=step, layer=layer))
            for layer, (q, entries) in enumerate(layers)
        ]
        for step in range(4)
    ]
    for step in range(4):
        full = [layer for layer in range(4) if found[step][layer] is None]
        assert full == ([0, 2] if step % 2 == 0 else [2]), step
    for step in (0, 2):
        lists = [chosen and chosen.blocks.lists for chosen in found[step]]
        later = [chosen and chosen.blocks.lists for chosen in found[step + 1]]
        assert torch.equal(later[0], lists[1])
        assert torch.equal(later[1], lists[1])
        assert torch.equal(later[3], lists[3])
    assert not torch.equal(found[0][1].blocks.lists, found[2][1].blocks.lists)


def test_attention_held_is_over_that_on_its_own(tmp_path):
    mass = np.array([[[0.5, 0.4], [0, 0.8]], [[0.45, 0.3], [0, 0.6]]])
    policy = made_up(tmp_path, HyLRA, np.ones((2, 2, 2)), mass)
    np.testing.assert_allclose(policy.likeness(), [[[1, 0.5], [0, 1]], [[0.9, 0.375], [0, 0.75]]])
    assert (replace(policy, by="overlap").likeness() == 1).all()


# -- LycheeDecode ---------------------------------------------------------------------------------------------------


def test_heads_that_lose_most_search(tmp_path):
    random = np.random.default_rng(0)
    overlap, mass = random.uniform(0.2, 0.9, (2, 1, 4, 4, HEADS))
    policy = made_up(tmp_path, LycheeDecode, overlap, mass, retrieval=0.5)
    roles = policy.roles
    assert roles[0].all()
    assert roles.sum() == 8
    gain = {(i, h): (1 - policy.measured("overlap")[0, i - 1, i, h]) * policy.measured("mass")[0, i, i, h]
            for i in range(1, 4) for h in range(HEADS)}  # fmt: skip
    assert {at for at in gain if roles[at]} == set(sorted(gain, key=gain.get)[-4:])
    assert replace(policy, retrieval=0.01).roles.sum() == HEADS


def test_a_head_reads_what_the_head_of_its_number_chose_last(tmp_path):
    overlap = np.ones((1, 3, 3, HEADS))
    overlap[0, 0, 1] = [0.5, 1, 0.5, 1]
    policy, shared = made_up(tmp_path, LycheeDecode, overlap, retrieval=0.5), {}
    assert policy.roles.tolist() == [[True] * 4, [True, False, True, False], [False] * 4]
    owns = [
        AnnSA(0.3, groups="place", sink_frames=0, summaries=False, dense_steps=0).plan(*past(seed=layer + 1), site())
        for layer in range(3)
    ]
    first, second, third = (policy.plan(*past(seed=layer + 1, shared=shared), site(layer=layer)) for layer in range(3))
    assert first is None
    blocks = -(-second.k.shape[1] // second.blocks.key_block)
    listed = second.blocks.listed(blocks)
    assert listed[:, ::2].all()
    assert torch.equal(listed[:, 1::2], owns[0].blocks.listed(blocks)[:, 1::2])
    expected = owns[0].blocks.lists.clone()
    expected[:, ::2] = owns[1].blocks.lists[:, ::2]
    assert torch.equal(third.blocks.lists, expected)
    assert second.keys_read == pytest.approx((second.k.shape[1] + owns[0].keys_read) / 2)
    assert third.keys_read == owns[2].keys_read


# -- profiles -------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_how_alike_choices_are(pipe, measured):
    assert {name: table.shape for name, table in measured.tables.items()} == {
        "overlap": (2, 4, 4, 2),
        "mass": (2, 4, 4, 2),
    }
    overlap, mass = measured.tables["overlap"], measured.tables["mass"]
    np.testing.assert_allclose(overlap[0].diagonal(), 1)
    assert ((overlap[0] > 0).all(-1) == np.triu(np.ones((4, 4), bool))).all()
    assert 0.2 < overlap[0, 0, 1:].mean() < overlap[1].diagonal().mean() < 1
    own = mass[0].diagonal().T  # (layers, heads)
    assert (mass[0, 0, 1:] < own[1:]).all()
    assert (own < 1).all()
    assert measured.knobs["density"] == 0.3


@every
def test_from_calibration_to_a_video(pipe, kind, tmp_path):
    profile = calibrate(pipe, kind(min_past=0), prompts=[PROMPT], **CALL)
    profile.save(tmp_path / "p.json")
    assert list(summary(profile))
    knobs = {"profile": str(tmp_path / "p.json"), "min_past": 0} | ({"least": 0.4} if kind is HyLRA else {})
    found, run = generate(pipe, Accel(selection=kind(**knobs)))
    counts = run.report().slots["selection"]
    assert counts.engaged
    assert 0.3 * counts.keys_total < counts.keys_read < 0.97 * counts.keys_total
    assert torch.isfinite(found).all()
    with pytest.raises(UnsupportedError, match=r"profile is of another model \(Wan.*calibrate this one"):
        Accel(selection=kind(**knobs)).apply(tiny_pipeline(layers=3))
    with pytest.raises(KnobError, match=r"density must be 0.3, as while .* calibrate again, got density=0.2"):
        kind(0.2, **knobs)


@every
def test_what_cannot_be_is_refused(pipe, kind):
    name = kind.__name__.lower()
    with pytest.raises(UnsupportedError, match=f"make a profile with diffaccel calibrate --method {name} and pass it"):
        Accel(selection=kind()).apply(pipe)
    with pytest.raises(KnobError, match="layers go by the same tokens, and TempCache keeps parts of frames"):
        Accel(selection=kind(), cache=TempCache())
    with pytest.raises(KnobError, match=r"a head reads what the head of its number chose .* and reuse with a profile"):
        Accel(selection=kind(), reuse=FlashBlock(profile=profile_of_flashblock()))


def profile_of_flashblock():
    kind = type(
        "FlashBlock", (), {"axes": ("step", "gap"), "tables": ("cos", "lse", "error"), "__name__": "FlashBlock"}
    )
    return profile_of(kind)


def test_choices_that_are_not_alike_are_an_error_that_says_so(pipe, measured, tmp_path):
    measured.save(tmp_path / "p.json")
    with pytest.raises(NotEngagedError, match=r"by 'overlap' the nearest are 0\.\d+, with least=1.0: lower it"):
        generate(pipe, Accel(selection=HyLRA(by="overlap", least=1.0, min_past=0, profile=str(tmp_path / "p.json"))))


def test_what_is_generated_meanwhile_is_dense(pipe):
    recorder = OverlapRecorder(HyLRA(min_past=0))
    found = generate(pipe, Accel(selection=recorder))[0]
    torch.testing.assert_close(found, generate(pipe, Accel())[0], atol=1e-4, rtol=0)
    assert recorder.counts
    assert len(recorder.seen) <= 2 * CALL["num_inference_steps"]  # of the block at work alone


def test_on_the_command_line(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    size = ["--size", "48x32", "--frames", "49", "--steps", "4", "--device", "cpu", "--model", "model"]
    arguments = ["calibrate", PROMPT, "--method", "hylra", "--set", "selection.min_past=0", *size]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "overlap with its own choice" in result.stdout
    assert HyLRA(profile="hylra.json").table("overlap").shape == (2, 4, 4, 2)


# -- the bundled model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_the_bundled_model_a_better_plan_is_nearer_to_dense(tmp_path):
    """What counts is the error of the video's blocks, each after the dense ones before it; not the overlap."""
    pipe = load("tiny-world", device="cpu")
    size = {"width": 128, "height": 128, "num_frames": 73, "num_inference_steps": 8, "guidance_scale": 1.0}
    profile = calibrate(pipe, HyLRA(), prompts=["a large red circle moves left over a teal checkerboard"], **size)
    profile.save(tmp_path / "h.json")
    replace(profile, method="LycheeDecode").save(tmp_path / "l.json")

    def video(accel, history=None):
        with accel(pipe) as run:
            generator, prompt = torch.Generator().manual_seed(1), "a small blue ring bounces over navy"
            made = pipe(prompt, **size, generator=generator, history=history, output_type="latent").frames
        return made, run

    dense, _ = video(Accel())

    def error(policy):
        found, run = video(Accel(selection=policy), dense)
        assert run.report().slots["selection"].engaged
        return float((found - dense)[:, :, -6:].square().mean().sqrt() / dense.std())

    near, far = (error(HyLRA(least=least, profile=str(tmp_path / "h.json"))) for least in (0.85, 0.6))
    assert near < 0.7 * far
    lychee = LycheeDecode(retrieval=0.5, profile=str(tmp_path / "l.json"))
    worst = replace(lychee)
    upside_down = lychee.roles[1:].ravel().argsort(kind="stable")[: lychee.roles[1:].sum()]
    roles = np.zeros(lychee.roles[1:].size, bool)
    roles[upside_down] = True
    vars(worst)["roles"] = np.concatenate([lychee.roles[:1], roles.reshape(lychee.roles[1:].shape)])
    assert worst.roles.sum() == lychee.roles.sum()
    assert error(lychee) < 0.8 * error(worst)
