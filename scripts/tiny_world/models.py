"""The components of the tiny-world pipeline, at their bundled sizes."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from .prompts import VOCABULARY

TEXT_DIM = 128
SHIFT = 3.0
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Sizes:
    """Widths and depths, the "sizes" of a config."""

    vae_dim: int
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_layers: int


def build_vae(sizes: Sizes) -> AutoencoderKLWan:
    """Causal video VAE: 4x in time, 8x in space, 16 channels."""
    return AutoencoderKLWan(base_dim=sizes.vae_dim, z_dim=LATENT_CHANNELS, num_res_blocks=1)


def build_transformer(sizes: Sizes) -> WanTransformer3DModel:
    """Wan transformer with 64 tokens per latent frame at 128x128."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.layers,
    )
    with torch.no_grad():
        # The usual start of a modulated transformer: every block and the head begin as (nearly) nothing.
        model.condition_embedder.time_proj.weight.mul_(0.1)
        model.condition_embedder.time_proj.bias.zero_()
        model.proj_out.weight.mul_(0.1)
        model.proj_out.bias.zero_()
    return model


def build_text_encoder(sizes: Sizes) -> UMT5EncoderModel:
    """Small UMT5 encoder over the word-level vocabulary."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(VOCABULARY),
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=sizes.text_layers,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_scheduler(few_step: bool = False) -> FlowMatchEulerDiscreteScheduler:
    """Flow matching: Euler steps, or with `few_step` a clean prediction that is noised anew at each level."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, stochastic_sampling=few_step)


def latent_stats(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, (1, C, 1, 1, 1) each."""
    mean = torch.tensor(vae.config.latents_mean, device=like.device, dtype=like.dtype)
    std = torch.tensor(vae.config.latents_std, device=like.device, dtype=like.dtype)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
