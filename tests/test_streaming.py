"""Streamed decode is whole decode: bit for bit frame by frame, within rounding several frames a call."""

import numpy as np
import pytest
import torch
from tiny import CHANNELS, tiny_pipeline, tiny_vae

from diffaccel.errors import UnsupportedError
from diffaccel.pipelines import StreamingDecoder
from diffaccel.pipelines.streaming import Decodes, decode, encode, normalise, unnormalise

FRAMES = 6


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, CHANNELS, FRAMES, 4, 6, generator=torch.Generator().manual_seed(0))


def stock(vae, latents):
    """diffusers' own decode."""
    with torch.no_grad():
        return vae.decode(unnormalise(vae, latents), return_dict=False)[0]


def streamed(vae, latents, split, at_once=None):
    decoder = StreamingDecoder(vae, at_once)
    return [decoder.decode(block) for block in latents.split(split, dim=2)]


@pytest.fixture(scope="module")
def whole(vae, latents):
    return stock(vae, latents)


@pytest.mark.parametrize("split", [(6,), (1, 1, 1, 1, 1, 1), (3, 3), (2, 3, 1), (1, 2, 3), (5, 1)], ids=str)
def test_any_split_decodes_to_the_whole(vae, latents, whole, split):
    chunks = streamed(vae, latents, split, at_once=1)
    assert [c.shape[2] for c in chunks] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    assert torch.equal(torch.cat(chunks, dim=2), whole)
    for at_once in (None, 2, 4):
        torch.testing.assert_close(torch.cat(streamed(vae, latents, split, at_once), 2), whole, atol=1e-5, rtol=0)
    fast = torch.cat(streamed(vae, latents, split), dim=2)
    assert torch.equal(decode(vae, latents.split(split, dim=2)), fast)


@pytest.mark.parametrize(("side", "at_once"), [(16, 16), (32, 4), (64, 1), (90, 1)])
def test_small_frames_are_decoded_many_a_call_and_large_ones_alone(vae, side, at_once, monkeypatch):
    seen = []

    def decoder(part, **_):
        seen.append(part.shape[2])
        frames = 1 if len(seen) == 1 else 4 * part.shape[2]
        return part.new_zeros(1, 3, frames, 8 * side, 8 * side)

    monkeypatch.setattr(vae.decoder, "forward", decoder)
    StreamingDecoder(vae).decode(torch.zeros(1, CHANNELS, 18, side, side))
    assert seen[0] == 1
    assert max(seen[1:]) == at_once
    assert sum(seen) == 18


def test_blocks_decoded_apart_are_not_the_whole(vae, latents, whole):
    """What the decoder is for: without its memory the later blocks come out shorter."""
    apart = torch.cat([stock(vae, block) for block in latents.split(3, dim=2)], dim=2)
    assert apart.shape[2] < whole.shape[2]


def test_whole_decode_is_the_stock_pipelines(vae, latents, whole):
    shape = (1, CHANNELS, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(shape)
    with torch.no_grad():
        assert torch.equal(vae.decode(latents / std + mean).sample, whole)


def test_slicing_streams_to_the_bits_of_sliced_decode(latents):
    vae = tiny_vae()
    vae.use_slicing = True
    assert torch.equal(torch.cat(streamed(vae, latents, 2, at_once=1), dim=2), stock(vae, latents))


def test_spatially_patched_vae_streams_exactly(latents):
    """The Wan 2.2 form: residual blocks and pixels folded into channels."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()
    expected = stock(vae, latents)
    assert torch.equal(torch.cat(streamed(vae, latents, (1, 3, 2), at_once=1), dim=2), expected)
    torch.testing.assert_close(torch.cat(streamed(vae, latents, (1, 3, 2)), dim=2), expected, atol=1e-5, rtol=0)


def test_the_vae_holds_nothing_of_the_stream(latents, whole):
    vae = tiny_vae()
    before = dict(vars(vae))
    decoder = StreamingDecoder(vae, at_once=1)
    first = decoder.decode(latents[:, :, :3])
    assert vars(vae) == before
    stock(vae, latents[:1])  # another decode in between does not disturb the stream
    second = decoder.decode(latents[:, :, 3:])
    assert torch.equal(torch.cat([first, second], dim=2), whole)


def test_tiling_is_refused_with_the_remedy():
    vae = tiny_vae()
    vae.enable_tiling()
    with pytest.raises(UnsupportedError, match="disable_tiling"):
        StreamingDecoder(vae)


def test_tiling_decodes_as_the_vae_does(latents):
    vae = tiny_vae()
    vae.enable_tiling()
    with torch.no_grad():
        assert torch.equal(decode(vae, latents.split(3, dim=2)), stock(vae, latents))


def test_no_frames_at_once_is_refused(vae):
    with pytest.raises(ValueError, match="at_once is a number of latent frames >= 1, got 0"):
        StreamingDecoder(vae, at_once=0)


def test_another_shape_in_the_middle_is_refused(vae, latents):
    decoder = StreamingDecoder(vae)
    decoder.decode(latents[:, :, :1])
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 6\).*\(1, 4, 4, 6\)"):
        decoder.decode(latents[:1, :, 1:2])


def test_statistics_go_out_and_back(vae, latents):
    assert (normalise(vae, unnormalise(vae, latents)) - latents).abs().max() < 1e-6
    assert not torch.allclose(unnormalise(vae, latents), latents)


def test_encode_is_the_normalised_mode(vae):
    pixels = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        found, again = encode(vae, pixels), encode(vae, pixels)
        posterior = vae.encode(pixels).latent_dist
    mean = torch.tensor(vae.config.latents_mean).view(1, CHANNELS, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, CHANNELS, 1, 1, 1)
    assert found.shape == (1, CHANNELS, 3, 4, 6)
    assert torch.equal(found, again)
    assert (found - (posterior.mean - mean) / std).abs().max() < 1e-6


@pytest.mark.parametrize("offloaded", [False, True])
def test_offloaded_weights_move_once_a_video(offloaded, monkeypatch):
    """Which blocks are decoded beside others is decided by where the VAE is and whether it moves."""
    made, vae = [], tiny_vae()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device))
    monkeypatch.setattr("diffaccel.pipelines.streaming.get_module_execution_device", lambda vae: torch.device("cuda"))
    if offloaded:
        vae._hf_hook = object()
    Decodes(StreamingDecoder(vae))
    assert made == ([] if offloaded else [torch.device("cuda")])


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cuda:0", "cuda:1"])
def test_decoding_beside_denoising_gives_the_same_frames(place):
    if int(place[-1]) >= torch.cuda.device_count():
        pytest.skip("one GPU")
    pipe = tiny_pipeline(sampler="few_step").to("cuda:0")
    settings = {"height": 64, "width": 64, "num_frames": 33, "num_inference_steps": 2, "output_type": "np"}

    def made(overlap):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return list(pipe.stream("a red circle", generator=generator, overlap=overlap, **settings))

    plain = made(overlap=False)
    pipe.vae.to(place)
    beside = made(overlap=True)
    assert len(beside) == len(plain) > 2
    for one, other in zip(beside, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
