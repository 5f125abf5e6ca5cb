"""The decoder's short way is diffusers' own decoder, up to rounding."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from oracle import assert_within
from tiny import CHANNELS, tiny_vae

from diffaccel.errors import UnsupportedError
from diffaccel.kernel.merge import HAS_TRITON
from diffaccel.pipelines import StreamingDecoder
from diffaccel.pipelines.fast_vae import fused, norm_silu_eager, unfit


def residual_vae():
    """As of Wan2.2-TI2V-5B: blocks around a shortcut, pixels in patches of two."""
    torch.manual_seed(3)
    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=16, z_dim=CHANNELS, dim_mult=[1, 2, 2, 2], num_res_blocks=2,
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
    ).eval()  # fmt: skip


def latents(frames=5, batch=2):
    return torch.randn(batch, CHANNELS, frames, 4, 6, generator=torch.Generator().manual_seed(0))


def streamed(vae, split, device="cpu", **how):
    decoder = StreamingDecoder(vae, **how)
    return torch.cat([decoder.decode(block.to(device)) for block in latents().split(split, dim=2)], 2)


@pytest.mark.parametrize("make", [tiny_vae, residual_vae])
@pytest.mark.parametrize("split", [(5,), (1, 1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("at_once", [1, 2])
def test_the_short_way_is_the_stock_decoder(make, split, at_once):
    vae = make()
    torch.testing.assert_close(
        streamed(vae, split, at_once=at_once, fast=True), streamed(vae, split, at_once=1, fast=False), atol=2e-5, rtol=0
    )


def test_the_decoder_is_left_as_it_was():
    vae = tiny_vae()
    before = {name: x.clone() for name, x in vae.state_dict().items()}
    expected = streamed(vae, (5,), at_once=1, fast=False)
    with pytest.raises(KeyError), fused(vae.decoder):
        raise KeyError("forward" in vars(vae.decoder.conv_in))
    assert not any("forward" in vars(module) for module in vae.modules())
    assert all(torch.equal(x, before[name]) for name, x in vae.state_dict().items())
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(streamed(vae, (5,), at_once=1, fast=False), expected, atol=2e-5, rtol=0)


def test_layers_that_something_hooks_keep_their_forward():
    from accelerate import cpu_offload

    vae = tiny_vae()
    assert unfit(vae.decoder) is None
    assert "NormalConv" in unfit(type("NormalConv", (torch.nn.Module,), {})())
    cpu_offload(vae.decoder, execution_device="cpu")
    assert "hooks on its layers" in unfit(vae.decoder)
    with pytest.raises(UnsupportedError, match="hooks on its layers"):
        StreamingDecoder(vae, fast=True)
    changed = tiny_vae()
    changed.decoder.conv_in.forward = changed.decoder.conv_in.forward
    assert "has been replaced" in unfit(changed.decoder)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("channels", [1, 8, 96, 100])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("batch", "frames", "first"), [(1, 1, 0), (2, 3, 2), (3, 2, 1)])
def test_norm_and_activation_in_one_pass(channels, biased, batch, frames, first):
    """By Triton's interpreter where there is no GPU."""
    from diffaccel.kernel.fused_norm import norm_silu

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(batch, channels, frames, 3, 5).to(device).contiguous(memory_format=torch.channels_last_3d)
    x[0, :, 0, 0, 0] = 0  # no norm to divide by
    gamma, bias = (torch.randn(channels).to(device) for _ in range(2))
    rooms = [torch.full((batch, first + frames, 3, 5, channels), 7.0, device=device).permute(0, 4, 1, 2, 3)] * 2
    rooms = [room.clone(memory_format=torch.preserve_format) for room in rooms]
    for function, room in zip((norm_silu, norm_silu_eager), rooms, strict=True):
        function(x, gamma, bias if biased else None, room, first)
    assert_within(rooms[0], rooms[1], torch.float32, inputs=float(channels) ** 0.5)
    assert rooms[0][:, :, :first].eq(7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [tiny_vae, residual_vae])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_is_taken_by_itself_and_no_further_from_fp64(make, dtype):
    exact = streamed(make().double(), (2, 3), fast=False)
    vae = make().to("cuda", dtype)
    with torch.backends.cudnn.flags(allow_tf32=False):
        stock, short = (streamed(vae, (2, 3), "cuda", fast=fast).double().cpu() for fast in (False, None))
    assert not torch.equal(stock, short)
    off = [float((x - exact).square().mean().sqrt()) for x in (stock, short)]
    assert off[1] <= 1.2 * off[0] + 1e-6
