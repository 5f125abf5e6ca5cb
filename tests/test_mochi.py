"""Mochi: streams of their own for video and text in one attention, which leaves padding of the text out.

What holds for every family is in `test_families.py`.
"""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline
from families import GRID, STEPS, WORDS, mochi, noise, padded
from test_inward_window import Masked
from tiny import CHANNELS, TEXT_DIM

from diffaccel import Accel, AnnSA, InwardWindow, UnsupportedError
from diffaccel.joint import Text

SIZE = {"height": 16 * GRID.height, "width": 16 * GRID.width, "num_frames": 13}
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # the stock model's rotary angles, in fp32


@pytest.fixture
def pipe():
    found = MochiPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, mochi())
    found.set_progress_bar_config(disable=True)
    return found


def generate(pipe, lengths=(7,), negative=(3,), kind=torch.bool):
    """Latents of one generation; prompts of so many tokens before padding, no guidance without negative ones."""
    text = {}
    for name, number, of in (("", 1, lengths), ("negative_", 2, negative)):
        text[f"{name}prompt_embeds"] = noise(len(of), WORDS, TEXT_DIM, seed=number) if of else None
        text[f"{name}prompt_attention_mask"] = mask(of).to(kind) if of else None
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0 if negative else 1.0}
    return pipe(**text, **SIZE, **settings, generator=generator, output_type="latent").frames


def mask(lengths):
    return torch.arange(WORDS) < torch.tensor(lengths)[:, None]


CASES = [((7,), ()), ((7,), (3,)), ((12,), (0,)), ((4, 9), (2, 2))]


@pytest.mark.parametrize(("lengths", "negative"), CASES, ids=str)
@pytest.mark.parametrize("accel", [Accel(), Accel(selection=AnnSA(density=1))], ids=["none", "AnnSA"])
def test_exact_settings_are_the_stock_pipeline(pipe, lengths, negative, accel):
    stock = generate(pipe, lengths, negative)
    with accel(pipe):
        torch.testing.assert_close(generate(pipe, lengths, negative), stock, atol=3e-5, rtol=0)
    assert torch.equal(generate(pipe, lengths, negative), stock)
    shorter = generate(pipe, tuple(n - 1 for n in lengths), negative)
    assert (shorter - stock).abs().max() > 1e-3  # where padding begins is felt


@pytest.mark.parametrize(("lengths", "negative"), CASES, ids=str)
def test_a_window_is_the_mask_of_its_tokens_and_text_is_read_whole(pipe, lengths, negative):
    window, stock = InwardWindow((3, 3), ratio=1), generate(pipe, lengths, negative)
    with Accel(window=Masked(window))(pipe):
        expected = generate(pipe, lengths, negative)
    with Accel(window=window)(pipe) as run:
        found = generate(pipe, lengths, negative, torch.int64)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
    assert (found - stock).abs().max() > 1e-3
    counts, text = run.report().slots["window"], sum(lengths + negative) / len(lengths + negative)
    assert counts.keys_total == pytest.approx(STEPS * 2 * (GRID.tokens + text), abs=1)
    assert counts.keys_read == pytest.approx(STEPS * 2 * (9 * GRID.frames + text), abs=1)


def test_the_scheduler_tells_the_step(pipe):
    with Accel(selection=AnnSA(0.4, dense_steps=0.5, min_past=0))(pipe) as run:
        generate(pipe)
    assert [layer.engaged["selection"] for layer in run.report().layers] == [STEPS / 2] * 2


@pytest.mark.parametrize("positional", [0, 4])
def test_the_model_however_it_is_called(pipe, positional):
    arguments = {
        "hidden_states": noise(2, CHANNELS, GRID.frames, 2 * GRID.height, 2 * GRID.width),
        **padded(2, 0), "timestep": torch.tensor([300, 700]),
    }  # fmt: skip
    order = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
    given = [arguments.pop(name) for name in order[:positional]]

    @torch.no_grad()
    def go():
        return pipe.transformer(*given, **arguments, return_dict=False)[0]

    stock = go()
    with Accel()(pipe):
        torch.testing.assert_close(go(), stock, atol=2e-5, rtol=0)


def test_padding_before_the_text_is_refused(pipe):
    given = padded(1, 0) | {"hidden_states": noise(1, CHANNELS, *(3, 12, 16)), "timestep": torch.ones(1)}
    given["encoder_attention_mask"] = given["encoder_attention_mask"].flip(1)
    with Accel()(pipe), pytest.raises(UnsupportedError, match=r"got masks of \[7\] ones that end at \[12\]"):
        pipe.transformer(**given)


def test_what_is_read_is_told(pipe, monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(args[-1]) or plan(*args))
    with Accel(selection=AnnSA(0.4, dense_steps=0, min_past=0))(pipe):
        generate(pipe, (4, 9), (2, 0))
    assert {site.text for site in seen} == {Text(WORDS, (2, 0, 4, 9))}
    assert {(site.branch, site.grid) for site in seen} == {("cond_uncond", GRID)}
