"""Qwen-Image through its own pipeline: images, padded text first; the rest is in `test_families.py`."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from families import IMAGE, WORDS, noise, qwen, qwen_image
from tiny import TEXT_DIM

from diffaccel import Accel, AnnSA, InwardWindow, PadCollapse, UnsupportedError


@pytest.fixture
def pipe():
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, qwen_image())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, lengths=(7,), negative=None):
    rows, text = len(lengths), {"true_cfg_scale": 2.0 if negative else 1.0}
    for seed, (name, valid) in enumerate((("", lengths), ("negative_", negative))):
        if valid:
            text[f"{name}prompt_embeds"] = noise(rows, WORDS, TEXT_DIM, seed=seed)
            text[f"{name}prompt_embeds_mask"] = (torch.arange(WORDS) < torch.tensor(valid)[:, None]).long()
    size = {"height": 192, "width": 256, "num_inference_steps": 3, "output_type": "latent"}
    return pipe(**text, **size, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize(
    ("lengths", "negative"), [((7,), None), ((12,), (3,)), ((3, 9), (4, 12)), ((12, 12), None)], ids=str
)
@pytest.mark.parametrize("accel", [Accel(), Accel(selection=AnnSA(density=1))], ids=["none", "AnnSA"])
def test_exact_settings_are_the_stock_pipeline(pipe, lengths, negative, accel):
    stock = generate(pipe, lengths, negative)
    with accel(pipe):
        torch.testing.assert_close(generate(pipe, lengths, negative), stock, atol=2e-5, rtol=0)
    assert torch.equal(generate(pipe, lengths, negative), stock)


def test_padding_is_neither_read_nor_counted(pipe):
    with Accel(window=InwardWindow((5, 5)))(pipe) as run:
        found = generate(pipe, (7,))
    assert (found - generate(pipe, (7,))).abs().max() > 1e-3
    counts = run.report().slots["window"]
    assert counts.keys_total == counts.calls * (12 * 16 + 7)
    assert counts.keys_read == counts.calls * (5 * 5 + 7)


def given(**more):
    given = qwen(1, 0) | {"hidden_states": noise(1, IMAGE.tokens, 8), "timestep": torch.tensor([0.5])}
    return given | more


@pytest.mark.parametrize("positional", [2, 5])
def test_positional_arguments_mean_what_they_mean_to_the_model(pipe, positional):
    order = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes")
    values = [given()[name] for name in order]
    args, named = values[:positional], dict(zip(order[positional:], values[positional:], strict=True))
    with torch.no_grad():
        stock = pipe.transformer(*args, **named).sample
        with Accel()(pipe):
            torch.testing.assert_close(pipe.transformer(*args, **named).sample, stock, atol=2e-5, rtol=0)


REFUSED = [
    ({"img_shapes": [[(1, 12, 6), (1, 12, 6)]]}, "got 2 images in one sequence"),
    ({"encoder_hidden_states_mask": (torch.arange(WORDS) > 3).float()[None]}, "padding before it"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=["two images", "padding first"])
def test_forwards_it_cannot_take_are_refused(pipe, changed, message):
    with Accel()(pipe), pytest.raises(UnsupportedError, match=message):
        pipe.transformer(**given(**changed))


def test_the_prompt_stays_whole(pipe):
    with pytest.raises(UnsupportedError, match="its prompt is read in one attention"):
        Accel(prompt=PadCollapse()).apply(pipe)
