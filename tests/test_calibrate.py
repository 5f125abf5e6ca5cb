"""Calibration measures what AnnSA would read; a run that loads the profile chooses in the layers it names."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import attention64
from test_cli import left_in, refused
from tiny import tiny_components, tiny_pipeline, tiny_transformer
from typer.testing import CliRunner

from diffaccel import Accel, AnnSA, KnobError, NotEngagedError, UnsupportedError
from diffaccel import calibrate as calibration
from diffaccel.calibrate import DENSITIES, PROMPTS, Recorder, calibrate, frames_wanted, summary
from diffaccel.cli import app
from diffaccel.profile import Model, Profile, ProfileError, fingerprint

PROMPT = "a red circle moves left"
SIZE = {"width": 48, "height": 32, "num_frames": 49}
CALL = {"num_inference_steps": 4, "guidance_scale": 2.0}
POLICY = AnnSA(min_past=0)


def measure(pipe, policy=POLICY, prompts=(PROMPT,), densities=(0.2, 0.4), **changes):
    return calibrate(pipe, policy, prompts=prompts, densities=densities, **(SIZE | CALL | changes))


def generate(pipe, accel, **changes):
    with accel(pipe) as run:
        call = SIZE | CALL | changes
        frames = pipe(PROMPT, **call, generator=torch.Generator().manual_seed(0), output_type="latent").frames
    return frames, run


def load(path):
    return Profile.load(path, "AnnSA", axes=("density", "step"), tables=("recall",))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(layers=4)


@pytest.fixture(scope="module")
def measured(pipe):
    return measure(pipe)


@pytest.fixture
def saved(measured, tmp_path):
    measured.save(tmp_path / "annsa.json")
    return tmp_path / "annsa.json"


def ranked(profile, path, recall):
    """The profile in a file, with these recalls (densities, steps, layers), the same for all heads."""
    recall = np.array(recall, float)[..., None].repeat(profile.model.heads, -1)
    axes = {"density": (0.2, 0.4)[: len(recall)], "step": (2, 3)[: recall.shape[1]]}
    replace(profile, axes=axes, tables={"recall": recall}).save(path)
    return str(path)


# -- what is measured ------------------------------------------------------------------------------------------------


def test_it_is_the_share_of_the_mass_on_the_keys_that_would_be_read(pipe, monkeypatch):
    found = []

    def listen(kernel, q, entries, chosen, scale):
        listed = chosen.blocks.listed(-(-entries.count // chosen.blocks.key_block))
        shares = torch.zeros(q.shape[:3], dtype=torch.float64)
        for b, s, h in np.ndindex(*shares.shape):
            place = s if chosen.order is None else int((chosen.order[b, h] == s).nonzero())
            rows = listed[b, h, place // chosen.blocks.query_block].repeat_interleave(chosen.blocks.key_block)
            query, keys = q[b : b + 1, s : s + 1, h : h + 1], entries.k[b : b + 1, :, h : h + 1]
            read = chosen.k[b : b + 1, rows[: entries.count], h : h + 1]
            (_, some), (_, every) = (attention64(query, k, k, scale=scale) for k in (read, keys))
            shares[b, s, h] = (some - every).exp()
        found.append(shares.mean((0, 1)))
        return original(kernel, q, entries, chosen, scale)

    original = calibration.mass_read
    monkeypatch.setattr(calibration, "mass_read", listen)
    profile = measure(pipe, AnnSA(min_past=2, dense_steps=0.7), densities=(0.4,), guidance_scale=1.0)
    assert profile.axes == {"density": (0.4,), "step": (3,)}
    assert len(found) == 2 * 4  # in two blocks
    direct = torch.stack(found).unflatten(0, (-1, 4)).mean(0)  # layers follow each other in every block
    np.testing.assert_allclose(profile.tables["recall"][0, 0], direct, atol=1e-5)
    assert 0.2 < direct.min() < direct.max() < 0.95


def test_what_it_measured_grows_with_density_and_covers_the_steps_that_choose(measured, pipe):
    assert measured.axes == {"density": (0.2, 0.4), "step": (2, 3)}  # the first 30 % of 4 steps read everything
    low, high = measured.tables["recall"]
    assert low.shape == (2, 4, 2)
    assert (low < high).all()
    assert 0 < low.min() < high.max() <= 1
    assert measured.shape == {"width": 48, "height": 32, "frames": 49, "steps": 4}
    assert measured.model == Model("WanTransformer3DModel", 4, 2, 24, fingerprint(pipe.transformer))
    assert measured.knobs["min_past"] == 0
    assert "density" not in measured.knobs
    assert measured.versions["torch"] == torch.__version__
    clean = measure(pipe, replace(POLICY, clean_pass="sparse"), densities=(0.4,))
    assert clean.axes["step"] == (2, 3, 4)


def test_what_is_generated_meanwhile_is_dense(pipe):
    recorder = Recorder((replace(POLICY, density=0.2),))
    torch.testing.assert_close(
        generate(pipe, Accel(selection=recorder))[0], generate(pipe, Accel())[0], atol=1e-4, rtol=0
    )
    assert recorder.counts


def test_prompts_are_averaged(pipe, measured):
    other = measure(pipe, prompts=["the blue square moves up"])
    both = measure(pipe, prompts=[PROMPT, "the blue square moves up"])
    mean = (measured.tables["recall"] + other.tables["recall"]) / 2
    np.testing.assert_allclose(both.tables["recall"], mean, atol=1e-6)
    assert np.abs(other.tables["recall"] - mean).max() > 1e-4
    assert both.prompts == 2


def test_a_whole_video_at_once_is_calibrated_too():
    from diffusers import WanPipeline

    pipe = WanPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    profile = measure(pipe, AnnSA(), num_frames=33, num_inference_steps=2)
    assert profile.axes["step"] == (1,)
    assert profile.tables["recall"].shape == (2, 1, 2, 2)
    assert frames_wanted(pipe, AnnSA(), 33) == 33


def test_frames_are_enough_for_a_past(pipe):
    assert frames_wanted(pipe, AnnSA(min_past=2), 9) == 4 * (3 * (2 + 3) - 1) + 1
    assert frames_wanted(pipe, AnnSA(min_past=2), 81) == 81
    profile = measure(pipe, AnnSA(min_past=2), num_frames=frames_wanted(pipe, AnnSA(min_past=2), 9))
    assert profile.axes["density"] == (0.2, 0.4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"densities": ()}, KnobError, r"shares in \(0, 1\), at least one, got \[\]"),
        ({"densities": (0.3, 1.0)}, KnobError, r"got \[0.3, 1.0\]"),
        ({"policy": AnnSA(0.2)}, KnobError, r"got density=0.2: leave selection.density out"),
        ({"policy": AnnSA(layers=(1,))}, KnobError, r"got layers=\(1,\): leave selection.layers out"),
        ({"policy": AnnSA()}, NotEngagedError, "at density 0.2: no past was ever long enough"),
        ({"densities": (0.2, 0.99)}, NotEngagedError, r"at density 0.99: .* density=0.99 must leave some out"),
        ({"policy": AnnSA(min_past=0, dense_steps=0.9)}, NotEngagedError, "in the first 4 of 4 steps: lower it"),
    ],
)
def test_what_cannot_be_measured_is_refused(pipe, changes, error, message):
    with pytest.raises(error, match=message):
        measure(pipe, **{"num_frames": 33} | changes)
    generate(pipe, Accel(), num_frames=9)  # and the pipeline is as before


def test_two_denoisers_have_no_profile(saved):
    from diffusers import WanPipeline

    pipe = WanPipeline(**tiny_components(), transformer_2=tiny_transformer(seed=3), boundary_ratio=0.5)
    with pytest.raises(UnsupportedError, match="of one denoiser, and WanPipeline has 2"):
        measure(pipe)
    with pytest.raises(UnsupportedError, match="this pipeline has 2: leave the profile out"):
        Accel(selection=AnnSA(profile=str(saved))).apply(pipe)


def test_the_bundled_model():
    from diffaccel.pipelines.loading import load as open_pipeline

    pipe = open_pipeline(device="cpu")
    size = {"width": 128, "height": 128, "num_frames": 37}
    profile = measure(pipe, AnnSA(min_past=1), PROMPTS[:1], (0.2, 0.5), **size, num_inference_steps=2)
    low, high = profile.tables["recall"]
    assert low.shape == (1, 8, 4)
    assert (low < high).all()
    assert low.mean() > 0.3  # more than the share of the keys
    assert fingerprint(pipe.transformer) == fingerprint(open_pipeline(device="cpu", dtype="bfloat16").transformer)
    other = open_pipeline("tiny-world-few-step", device="cpu")
    assert fingerprint(pipe.transformer) != fingerprint(other.transformer)
    lines = list(summary(profile))
    assert [line.split()[:2] for line in lines[1:]] == [["0.2", f"{low.mean():.3f}"], ["0.5", f"{high.mean():.3f}"]]
    layers = high.mean((0, 2))
    assert lines[2].split()[2:] == [
        *(str(layers.argmax()), f"({layers.max():.3f})"),
        *(str(layers.argmin()), f"({layers.min():.3f})"),
    ]


# -- whose it is -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_same_in_float32_bfloat16_and_offloaded():
    import accelerate

    wanted = fingerprint(tiny_transformer())
    assert fingerprint(tiny_transformer().to(torch.bfloat16)) == wanted
    assert fingerprint(tiny_transformer(seed=1)) != wanted
    assert fingerprint(tiny_transformer(layers=3)) != wanted
    changed = tiny_transformer()
    with torch.no_grad():
        changed.blocks[1].attn2.to_k.weight.mul_(1.02)
    assert fingerprint(changed) != wanted
    line, column = torch.nn.Linear(8, 1, bias=False), torch.nn.Linear(1, 8, bias=False)
    column.weight.data = line.weight.data.T
    assert fingerprint(line) != fingerprint(column)
    offloaded = tiny_transformer()
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert offloaded.blocks[0].attn1.to_q.weight.is_meta
    assert fingerprint(offloaded) == wanted


def test_a_profile_of_another_model_is_refused_before_anything_is_computed(saved):
    accel = Accel(selection=AnnSA(profile=str(saved)))
    for transformer in ({"layers": 2}, {"layers": 4, "seed": 1}):
        pipe = tiny_pipeline(**transformer)
        with pytest.raises(UnsupportedError, match=r"of another model \(Wan.*, 4 layers of 2 .* calibrate this one"):
            accel.apply(pipe)
        assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
    accel.apply(tiny_pipeline(layers=4)).remove(check=False)


def test_layers_that_the_model_does_not_have_are_refused(pipe):
    with pytest.raises(UnsupportedError, match=r"has the layers 0 to 3, and layers=\(3, 99\) names 99"):
        Accel(selection=AnnSA(layers=(3, 99))).apply(pipe)
    Accel(selection=AnnSA(layers=(3,))).apply(pipe).remove(check=False)


# -- the file --------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_rounded(measured, saved):
    found = load(saved)
    np.testing.assert_array_equal(found.tables["recall"], measured.tables["recall"].round(4))
    assert found.axes == measured.axes
    for name in ("method", "model", "shape", "prompts", "knobs", "versions"):
        assert getattr(found, name) == getattr(measured, name)


def spoil(content, **changes):
    return {**content, **changes}


MALFORMED = {
    "no object": (lambda c: [c], "is some other JSON: it names no format"),
    "no format": (lambda c: {"method": "AnnSA"}, "is some other JSON: it names no format"),
    "format": (lambda c: spoil(c, format=2), "has format 2, and this diffaccel reads format 1"),
    "method": (lambda c: spoil(c, method="FlashBlock"), "must be of the method AnnSA, and is of FlashBlock"),
    "lacking": (lambda c: {k: v for k, v in c.items() if k not in ("model", "axes")}, "lacks model, axes"),
    "model": (lambda c: spoil(c, model={"layers": 4}), "is damaged"),
    "axes": (lambda c: spoil(c, axes={"density": "low", "step": [2, 3]}), "is damaged"),
    "axes list": (lambda c: spoil(c, axes=[[0.2, 0.4], [2, 3]]), "is damaged"),
    "shape": (lambda c: spoil(c, shape={"width": 48}), "is damaged ('steps')"),
    "ragged": (lambda c: spoil(c, tables={"recall": [[1.0], [1.0, 2.0]]}), "is damaged"),
    "other axes": (
        lambda c: spoil(c, axes={"step": [2, 3]}),
        "must hold recall by density, step, and holds recall by step",
    ),
    "other table": (
        lambda c: spoil(c, tables={"drift": c["tables"]["recall"]}),
        "must hold recall by density, step, and holds drift by density, step",
    ),
    "order": (lambda c: spoil(c, axes=c["axes"] | {"density": [0.4, 0.2]}), "must have ascending places along density"),
    "table shape": (
        lambda c: spoil(c, axes=c["axes"] | {"step": [1, 2, 3]}),
        "must have a table recall of 2 x 3 x 4 x 2 numbers, and has 2 x 2 x 4 x 2",
    ),
    "NaN": (
        lambda c: spoil(c, tables={"recall": (np.array(c["tables"]["recall"]) * [1, np.nan]).tolist()}),
        "must have finite numbers in the table recall, and 16 are not",
    ),
    "null": (
        lambda c: spoil(c, tables={"recall": [None, *c["tables"]["recall"][1:]]}),
        "is damaged",
    ),
    "no steps": (lambda c: spoil(c, shape=c["shape"] | {"steps": 0}), "over at least one step, and names 0"),
}


@pytest.mark.parametrize("how", MALFORMED)
def test_a_file_that_is_no_such_profile_is_one_sentence(saved, how):
    change, sentence = MALFORMED[how]
    saved.write_text(json.dumps(change(json.loads(saved.read_text()))))
    with pytest.raises(ProfileError) as refusal:
        AnnSA(profile=str(saved))
    said = str(refusal.value)
    assert said.startswith(f"the profile '{saved}' ")
    assert sentence in said
    assert said.endswith(f"make one with diffaccel calibrate --method annsa -o {saved}")
    assert "\n" not in said


def test_a_file_that_is_absent_or_no_json_is_one_sentence(tmp_path):
    (tmp_path / "cut.json").write_text('{"format": 1, "meth')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, sentence in (
        ("gone.json", r"cannot be read \(No such file or directory\)"),
        (".", "cannot be read"),
        ("cut.json", "is not JSON"),
        ("binary.json", "is not JSON"),
    ):
        with pytest.raises(ProfileError, match=f"the profile '.*' {sentence}.*; make one with diffaccel calibrate"):
            AnnSA(profile=str(tmp_path / name))


# -- what a run makes of it ------------------------------------------------------------------------------------------


def test_places_between_those_measured_are_interpolated(measured, tmp_path):
    table = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[10, 11, 12, 13], [14, 15, 16, 17]]]  # steps 2 and 3 of 4
    profile = load(ranked(measured, tmp_path / "p.json", table))

    def first(density, step, steps):
        return profile.at("recall", density=density, step=profile.place(step, steps))[0, 0]

    assert [first(0.2, step, 4) for step in range(5)] == [0, 0, 0, 4, 4]  # the clean pass is as the last step
    assert first(0.3, 2, 4) == pytest.approx(5)
    assert [first(density, 3, 4) for density in (0.01, 0.99)] == [4, 14]
    # of 13 steps the 9th and the 13th are where the 3rd and the 4th of 4 are
    assert [first(0.2, step, 13) for step in (7, 8, 9, 12)] == pytest.approx([0, 0, 1, 4])
    assert first(0.3, 10, 13) == pytest.approx(7)
    assert first(0.2, 0, 1) == 0
    profile = replace(profile, axes=profile.axes | {"step": (3, 4)})  # the clean pass was measured
    assert [first(0.2, step, 13) for step in (12, 13)] == [0, 4]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7, 1.0])
def test_the_share_of_layers_with_the_highest_recall_chooses_at_each_step(pipe, measured, tmp_path, monkeypatch, share):
    path = ranked(measured, tmp_path / "p.json", [[[0.1, 0.9, 0.5, 0.3], [0.9, 0.1, 0.5, 0.3]]])
    called = {2: set(), 3: set()}
    calls = [0]
    plan = AnnSA.plan

    def listen(self, q, entries, site):
        chosen = plan(self, q, entries, site)
        if chosen is not None:
            called[site.step].add(site.layer)
            calls[0] += 1
        return chosen

    monkeypatch.setattr(AnnSA, "plan", listen)
    _, run = generate(pipe, Accel(selection=replace(POLICY, density=0.2, profile=path, sparse_layers=share)))
    count = {0.25: 1, 0.5: 2, 0.7: 3, 1.0: 4}[share]
    assert called == {2: set([1, 2, 3, 0][:count]), 3: set([0, 2, 3, 1][:count])}
    assert calls[0] % (2 * 2 * count) == 0  # branches, steps; the same at every block that chooses
    slot = run.report().slots["selection"]
    assert (slot.engaged, slot.knobs["profile"], slot.knobs["sparse_layers"]) == (True, path, share)
    monkeypatch.undo()
    _, every = generate(pipe, Accel(selection=replace(POLICY, density=0.2)))
    left_out, all_left_out = (s.keys_total - s.keys_read for s in (slot, every.report().slots["selection"]))
    assert left_out / all_left_out == pytest.approx(count / 4, abs=0.01)


def test_knobs_of_a_profile(pipe, saved):
    path = str(saved)
    for changes, message in (
        ({"profile": path, "layers": (1,)}, "profile and layers both say which layers choose"),
        ({"profile": path, "sparse_layers": 0}, r"sparse_layers is a share in \(0, 1\]"),
        ({"profile": path, "sparse_layers": 1.5}, r"sparse_layers is a share in \(0, 1\]"),
        ({"sparse_layers": 0.5}, "goes with a profile, got sparse_layers=0.5, profile=None"),
        ({"profile": path, "groups": "hash"}, "groups must be 'kmeans', as while the profile was measured"),
    ):
        with pytest.raises(KnobError, match=message):
            AnnSA(**changes)
    assert {AnnSA(profile=path): 1}[AnnSA(profile=path)] == 1
    idle = replace(POLICY, profile=path, sparse_layers=0.1)
    with pytest.raises(NotEngagedError, match=r"sparse_layers=0.1 of 4 layers is none: raise it"):
        generate(pipe, Accel(selection=idle))


# -- on the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "causal"
    tiny_pipeline(layers=4).save_pretrained(folder)
    return folder


@pytest.fixture
def command(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        if "--model" not in arguments:
            arguments = (*arguments, "--model", model)
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return invoke


SMALL = ["--size", "48x32", "--frames", "49", "--steps", "4", "--device", "cpu"]


def test_from_calibration_to_a_video(command, model, tmp_path):
    result = command(
        *("calibrate", PROMPT, "the blue zebra moves up", *SMALL, "-o", "p.json"),
        *("--set", "selection.min_past=0", "--densities", "0.4, 0.2", "--seed", "3"),
    )
    assert result.exit_code == 0, result.output
    assert left_in(tmp_path) == ["p.json"]
    assert result.stderr.count('read them: "zebra"') == 1
    profile = load(tmp_path / "p.json")
    from diffaccel.pipelines.loading import defaults
    from diffaccel.pipelines.loading import load as open_pipeline

    pipe = open_pipeline(model, device="cpu")
    guidance = defaults(pipe, model).guidance_scale
    wanted = measure(pipe, prompts=(PROMPT, "the blue zebra moves up"), seed=3, guidance_scale=guidance)
    np.testing.assert_array_equal(profile.tables["recall"], wanted.tables["recall"].round(4))
    assert (profile.axes["density"], profile.prompts, profile.shape["steps"]) == ((0.2, 0.4), 2, 4)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("p.json: AnnSA, WanTransformer3DModel, 4 layers of 2 heads")
    assert "2 prompts, 48x32, 49 frames, 4 steps" in lines[0]
    assert lines[1:] == list(summary(profile))
    result = command(
        *("generate", PROMPT, *SMALL, "--preset", "exact", "-o", "v.mp4", "--report", "r.json"),
        *("--set", "selection=annsa", "--set", "selection.min_past=0", "--set", "selection.profile=p.json"),
    )
    assert result.exit_code == 0, result.output
    assert "profile='p.json'" in result.stdout
    slot = json.loads((tmp_path / "r.json").read_text())["slots"]["selection"]
    assert (slot["engaged"], slot["knobs"]["profile"], slot["knobs"]["sparse_layers"]) == (True, "p.json", 0.7)


def test_drift_from_calibration_to_a_video(command, tmp_path):
    result = command("calibrate", PROMPT, *SMALL, "--method", "flashblock", "--set", "reuse.min_past=1")
    assert result.exit_code == 0, result.output
    assert left_in(tmp_path) == ["flashblock.json"]
    assert result.stdout.startswith("flashblock.json: FlashBlock, WanTransformer3DModel, 4 layers of 2 heads")
    chosen = ("--set", "reuse=flashblock", "--set", "reuse.min_past=1", "--set", "reuse.profile=flashblock.json")
    result = command(
        *("generate", PROMPT, *SMALL, "--preset", "exact", "-o", "v.mp4", "--report", "r.json"),
        *(*chosen, "--set", "reuse.share=0.5"),
    )
    assert result.exit_code == 0, result.output
    slot = json.loads((tmp_path / "r.json").read_text())["slots"]["reuse"]
    assert slot["engaged"]
    assert 0 < slot["skipped"] < slot["calls"]
    result = command("calibrate", PROMPT, *SMALL, "--method", "flashblock", "--set", "reuse.refresh=2")
    before = left_in(tmp_path)
    refused(result, "leave reuse.refresh out", tmp_path, before)
    result = command(
        *("generate", PROMPT, *SMALL, "-o", "w.mp4", "--preset", "exact"),
        *("--set", "selection=annsa", "--set", "selection.profile=flashblock.json"),
    )
    refused(result, "must be of the method AnnSA, and is of FlashBlock", tmp_path, before)


MISTAKES = {
    "no prompt": ([], "no prompt was given"),
    "method": (["p", "--method", "flashblok"], "unknown method to calibrate 'flashblok'"),
    "suffix": (["p", "-o", "annsa.txt"], "-o must name a .json file, got 'annsa.txt'"),
    "folder": (["p", "-o", "gone/p.json"], "does not exist; create it first"),
    "size": (["p", "--size", "wide"], "--size takes width x height"),
    "frames": (["p", "--frames", "10"], "the nearest valid values are 9 and 13"),
    "steps": (["p", "--steps", "0"], "--steps must be at least 1"),
    "densities": (["p", "--densities", "low"], "--densities takes shares with commas between"),
    "density range": (["p", "--densities", "0.3,1"], "shares in (0, 1), at least one, got [0.3, 1.0]"),
    "other slot": (["p", "--set", "cache=TempCache"], "--set takes selection.KNOB=VALUE here, got 'cache=TempCache'"),
    "knob": (["p", "--set", "selection.group=hash"], "did you mean 'groups'"),
    "varied knob": (["p", "--set", "selection.layers=1,2"], "leave selection.layers out"),
    "model": (["p", "--model", "./gone"], "there is no folder"),
    "short": ([PROMPT, "--frames", "9"], "at density 0.1: no past was ever long enough"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(command, tmp_path, mistake):
    arguments, sentence = MISTAKES[mistake]
    refused(command("calibrate", *[*SMALL, *arguments]), sentence, tmp_path, [])


def test_generate_refuses_a_profile_in_one_sentence(command, measured, tmp_path):
    def asked(file):
        changes = ["--set", "selection=annsa", "--set", f"selection.profile={file}"]
        return command("generate", PROMPT, *SMALL, *changes, "-o", "v.mp4")

    refused(asked("gone.json"), "the profile 'gone.json' cannot be read", tmp_path, [])
    replace(measured, model=replace(measured.model, weights="0" * 64)).save("other.json")
    refused(asked("other.json"), "the profile is of another model", tmp_path, ["other.json"])


def test_the_bundled_models_have_prompts_of_their_own():
    from diffaccel.pipelines.inputs import unread
    from diffaccel.pipelines.loading import load as open_pipeline

    assert list(unread(open_pipeline(device="cpu").tokenizer, list(PROMPTS), 512)) == []
    assert DENSITIES == (0.1, 0.2, 0.3, 0.5)
