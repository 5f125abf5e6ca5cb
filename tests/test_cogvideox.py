"""CogVideoX: text before video in one attention, both branches of guidance in a batch, schedulers that count nothing.

What holds for every family is in `test_families.py`.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    ConsisIDTransformer3DModel,
    DPMSolverMultistepScheduler,
)
from families import GRID, STEPS, WORDS, cogvideox, noise
from test_inward_window import mask_of
from tiny import CHANNELS, TEXT_DIM

from diffaccel import Accel, AnnSA, InwardWindow, UnsupportedError

SIZE = {"height": 16 * GRID.height, "width": 16 * GRID.width}
VERSIONS = {
    "1.0": {},
    "2b": {"use_rotary_positional_embeddings": False},
    "1.5": {"patch_size_t": 2, "sample_frames": 21},
}


def pipeline(version="1.0", scheduler=CogVideoXDDIMScheduler):
    pipe = CogVideoXPipeline(None, None, None, cogvideox(**VERSIONS[version]), scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, rows=1, guidance=3.0, mask=None):
    text = {"prompt_embeds": noise(rows, WORDS, TEXT_DIM, seed=1)}
    if guidance > 1:
        text["negative_prompt_embeds"] = noise(rows, WORDS, TEXT_DIM, seed=2)
    frames = 21 if pipe.transformer.config.patch_size_t else 9
    settings = {"num_frames": frames, "num_inference_steps": STEPS, "guidance_scale": guidance}
    generator = torch.Generator().manual_seed(3)
    if mask is not None:
        settings["attention_kwargs"] = {"attention_mask": mask.expand(2 * rows, -1, -1)}
    return pipe(**text, **SIZE, **settings, generator=generator, output_type="latent").frames


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("rows", "guidance"), [(1, 1.0), (1, 3.0), (2, 3.0)])
@pytest.mark.parametrize("accel", [Accel(), Accel(selection=AnnSA(density=1))], ids=["none", "AnnSA"])
def test_exact_settings_are_the_stock_pipeline(version, rows, guidance, accel):
    pipe = pipeline(version)
    stock = generate(pipe, rows, guidance)
    with accel(pipe):
        torch.testing.assert_close(generate(pipe, rows, guidance), stock, atol=3e-5, rtol=0)
    assert torch.equal(generate(pipe, rows, guidance), stock)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_window_is_a_mask_of_the_stock_model_and_text_is_read_whole(version):
    pipe, window = pipeline(version), InwardWindow((3, 3), ratio=1)
    mask = torch.ones(WORDS + GRID.tokens, WORDS + GRID.tokens, dtype=torch.bool)
    mask[WORDS:, WORDS:] = mask_of(window, GRID, GRID)
    expected, stock = generate(pipe, mask=mask), generate(pipe)
    with Accel(window=window)(pipe) as run:
        found = generate(pipe)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
    assert (found - stock).abs().max() > 1e-3
    counts = run.report().slots["window"]
    assert counts.keys_total == STEPS * 2 * (GRID.tokens + WORDS)
    assert counts.keys_read == STEPS * 2 * (9 * GRID.frames + WORDS)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the last scheduler
@pytest.mark.parametrize("scheduler", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DPMSolverMultistepScheduler])
def test_steps_are_told_by_the_timestep_where_the_scheduler_counts_none(scheduler, monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(args[-1]) or plan(*args))
    pipe = pipeline(scheduler=scheduler)
    with Accel(selection=AnnSA(0.4, dense_steps=0.5, min_past=0))(pipe) as run:
        generate(pipe)
    assert [site.step for site in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {site.steps for site in seen} == {STEPS}
    counts = run.report().layers[0]
    assert counts.engaged["selection"] == STEPS / 2


@pytest.mark.parametrize("positional", [0, 3])
def test_image_to_video_however_the_model_is_called(positional):
    """The model of 1.5: image latents in channels of their own, an offset embedding."""
    model = cogvideox(patch_size_t=1, in_channels=2 * CHANNELS, ofs_embed_dim=8)
    arguments = {
        "hidden_states": noise(2, GRID.frames, 2 * CHANNELS, 2 * GRID.height, 2 * GRID.width, seed=4),
        "encoder_hidden_states": noise(2, WORDS, TEXT_DIM, seed=5),
        "timestep": torch.tensor([300, 700]),
        "ofs": torch.full((1,), 2.0),
    }
    given, named = list(arguments.values())[:positional], dict(list(arguments.items())[positional:])

    @torch.no_grad()
    def go():
        return model(*given, **named, return_dict=False)[0]

    stock = go()
    with Accel()(SimpleNamespace(transformer=model)):
        torch.testing.assert_close(go(), stock, atol=2e-5, rtol=0)


def test_masks_and_fused_projections_are_refused():
    pipe = pipeline()
    mask = torch.zeros(1, 1, 1, WORDS + GRID.tokens)
    latents, text = noise(1, GRID.frames, CHANNELS, 12, 16), noise(1, WORDS, TEXT_DIM)
    with Accel()(pipe), pytest.raises(UnsupportedError, match="masks do not pass through"):
        pipe.transformer(latents, text, torch.ones(1), attention_kwargs={"attention_mask": mask})
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(UnsupportedError, match="runs FusedCogVideoXAttnProcessor2_0 already"):
        Accel().apply(pipe)


def test_another_class_of_the_house_is_refused():
    pipe = SimpleNamespace(transformer=ConsisIDTransformer3DModel.__new__(ConsisIDTransformer3DModel))
    with pytest.raises(UnsupportedError, match=r"denoises with ConsisIDTransformer3DModel .* families: .*CogVideoX"):
        Accel().apply(pipe)
