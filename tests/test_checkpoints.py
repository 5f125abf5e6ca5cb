"""Published causal checkpoints become a stock transformer, or are refused with the reason."""

import logging
import os
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from tiny import CHANNELS, TEXT_DIM, tiny_transformer

from diffaccel.pipelines import CheckpointError, load_self_forcing
from diffaccel.pipelines.checkpoints import infer_config

ORIGINAL = [  # diffusers' name, the original Wan's; longest first where one contains another
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
    ("proj_out", "head.head"),
]


def original_names(weights):
    renamed = {}
    for name, tensor in weights.items():
        new = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        for ours, theirs in ORIGINAL:
            new = new.replace(ours, theirs)
        renamed[new] = tensor.clone()
    return renamed


@pytest.fixture(scope="module")
def source():
    """Two layers, one head of 128 channels: the smallest model with the head width of the published ones."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=128,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).eval()


@pytest.fixture(scope="module")
def original(source):
    return original_names(source.state_dict())


@torch.no_grad()
def forward(model):
    rng = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, CHANNELS, 2, 4, 4, generator=rng), torch.randn(1, 5, TEXT_DIM, generator=rng)
    return model(latents, torch.tensor([500.0]), text, return_dict=False)[0]


def fsdp(weights):
    return {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in weights.items()}


def test_original_names_differ_from_diffusers(original, source):
    assert "blocks.0.self_attn.q.weight" in original
    assert "blocks.1.norm3.weight" in original
    assert len(original) == len(source.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model": w},
        lambda w: {"generator": fsdp(w)},
        lambda w: {"generator": {n: torch.zeros_like(t) for n, t in w.items()}, "generator_ema": fsdp(w)},
        lambda w: {f"model.blocks.{n[7:]}" if n.startswith("blocks.") else f"model.{n}": t for n, t in w.items()},
    ],
    ids=["bare", "model", "generator", "generator_ema", "prefixed"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_wrapping_loads_to_the_same_function(tmp_path, source, original, wrap, legacy):
    path = tmp_path / "self_forcing.pt"
    torch.save(wrap(original), path, _use_new_zipfile_serialization=not legacy)
    model = load_self_forcing(path)
    assert torch.equal(forward(model), forward(source))
    assert not model.training


def test_safetensors_and_diffusers_names(tmp_path, source, original):
    save_file(original, tmp_path / "a.safetensors")
    save_file(source.state_dict(), tmp_path / "b.safetensors")
    for file in ("a.safetensors", "b.safetensors"):
        model = load_self_forcing(tmp_path / file)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
        assert (forward(model) - forward(source)).abs().max() < 1e-5  # where memory is aligned decides the last bits


def test_use_ema_chooses(tmp_path, source, original):
    doubled = {name: 2 * tensor for name, tensor in original.items()}
    torch.save({"generator": original, "generator_ema": doubled}, tmp_path / "x.pt")
    plain = load_self_forcing(tmp_path / "x.pt", use_ema=False)
    averaged = load_self_forcing(tmp_path / "x.pt")
    assert torch.equal(plain.proj_out.weight, source.proj_out.weight)
    assert torch.equal(averaged.proj_out.weight, 2 * source.proj_out.weight)
    torch.save({"generator_ema": original}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="use_ema=True"):
        load_self_forcing(tmp_path / "y.pt", use_ema=False)


def test_missing_average_is_said(tmp_path, original, caplog):
    logging.getLogger("diffaccel.pipelines.checkpoints").addHandler(caplog.handler)
    torch.save({"generator": original}, tmp_path / "x.pt")
    load_self_forcing(tmp_path / "x.pt")
    assert "no averaged weights" in caplog.text


def test_dtype_leaves_the_fp32_parts(tmp_path, original):
    torch.save(original, tmp_path / "x.pt")
    model = load_self_forcing(tmp_path / "x.pt", dtype=torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert model.rope.freqs_cos.dtype == torch.float32


def test_nothing_is_left_on_the_meta_device(tmp_path, original):
    torch.save(original, tmp_path / "x.pt")
    model = load_self_forcing(tmp_path / "x.pt")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}


@pytest.mark.parametrize(
    "geometry",
    [
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},  # Wan2.1 1.3B
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},  # Wan2.1 14B
    ],
    ids=["1.3B", "14B"],
)
def test_published_geometries_are_inferred(geometry):
    with torch.device("meta"):
        model = WanTransformer3DModel(**geometry)
    assert {**model.config, **infer_config(model.state_dict())} == dict(model.config)
    for knob, value in geometry.items():
        assert infer_config(model.state_dict())[knob] == value


def test_other_head_widths_need_a_config(tmp_path):
    model = tiny_transformer()
    torch.save(original_names(model.state_dict()), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="pass config="):
        load_self_forcing(tmp_path / "x.pt")
    loaded = load_self_forcing(tmp_path / "x.pt", config=model.config)
    assert torch.equal(forward(loaded), forward(model))


class Payload:
    """Pickles to a call that leaves a trace if it is ever made."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, original, legacy):
    trace = tmp_path / "executed"
    content = {"generator": original, "hook": Payload(trace)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="could run code"):
        load_self_forcing(tmp_path / "x.pt")
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_files_cut_short_are_refused(tmp_path, original, suffix, keep):
    path = tmp_path / f"x{suffix}"
    if suffix == ".pt":
        torch.save(original, path)
    else:
        save_file(original, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_self_forcing(path)


def test_faults_are_listed_by_name(tmp_path, original):
    weights = dict(original)
    del weights["blocks.1.ffn.0.bias"]
    weights["blocks.1.extra"] = torch.zeros(1)
    weights["head.head.bias"] = torch.zeros(3)
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as error:
        load_self_forcing(tmp_path / "x.pt")
    for part in ("missing: blocks.1.ffn.net.0.proj.bias", "unexpected: blocks.1.extra", "proj_out.bias is (3,)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"critic": {"a": torch.zeros(1)}}, "found critic"),
        ({"a": 3, "b": torch.zeros(1)}, "no tensors: a"),
        ([torch.zeros(1)], "but list"),
        ({"some.weight": torch.zeros(1)}, "patch_embedding.weight"),
        ({"model.a": torch.zeros(1), "a": torch.zeros(1)}, "become a"),
    ],
    ids=["other", "number", "list", "foreign", "clash"],
)
def test_other_contents_are_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=says):
        load_self_forcing(tmp_path / "x.pt")


def test_a_model_of_another_size_is_told_in_one_line(tmp_path, original, source):
    torch.save(original, tmp_path / "x.pt")
    for changes, asked in (({"num_layers": 3}, "3 layers of 128"), ({"num_attention_heads": 2}, "2 layers of 256")):
        with pytest.raises(CheckpointError) as error:
            load_self_forcing(tmp_path / "x.pt", config=dict(source.config) | changes)
        assert str(error.value) == (
            f"{tmp_path / 'x.pt'} holds a Wan of 2 layers of 128 channels, and config= is of {asked} channels; "
            "leave config out to load it as it is, or name another file"
        )


def test_another_models_weights_are_told(tmp_path, source):
    torch.save({"transformer_blocks.0.attn.to_q.weight": torch.zeros(4, 4)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as error:
        load_self_forcing(tmp_path / "x.pt")
    assert str(error.value) == (
        f"{tmp_path / 'x.pt'}: these are no Wan transformer's weights, 'patch_embedding.weight' is missing among "
        "transformer_blocks.0.attn.to_q.weight; name the file of a causal Wan"
    )
    with pytest.raises(CheckpointError, match=r"missing: blocks.*; unexpected: transformer_blocks\.0\.attn\.to_q"):
        load_self_forcing(tmp_path / "x.pt", config=dict(source.config))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_self_forcing(tmp_path / "nowhere.pt")
