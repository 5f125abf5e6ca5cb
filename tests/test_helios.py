"""Helios: sections with history in front of them, at three scales, in stages of a pyramid or without.

What holds for every family is in `test_families.py`.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import HeliosPipeline, HeliosPyramidPipeline, HeliosScheduler
from families import GRID, HISTORY, STEPS, VIDEO, helios, helios_given, noise
from test_framepack import LOSSY, tokens
from test_inward_window import Masked
from tiny import TEXT_DIM, tiny_components

from diffaccel import Accel, AnnCA, AnnSA, FlashBlock, FullFieldGuide, Grid, InwardWindow, PadCollapse, UnsupportedError
from diffaccel.joint import Text

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # of NumPy, in diffusers' scheduler
SECTIONS, PAST = 2, (2, 2, 16)  # latent frames of history by scale
EXACT = [Accel(), Accel(selection=AnnSA(density=1)), Accel(prompt=PadCollapse())]


def pipeline(kind=HeliosPipeline, **changes):
    scheduler = HeliosScheduler(stages=2 if kind is HeliosPyramidPipeline else 1)
    found = kind(**tiny_components() | {"transformer": helios(**changes), "scheduler": scheduler})
    found.set_progress_bar_config(disable=True)
    found.vae.decode = lambda latents, **_: (latents[:, :3],)  # which is asked also where latents are wanted
    return found


def generate(pipe, **given):
    """Latents of all sections of one generation under guidance."""
    text = {"prompt_embeds": noise(1, 12, TEXT_DIM, seed=1), "negative_prompt_embeds": noise(1, 12, TEXT_DIM, seed=2)}
    text["prompt_embeds"][:, 7:] = text["negative_prompt_embeds"][:, 3:] = 0
    steps = (
        {"num_inference_steps": STEPS} if type(pipe) is HeliosPipeline else {"pyramid_num_inference_steps_list": [2, 2]}
    )
    return pipe(
        **text, height=16 * GRID.height, width=16 * GRID.width, num_frames=9 * SECTIONS,
        num_latent_frames_per_chunk=GRID.frames, guidance_scale=3.0, **steps, **given,
        generator=torch.Generator().manual_seed(5), output_type="latent",
    ).frames  # fmt: skip


@pytest.mark.parametrize("kind", [HeliosPipeline, HeliosPyramidPipeline])
@pytest.mark.parametrize("accel", EXACT, ids=["none", "AnnSA", "PadCollapse"])
def test_exact_settings_are_the_stock_pipeline(kind, accel):
    pipe = pipeline(kind)
    stock = generate(pipe)
    with accel(pipe):
        torch.testing.assert_close(generate(pipe), stock, atol=1e-4, rtol=0)
    assert torch.equal(generate(pipe), stock)


@pytest.mark.parametrize("mode", ["per_head", "scalar"])
def test_a_window_is_the_mask_of_its_tokens_and_amplified_history_is_read_whole(mode):
    pipe, window = pipeline(is_amplify_history=True, history_scale_mode=mode), InwardWindow((3, 3), ratio=1)
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.history_key_scale.copy_(noise(*block.attn1.history_key_scale.shape) - 2)
    stock = generate(pipe)
    with Accel()(pipe):
        torch.testing.assert_close(generate(pipe), stock, atol=3e-5, rtol=0)
    with Accel(window=Masked(window))(pipe):
        expected = generate(pipe)
    with Accel(window=window)(pipe) as run:
        found = generate(pipe)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
    assert (found - stock).abs().max() > 1e-3
    counts, calls = run.report().slots["window"], 2 * 2 * STEPS * SECTIONS  # layers, branches
    assert counts.keys_total == calls * (GRID.tokens + tokens(PAST))
    assert counts.keys_read == calls * (9 * GRID.frames + tokens(PAST))


def test_stages_of_a_pyramid_have_grids_of_their_own(monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(args[-1]) or plan(*args))
    pipe = pipeline(HeliosPyramidPipeline)
    with Accel(selection=LOSSY)(pipe):
        assert torch.isfinite(generate(pipe)).all()
    small = Grid(GRID.frames, GRID.height // 2, GRID.width // 2)
    per_stage = 2 * 2 * 2  # steps, branches, layers
    assert [site.grid for site in seen[::per_stage]] == [small, GRID] * SECTIONS
    assert [(site.step, site.branch) for site in seen[:per_stage:2]] == [
        (step, branch) for step in range(2) for branch in ("cond", "uncond")
    ]
    assert {site.text for site in seen} == {Text(tokens(PAST), (tokens(PAST),), first=True)}


@pytest.mark.parametrize("kind", [HeliosPipeline, HeliosPyramidPipeline])
def test_a_pass_over_a_smaller_field_has_a_smaller_history(kind, monkeypatch):
    seen = []
    stock = type(helios()).forward
    monkeypatch.setattr(
        "diffusers.HeliosTransformer3DModel.forward", lambda model, **given: seen.append(given) or stock(model, **given)
    )
    pipe = pipeline(kind)
    with Accel(window=InwardWindow((2, 2)), reuse=FullFieldGuide(shrink=2))(pipe) as run:
        assert torch.isfinite(generate(pipe)).all()
    assert run.report().slots["reuse"].engaged
    (section, history), (before, history_before) = (
        [torch.tensor(given[name].shape[3:]) for name in ("hidden_states", "latents_history_mid")] for given in seen[:2]
    )
    assert (section < before).all()
    assert torch.equal(history * before, history_before * section)


def test_history_that_reads_the_prompt_leaves_that_attention_as_it_is():
    pipe = pipeline(guidance_cross_attn=False)
    stock = generate(pipe)
    with Accel()(pipe) as run:
        torch.testing.assert_close(generate(pipe), stock, atol=3e-5, rtol=0)
    assert {layer.part for layer in run.report().layers} == {"self"}
    for accel, why in (
        (Accel(prompt=AnnCA()), "its history reads the prompt too"),
        (Accel(window=InwardWindow(), reuse=FullFieldGuide()), "which stays as it is"),
        (Accel(reuse=FlashBlock()), "has none that stay, for its history passes through the layers"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            accel.apply(pipe)


@pytest.mark.parametrize("left_out", ["", "latents_history_long", "indices_latents_history_mid", "all"])
@pytest.mark.parametrize("positional", [0, 9])
def test_history_is_what_the_model_takes_for_it(left_out, positional):
    model, given = helios(), helios_given(2, 0)
    order = ["short", "mid", "long"]
    arguments = {"hidden_states": noise(2, *VIDEO), "timestep": torch.tensor([300.0, 700.0])}
    for name in (
        "encoder_hidden_states",
        "indices_hidden_states",
        *(f"indices_latents_history_{name}" for name in order),
        *(f"latents_history_{name}" for name in order),
    ):
        arguments[name] = None if name == left_out or (left_out == "all" and "history" in name) else given[name]
    placed, named = list(arguments.values())[:positional], dict(list(arguments.items())[positional:])

    @torch.no_grad()
    def go():
        return model(*placed, **named, return_dict=False)[0]

    stock, frames = go(), list(HISTORY.values())
    for place, name in enumerate(order):
        frames[place] *= not (left_out == "all" or left_out.endswith(name))
    with Accel()(SimpleNamespace(transformer=model)) as run:
        torch.testing.assert_close(go(), stock, atol=2e-5, rtol=0)
        count = tokens(frames)
        assert run.site(0, "self").text == (Text(count, (count, count), first=True) if count else None)
