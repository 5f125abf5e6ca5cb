"""LTX-Video: packed tokens, both branches of guidance in one batch, the prompt's attention left as it is."""

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from test_inward_window import Masked
from tiny import TEXT_DIM

from diffaccel import Accel, AnnCA, AnnSA, FlashBlock, FullFieldGuide, Grid, InwardWindow, PadCollapse, UnsupportedError

CHANNELS, GRID = 8, Grid(3, 4, 6)
SIZE = {"height": 128, "width": 192, "num_frames": 17}  # the VAE takes 32 x 32 x 8 to a token


def transformer():
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=2, caption_channels=TEXT_DIM,
    )  # fmt: skip
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.norm_q.weight.mul_(3)  # attention that tells keys apart
    return model.eval()


def pipeline():
    torch.manual_seed(1)
    small = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": (1,) * 5}
    vae = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS, **small, decoder_block_out_channels=(8, 8, 8, 8), decoder_layers_per_block=(1,) * 5
    )
    pipe = LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, transformer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, guidance=3.0):
    generator = torch.Generator().manual_seed(2)
    texts = {
        f"{name}prompt_{what}": value
        for name, length in (("", 7), ("negative_", 3))
        for what, value in (
            ("embeds", torch.randn(1, 12, TEXT_DIM, generator=generator)),
            ("attention_mask", (torch.arange(12) < length).long()[None]),
        )
    }
    return pipe(
        **texts, **SIZE, num_inference_steps=3, guidance_scale=guidance, output_type="latent", generator=generator
    ).frames


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "accel",
    [Accel(), Accel(window=InwardWindow(size=None)), Accel(selection=AnnSA(density=1))],
    ids=["none", "window", "AnnSA"],
)
def test_exact_settings_are_the_stock_pipeline(guidance, accel):
    pipe = pipeline()
    stock = generate(pipe, guidance)
    with accel(pipe):
        torch.testing.assert_close(generate(pipe, guidance), stock, atol=2e-5, rtol=0)
    assert torch.equal(generate(pipe, guidance), stock)


def test_a_window_is_the_mask_of_its_tokens():
    pipe, window = pipeline(), InwardWindow((3, 3), ratio=1)
    with Accel(window=Masked(window))(pipe):
        expected = generate(pipe)
    with Accel(window=window)(pipe) as run:
        found = generate(pipe)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    counts = run.report().slots["window"]
    assert counts.keys_read == counts.keys_total * 9 / 24
    assert (found - generate(pipe)).abs().max() > 1e-3


def test_a_selection_engages():
    pipe = pipeline()
    with Accel(selection=AnnSA(0.5, dense_steps=0, min_past=0))(pipe) as run:
        assert torch.isfinite(generate(pipe)).all()
    assert run.report().slots["selection"].keys_read < 0.7 * run.report().slots["selection"].keys_total


def test_positional_arguments_mean_what_they_mean_to_the_model():
    model, pipe = transformer(), pipeline()
    pipe.transformer = model
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, GRID.tokens, CHANNELS, generator=generator)
    given = (latents, torch.randn(1, 12, TEXT_DIM, generator=generator), torch.tensor([500.0]), torch.ones(1, 12))
    sizes = (GRID.frames, GRID.height, GRID.width)
    with torch.no_grad():
        expected = model(*given, *sizes).sample
        with Accel()(pipe):
            torch.testing.assert_close(model(*given, *sizes).sample, expected, atol=2e-5, rtol=0)


def test_tokens_that_are_no_grid_are_refused():
    pipe = pipeline()
    latents, text = torch.zeros(1, 50, CHANNELS), torch.zeros(1, 12, TEXT_DIM)
    given = {"encoder_hidden_states": text, "timestep": torch.ones(1), "encoder_attention_mask": torch.ones(1, 12)}
    with Accel()(pipe), pytest.raises(UnsupportedError, match="got 50 tokens and 2 x 4 x 6"):
        pipe.transformer(latents, **given, num_frames=2, height=4, width=6)


REFUSED = [
    (Accel(prompt=PadCollapse()), "masked row by row"),
    (Accel(prompt=AnnCA(bits=4)), "masked row by row"),
    (Accel(reuse=FlashBlock()), "acts on earlier blocks"),
    (Accel(window=InwardWindow((3, 3)), reuse=FullFieldGuide()), "what steers is cross-attention"),
    (Accel(selection=AnnSA(0.5, groups="prompt")), "use groups='kmeans'"),
]


@pytest.mark.parametrize(("accel", "message"), REFUSED)
def test_what_it_cannot_take_is_refused(accel, message):
    pipe = pipeline()
    with pytest.raises(UnsupportedError, match=message):
        accel.apply(pipe)
