"""Teach a trained decoder to see each latent frame for itself, at the cost of two CPU minutes.

A decoder trained on clips shorter than its memory may look a colour up in the clip's first latent frame and
lose it once that frame is forgotten. The slow trunk of the decoder (everything before its first upsampling in
time) holds that habit. Here it is trained, the rest frozen, to give on long latents the features that the same
trunk gives on short ones: a still scene must keep the features it had at the eleventh latent frame, a moving one
those of a fresh encoding that starts a few frames earlier. The encoder stays, and with it the transformer.
"""

import math
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from .checkpoint import load_parts, prefixed, save_parts, strip
from .models import FULL, TOY, build_vae
from .parallel_vae import ParallelVAE
from .train_vae import to_signed
from .world import BACKGROUNDS, PATTERNS, draw_scene, render

LENGTH = 33
TRUSTED = 13
SEED = 40_000_000


def _trunk(model: ParallelVAE, latents: torch.Tensor) -> torch.Tensor:
    decoder = model.vae.decoder
    x = model._mid(decoder.mid_block, model._conv3d(decoder.conv_in, model._conv3d(model.vae.post_quant_conv, latents)))
    for resnet in decoder.up_blocks[0].resnets:
        x = model._residual(resnet, x)
    return x


def _parameters(vae: AutoencoderKLWan) -> list[nn.Parameter]:
    decoder = vae.decoder
    modules = [vae.post_quant_conv, decoder.conv_in, decoder.mid_block, *decoder.up_blocks[0].resnets]
    return [p for module in modules for p in module.parameters()]


@torch.no_grad()
def _still(model: ParallelVAE, index: int, rng: random.Random) -> tuple[torch.Tensor, ...]:
    scene = draw_scene(SEED + index)
    sprites = tuple(replace(s, motion="still", rate=0.0, orbit=0.0) for s in scene.sprites)
    scene = replace(
        scene,
        camera="static",
        event=None,
        pattern=PATTERNS[index % len(PATTERNS)],
        background=BACKGROUNDS[(index // len(PATTERNS) + index) % len(BACKGROUNDS)],
        sprites=sprites,
    )
    y, x = rng.randrange(65), rng.randrange(65)
    video = to_signed(render([scene], 1))[..., y : y + 64, x : x + 64].expand(-1, -1, 41, -1, -1)
    latents = model.moments(video)[0]
    features = _trunk(model, latents)
    more = LENGTH - latents.shape[2]

    def extend(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, t[:, :, -1:].expand(-1, -1, more, -1, -1)], dim=2)

    return extend(latents), extend(features), torch.ones(1, LENGTH)


@torch.no_grad()
def _moving(model: ParallelVAE, index: int, rng: random.Random) -> tuple[torch.Tensor, ...]:
    y, x = rng.randrange(65), rng.randrange(65)
    video = to_signed(render([draw_scene(SEED + index)], 4 * LENGTH - 3))[..., y : y + 64, x : x + 64]
    latents = model.moments(video)[0]
    features, known = _trunk(model, latents), torch.zeros(1, LENGTH)
    known[:, :TRUSTED] = 1
    for start in range(8, LENGTH - 8, 8):
        window = video[:, :, 4 * start : 4 * (start + TRUSTED) - 3]
        fresh = _trunk(model, model.moments(window)[0])
        # A fresh encoding differs at its own start; from the seventh latent frame on it agrees.
        end = start + fresh.shape[2]
        features[:, :, start + 6 : end] = fresh[:, :, 6:]
        known[:, start + 6 : end] = 1
    return latents, features, known


def settle(parts: Path, minutes: float, seed: int, toy: bool) -> None:
    """Replace the decoder's trunk in `vae.part*` of `parts`."""
    held = load_parts(parts, "vae")
    if held is None:
        raise FileNotFoundError(f"no vae.part* in {parts}: run the vae stage first")
    torch.manual_seed(seed)
    vae = build_vae(TOY if toy else FULL)
    vae.load_state_dict(strip("vae", held))
    model, rng = ParallelVAE(vae), random.Random(seed)
    start = time.monotonic()
    still, moving = (4, 4) if toy else (360, 60)
    data = [_still(model, i, rng) for i in range(still)] + [_moving(model, still + i, rng) for i in range(moving)]
    latents, features, known = (torch.cat(column) for column in zip(*data, strict=True))
    print(f"settle: {still} still and {moving} moving clips, {time.monotonic() - start:.0f} s", flush=True)
    scale = features.std((0, 2, 3, 4)).view(1, -1, 1, 1, 1)
    spread = held["latents_std"].view(1, -1, 1, 1, 1)
    weight = torch.ones(LENGTH)
    weight[TRUSTED:] = 2.0
    parameters = _parameters(vae)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        progress = (time.monotonic() - start) / (60 * minutes)
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 10) * (0.02 + 0.98 * cosine)
        rows = torch.cat([torch.randint(0, still, (4,)), torch.randint(still, still + moving, (4,))])
        noise = torch.randn_like(latents[rows]) * spread * torch.rand(len(rows), 1, 1, 1, 1) * 0.08
        error = ((_trunk(model, latents[rows] + noise) - features[rows]) / scale).square().mean((1, 3, 4))
        error = error * known[rows]
        loss = (error * weight).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            early, late = float(error[:, :TRUSTED].mean().detach()), float(error[:, TRUSTED:].mean().detach())
            print(f"settle step {step}: early {early:.4f} late {late:.4f}", flush=True)
    save_parts(parts, "vae", held | prefixed("vae", dict(vae.named_parameters())))
