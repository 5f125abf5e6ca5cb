"""Stage two: the text encoder and the causal flow-matching transformer, on banked latents."""

import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

from .bank import LatentBank, choose_prompts, gapped, read_prompts
from .checkpoint import (
    Average,
    Clock,
    TrainingError,
    load_stage,
    need_stage,
    prefixed,
    record,
    save_stage,
    strip,
)
from .config import Config, Stage
from .flow import FlowNet, Layout, Masks, bidirectional, latent_frames, shifted, teacher_forcing, text_bias
from .models import SHIFT, build_text_encoder, build_transformer, build_vae
from .muon import Optimisers
from .parallel import Workers
from .parallel_vae import ParallelVAE
from .preview import write_preview
from .train_vae import VALIDATION_SEED

BANK_SEED = 500_000_000
LONG_FRAMES = 321
"""Clips four times the training length; sequences are cut from them with a gap, never whole."""

TOKENS = 64


def noised(
    latents: torch.Tensor, layout: Layout, context: torch.Tensor | None = None, level: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots (B, C, 2f, h, w), their timesteps (B, 2f) in 0..1 and the velocities to predict.

    Args:
        latents: clean latents (B, C, f, h, w).
        context: what takes the clean copy's place in a causal layout.
        level: noise levels (B, 2f); drawn, one a block, where it is not given.
    """
    b, _, frames, _, _ = latents.shape
    device = latents.device
    double = torch.cat([latents if context is None else context, latents], dim=2)
    noise = torch.randn_like(double)
    if level is None:
        level = shifted(torch.rand(b, layout.count, device=device), SHIFT)[:, layout.blocks]
    time_ = level
    if layout.causal:
        # The context is labelled clean yet slightly noised: in a rollout it is the model's own, imperfect output.
        slight = torch.rand(b, 1, device=device) * 0.1
        level = torch.cat([slight.expand(b, frames), level[:, frames:]], dim=1)
        time_ = torch.cat([torch.zeros_like(level[:, :frames]), level[:, frames:]], dim=1)
    wide = level[:, None, :, None, None]
    return (1 - wide) * double + wide * noise, time_, noise - double


@torch.no_grad()
def own_output(
    net: FlowNet,
    latents: torch.Tensor,
    layout: Layout,
    mask: Any,
    embeddings: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Clean latents as the model itself would have put them, (B, C, f, h, w): noised half-way, predicted in one step.

    Training on them as context teaches the model to go on from its own mistakes without rolling out.
    """
    level = 0.6 * torch.rand(len(latents), layout.count, device=latents.device)[:, layout.blocks]
    slots, level, _ = noised(latents, layout, level=level)
    velocity = net(slots, level * 1000, embeddings, bias, positions.repeat(2), mask)
    return (slots - level[:, None, :, None, None] * velocity)[:, :, latents.shape[2] :]


def load_vae(config: Config, out: Path, workers: Workers) -> tuple[AutoencoderKLWan, tuple[torch.Tensor, torch.Tensor]]:
    """The trained VAE, and mean and standard deviation of its latents (C,)."""
    held = need_stage(out, "vae", config.describe())
    vae = build_vae(config.sizes).to(workers.device)
    vae.load_state_dict(strip("vae", held))
    return vae, (held["latents_mean"].to(workers.device), held["latents_std"].to(workers.device))


def make_banks(
    stage: Stage,
    vae: AutoencoderKLWan,
    stats: tuple[torch.Tensor, torch.Tensor],
    workers: Workers,
    seed: int,
    toy: bool,
) -> tuple[LatentBank, LatentBank | None, LatentBank]:
    """Clips of the training length, long ones, and unseen ones to validate on."""
    cuda = workers.device.type == "cuda"
    parallel = ParallelVAE(vae, torch.bfloat16 if cuda else torch.float32, compiled=cuda)
    parallel.channels_last = cuda
    base = BANK_SEED + (seed * 64 + workers.rank) * 1_000_000
    batch = 32 if cuda else 2
    usual = LatentBank(parallel, stats, stage.clips, stage.frames, base, batch)
    long_frames = 33 if toy else LONG_FRAMES
    far = None
    if stage.long_clips:
        far = LatentBank(parallel, stats, stage.long_clips, long_frames, base + 500_000, max(1, batch // 4))
    unseen = LatentBank(parallel, stats, 64 if cuda else 4, stage.frames, VALIDATION_SEED, batch)
    return usual, far, unseen


def make_layouts(frames: int, device: torch.device) -> tuple[list[Layout], list[Layout]]:
    """Causal and bidirectional layouts of `frames` latent frames."""
    causal = [teacher_forcing(frames, first).to(device) for first in (1, 2, 3)]
    lengths = [length for length in (4, 7, 10, 13, 16, 19) if length < frames] or [frames]
    return causal, [bidirectional(frames, length).to(device) for length in lengths]


def split_parameters(
    transformer: WanTransformer3DModel, encoder: nn.Module | None = None
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices inside the blocks, and everything else."""
    inner = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in transformer.parameters() if id(p) not in chosen]
    return inner, rest if encoder is None else [*rest, *encoder.parameters()]


def train_flow(config: Config, out: Path, workers: Workers, seed: int) -> None:
    """Train on the VAE in `out`, resuming from `flow.safetensors` there, and write it (averaged weights)."""
    device, stage = workers.device, config.stage("flow")
    cuda = device.type == "cuda"
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    clock = Clock(stage.minutes, stage.steps)
    vae, stats = load_vae(config, out, workers)
    transformer, encoder = build_transformer(config.sizes).to(device), build_text_encoder(config.sizes).to(device)
    done = 0
    held = load_stage(out, "flow", config.describe())
    if held is not None:
        transformer.load_state_dict(strip("transformer", held))
        encoder.load_state_dict(strip("text_encoder", held), strict=False)
        done = int(held["step"])
    for module in (transformer, encoder):
        workers.broadcast_module(module)
        module.train()
    workers.say(f"flow: {sum(p.numel() for p in transformer.parameters()) / 1e6:.2f} M, {stage}")
    workers.say(f"slot form against the library: relative error {self_check(transformer):.1e}")
    bank, far, unseen = make_banks(stage, vae, stats, workers, seed, config.toy)
    spread = bank.latents[:256].float()
    workers.say(f"banks: {clock.elapsed():.1f} s, latent mean {spread.mean():.3f} std {spread.std():.3f}")

    frames = latent_frames(stage.frames)
    causal, full = make_layouts(frames, device)
    masks = Masks([*causal, *full], TOKENS, device, flex=cuda)
    net = FlowNet(transformer, torch.bfloat16 if cuda else torch.float32, compiled=cuda)
    usual = torch.arange(frames, device=device)
    if cuda:
        workers.say(check_masks(net, masks, causal + full[:1], bank, encoder, stage.batch))

    # Data order must differ between processes, layouts and lengths must not.
    chooser = random.Random(seed + done)
    torch.manual_seed(seed * 1000 + done * 16 + workers.rank)
    optimisers = Optimisers(*split_parameters(transformer, encoder), stage)
    average = Average(optimisers.parameters, 0.9993)
    running: dict[str, list[torch.Tensor]] = {}
    step, progress, saved, started = 0, 0.0, time.monotonic(), time.monotonic()

    def save() -> None:
        average.swap()
        transformer.eval()
        state = prefixed("transformer", dict(transformer.named_parameters()))
        state |= prefixed("text_encoder", dict(encoder.named_parameters()))
        save_stage(out, "flow", state | {"step": torch.tensor(done + step)}, config.describe())
        levels = validate(net, unseen, encoder, causal[2], masks.select(causal[2].name), stage.batch)
        record(out, "flow", step=done + step, seconds=clock.elapsed(), validation=levels)
        for kind, row in levels.items():
            print(f"  validation, {kind}: " + "  ".join(f"t={t} {v:.4f}" for t, v in row.items()), flush=True)
        size = 32 if config.toy else 128
        write_preview(out / f"flow-{done + step}.png", config.sizes, vae, stats, transformer, encoder, size)
        transformer.train()
        average.swap()

    while progress < 1.0:
        layout = chooser.choice(causal) if chooser.random() < 0.8 else chooser.choice(full)
        source, positions = bank, usual
        if far is not None and layout.causal and chooser.random() < 0.25:
            positions = gapped(far.latents.shape[2], frames, layout.first, chooser).to(device)
            source = far
        latents, ids, switch = source.draw(stage.batch, positions)
        choice = choose_prompts(layout, positions, switch)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            embeddings, bias = read_prompts(encoder, ids, choice)
        mask, context = masks.select(layout.name), None
        if layout.causal and progress > 0.4 and chooser.random() < 0.4:
            context = own_output(net, latents, layout, mask, embeddings, bias, positions)
        slots, level, target = noised(latents, layout, context)
        velocity = net(slots, level * 1000, embeddings, bias, positions.repeat(2), mask)
        loss = ((velocity - target).square().mean(dim=(1, 3, 4)) * layout.weight).mean()
        loss.backward()
        optimisers.step(workers, step, progress, warmup=200)
        average.update()
        kind = "gapped" if source is far else "own" if context is not None else layout.name.rstrip("0123456789")
        running.setdefault(kind, []).append(loss.detach())
        step += 1
        if stage.steps or step % 10 == 0:
            progress = workers.agree(clock.progress(step))
        if step in (1, 5, 20, 60) or step % 250 == 0:
            values = {name: float(torch.stack(v).mean()) for name, v in sorted(running.items())}
            running = {}
            if any(value != value for value in values.values()):
                raise TrainingError(f"the loss is not a number at step {step}; lower the rate")
            workers.say(
                f"flow step {done + step} "
                + " ".join(f"{name} {value:.4f}" for name, value in values.items())
                + f" {step / (time.monotonic() - started):.2f} it/s {clock.elapsed():.0f} s"
            )
        if workers.main and time.monotonic() - saved > 150:
            save()
            saved = time.monotonic()
    if workers.main:
        save()


@torch.no_grad()
def validate(
    net: FlowNet,
    bank: LatentBank,
    encoder: UMT5EncoderModel,
    layout: Layout,
    mask: Any,
    batch: int,
) -> dict[str, dict[str, float]]:
    """Velocity error on unseen clips at four noise levels: first block, later blocks, later blocks without text."""
    out: dict[str, dict[str, float]] = {"first block": {}, "later blocks": {}, "later, no text": {}}
    device = bank.latents.device
    positions = torch.arange(len(layout.blocks) // 2, device=device)
    noisy, first = layout.weight > 0, layout.blocks == 0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for drop in (0.0, 1.0):
            for t in (0.25, 0.5, 0.75, 0.95):
                latents, ids, switch = bank.draw(batch, positions, drop)
                embeddings, bias = read_prompts(encoder, ids, choose_prompts(layout, positions, switch))
                level = torch.full((batch, len(layout.blocks)), t, device=device)
                slots, level, target = noised(latents, layout, level=level)
                velocity = net(slots, level * 1000, embeddings, bias, positions.repeat(2), mask)
                error = (velocity - target).square().mean(dim=(0, 1, 3, 4))
                if not drop:
                    out["first block"][str(t)] = float(error[noisy & first].mean())
                out["later, no text" if drop else "later blocks"][str(t)] = float(error[noisy & ~first].mean())
    return out


@torch.no_grad()
def self_check(transformer: WanTransformer3DModel) -> float:
    """Relative difference of the slot form and the library's forward; raises where it is no rounding."""
    device = transformer.device
    net = FlowNet(transformer)
    x = torch.randn(2, 16, 2, 16, 16, device=device)
    lengths = torch.tensor([5, 9], device=device)
    words = torch.randn(2, 20, int(transformer.config.text_dim), device=device)
    words = words * (torch.arange(20, device=device)[None, :, None] < lengths[:, None, None])
    time_ = torch.tensor([300.0, 700.0], device=device)
    full = transformer(x, time_, F.pad(words, (0, 0, 0, 512 - 20)), return_dict=False)[0]
    bias = text_bias(lengths[:, None], 20, torch.zeros(2, 2, device=device, dtype=torch.long))
    slots = time_[:, None].expand(2, 2)
    ours = net(x, slots, F.pad(words, (0, 0, 0, 1)), bias, torch.arange(2, device=device))
    error = float((full - ours).norm() / full.norm())
    if not error < 5e-3:
        raise TrainingError(f"the slot form differs from the library's forward by {error:.1e}")
    return error


def check_masks(
    net: FlowNet, masks: Masks, layouts: Iterable[Layout], bank: LatentBank, encoder: UMT5EncoderModel, batch: int
) -> str:
    """Stop at once if compiled flex attention and a dense mask differ; also compiles the graph training uses."""
    start = time.monotonic()
    exact, worst = FlowNet(net.model), 0.0
    for layout in layouts:
        positions = torch.arange(len(layout.blocks) // 2, device=layout.blocks.device)
        latents, ids, switch = bank.draw(batch, positions)
        slots, level, _ = noised(latents, layout)
        with torch.no_grad():
            words, bias = read_prompts(encoder, ids, choose_prompts(layout, positions, switch))
            where = positions.repeat(2)
            want = exact(slots[:2], level[:2] * 1000, words[:2], bias[:2], where, masks.dense(layout.name))
            got = net(slots, level * 1000, words, bias, where, masks.select(layout.name))
        worst = max(worst, float((got[:2] - want).norm() / want.norm()))
    if not worst < 5e-2:
        raise TrainingError(f"flex attention differs from a dense mask by {worst:.1e}")
    return f"flex in bf16 against a dense mask in fp32: {worst:.1e} ({time.monotonic() - start:.0f} s)"
