"""Stage one: the causal video VAE."""

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn

from .checkpoint import (
    Average,
    Clock,
    TrainingError,
    load_stage,
    prefixed,
    record,
    save_stage,
    strip,
)
from .config import Config
from .models import build_vae
from .muon import Optimisers
from .parallel import Workers
from .parallel_vae import ParallelVAE
from .world import draw_scene, render, sprite_path

VALIDATION_SEED = 900_000_000
# Frames of the long crops: more than the decoder's temporal receptive field of 117.
LONG = 145


def psnr(reference: torch.Tensor, video: torch.Tensor) -> float:
    """Mean over clips of the PSNR of (B, 3, F, H, W) in -1..1."""
    error = ((reference - video.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return float((-10 * torch.log10(error)).mean())


def split_parameters(vae: AutoencoderKLWan) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The convolutions between the first and the last, and everything else."""
    ends = (vae.encoder.conv_in.weight, vae.decoder.conv_out.weight)
    inner = [p for p in vae.parameters() if p.ndim >= 4 and min(p.shape[0], p[0].numel()) > 1]
    inner = [p for p in inner if all(p is not end for end in ends)]
    chosen = {id(p) for p in inner}
    return inner, [p for p in vae.parameters() if id(p) not in chosen]


def to_signed(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (B, F, 3, H, W) to float (B, 3, F, H, W) in -1..1."""
    return (frames.float() / 127.5 - 1).transpose(1, 2)


def _gradients(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return video.diff(dim=-1), video.diff(dim=-2), video.diff(dim=2)


def reconstruction_loss(target: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """L1 and squared error, with L1 of the differences in space and time so that edges stay sharp."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(_gradients(target), _gradients(video), strict=True))
    return F.l1_loss(video, target) + 2.0 * F.mse_loss(video, target) + 0.5 * edges


class Bank:
    """Rendered clips held on the device, (N, F, 3, H, W) uint8, and crops of them, most with a sprite in the middle.

    Nearly all of the error is at the sprites, which cover an eighth of a frame.
    """

    def __init__(self, count: int, frames: int, seed: int, device: torch.device) -> None:
        self.rng = random.Random(seed)
        scenes = [draw_scene(seed + i) for i in range(count)]
        self.clips = torch.cat([render(scenes[start : start + 32], frames, device) for start in range(0, count, 32)])
        self.paths = [[sprite_path(scene, i, frames) for i in range(len(scene.sprites))] for scene in scenes]

    def crops(self, batch: int, frames: int, size: int) -> torch.Tensor:
        """(batch, 3, frames, size, size) in -1..1."""
        count, total, _, height, width = self.clips.shape
        out = []
        for _ in range(batch):
            i, t = self.rng.randrange(count), self.rng.randrange(total - frames + 1)
            y, x = self.rng.randrange(height - size + 1), self.rng.randrange(width - size + 1)
            if self.rng.random() < 0.75:
                at = self.rng.choice(self.paths[i])[self.rng.randrange(t, t + frames)]
                x, y = (self._around(centre, size, total) for centre, total in zip(at, (width, height), strict=True))
            out.append(self.clips[i, t : t + frames, :, y : y + size, x : x + size])
        return to_signed(torch.stack(out))

    def _around(self, centre: float, size: int, total: int) -> int:
        """Where a crop begins that has `centre` in its middle half, within the frame."""
        start = centre - size * self.rng.uniform(0.25, 0.75)
        return int(min(max(start, 0), total - size))


@torch.no_grad()
def validate(model: ParallelVAE, device: torch.device, clips: int, frames: int) -> float:
    """PSNR of whole unseen clips."""
    values = []
    for index in range(clips):
        video = to_signed(render([draw_scene(VALIDATION_SEED + index)], frames, device))
        mean, _ = model.moments(video)
        values.append(psnr(video, model.decode(mean)))
    return sum(values) / len(values)


@torch.no_grad()
def measure_latents(model: ParallelVAE, bank: Bank, batches: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel over whole clips."""
    means = []
    for index in range(batches):
        rows = bank.clips[index * 8 : index * 8 + 8, :frames]
        if len(rows):
            means.append(model.moments(to_signed(rows))[0].transpose(0, 1).flatten(1))
    values = torch.cat(means, dim=1)
    return values.mean(1), values.std(1)


def train_vae(config: Config, out: Path, workers: Workers, seed: int) -> None:
    """Train, resuming from `vae.safetensors` in `out`, and write it there (averaged weights, latent statistics)."""
    device, stage, toy = workers.device, config.stage("vae"), config.toy
    torch.manual_seed(seed)
    vae = build_vae(config.sizes).to(device)
    held = load_stage(out, "vae", config.describe())
    done = 0
    if held is not None:
        vae.load_state_dict(strip("vae", held))
        done = int(held["step"])
    workers.broadcast_module(vae)
    cuda = device.type == "cuda"
    model = ParallelVAE(vae, torch.bfloat16 if cuda else torch.float32, compiled=cuda)
    model.channels_last = True
    clock = Clock(stage.minutes, stage.steps)
    length = 25 if toy else LONG + 20
    bank = Bank(stage.clips, length, (seed + 17 * workers.rank) * 1_000_000 + done, device)
    optimisers = Optimisers(*split_parameters(vae), stage)
    average = Average(optimisers.parameters, 0.998)
    validation = (2, 9) if toy else (8 if cuda else 1, LONG)
    workers.say(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M, {stage}, bank {clock.elapsed():.1f} s")
    step, progress, saved = 0, 0.0, time.monotonic()

    def save() -> None:
        average.swap()
        score = validate(model, device, *validation)
        mean, std = measure_latents(model, bank, 4 if toy or not cuda else 12, stage.frames)
        state = prefixed("vae", dict(vae.named_parameters()))
        state |= {"latents_mean": mean, "latents_std": std, "step": torch.tensor(done + step)}
        save_stage(out, "vae", state, config.describe())
        average.swap()
        record(out, "vae", step=done + step, seconds=clock.elapsed(), validation_psnr=score)
        print(f"vae step {done + step}: validation {score:.2f} dB over {validation[1]} frames", flush=True)

    while progress < 1.0:
        video, coarse = _batch(bank, stage.batch, step, toy)
        mean, logvar = model.moments(video)
        latents = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        if coarse:
            # Latents at half the size must decode to the video at half the size: smooth latents, which a transformer
            # learns sooner (EQ-VAE, arXiv 2502.09509).
            video, latents = _half(video), _half(latents)
        loss = reconstruction_loss(video, model.decode(latents))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        (loss + 1e-4 * kl).backward()
        optimisers.step(workers, step, progress, warmup=150)
        average.update()
        step += 1
        if stage.steps or step % 10 == 0:
            progress = workers.agree(clock.progress(step))
        if step in (1, 5, 20, 60) or step % (200 if cuda else 50) == 0:
            value = float(loss.detach())
            if value != value:
                raise TrainingError(f"the VAE loss is not a number at step {step}; lower the rate")
            workers.say(
                f"vae step {done + step} loss {value:.4f} kl {float(kl.detach()):.2f}"
                f" {step / clock.elapsed():.2f} it/s {clock.elapsed():.0f} s, peak {_peak():.1f} GiB"
            )
        if workers.main and time.monotonic() - saved > (150 if cuda else 600):
            save()
            saved = time.monotonic()
    if workers.main:
        save()


def _batch(bank: Bank, batch: int, step: int, toy: bool) -> tuple[torch.Tensor, bool]:
    """Crops (B, 3, F, H, W) of the kind whose turn it is, and whether they are decoded at half the size."""
    if toy:
        return bank.crops(batch, 9, 32), step % 4 == 1
    # One step in eight sees whole frames: the middle attention must know 16x16 latents, not only 8x8.
    if step % 8 == 7:
        return bank.crops(max(1, batch // 4), 33, 128), False
    # A third are longer than the decoder remembers: or it looks a colour up in the clip's first latent frame, the
    # encoder leaves it out of the others, and the colour is lost once that frame is forgotten.
    if step % 3 == 2:
        return bank.crops(max(1, batch * 5 // 8), LONG, 48), False
    return bank.crops(batch, 49, 64), step % 4 == 1


def _half(video: torch.Tensor) -> torch.Tensor:
    return F.avg_pool3d(video, (1, 2, 2))


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
