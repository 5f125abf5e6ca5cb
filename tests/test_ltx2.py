"""LTX-2: video and sound made together; what is thinned is the video's attention to itself, and nothing else.

What holds for every family is in `test_families.py`.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from families import GRID, STEPS, WORDS, ltx2, ltx2_video, noise
from test_inward_window import Masked
from tiny import TEXT_DIM

from diffaccel import Accel, AnnSA, InwardWindow, UnsupportedError

LOSSY = AnnSA(0.4, dense_steps=0, min_past=0)
KINDS = {
    "2.0": {},
    "split": {"rope_type": "split"},
    "2.3": {
        "rope_type": "split", "perturbed_attn": True, "gated_attn": True, "audio_gated_attn": True,
        "cross_attn_mod": True, "audio_cross_attn_mod": True,
    },
}  # fmt: skip


def pipeline(kind):
    torch.manual_seed(1)
    small = {"num_attention_heads": 2, "attention_head_dim": TEXT_DIM // 2, "num_layers": 1}
    connectors = {
        f"{name}_connector_{key}": value
        for name in ("video", "audio")
        for key, value in (small | {"num_learnable_registers": None}).items()
    }
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4,
        ).eval(),
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=8
        ).eval(),
        text_encoder=None, tokenizer=None, vocoder=None,
        connectors=LTX2TextConnectors(
            caption_channels=TEXT_DIM, text_proj_in_factor=2, connector_rope_base_seq_len=32, **connectors
        ).eval(),
        transformer=ltx2_video(**KINDS[kind]),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, rows=1, guidance=3.0, **settings):
    """Latents of one generation, of video and of sound."""
    text = {}
    for name, number in (("", 1), ("negative_", 2)):
        text[f"{name}prompt_embeds"] = noise(rows, WORDS, 2 * TEXT_DIM, seed=number)
        text[f"{name}prompt_attention_mask"] = (torch.arange(WORDS) >= 4 * number).long().repeat(rows, 1)
    settings = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_guidance_scale": guidance} | settings
    settings |= {"audio_stg_scale": settings["stg_scale"], "audio_modality_scale": settings["modality_scale"]}
    sides, frames = pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio
    size = {"height": sides * GRID.height, "width": sides * GRID.width, "num_frames": frames * (GRID.frames - 1) + 1}
    generator = torch.Generator().manual_seed(3)
    found = pipe(
        **text, **size, **settings, num_inference_steps=STEPS, guidance_scale=guidance, generator=generator,
        output_type="latent",
    )  # fmt: skip
    return found.frames, found.audio


ALL_GUIDANCE = {"stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1], "modality_scale": 2.0}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("2.0", {}), ("2.0", {"rows": 2}), ("split", {"guidance": 1.0}), ("2.3", ALL_GUIDANCE)],
    ids=["2.0", "two rows", "split", "2.3"],
)
@pytest.mark.parametrize("accel", [Accel(), Accel(selection=AnnSA(density=1))], ids=["none", "AnnSA"])
def test_exact_settings_are_the_stock_pipeline(kind, settings, accel):
    pipe = pipeline(kind)
    stock = generate(pipe, **settings)
    with accel(pipe):
        torch.testing.assert_close(generate(pipe, **settings), stock, atol=5e-5, rtol=0)
    for one, other in zip(generate(pipe, **settings), stock, strict=True):
        assert torch.equal(one, other)


def test_a_window_is_the_mask_of_its_tokens_and_sound_hears_of_it():
    pipe, window = pipeline("2.0"), InwardWindow((3, 3), ratio=1)
    stock = generate(pipe)
    with Accel(window=Masked(window))(pipe):
        expected = generate(pipe)
    with Accel(window=window)(pipe) as run:
        found = generate(pipe)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(found, stock, strict=True))
    counts = run.report().slots["window"]
    assert counts.keys_total == STEPS * 2 * GRID.tokens
    assert counts.keys_read == STEPS * 2 * 9 * GRID.frames


def test_forwards_of_every_guidance_are_told_apart_and_a_perturbed_layer_attends_to_nothing(monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(args[-1]) or plan(*args))
    pipe = pipeline("2.3")
    with Accel(selection=LOSSY)(pipe):
        generate(pipe, **ALL_GUIDANCE)
    a_step = [(name, layer) for name in ("cond_uncond", "uncond_stg", "uncond_modality") for layer in (0, 1)]
    a_step.remove(("uncond_stg", 1))
    assert [(site.branch, site.layer) for site in seen] == a_step * STEPS
    assert [site.step for site in seen[:: len(a_step)]] == list(range(STEPS))


@pytest.mark.parametrize("perturbed", [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], ids=str)
def test_rows_that_are_perturbed_beside_others(perturbed):
    pipe = SimpleNamespace(transformer=ltx2_video(**KINDS["2.3"]))
    given = forward(2) | {"spatio_temporal_guidance_blocks": [0], "perturbation_mask": torch.tensor(perturbed)}
    given["sigma"] = given["timestep"]
    with torch.no_grad():
        stock = pipe.transformer(**given, return_dict=False)
        with Accel()(pipe):
            torch.testing.assert_close(pipe.transformer(**given, return_dict=False), stock, atol=2e-5, rtol=0)


def forward(rows=1):
    """Arguments of the model's forward."""
    return ltx2(rows, 0) | {
        "hidden_states": noise(rows, GRID.tokens, 8, seed=4),
        "timestep": torch.full((rows,), 500.0),
    }


def test_positional_arguments_mean_what_they_mean_to_the_model():
    pipe, given = SimpleNamespace(transformer=ltx2_video()), forward()
    order = ("hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states", "timestep")
    masks = given.pop("encoder_attention_mask"), given.pop("audio_encoder_attention_mask")
    sizes = (given.pop(name) for name in ("num_frames", "height", "width"))
    placed = (*(given.pop(name) for name in order), None, None, None, *masks, *sizes)
    with torch.no_grad():
        stock = pipe.transformer(*placed, **given, return_dict=False)
        with Accel()(pipe):
            torch.testing.assert_close(pipe.transformer(*placed, **given, return_dict=False), stock, atol=2e-5, rtol=0)


def test_attention_of_sound_and_prompt_stays_stock():
    pipe = pipeline("2.0")
    names = ("audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

    def others():
        return [getattr(block, name).processor for block in pipe.transformer.transformer_blocks for name in names]

    before, own = others(), pipe.transformer.transformer_blocks[0].attn1.processor
    with Accel()(pipe):
        assert others() == before
        assert pipe.transformer.transformer_blocks[0].attn1.processor is not own


def test_masks_and_tokens_that_are_no_grid_are_refused():
    pipe, given = SimpleNamespace(transformer=ltx2_video()), forward()
    with Accel()(pipe):
        with pytest.raises(UnsupportedError, match="mask of the video's attention to itself"):
            pipe.transformer(**given, video_self_attention_mask=torch.ones(1, GRID.tokens, GRID.tokens))
        with pytest.raises(UnsupportedError, match="got 144 tokens and 2 x 6 x 8"):
            pipe.transformer(**given | {"num_frames": 2})
