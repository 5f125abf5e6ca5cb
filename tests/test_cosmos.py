"""Cosmos through its own pipeline; what holds for every family is in `test_families.py`."""

import pytest
import torch
from diffusers import AutoencoderKLCosmos, CosmosTextToWorldPipeline, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from families import GRID, VIDEO, WORDS, cosmos, noise, prompt
from tiny import CHANNELS, TEXT_DIM

from diffaccel import Accel, AnnSA, FullFieldGuide, InwardWindow, PadCollapse, UnsupportedError

SELECTION = AnnSA(0.4, dense_steps=0, min_past=0)


class Safe:
    """In place of a safety checker that has to be downloaded."""

    def to(self, device):
        return self

    def check_text_safety(self, text):
        return True


@pytest.fixture
def pipe():
    torch.manual_seed(1)
    vae = AutoencoderKLCosmos(
        latent_channels=CHANNELS, encoder_block_out_channels=(8, 8), decode_block_out_channels=(8, 8),
        num_layers=1, attention_resolutions=(), patch_size=4,
    )  # fmt: skip
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    pipe = CosmosTextToWorldPipeline(None, None, cosmos(), vae.eval(), scheduler, Safe())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, height=64, rows=1, seed=0):
    texts = prompt(rows, 0)["encoder_hidden_states"], prompt(rows, 1)["encoder_hidden_states"]
    return pipe(
        prompt_embeds=texts[0], negative_prompt_embeds=texts[1], height=height, width=96, num_frames=17,
        num_inference_steps=3, generator=torch.Generator().manual_seed(seed), output_type="latent",
    ).frames  # fmt: skip


@pytest.mark.parametrize("technique", [{}, {"prompt": PadCollapse()}, {"selection": AnnSA(density=1)}], ids=str)
def test_exact_settings_are_the_stock_pipeline(pipe, technique):
    stock = generate(pipe)
    with Accel(**technique)(pipe):
        torch.testing.assert_close(generate(pipe), stock, atol=1e-3, rtol=0)  # of latents that begin at 80
    assert torch.equal(generate(pipe), stock)


def test_generations_of_one_run_do_not_mix(pipe):
    with Accel(selection=SELECTION)(pipe):
        alone = generate(pipe)
    with Accel(selection=SELECTION)(pipe):
        generate(pipe, height=96, seed=1)
        generate(pipe, rows=2, seed=2)
        assert torch.equal(generate(pipe), alone)
    assert (generate(pipe) - alone).abs().max() > 1e-2


def test_the_step_is_the_schedulers(pipe, monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(args[-1]) or plan(*args))
    with Accel(selection=SELECTION)(pipe):
        generate(pipe)
    assert [(site.step, site.branch) for site in seen[::2]] == [
        (step, f"branch {branch}") for step in range(3) for branch in range(2)
    ]


def given(**more):
    text = {"encoder_hidden_states": noise(1, WORDS, TEXT_DIM)}
    return {"hidden_states": noise(1, *VIDEO), "timestep": torch.tensor([0.5])} | text | more


def as_pipe(model):
    return type("Pipe", (), {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler()})


def test_a_pass_on_a_smaller_grid_has_its_mask_of_given_frames_there_too(monkeypatch):
    model, seen = cosmos(in_channels=CHANNELS + 1), []
    embed = model.patch_embed.forward
    monkeypatch.setattr(model.patch_embed, "forward", lambda x: seen.append(x) or embed(x))
    mask = noise(1, 1, *VIDEO[1:], seed=1)
    window = InwardWindow((GRID.height // 2, GRID.width // 2))
    with Accel(window=window, reuse=FullFieldGuide(shrink=2))(as_pipe(model)), torch.no_grad():
        model(**given(condition_mask=mask))
    small, whole = seen
    assert torch.equal(whole[:, -1:], mask)
    assert torch.equal(small, whole[..., 1::2, 1::2])


def test_a_noise_level_for_each_frame():
    model, levels = cosmos(), torch.linspace(0, 1, GRID.frames).view(1, 1, -1, 1, 1)
    with torch.no_grad():
        stock = model(**given(timestep=levels)).sample
        with Accel()(as_pipe(model)):
            torch.testing.assert_close(model(**given(timestep=levels)).sample, stock, atol=2e-5, rtol=0)


def test_what_it_cannot_take_is_refused():
    with pytest.raises(UnsupportedError, match=r"as Cosmos Transfer 2\.5 does"):
        Accel().apply(as_pipe(cosmos(img_context_dim_in=8, img_context_dim_out=48)))
    model = cosmos()
    with Accel()(as_pipe(model)), pytest.raises(UnsupportedError, match="attention masks"):
        model(**given(attention_mask=torch.ones(1, WORDS, dtype=torch.bool)))
