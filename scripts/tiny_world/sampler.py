"""A small causal sampler, enough to look at and score a checkpoint without the toolkit."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from .flow import Cache, FlowNet, latent_frames, sigmas
from .models import SHIFT, latent_stats
from .prompts import encode_words
from .train_flow import encode_text


class Sampler:
    """Chunk-by-chunk generation with a key/value cache, Euler steps and guidance."""

    def __init__(
        self,
        vae: AutoencoderKLWan,
        transformer: WanTransformer3DModel,
        encoder: UMT5EncoderModel,
        dtype: torch.dtype,
    ) -> None:
        self.vae, self.encoder = vae.eval(), encoder.eval()
        self.net = FlowNet(transformer.eval(), dtype)
        self.device = next(transformer.parameters()).device

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> "Sampler":
        """Load an exported checkpoint, weights in fp32 and activations in `dtype`."""
        AutoTokenizer.from_pretrained(folder / "tokenizer")  # fails early where the export is broken
        return cls(
            AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32).to(device),
            WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32).to(device),
            UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device),
            dtype,
        )

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        frames: int,
        steps: int = 8,
        guidance: float = 2.5,
        size: int = 128,
        block: int = 3,
        causal: bool = True,
    ) -> torch.Tensor:
        """Normalised latents (N, C, f, h, w); the first block is the short one where f is no multiple of 3."""
        count, f, side = len(prompts), latent_frames(frames), size // 8
        ids = torch.tensor([encode_words(text) for text in [*prompts, *[""] * count]], device=self.device)
        words, bias = encode_text(self.encoder, ids)
        noise = torch.stack(
            [torch.randn(16, f, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(self.device)
        levels = sigmas(steps, SHIFT)
        edges = [0, *range(f % block or block, f + 1, block)] if causal else [0, f]
        past: list[Cache] | None = None
        done = []
        for start, end in pairwise(edges):
            positions = torch.arange(start, end, device=self.device)
            x = noise[:, :, start:end]
            for level, following in pairwise(levels):
                time = torch.full((2 * count, end - start), level * 1000.0, device=self.device)
                velocity = self.net(torch.cat([x, x]), time, words, bias, positions, past=past)
                cond, uncond = velocity.chunk(2)
                x = x + (following - level) * (uncond + guidance * (cond - uncond))
            done.append(x)
            if end < f:
                fresh: list[Cache] = []
                time = torch.zeros((2 * count, end - start), device=self.device)
                self.net(torch.cat([x, x]), time, words, bias, positions, past=past, keep=fresh)
                if past is None:
                    past = fresh
                else:
                    past = [
                        (torch.cat([a[0], b[0]], 2), torch.cat([a[1], b[1]], 2))
                        for a, b in zip(past, fresh, strict=True)
                    ]
        return torch.cat(done, dim=2)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Frames (N, F, H, W, 3) in 0..1 of normalised latents."""
        mean, std = latent_stats(self.vae, latents)
        videos = [self.vae.decode(row, return_dict=False)[0] for row in (latents * std + mean).split(4)]
        return ((torch.cat(videos).clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1).cpu().numpy()

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], frames: int, steps: int = 8, guidance: float = 2.5
    ) -> np.ndarray:
        """Frames (N, F, H, W, 3) in 0..1."""
        return self.decode(self.latents(prompts, seeds, frames, steps, guidance))
