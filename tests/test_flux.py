"""Flux through its own pipeline: images, text first; what holds for every family is in `test_families.py`."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from families import WORDS, flux, noise
from tiny import TEXT_DIM

from diffaccel import Accel, AnnSA, Grid, InwardWindow, NotEngagedError, PadCollapse, UnsupportedError

SELECTION = AnnSA(0.4, dense_steps=0, min_past=0, sink_frames=0)


def pipeline(**transformer):
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, flux(**transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, rows=1, guided=True, height=192, width=256):
    text = {"prompt_embeds": noise(rows, WORDS, TEXT_DIM), "pooled_prompt_embeds": noise(rows, 16)}
    if guided:
        text |= {f"negative_{name}": noise(*value.shape, seed=1) for name, value in text.items()}
        text["true_cfg_scale"] = 2.0
    size = {"height": height, "width": width, "num_inference_steps": 3, "output_type": "latent"}
    return pipe(**text, **size, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("settings", [{"guided": False}, {}, {"rows": 2}], ids=str)
@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize(
    "accel", [Accel(), Accel(selection=AnnSA(density=1)), Accel(window=InwardWindow(size=None))], ids=lambda _: ""
)
def test_exact_settings_are_the_stock_pipeline(settings, guidance_embeds, accel):
    pipe = pipeline(guidance_embeds=guidance_embeds)
    stock = generate(pipe, **settings)
    with accel(pipe):
        torch.testing.assert_close(generate(pipe, **settings), stock, atol=2e-5, rtol=0)
    assert torch.equal(generate(pipe, **settings), stock)


@pytest.mark.parametrize("accel", [Accel(window=InwardWindow((5, 5))), Accel(selection=SELECTION)], ids=lambda _: "")
def test_techniques_engage_in_images_of_any_shape_one_after_another(accel):
    pipe = pipeline()
    with accel(pipe) as run:
        alone = generate(pipe)
        generate(pipe, height=256, width=160)
        assert torch.equal(generate(pipe), alone)
    assert (generate(pipe) - alone).abs().max() > 1e-3
    for counts in run.report().slots.values():
        assert counts.keys_read < 0.7 * counts.keys_total


def test_the_grid_is_read_off_positions(monkeypatch):
    seen, plan = [], InwardWindow.plan
    monkeypatch.setattr(InwardWindow, "plan", lambda *args: seen.append(args[-1]) or plan(*args))
    pipe = pipeline()
    with Accel(window=InwardWindow((3, 3)))(pipe):
        generate(pipe)
    assert {(site.grid, site.text.first, site.text.tokens) for site in seen} == {(Grid(1, 12, 16), True, WORDS)}
    assert [(site.step, site.branch) for site in seen[::3]] == [
        (step, branch) for step in range(3) for branch in ("cond", "uncond")
    ]


def given(places):
    text = {"encoder_hidden_states": noise(1, WORDS, TEXT_DIM), "pooled_projections": noise(1, 16)}
    ids = {"img_ids": places, "txt_ids": torch.zeros(WORDS, 3)}
    return text | ids | {"hidden_states": noise(1, len(places), 8), "timestep": torch.tensor([0.5])}


def places(*sides):
    return torch.cartesian_prod(*(torch.arange(float(side)) for side in sides))


@pytest.mark.parametrize(
    "ids",
    [torch.cat([places(1, 4, 6), places(1, 4, 6) + torch.tensor([1.0, 0, 0])]), places(1, 6, 4)[:, [0, 2, 1]]],
    ids=["a reference image beside it", "columns first"],
)
def test_tokens_that_are_no_image_are_refused(ids):
    pipe = pipeline()
    with Accel()(pipe), pytest.raises(UnsupportedError, match=f"got {len(ids)} tokens on 4 x 6 places"):
        pipe.transformer(**given(ids))


def test_what_it_cannot_take_is_refused():
    pipe = pipeline()
    with pytest.raises(UnsupportedError, match="its prompt is read in one attention"):
        Accel(prompt=PadCollapse()).apply(pipe)
    with pytest.raises(NotEngagedError, match="sink_frames"), Accel(selection=AnnSA(0.4, min_past=0))(pipe):
        generate(pipe)  # one frame, and by default the first is always read
