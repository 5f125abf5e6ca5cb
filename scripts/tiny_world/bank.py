"""Encoded clips with several wordings each, held on the device."""

import random

import torch
import torch.nn.functional as F
from transformers import UMT5EncoderModel

from .flow import Layout, text_bias
from .parallel_vae import ParallelVAE
from .prompts import MAX_WORDS, describe_twice, encode_words
from .train_vae import to_signed
from .world import SWITCHES, draw_scene, render

WORDS = MAX_WORDS + 1
WORDINGS = 6


class LatentBank:
    """Normalised latents (N, C, f, h, w), wordings (N, WORDINGS, 2, words), where the second prompt begins (N,)."""

    def __init__(
        self,
        vae: ParallelVAE,
        stats: tuple[torch.Tensor, torch.Tensor],
        count: int,
        frames: int,
        seed: int,
        batch: int = 32,
    ) -> None:
        device = stats[0].device
        mean, std = (value.view(1, -1, 1, 1, 1) for value in stats)
        rng = random.Random(seed)
        latents, words, switch = [], [], []
        for start in range(0, count, batch):
            scenes = [draw_scene(seed + i) for i in range(start, min(start + batch, count))]
            with torch.no_grad():
                video = to_signed(render(scenes, frames, device))
                latents.append(((vae.moments(video)[0] - mean) / std).to(torch.bfloat16))
            for scene in scenes:
                pairs = [describe_twice(scene, rng) for _ in range(WORDINGS)]
                words.append([[encode_words(text) for text in pair] for pair in pairs])
                switch.append((scene.event_frame + 3) // 4 if scene.event in SWITCHES else 10**6)
        self.latents = torch.cat(latents)
        self.words = torch.tensor(words, dtype=torch.int32, device=device)
        self.switch = torch.tensor(switch, device=device)

    def draw(self, batch: int, positions: torch.Tensor, drop: float = 0.1) -> tuple[torch.Tensor, ...]:
        """Latents (batch, C, len(positions), h, w) in fp32, token ids (batch, 2, words), switches (batch,)."""
        device = self.latents.device
        index = torch.randint(len(self.latents), (batch,), device=device)
        ids = self.words[index, torch.randint(WORDINGS, (batch,), device=device)].long()
        empty = torch.zeros_like(ids)
        empty[..., 0] = 1
        ids = torch.where(torch.rand(batch, 1, 1, device=device) < drop, empty, ids)
        # A rare unknown word, so that one in a user's prompt is passed over.
        unknown = (torch.rand(ids.shape, device=device) < 0.005) & (ids > 2)
        return self.latents[index][:, :, positions].float(), ids.masked_fill(unknown, 2), self.switch[index]


def gapped(total: int, frames: int, first: int, rng: random.Random) -> torch.Tensor:
    """Frame numbers (frames,) of a clip of `total` latent frames: whole blocks of its beginning, then later ones.

    So a sequence of the usual length reads a past as far away as that of a longer video.
    """
    head = first + 3 * rng.randrange(max(1, (frames - first) // 3))
    last = (total - (frames - head) - first) // 3
    start = first + 3 * rng.randint((head - first) // 3, last)
    return torch.cat([torch.arange(head), torch.arange(start, start + frames - head)])


def read_prompts(
    encoder: UMT5EncoderModel, ids: torch.Tensor, choice: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, P * (words + 1), dim) of prompts (B, P, words), zero past each, and the bias of their keys.

    `choice` (B, S) is the prompt that each slot reads.
    """
    mask = ids.ne(0)
    flat = mask.flatten(0, 1)
    hidden = encoder(input_ids=ids.flatten(0, 1), attention_mask=flat.long()).last_hidden_state.float()
    hidden = F.pad(hidden * flat.unsqueeze(-1), (0, 0, 0, 1))
    return hidden.view(len(ids), -1, hidden.shape[-1]), text_bias(mask.sum(2), ids.shape[2], choice)


def choose_prompts(layout: Layout, positions: torch.Tensor, switch: torch.Tensor) -> torch.Tensor:
    """The prompt, 0 or 1, that each slot of a layout reads, (B, S): the second from the block of the change on."""
    return (positions.repeat(2)[layout.ends][None] >= switch[:, None]).long()
