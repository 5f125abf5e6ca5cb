"""Stage three: four steps without guidance instead of eight with it, by consistency with the teacher's own paths.

From a level of the few-step sampler the frozen teacher follows its guided flow to a clean block, given the clean blocks
before it; the student learns to get there in one prediction. The sampler noises each prediction anew for the next level
(Self-Forcing, arXiv 2506.08009, Algorithm 2), so the levels are learned independently, on noised data.
"""

import copy
import random
import time
from itertools import pairwise
from pathlib import Path

import torch
from transformers import UMT5EncoderModel

from .bank import LatentBank, choose_prompts, read_prompts
from .checkpoint import Average, Clock, TrainingError, load_stage, need_stage, prefixed, record, save_stage, strip
from .config import Config
from .flow import Cache, FlowNet, Layout, Masks, latent_frames, shifted
from .models import SHIFT, build_text_encoder, build_transformer
from .muon import Optimisers
from .parallel import Workers
from .preview import write_preview
from .train_flow import TOKENS, load_vae, make_banks, make_layouts, noised, own_output, split_parameters

STEPS = 4
GUIDANCE = 3.0
TEACHER_STEPS = 6


class Teacher:
    """The frozen multi-step model, its context computed once for all steps of a path."""

    def __init__(self, net: FlowNet, causal: list[Layout], device: torch.device, flex: bool) -> None:
        self.net = net
        frames = len(causal[0].blocks) // 2
        self.context = Masks(
            [cut(layout, slice(0, frames), slice(0, frames)) for layout in causal], TOKENS, device, flex
        )
        self.path = Masks([cut(layout, slice(frames, None), slice(None)) for layout in causal], TOKENS, device, flex)

    @torch.no_grad()
    def follow(
        self,
        layout: Layout,
        context: torch.Tensor,
        noisy: torch.Tensor,
        level: torch.Tensor,
        embeddings: torch.Tensor,
        bias: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Clean latents (B, C, f, h, w) that the guided flow reaches from `noisy` at `level` (B, f).

        `embeddings` and `bias` (of 2 f slots) hold the prompts first, then the empty ones.
        """
        # The scheduler's own spacing, from each slot's level down.
        start = level / (SHIFT - (SHIFT - 1) * level)
        levels = [shifted(start * (1 - i / TEACHER_STEPS), SHIFT) for i in range(TEACHER_STEPS + 1)]
        past = self.read(layout, context, embeddings, bias, positions)
        x = noisy
        for now, then in pairwise(levels):
            cond, uncond = self.velocity(layout, x, now, past, embeddings, bias, positions).chunk(2)
            x = x + (then - now)[:, None, :, None, None] * (uncond + GUIDANCE * (cond - uncond))
        return x

    def read(
        self,
        layout: Layout,
        context: torch.Tensor,
        embeddings: torch.Tensor,
        bias: torch.Tensor,
        positions: torch.Tensor,
    ) -> list[Cache]:
        """Keys and values of the clean slots under both kinds of prompts."""
        kept: list[Cache] = []
        time_ = torch.zeros(2 * len(context), len(positions), device=context.device)
        mask = self.context.select(layout.name)
        clean = context.repeat(2, 1, 1, 1, 1)
        self.net(clean, time_, embeddings, bias[:, : len(positions)], positions, mask, keep=kept)
        return kept

    def velocity(
        self,
        layout: Layout,
        noisy: torch.Tensor,
        level: torch.Tensor,
        past: list[Cache],
        embeddings: torch.Tensor,
        bias: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Velocities (2 B, C, f, h, w) of the noisy slots: with their prompts, then with empty ones."""
        mask = self.path.select(layout.name)
        slots, time_ = noisy.repeat(2, 1, 1, 1, 1), 1000 * level.repeat(2, 1)
        return self.net(slots, time_, embeddings, bias[:, len(positions) :], positions, mask, past)


def cut(layout: Layout, queries: slice, keys: slice) -> Layout:
    """The layout's attention between some slots."""
    parts = {name: getattr(layout, name) for name in ("blocks", "ends", "weight")}
    return Layout(layout.name, True, layout.first, layout.count, layout.allowed[queries, keys], **parts)


def sampler_levels(device: torch.device) -> torch.Tensor:
    """Noise levels of the few-step sampler, (STEPS,)."""
    return shifted(torch.tensor([1 - i / STEPS for i in range(STEPS)], device=device), SHIFT)


def train_few_step(config: Config, out: Path, workers: Workers, seed: int) -> None:
    """Distil `flow.safetensors` of `out`, resuming from `few_step.safetensors`, and write that (averaged weights)."""
    device, stage = workers.device, config.stage("few_step")
    cuda = device.type == "cuda"
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    clock = Clock(stage.minutes, stage.steps)
    vae, stats = load_vae(config, out, workers)
    taught = need_stage(out, "flow", config.describe())
    teacher, encoder = build_transformer(config.sizes).to(device), build_text_encoder(config.sizes).to(device)
    teacher.load_state_dict(strip("transformer", taught))
    encoder.load_state_dict(strip("text_encoder", taught), strict=False)
    student = copy.deepcopy(teacher)
    held = load_stage(out, "few_step", config.describe())
    done = 0
    if held is not None:
        student.load_state_dict(strip("transformer", held))
        done = int(held["step"])
    teacher.requires_grad_(False).eval()
    encoder.requires_grad_(False).eval()
    workers.say(f"few_step: {stage}")
    # Other clips than the teacher saw.
    bank, _, unseen = make_banks(stage, vae, stats, workers, seed + 1000, config.toy)
    workers.say(f"bank: {clock.elapsed():.1f} s")

    frames = latent_frames(stage.frames)
    causal, _ = make_layouts(frames, device)
    masks = Masks(causal, TOKENS, device, flex=cuda)
    dtype = torch.bfloat16 if cuda else torch.float32
    net = FlowNet(student, dtype, compiled=cuda)
    guide = Teacher(FlowNet(teacher, dtype, compiled=cuda), causal, device, cuda)
    positions, levels = torch.arange(frames, device=device), sampler_levels(device)
    chooser = random.Random(seed + done)
    torch.manual_seed(seed * 1000 + done * 16 + workers.rank + 7)
    optimisers = Optimisers(*split_parameters(student), stage)
    average = Average(optimisers.parameters, 0.998)
    running: list[torch.Tensor] = []
    step, progress, saved, started = 0, 0.0, time.monotonic(), time.monotonic()

    def batch_loss(layout: Layout, source: LatentBank, rows: int, own: bool) -> torch.Tensor:
        latents, ids, switch = source.draw(rows, positions, 0.0)
        choice = choose_prompts(layout, positions, switch)
        embeddings, bias = prompts_and_empty(encoder, ids, choice)
        mask, context = masks.select(layout.name), None
        words, word_bias = embeddings[:rows], bias[:rows]
        if own:
            context = own_output(net, latents, layout, mask, words, word_bias, positions)
        pick = torch.randint(STEPS, (rows, layout.count), device=device)
        level = levels[pick][:, layout.blocks]
        slots, time_, _ = noised(latents, layout, context, level)
        noisy, start = slots[:, :, frames:], level[:, frames:]
        goal = guide.follow(layout, slots[:, :, :frames], noisy, start, embeddings, bias, positions)
        velocity = net(slots, time_ * 1000, words, word_bias, positions.repeat(2), masks.select(layout.name))
        error = velocity[:, :, frames:] - (noisy - goal) / start[:, None, :, None, None]
        # A norm rather than its square: what the student cannot settle becomes one of the answers, not their mean.
        norm = ((error.square().mean(1) + 1e-3).sqrt() - 1e-3**0.5).mean(dim=(2, 3))
        return (norm * layout.weight[frames:] / 2).mean()

    workers.say(check_path(guide, masks, causal, bank, encoder, stage.batch))

    def save() -> None:
        average.swap()
        student.eval()
        save_stage(
            out,
            "few_step",
            prefixed("transformer", dict(student.named_parameters())) | {"step": torch.tensor(done + step)},
            config.describe(),
        )
        device_list = [device] if cuda else []
        with torch.no_grad(), torch.random.fork_rng(device_list):
            torch.manual_seed(0)
            error = float(batch_loss(causal[2], unseen, stage.batch, False))
        record(out, "few_step", step=done + step, seconds=clock.elapsed(), validation=error)
        print(f"few_step step {done + step}: distance to the teacher on unseen clips {error:.4f}", flush=True)
        size = 32 if config.toy else 128
        write_preview(out / f"few_step-{done + step}.png", config.sizes, vae, stats, student, encoder, size, True)
        student.train()
        average.swap()

    while progress < 1.0:
        loss = batch_loss(chooser.choice(causal), bank, stage.batch, chooser.random() < 0.5)
        loss.backward()
        optimisers.step(workers, step, progress, warmup=50)
        average.update()
        running.append(loss.detach())
        step += 1
        if stage.steps or step % 10 == 0:
            progress = workers.agree(clock.progress(step))
        if step in (1, 5, 20, 60) or step % 100 == 0:
            value = float(torch.stack(running).mean())
            running.clear()
            if value != value:
                raise TrainingError(f"the loss is not a number at step {step}; lower the rate")
            rate = step / (time.monotonic() - started)
            workers.say(f"few_step step {done + step} loss {value:.4f} {rate:.2f} it/s {clock.elapsed():.0f} s")
        if workers.main and time.monotonic() - saved > 150:
            save()
            saved = time.monotonic()
    if workers.main:
        save()


@torch.no_grad()
def prompts_and_empty(
    encoder: UMT5EncoderModel, ids: torch.Tensor, choice: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`read_prompts` of prompts (B, P, words) and, below them, of as many empty ones."""
    empty = torch.zeros_like(ids)
    empty[..., 0] = 1
    return read_prompts(encoder, torch.cat([ids, empty]), choice.repeat(2, 1))


@torch.no_grad()
def check_path(
    guide: Teacher, masks: Masks, causal: list[Layout], bank: LatentBank, encoder: UMT5EncoderModel, batch: int
) -> str:
    """Stop at once where the teacher with a kept context and the whole sequence in one forward differ."""
    frames = len(causal[0].blocks) // 2
    positions = torch.arange(frames, device=bank.latents.device)
    worst = 0.0
    for layout in causal:
        latents, ids, switch = bank.draw(batch, positions, 0.0)
        words, bias = prompts_and_empty(encoder, ids, choose_prompts(layout, positions, switch))
        slots, level, _ = noised(latents, layout)
        past = guide.read(layout, slots[:, :, :frames], words, bias, positions)
        got = guide.velocity(layout, slots[:, :, frames:], level[:, frames:], past, words, bias, positions)
        exact, dense = FlowNet(guide.net.model), masks.dense(layout.name)
        for row in (0, batch):
            part = slice(row, row + 1)
            want = exact(slots[:1], 1000 * level[:1], words[part], bias[part], positions.repeat(2), dense)
            want = want[:, :, frames:]
            worst = max(worst, float((got[part] - want).norm() / want.norm()))
    limit = 5e-2 if guide.net.dtype == torch.bfloat16 else 1e-4
    if not worst < limit:
        raise TrainingError(f"the teacher's kept context differs from the whole sequence by {worst:.1e}")
    return f"kept context against the whole sequence: {worst:.1e}"
