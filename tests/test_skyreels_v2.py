"""SkyReels-V2 through its own pipelines; what holds for every family is in `test_families.py`."""

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Pipeline, UniPCMultistepScheduler
from families import VIDEO, noise, prompt, skyreels_v2
from tiny import HEIGHT, WIDTH, tiny_components

from diffaccel import Accel, AnnSA, InwardWindow, PadCollapse, UnsupportedError

STEPS = 4


def pipeline(kind=SkyReelsV2DiffusionForcingPipeline):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = kind(**tiny_components() | {"transformer": skyreels_v2(), "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, frames=17, **settings):
    generator = torch.Generator().manual_seed(0)
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": frames, "num_inference_steps": STEPS}
    return pipe("a red circle moves left", **size, **settings, generator=generator, output_type="latent").frames


ASYNCHRONOUS = {"ar_step": 2}
LONG = {"frames": 25, "base_num_frames": 13, "overlap_history": 5, "addnoise_condition": 20}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SkyReelsV2Pipeline, {}),
        (SkyReelsV2DiffusionForcingPipeline, {}),
        (SkyReelsV2DiffusionForcingPipeline, ASYNCHRONOUS),
        (SkyReelsV2DiffusionForcingPipeline, LONG),
    ],
    ids=["at once", "synchronous", "asynchronous", "long"],
)
def test_exact_settings_are_the_stock_pipeline(kind, settings):
    def go():
        torch.manual_seed(1)  # noise on the history of a long video is the global generator's
        return generate(pipe, **settings)

    pipe = pipeline(kind)
    stock = go()
    with Accel(selection=AnnSA(density=1), prompt=PadCollapse())(pipe):
        torch.testing.assert_close(go(), stock, atol=2e-5, rtol=0)
    assert torch.equal(go(), stock)


@pytest.mark.parametrize(("settings", "more"), [({}, 0), (ASYNCHRONOUS, 2 * 4)], ids=["synchronous", "asynchronous"])
def test_the_step_is_that_of_the_noisiest_frame(monkeypatch, settings, more):
    seen, plan = [], InwardWindow.plan
    monkeypatch.setattr(InwardWindow, "plan", lambda *args: seen.append(args[-1]) or plan(*args))
    pipe = pipeline()
    with Accel(window=InwardWindow((1, 2)))(pipe):
        generate(pipe, **settings, guidance_scale=1.0)
    sites = [site for site in seen if site.layer == 0]
    assert {site.steps for site in sites} == {STEPS}
    steps = [site.step for site in sites]
    assert steps == sorted(steps)
    assert set(steps) == set(range(STEPS))
    assert len(steps) == STEPS + more  # four of five frames wait two steps each for the one before
    assert steps.count(0) == 1 + more


def test_causal_blocks_are_refused_and_leave_no_trace():
    pipe = pipeline()
    stock = generate(pipe)
    with (
        pytest.raises(
            UnsupportedError, match=r"causal blocks of 5 frames .* call the pipeline with causal_block_size=1"
        ),
        Accel()(pipe),
    ):
        generate(pipe, causal_block_size=5, ar_step=2)
    assert torch.equal(generate(pipe, causal_block_size=1), stock)


def test_image_to_video_reads_its_image_beside_the_prompt():
    model = skyreels_v2(image_dim=16, added_kv_proj_dim=48)
    pipe = type("Pipe", (), {"transformer": model})
    with pytest.raises(UnsupportedError, match="512 prompt tokens"):
        Accel(prompt=PadCollapse()).apply(pipe)
    text = torch.cat([prompt(1, 0)["encoder_hidden_states"], torch.zeros(1, 500, 32)], 1)
    images = noise(2, 1, 5, 16)

    @torch.no_grad()
    def go(image):
        return model(noise(1, *VIDEO), torch.tensor([500]), text, image).sample

    stock = go(images[0])
    assert (go(images[1]) - stock).abs().max() > 1e-3
    with Accel()(pipe):
        torch.testing.assert_close(go(images[0]), stock, atol=2e-5, rtol=0)
