"""The Wan VAE over whole clips at once.

The library runs the VAE frame group by frame group with caches, which is right for inference and slow to train.
Zero-padded causal convolutions over the whole clip give the same numbers; only the two temporal resamplers
treat the first frame apart.
"""

from collections.abc import Callable

import torch
import torch._dynamo
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from torch import nn


def _norm_act(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """RMS norm over channels and SiLU, computed in fp32 and returned in the dtype of `x`."""
    h = x.float()
    scale = torch.rsqrt(h.square().sum(1, keepdim=True).clamp_min(1e-24)) * (x.shape[1] ** 0.5)
    return F.silu(h * scale * gamma).to(x.dtype)


class ParallelVAE:
    """Encodes and decodes whole clips, sharing the parameters of `vae`."""

    def __init__(self, vae: AutoencoderKLWan, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
        self.vae = vae
        self.dtype = dtype
        self.channels_last = False
        if compiled:
            # One graph per width, memory layout and gradient mode: more than the default allows.
            torch._dynamo.config.recompile_limit = 64
        self.norm_act: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = (
            torch.compile(_norm_act, dynamic=True) if compiled else _norm_act
        )

    def _conv3d(self, conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
        left, _, top, _, front, _ = conv._padding
        if front:
            x = F.pad(x, (0, 0, 0, 0, front, 0))
        return F.conv3d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), conv.stride, (0, top, left))

    def _conv2d(self, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), conv.stride, conv.padding)

    def _residual(self, block: WanResidualBlock, x: torch.Tensor) -> torch.Tensor:
        skip = x if isinstance(block.conv_shortcut, nn.Identity) else self._conv3d(block.conv_shortcut, x)
        h = self._conv3d(block.conv1, self.norm_act(x, block.norm1.gamma))
        return self._conv3d(block.conv2, self.norm_act(h, block.norm2.gamma)) + skip

    def _attention(self, block: WanAttentionBlock, x: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = x.shape
        y = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
        y = (F.normalize(y.float(), dim=1) * block.norm.scale * block.norm.gamma).to(x.dtype)
        q, k, v = self._conv2d(block.to_qkv, y).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(b * t, c, h, w)
        return self._conv2d(block.proj, y).view(b, t, c, h, w).permute(0, 2, 1, 3, 4) + x

    def _resample(self, block: WanResample, x: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = x.shape
        if block.mode == "upsample3d" and t > 1:
            y = self._conv3d(block.time_conv, x[:, :, 1:])
            y = y.view(b, 2, c, t - 1, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * (t - 1), h, w)
            x = torch.cat([x[:, :, :1], y], dim=2)
            t = x.shape[2]
        y = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
        conv = block.resample[1]
        if block.mode.startswith("upsample"):
            y = self._conv2d(conv, F.interpolate(y, scale_factor=2.0, mode="nearest-exact"))
        else:
            y = self._conv2d(conv, F.pad(y, (0, 1, 0, 1)))
        y = y.view(b, t, *y.shape[1:]).permute(0, 2, 1, 3, 4)
        if block.mode == "downsample3d" and t > 1:
            y = torch.cat([y[:, :, :1], self._conv3d(block.time_conv, y)], dim=2)
        return y

    def _mid(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self._residual(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(resnet, self._attention(attention, x))
        return x

    def moments(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the latents of `video` (B, 3, F, H, W) in -1..1."""
        encoder = self.vae.encoder
        x = video.to(self.dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        x = self._conv3d(encoder.conv_in, x)
        for block in encoder.down_blocks:
            x = self._residual(block, x) if isinstance(block, WanResidualBlock) else self._resample(block, x)
        x = self._mid(encoder.mid_block, x)
        x = self._conv3d(encoder.conv_out, self.norm_act(x, encoder.norm_out.gamma))
        mean, logvar = self._conv3d(self.vae.quant_conv, x).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Video (B, 3, F, H, W), not clamped, of un-normalised latents (B, C, f, h, w)."""
        decoder = self.vae.decoder
        x = latents.to(self.dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        x = self._conv3d(decoder.conv_in, self._conv3d(self.vae.post_quant_conv, x))
        x = self._mid(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            if block.upsamplers is not None:
                x = self._resample(block.upsamplers[0], x)
        return self._conv3d(decoder.conv_out, self.norm_act(x, decoder.norm_out.gamma)).float()
