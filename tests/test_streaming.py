"""Streamed decode is whole decode, bit for bit; encode is its condition counterpart."""

import pytest
import torch
from tiny import CHANNELS, tiny_vae

from diffaccel.errors import UnsupportedError
from diffaccel.pipelines import StreamingDecoder
from diffaccel.pipelines.streaming import decode, encode, normalise, unnormalise

FRAMES = 6


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, CHANNELS, FRAMES, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(vae, latents):
    with torch.no_grad():
        return decode(vae, latents)


@pytest.mark.parametrize("split", [(6,), (1, 1, 1, 1, 1, 1), (3, 3), (2, 3, 1), (1, 2, 3), (5, 1)], ids=str)
def test_any_split_decodes_to_the_bits_of_the_whole(vae, latents, whole, split):
    decoder = StreamingDecoder(vae)
    chunks = [decoder.decode(block) for block in latents.split(split, dim=2)]
    assert [c.shape[2] for c in chunks] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    assert torch.equal(torch.cat(chunks, dim=2), whole)


def test_blocks_decoded_apart_are_not_the_whole(vae, latents, whole):
    """What the decoder is for: without its memory the later blocks come out shorter."""
    apart = torch.cat([decode(vae, block).detach() for block in latents.split(3, dim=2)], dim=2)
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
    with torch.no_grad():
        expected = decode(vae, latents)
    decoder = StreamingDecoder(vae)
    assert torch.equal(torch.cat([decoder.decode(b) for b in latents.split(2, dim=2)], dim=2), expected)


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
    with torch.no_grad():
        expected = decode(vae, latents)
    decoder = StreamingDecoder(vae)
    assert torch.equal(torch.cat([decoder.decode(b) for b in latents.split((1, 3, 2), dim=2)], dim=2), expected)


def test_the_vae_holds_nothing_of_the_stream(latents, whole):
    vae = tiny_vae()
    before = dict(vars(vae))
    decoder = StreamingDecoder(vae)
    first = decoder.decode(latents[:, :, :3])
    assert vars(vae) == before
    with torch.no_grad():
        decode(vae, latents[:1])  # another decode in between does not disturb the stream
    second = decoder.decode(latents[:, :, 3:])
    assert torch.equal(torch.cat([first, second], dim=2), whole)


def test_tiling_is_refused_with_the_remedy():
    vae = tiny_vae()
    vae.enable_tiling()
    with pytest.raises(UnsupportedError, match="disable_tiling"):
        StreamingDecoder(vae)


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
