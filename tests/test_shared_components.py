"""Checkpoints that take components from a base, say which sampler they were trained for, and are opened by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines import pipeline_utils
from profiles import assert_nothing_but_profiles_is_missing
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import diffaccel
from diffaccel import KnobError
from diffaccel.cli import app
from diffaccel.pipelines import CausalWanPipeline, inputs
from diffaccel.pipelines.loading import (
    BUNDLED_MODELS,
    Defaults,
    LoadError,
    bundled_model,
    check_checkpoint,
    defaults,
    load,
)

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
FEW_STEP = {
    "pipeline": "causal",
    "sampler": "few_step",
    "base": "../tiny-world",
    "width": 128,
    "height": 128,
    "num_frames": 49,
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "fps": 16,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {"height": 32, "width": 32, "num_frames": 17}
SHARED = ("tokenizer", "text_encoder", "vae")


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(file):
    """Other weights of the same shapes; the name of the first that differs."""
    weights = load_file(file)
    name = min(weights)
    weights[name] = weights[name] + 0.5
    save_file(weights, file, metadata={"format": "pt"})
    return name


def build_few_step(samples):
    """`tiny-world` and beside it a checkpoint with a transformer and a scheduler of its own."""
    shutil.copytree(SAMPLES / "tiny-world", samples / "tiny-world")
    folder = samples / "tiny-world-few-step"
    for name in ("transformer", "scheduler"):
        shutil.copytree(SAMPLES / "tiny-world" / name, folder / name)
    shutil.copy(SAMPLES / "tiny-world" / "model_index.json", folder)
    change_json(folder / "scheduler" / "scheduler_config.json", shift=3.0, stochastic_sampling=True)
    change_weights(folder / "transformer" / WEIGHTS)
    (folder / "generation.json").write_text(json.dumps(FEW_STEP))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Read only; what is to be damaged is `folder`."""
    return build_few_step(tmp_path_factory.mktemp("checkout") / "samples")


@pytest.fixture
def folder(tmp_path):
    return build_few_step(tmp_path / "samples")


@pytest.fixture
def installed(whole, tmp_path, monkeypatch):
    """An installation whose bundled models are both there, and an empty working folder."""
    monkeypatch.setattr(diffaccel, "__file__", str(whole.parent.parent / "diffaccel" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    return whole.parent


def same(component, file):
    weights = load_file(file)
    return all(torch.equal(value, weights[name]) for name, value in component.state_dict().items() if name in weights)


def memory(pipe):
    modules = (pipe.transformer, pipe.vae, pipe.text_encoder)
    return {tensor.untyped_storage().data_ptr() for module in modules for tensor in module.parameters()}


# -- what is loaded ----------------------------------------------------------------------------------------------------


def test_it_opens_with_its_own_and_the_components_of_its_base(whole, tmp_path, monkeypatch):
    assert not any((whole / name).exists() for name in SHARED)
    monkeypatch.chdir(tmp_path)  # the base is relative to the checkpoint, not to the working folder
    assert check_checkpoint(whole)["_class_name"] == "WanPipeline"
    pipe, base = load(whole, device="cpu"), load(whole.parent / "tiny-world", device="cpu")
    assert type(pipe) is CausalWanPipeline
    assert (pipe.config["sampler"], base.config["sampler"]) == ("few_step", "multistep")
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.stochastic_sampling) == (3.0, True)
    assert base.scheduler.config.stochastic_sampling is False
    assert same(pipe.transformer, whole / "transformer" / WEIGHTS)
    assert not same(pipe.transformer, whole.parent / "tiny-world" / "transformer" / WEIGHTS)
    assert same(pipe.vae, whole.parent / "tiny-world" / "vae" / WEIGHTS)
    assert same(pipe.text_encoder, whole.parent / "tiny-world" / "text_encoder" / "model.safetensors")
    assert pipe.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert not any(module.training for module in (pipe.transformer, pipe.vae, pipe.text_encoder))
    assert defaults(pipe, whole) == Defaults(128, 128, 49, 4, 1.0, 16)


def test_two_pipelines_share_files_and_no_memory(whole):
    pipes = [load(whole, device="cpu"), load(whole, device="cpu"), load(whole.parent / "tiny-world", device="cpu")]
    assert len(set.union(*map(memory, pipes))) == sum(len(memory(pipe)) for pipe in pipes)
    with torch.no_grad():
        next(pipes[0].vae.parameters()).add_(1)
    assert same(pipes[1].vae, whole.parent / "tiny-world" / "vae" / WEIGHTS)


def test_what_the_checkpoint_has_is_not_taken_from_its_base(folder):
    shutil.copytree(folder.parent / "tiny-world" / "vae", folder / "vae")
    change_weights(folder / "vae" / WEIGHTS)
    pipe = load(folder, device="cpu")
    assert same(pipe.vae, folder / "vae" / WEIGHTS)
    assert not same(pipe.vae, folder.parent / "tiny-world" / "vae" / WEIGHTS)


def test_the_precisions_are_those_of_a_checkpoint_that_has_all(whole):
    pipe = load(whole, device="cpu", dtype="bfloat16")
    kinds = (pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype)
    assert kinds == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_base_may_be_an_absolute_path_and_saved_by_the_causal_class(folder, tmp_path):
    base = tmp_path / "elsewhere"
    shutil.move(folder.parent / "tiny-world", base)
    change_json(base / "model_index.json", _class_name="CausalWanPipeline", frames_per_block=3, sampler="multistep")
    change_json(folder / "generation.json", base=str(base))
    assert same(load(folder, device="cpu").vae, base / "vae" / WEIGHTS)


def test_by_default_it_takes_four_steps_and_no_guidance(whole):
    pipe = load(whole, device="cpu")

    def frames(pipe, **settings):
        steps = []

        def on_step(_pipe, step, timestep, _tensors):
            steps.append(round(float(timestep)))
            return {}

        generator = torch.Generator().manual_seed(1)
        settings = SMALL | {"generator": generator, "callback_on_step_end": on_step} | settings
        return pipe("a large red square moves left", **settings).frames, steps

    made, steps = frames(pipe)
    assert steps == [1000, 900, 750, 500] * 2  # 5 latent frames are 2 blocks; 1, 3/4, 1/2, 1/4 under shift 3
    assert pipe.do_classifier_free_guidance is False
    explicit, _ = frames(CausalWanPipeline(**pipe.components), sampler="few_step", num_inference_steps=4)
    assert np.array_equal(made, explicit)
    other, steps = frames(pipe, sampler="multistep", num_inference_steps=2, guidance_scale=2.0)
    assert len(steps) == 4
    assert pipe.do_classifier_free_guidance is True
    assert not np.array_equal(made, other)


def test_the_stock_class_opens_on_the_same_components(whole, monkeypatch):
    warnings = []
    monkeypatch.setattr(pipeline_utils.logger, "warning", warnings.append)
    pipe = load(whole, pipeline="stock", device="cpu")
    assert warnings == []  # a sampler would be an argument it does not know
    assert type(pipe) is WanPipeline
    assert same(pipe.vae, whole.parent / "tiny-world" / "vae" / WEIGHTS)
    assert np.isfinite(pipe("a red square", **SMALL | {"num_frames": 5}, num_inference_steps=1).frames).all()


def test_what_it_saves_is_complete(whole, tmp_path):
    load(whole, device="cpu").save_pretrained(tmp_path / "saved")
    pipe = load(tmp_path / "saved", device="cpu")
    assert pipe.config["sampler"] == "few_step"
    assert same(pipe.vae, whole.parent / "tiny-world" / "vae" / WEIGHTS)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def say(**changes):
    return lambda folder: change_json(folder / "generation.json", **changes)


def in_base(damage):
    return lambda folder: damage(folder.parent / "tiny-world")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def unname(base):
    index = json.loads((base / "model_index.json").read_text())
    del index["vae"]
    (base / "model_index.json").write_text(json.dumps(index))


MISTAKES = {
    "no base": (
        lambda folder: (folder / "generation.json").write_text(json.dumps({"pipeline": "causal"})),
        r"tiny-world-few-step' lacks its component folder '\w+'; download or save it again",
    ),
    "base that is not there": (say(base="../tiny"), r"names the base '\S+/samples/tiny', and there is no such folder"),
    "base that is no checkpoint": (
        say(base="transformer"),
        "the base of .* cannot be used: .*transformer' is not a diffusers checkpoint",
    ),
    "base without the folder": (
        in_base(lambda base: shutil.rmtree(base / "vae")),
        "the base of .* cannot be used: .*tiny-world' lacks its component folder 'vae'",
    ),
    "base without the component": (in_base(unname), "its base '.*tiny-world' both lack the component 'vae'"),
    "base with none in its place": (
        in_base(lambda base: change_json(base / "model_index.json", vae=[None, None])),
        "its base '.*tiny-world' both lack the component 'vae'",
    ),
    "base of another kind": (
        in_base(lambda base: change_json(base / "model_index.json", vae=["diffusers", "AutoencoderKL"])),
        r"the 'vae' of the base '.*' is a diffusers.AutoencoderKL, and '.*' needs a diffusers.AutoencoderKLWan;",
    ),
    "base with a cut weight file": (
        in_base(lambda base: truncate(base / "vae" / WEIGHTS)),
        rf"the base of .* cannot be used: .*vae/{WEIGHTS}' has \d+ bytes where its header says \d+",
    ),
    "base with an unreadable index": (
        in_base(lambda base: (base / "model_index.json").write_text("{")),
        "the base of .* cannot be used: .*model_index.json' cannot be read as JSON",
    ),
    "base with a base": (
        in_base(lambda base: change_json(base / "generation.json", base="../other")),
        "the base '.*tiny-world' of '.*tiny-world-few-step' has a base itself; name one in",
    ),
    "itself": (say(base="."), "has a base itself"),
    "base that is no path": (say(base=3), "must hold a name as 'base', got 3"),
    "base that is empty": (say(base=""), "must hold a name as 'base', got ''"),
    "sampler": (
        say(sampler="few_steps"),
        "unknown sampler in .*: choose one of multistep, few_step, rolling; did you mean",
    ),
    "sampler that is no name": (say(sampler=4), "must hold a name as 'sampler', got 4"),
    "sampler of stock": (say(pipeline="stock"), 'names a sampler, which is for "pipeline": "causal"'),
    "own weights": (
        lambda folder: truncate(folder / "transformer" / WEIGHTS),
        r"few-step/transformer/\S+' has \d+ bytes where its header says \d+",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_of_the_check(folder, mistake):
    damage, sentence = MISTAKES[mistake]
    damage(folder)
    for opening in (check_checkpoint, lambda where: load(where, device="cpu")):
        with pytest.raises((LoadError, KnobError), match=sentence) as caught:
            opening(folder)
        assert "\n" not in str(caught.value)


# -- by name -----------------------------------------------------------------------------------------------------------


def test_bundled_models_open_by_name(installed):
    assert [bundled_model(name) for name in BUNDLED_MODELS] == [installed / name for name in BUNDLED_MODELS]
    assert bundled_model() == bundled_model("tiny-world")
    pipe = load("tiny-world-few-step", device="cpu")
    assert pipe.config["sampler"] == "few_step"
    assert defaults(pipe, "tiny-world-few-step") == Defaults(128, 128, 49, 4, 1.0, 16)
    assert load("tiny-world", device="cpu").config["sampler"] == "multistep"
    assert defaults(pipe, "tiny-world") == defaults(pipe) != defaults(pipe, "tiny-world-few-step")


def test_a_local_folder_of_a_bundled_name_wins(installed, tmp_path):
    (tmp_path / "tiny-world").mkdir()
    with pytest.raises(LoadError, match="'tiny-world' is not a diffusers checkpoint"):
        load("tiny-world", device="cpu")
    with pytest.raises(LoadError, match="there is no folder 'tiny-world-few-step'"):
        load(Path("tiny-world-few-step"), device="cpu")  # a path is no name


def test_other_names_are_refused_with_those_there_are(installed, tmp_path, monkeypatch):
    with pytest.raises(LoadError, match=r"no folder 'tiny-wrld'.* bundled model \(tiny-world, tiny-world-few-step\)"):
        load("tiny-wrld", device="cpu")
    with pytest.raises(KnobError, match=r"unknown bundled model 'tiny-wrld'.*did you mean 'tiny-world'"):
        bundled_model("tiny-wrld")
    monkeypatch.setattr(diffaccel, "__file__", str(tmp_path / "diffaccel" / "__init__.py"))
    with pytest.raises(LoadError, match="the bundled model 'tiny-world-few-step' is not part of this installation"):
        load("tiny-world-few-step", device="cpu")


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def generate(installed, monkeypatch):
    """Runs `diffaccel generate` on the few-step model; the result, and the sampler and steps of every schedule."""

    def invoke(*arguments):
        made = []

        def spy(scheduler, sampler, steps=None, *others):
            made.append((sampler, steps))
            return block_schedule(scheduler, sampler, steps, *others)

        block_schedule = inputs.block_schedule
        with monkeypatch.context() as patch:
            patch.setattr(inputs, "block_schedule", spy)
            options = ["--model", "tiny-world-few-step", "--size", "32x32", "--frames", "5", "--device", "cpu"]
            options += ["--preset", "exact", "-o", "v.mp4", "--report", "r.json"]
            command = ["generate", "a large red square", *options, *arguments]
            return CliRunner().invoke(app, command, catch_exceptions=False), made

    return invoke


def test_generate_takes_the_sampler_of_the_checkpoint_or_the_one_asked_for(generate, tmp_path):
    result, made = generate()
    assert result.exit_code == 0, result.output
    assert made == [("few_step", 4)]
    settings = json.loads((tmp_path / "r.json").read_text())["settings"]
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (4, 1.0)
    result, made = generate("--sampler", "multistep", "--steps", "3", "--guidance", "2")
    assert result.exit_code == 0, result.output
    assert made == [("multistep", 3)]
    settings = json.loads((tmp_path / "r.json").read_text())["settings"]
    assert (settings["sampler"], settings["guidance_scale"]) == ("multistep", 2)


def test_a_negative_prompt_is_refused_where_the_sampler_of_the_checkpoint_has_no_guidance(folder, tmp_path):
    change_json(folder / "generation.json", guidance_scale=None)
    command = ["generate", "a red square", "--negative", "blue", "--model", str(folder), "-o", str(tmp_path / "v.mp4")]
    result = CliRunner().invoke(app, [*command, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert "--negative acts through guidance, which is 1" in result.stderr


def test_info_opens_by_name(installed):
    result = CliRunner().invoke(app, ["info", "tiny-world-few-step", "--json"], catch_exceptions=False)
    [row] = json.loads(result.stdout)
    assert (row["pipeline"], row["causal"], row["size"]) == ("CausalWanPipeline", True, "128x128")
    assert_nothing_but_profiles_is_missing(row["refuses"])


@pytest.mark.parametrize("command", ["generate", "info"])
def test_help_names_the_bundled_models(command):
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).stdout
    assert ", ".join(BUNDLED_MODELS) in text


# -- the model itself --------------------------------------------------------------------------------------------------


def test_the_bundled_few_step_model_opens():
    folder = SAMPLES / "tiny-world-few-step"
    assert not any((folder / name).exists() for name in SHARED)
    assert not Path(json.loads((folder / "generation.json").read_text())["base"]).is_absolute()
    pipe = load("tiny-world-few-step", device="cpu")
    assert pipe.config["sampler"] == "few_step"
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.stochastic_sampling) == (3.0, True)
    assert defaults(pipe, "tiny-world-few-step") == Defaults(128, 128, 49, 4, 1.0, 16)
