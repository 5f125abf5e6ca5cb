"""Stage one: the causal video VAE."""

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from .checkpoint import Average, Clock, learning_rate, load_parts, prefixed, save_parts, strip
from .models import FULL, TOY, build_vae
from .parallel import Workers
from .parallel_vae import ParallelVAE
from .world import draw_scene, render

VALIDATION_SEED = 900_000_000
# Frames of the long crops: more than the decoder's temporal receptive field of 117.
LONG = 145


def psnr(reference: torch.Tensor, video: torch.Tensor) -> float:
    """Mean over clips of the PSNR of (B, 3, F, H, W) in -1..1."""
    error = ((reference - video.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return float((-10 * torch.log10(error)).mean())


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
    """Rendered clips held on the device, (N, F, 3, H, W) uint8, and random crops of them."""

    def __init__(self, count: int, frames: int, seed: int, device: torch.device) -> None:
        self.rng = random.Random(seed)
        chunks = []
        for start in range(0, count, 32):
            scenes = [draw_scene(seed + i) for i in range(start, min(start + 32, count))]
            chunks.append(render(scenes, frames, device))
        self.clips = torch.cat(chunks)

    def crops(self, batch: int, frames: int, size: int) -> torch.Tensor:
        """(batch, 3, frames, size, size) in -1..1."""
        count, total, _, height, width = self.clips.shape
        out = []
        for _ in range(batch):
            i, t = self.rng.randrange(count), self.rng.randrange(total - frames + 1)
            y, x = self.rng.randrange(height - size + 1), self.rng.randrange(width - size + 1)
            out.append(self.clips[i, t : t + frames, :, y : y + size, x : x + size])
        return to_signed(torch.stack(out))


def _pick_layout(model: ParallelVAE, sample: torch.Tensor, log: list[str]) -> None:
    """Measure both memory layouts on the device and keep the faster."""
    timings = {}
    for channels_last in (True, False):
        model.channels_last = channels_last
        for attempt in range(4):
            if attempt == 2:
                torch.cuda.synchronize()
                start = time.monotonic()
            mean, _ = model.moments(sample)
            model.decode(mean).square().mean().backward()
        torch.cuda.synchronize()
        timings[channels_last] = (time.monotonic() - start) / 2
    model.channels_last = min(timings, key=timings.__getitem__)
    for parameter in model.vae.parameters():
        parameter.grad = None
    log.append(f"vae layout: channels_last {timings[True]:.3f} s/step, contiguous {timings[False]:.3f} s/step")


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


def train_vae(
    out: Path,
    workers: Workers,
    minutes: float,
    steps: int | None,
    seed: int,
    toy: bool,
    batch: int,
    lr: float,
    decoder_only: bool = False,
) -> None:
    """Train, resuming from the parts in `out`, and write `vae.part*` there (averaged weights, statistics).

    `decoder_only` keeps the encoder and the statistics, so that a transformer trained on them stays valid.
    """
    device = workers.device
    torch.manual_seed(seed)
    vae = build_vae(TOY if toy else FULL).to(device)
    held = load_parts(out, "vae")
    done = 0
    if held is not None:
        vae.load_state_dict(strip("vae", held))
        done = int(held["step"])
    workers.broadcast_module(vae)
    cuda = device.type == "cuda"
    model = ParallelVAE(vae, torch.bfloat16 if cuda else torch.float32, compiled=cuda)
    clock = Clock(minutes, steps)
    model.channels_last = cuda
    bank = Bank(16 if toy else 800, 25 if toy else LONG + 20, (seed + 17 * workers.rank) * 1_000_000 + done, device)
    frames, size = (9, 32) if toy else (49, 64)
    log: list[str] = [f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M, bank {clock.elapsed():.1f} s"]
    if decoder_only:
        if held is None:
            raise FileNotFoundError(f"no vae.part* in {out} whose encoder could be kept")
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    named = [(name, p) for name, p in vae.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=cuda)
    average = Average(parameters, 0.998)
    validation = (2, 9) if toy else (8, LONG)
    spread = 0.1 * held["latents_std"].to(device).view(1, -1, 1, 1, 1) if held is not None else None
    step, progress, last, saved = 0, 0.0, time.monotonic(), time.monotonic()

    def save() -> None:
        average.swap()
        score = validate(model, device, *validation)
        mean, std = measure_latents(model, bank, 4 if toy else 12, 9 if toy else 81)
        average.swap()
        if decoder_only and held is not None:
            mean, std = held["latents_mean"], held["latents_std"]
        weights = dict(vae.named_parameters())
        weights |= {name: shadow for (name, _), shadow in zip(named, average.shadow, strict=True)}
        state = prefixed("vae", weights)
        state |= {"latents_mean": mean, "latents_std": std, "step": torch.tensor(done + step)}
        state["psnr"] = torch.tensor(score)
        save_parts(out, "vae", state)
        print(f"vae step {done + step}: validation {score:.2f} dB over {validation[1]} frames", flush=True)

    while progress < 1.0:
        if step % 10 == 0:
            progress = workers.agree(clock.progress(step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, progress)
        # One step in eight sees whole frames: the middle attention must know 16x16 latents, not only 8x8.
        # A third are longer than the decoder remembers: or it looks a colour up in the clip's first latent
        # frame, the encoder leaves it out of the others, and the colour is lost once that frame is forgotten.
        if step % 8 == 7 and not toy:
            video = bank.crops(max(1, batch // 4), 33, 128)
        elif (decoder_only or step % 3 == 2) and not toy:
            video = bank.crops(max(1, batch * 5 // 8), LONG, 48)
        else:
            video = bank.crops(batch, frames, size)
        with torch.set_grad_enabled(not decoder_only):
            mean, logvar = model.moments(video)
        latents = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        if decoder_only and spread is not None:
            # The transformer's latents are about this far from an encoder's.
            latents = latents + torch.randn_like(mean) * torch.rand(len(mean), 1, 1, 1, 1, device=device) * spread
        loss = reconstruction_loss(video, model.decode(latents))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + 1e-4 * kl).backward()
        workers.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        step += 1
        if step in (1, 5, 20) or step % 200 == 0 or log:
            value = float(loss.detach())
            if value != value:
                raise RuntimeError(f"the VAE loss is not a number at step {step}")
            if workers.main:
                for line in log:
                    print(line, flush=True)
                rate = step / clock.elapsed()
                print(
                    f"vae step {done + step} loss {value:.4f} kl {float(kl.detach()):.2f}"
                    f" lr {learning_rate(lr, step, progress):.1e} {rate:.2f} it/s {clock.elapsed():.0f} s,"
                    f" peak {_peak():.1f} GiB",
                    flush=True,
                )
            log.clear()
            last = time.monotonic()
        if workers.main and last - saved > 200:
            save()
            saved = time.monotonic()
    if workers.main:
        save()


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
