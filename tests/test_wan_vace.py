"""Wan VACE through its own pipeline; what holds for every family is in `test_families.py`."""

import pytest
import torch
from diffusers import WanVACEPipeline
from families import GRID, VIDEO, noise, vace, wan_vace
from PIL import Image
from tiny import CHANNELS, HEIGHT, WIDTH, tiny_components

from diffaccel import Accel, AnnCA, AnnSA, FullFieldGuide, InwardWindow, PadCollapse, UnsupportedError


@pytest.fixture
def pipe():
    parts = tiny_components() | {"transformer": wan_vace(vace_in_channels=2 * CHANNELS + 64)}  # and a mask of 8 x 8
    pipe = WanVACEPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe):
    video = [Image.new("RGB", (WIDTH, HEIGHT), (20 * i, 100, 200)) for i in range(9)]
    return pipe(
        video=video, prompt="a red circle", height=HEIGHT,
        width=WIDTH, num_frames=9, num_inference_steps=3, generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames  # fmt: skip


@pytest.mark.parametrize("prompt", [None, PadCollapse(), AnnCA(bits=0)], ids=str)
def test_exact_settings_are_the_stock_pipeline(pipe, prompt):
    stock = generate(pipe)
    with Accel(prompt=prompt, selection=AnnSA(density=1))(pipe):
        torch.testing.assert_close(generate(pipe), stock, atol=2e-5, rtol=0)
    assert torch.equal(generate(pipe), stock)


def test_the_blocks_that_carry_control_are_layers_too(pipe):
    with Accel(window=InwardWindow((1, 2)))(pipe) as run:
        generate(pipe)
    layers = [(layer.layer, layer.part) for layer in run.report().layers]
    assert layers == [(layer, part) for layer in range(3) for part in ("cross", "self")]
    assert all(layer.engaged["window"] == layer.calls for layer in run.report().layers if layer.part == "self")


@pytest.mark.parametrize("positional", [0, 5])
def test_a_pass_on_a_smaller_grid_has_its_control_there_too(monkeypatch, positional):
    model, seen = wan_vace(), []
    monkeypatch.setattr(
        model.vace_patch_embedding, "forward", lambda x, to=model.vace_patch_embedding.forward: seen.append(x) or to(x)
    )
    given = {"hidden_states": noise(1, *VIDEO), "timestep": torch.tensor([500.0])} | vace(1, 0)
    given = {name: given.get(name) for name in (*list(given)[:3], "encoder_hidden_states_image", list(given)[3])}
    pipe = type("Pipe", (), {"transformer": model})
    window = InwardWindow((GRID.height // 2, GRID.width // 2))
    with Accel(window=window, reuse=FullFieldGuide(shrink=2))(pipe), torch.no_grad():
        model(*list(given.values())[:positional], **dict(list(given.items())[positional:]))
    small, whole = seen
    assert torch.equal(whole, given["control_hidden_states"])
    assert torch.equal(small, whole[..., 1::2, 1::2])  # the nearest


def test_image_tokens_keep_the_prompt_whole():
    pipe = type("Pipe", (), {"transformer": wan_vace(added_kv_proj_dim=48, image_dim=16)})
    with pytest.raises(UnsupportedError, match="512 prompt tokens"):
        Accel(prompt=PadCollapse()).apply(pipe)
