"""Presets, and opening pipelines: what they are, and what they say when they cannot."""

import json
import shutil

import pytest
import torch
from diffusers import WanPipeline
from tiny import tiny_components, tiny_pipeline

import diffaccel
from diffaccel import Accel, FlashBlock, KnobError, PadCollapse, TempCache, UnsupportedError
from diffaccel.pipelines import CausalWanPipeline, loading
from diffaccel.pipelines.loading import Defaults, LoadError, bundled_model, check_checkpoint, defaults, load
from diffaccel.pipelines.presets import PAYS, PRESETS, auto, balanced, exact, fast


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_presets_go_from_lossless_to_fast():
    assert list(PRESETS.items()) == [("exact", exact), ("balanced", balanced), ("fast", fast)]
    assert exact() == Accel(prompt=PadCollapse())
    assert all(policy.is_exact for policy in exact().policies().values())
    for preset in (balanced(), fast()):
        assert {slot: type(policy) for slot, policy in preset.policies().items()} == {
            "prompt": PadCollapse,
            "cache": TempCache,
            "reuse": FlashBlock,
        }
        assert preset.reuse.clean_pass == "compute"
        assert preset.cache.recent_frames is None  # the newest block stays unmerged
    assert fast().cache.threshold < balanced().cache.threshold
    assert fast().reuse.refresh > balanced().reuse.refresh
    assert all(preset.__doc__ for preset in PRESETS.values())


@pytest.mark.parametrize(("frames", "techniques"), [(9, False), (2001, True)])
def test_auto_takes_techniques_where_the_past_is_what_counts(frames, techniques):
    pipe = tiny_pipeline()
    chosen, why = auto(pipe, frames, 64, 64)
    found = {slot: type(policy) for slot, policy in chosen.policies().items()}
    assert bool(found) is techniques
    assert why.startswith("techniques on: " if techniques else "dense: ")
    config, block = pipe.transformer.config, pipe.transformer.blocks[0]
    past = ((frames - 1) // 4 + 1 - pipe.config.frames_per_block) * 16  # tokens: 64 pixels are 8 latents, 4 patches
    operations = 4 * past * config.num_attention_heads * config.attention_head_dim
    rest = 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2)
    assert f"is {operations / rest:.2g} times" in why
    assert techniques == (operations / rest >= PAYS["cpu"])


def test_auto_reuses_nothing_in_a_rolling_window():
    chosen, _ = auto(tiny_pipeline("rolling"), 2001, 64, 64)
    assert (chosen.cache is None, chosen.reuse) == (False, None)


def test_auto_leaves_a_pipeline_without_blocks_dense():
    chosen, why = auto(WanPipeline(**tiny_components()), 2001, 64, 64)
    assert chosen == Accel()
    assert why == "dense: Wan makes all frames at once, and nothing that is kept of earlier ones pays"


def test_a_stock_pipeline_refuses_what_needs_blocks_and_takes_exact():
    from diffusers import WanPipeline

    pipe = WanPipeline(**tiny_components())
    with pytest.raises(UnsupportedError, match="TempCache"):
        balanced().apply(pipe)
    exact().apply(pipe).remove(check=False)


def test_a_folder_opens_as_what_it_was_saved_as_or_as_asked(saved):
    pipe = load(saved)
    assert type(pipe) is CausalWanPipeline
    assert pipe.transformer.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    stock = load(str(saved), pipeline="stock", dtype="bfloat16", device="cpu")
    assert type(stock).__name__ == "WanPipeline"
    assert stock.transformer.dtype == torch.bfloat16
    assert stock.vae.dtype == torch.float32
    wanted = tiny_components()["transformer"].state_dict()
    assert all(
        torch.equal(value, wanted[name]) for name, value in load(saved, device="cpu").transformer.state_dict().items()
    )


def test_the_bundled_model_is_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch, saved):
    package = tmp_path / "root" / "diffaccel"
    package.mkdir(parents=True)
    monkeypatch.setattr(diffaccel, "__file__", str(package / "__init__.py"))
    with pytest.raises(LoadError, match=r"pass --model"):
        bundled_model()
    checkout = shutil.copytree(saved, tmp_path / "root" / "samples" / "tiny-world")
    assert bundled_model() == checkout
    wheel = shutil.copytree(saved, package / "samples" / "tiny-world")
    assert bundled_model() == wheel
    assert type(load(device="cpu")) is CausalWanPipeline


def test_a_checkpoint_may_say_what_to_generate(copy):
    pipe = tiny_pipeline()
    assert defaults(pipe, copy) == Defaults(832, 480, 81, None, None, 16.0)
    file = copy / "generation.json"
    file.write_text(json.dumps({"width": 48, "height": 32, "num_frames": 9, "guidance_scale": 2.5, "fps": 8}))
    assert defaults(pipe, copy) == Defaults(48, 32, 9, None, 2.5, 8)
    file.write_text(json.dumps({"length": 9}))
    with pytest.raises(LoadError, match="may hold pipeline, width, height, num_frames"):
        defaults(pipe, copy)
    file.write_text(json.dumps({"width": "wide"}))
    with pytest.raises(LoadError, match="must hold numbers, got 'wide' for 'width'"):
        defaults(pipe, copy)
    file.write_text(json.dumps({"pipeline": "casual"}))
    with pytest.raises(KnobError, match="did you mean 'causal'"):
        load(copy, device="cpu")


def test_a_checkpoint_may_say_how_it_generates(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanPipeline"}))
    assert type(load(copy, device="cpu")) is WanPipeline
    (copy / "generation.json").write_text(json.dumps({"pipeline": "causal"}))
    assert type(load(copy, device="cpu")) is CausalWanPipeline
    assert type(load(copy, device="cpu", pipeline="stock")) is WanPipeline


def weights(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def truncate(folder):
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content[: len(content) // 2])


def cut_header(folder):
    weights(folder).write_bytes(weights(folder).read_bytes()[:20])


def garble(folder):
    content = bytearray(weights(folder).read_bytes())
    content[8:40] = b"x" * 32
    weights(folder).write_bytes(content)


def lose_shard(folder):
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    weights(folder).with_suffix(".safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, r"diffusion_pytorch_model.safetensors' has \d+ bytes where its header says \d+"),
        (cut_header, r"is corrupt \(its header is cut off\)"),
        (lambda folder: weights(folder).write_bytes(b""), "is corrupt"),
        (garble, "is corrupt"),
        (lose_shard, "lacks 2 weight file"),
        (lambda folder: weights(folder).unlink(), "cannot be opened as CausalWanPipeline"),
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks its component folder 'vae'"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "must hold a JSON object"),
        (lambda folder: (folder / "model_index.json").write_text("{}"), "names no pipeline class"),
        (lambda folder: (folder / "model_index.json").unlink(), "is not a diffusers checkpoint"),
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_sentence(copy, damage, sentence):
    damage(copy)
    with pytest.raises(LoadError, match=sentence) as caught:
        load(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_whole_checkpoint_passes_the_check(saved):
    assert check_checkpoint(saved)["_class_name"] == "CausalWanPipeline"


def test_a_hub_name_that_cannot_be_had_is_one_sentence(monkeypatch):
    import huggingface_hub

    def gone(name, **_how):
        raise OSError(f"{name} is not a model\nmore lines")

    monkeypatch.setattr(huggingface_hub, "model_info", gone)
    with pytest.raises(LoadError, match="no folder 'owner/name', and it cannot be had from the hub") as caught:
        load("owner/name", device="cpu")
    assert "more lines" not in str(caught.value)


def test_other_pipelines_are_refused_by_name(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))
    with pytest.raises(UnsupportedError, match="is a NoSuchPipeline, which diffusers"):
        load(copy, device="cpu")
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "LTXPipeline"}))
    with pytest.raises(UnsupportedError, match="--pipeline causal needs a Wan checkpoint"):
        load(copy, pipeline="causal", device="cpu")


def test_bad_settings_of_loading_name_the_choices(saved, monkeypatch):
    for asked, choices in (
        ({"dtype": "float12"}, "float32, bfloat16, float16"),
        ({"pipeline": "casual"}, "did you mean 'causal'"),
        ({"offload": "disk"}, "none, model, sequential"),
    ):
        with pytest.raises(KnobError, match=choices):
            load(saved, **asked)
    with pytest.raises(LoadError, match="unknown device 'tpu9'"):
        load(saved, device="tpu9")
    with pytest.raises(LoadError, match="the device is the CPU"):
        load(saved, device="cpu", offload="model")
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoadError, match="this machine has no CUDA device; use --device cpu"):
        load(saved, device="cuda")
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LoadError, match="cuda:0 to cuda:1"):
        load(saved, device="cuda:2")
