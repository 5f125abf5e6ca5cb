"""Stage two: the text encoder and the causal flow-matching transformer, on banked latents."""

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import UMT5EncoderModel

from .checkpoint import Average, Clock, learning_rate, load_parts, save_parts, strip
from .flow import FlowNet, Layout, Masks, bidirectional, shifted, teacher_forcing, text_bias
from .models import FULL, SHIFT, TOY, build_text_encoder, build_transformer, build_vae
from .parallel import Workers
from .parallel_vae import ParallelVAE
from .prompts import MAX_WORDS, describe, encode_words
from .train_vae import to_signed
from .world import draw_scene, render

WORDS = MAX_WORDS + 1
BANK_SEED = 500_000_000


def encode_text(encoder: UMT5EncoderModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, words + 1, dim), zero past each prompt, and the bias of their keys."""
    mask = ids.ne(0)
    hidden = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
    hidden = F.pad(hidden * mask.unsqueeze(-1), (0, 0, 0, 1))
    return hidden, text_bias(mask.sum(1), ids.shape[1])


class LatentBank:
    """Normalised latents (N, C, f, h, w) and several wordings of each clip, (N, wordings, words)."""

    def __init__(
        self,
        vae: ParallelVAE,
        stats: tuple[torch.Tensor, torch.Tensor],
        count: int,
        frames: int,
        seed: int,
        batch: int,
    ) -> None:
        device = stats[0].device
        mean, std = (value.view(1, -1, 1, 1, 1) for value in stats)
        rng = random.Random(seed)
        latents, words = [], []
        for start in range(0, count, batch):
            scenes = [draw_scene(seed + i) for i in range(start, min(start + batch, count))]
            with torch.no_grad():
                video = to_signed(render(scenes, frames, device))
                latents.append(((vae.moments(video)[0] - mean) / std).to(torch.bfloat16))
            words += [[encode_words(describe(scene, rng)) for _ in range(6)] for scene in scenes]
        self.latents = torch.cat(latents)
        self.words = torch.tensor(words, dtype=torch.int32, device=device)

    def draw(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (batch, C, f, h, w) in fp32 and token ids (batch, words)."""
        index = torch.randint(len(self.latents), (batch,), device=self.latents.device)
        wording = torch.randint(self.words.shape[1], (batch,), device=self.latents.device)
        ids = self.words[index, wording].long()
        drop = torch.rand(batch, 1, device=ids.device) < 0.1
        empty = torch.zeros_like(ids)
        empty[:, 0] = 1
        ids = torch.where(drop, empty, ids)
        # A rare unknown word, so that one in a user's prompt is passed over.
        unknown = (torch.rand(ids.shape, device=ids.device) < 0.005) & (ids > 2)
        return self.latents[index].float(), ids.masked_fill(unknown, 2)


def noised(latents: torch.Tensor, layout: Layout, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slots (B, C, 2f, h, w), their noise levels (B, 2f) and the velocities to predict."""
    b, _, frames, _, _ = latents.shape
    double = torch.cat([latents, latents], dim=2)
    noise = torch.randn_like(double)
    level = shifted(torch.rand(b, int(layout.blocks.max()) + 1, device=latents.device), SHIFT)[:, blocks]
    time = level
    if layout.name.startswith("causal"):
        # The context is labelled clean yet slightly noised: in a rollout it is the model's own, imperfect output.
        context = torch.rand(b, 1, device=latents.device) * 0.1
        level = torch.cat([context.expand(b, frames), level[:, frames:]], dim=1)
        time = torch.cat([torch.zeros_like(level[:, :frames]), level[:, frames:]], dim=1)
    wide = level[:, None, :, None, None]
    return (1 - wide) * double + wide * noise, time, noise - double


def self_check(transformer: torch.nn.Module, device: torch.device) -> None:
    """Stop at once if the slot form and the library's forward differ."""
    net = FlowNet(transformer)  # type: ignore[arg-type]
    x = torch.randn(2, 16, 2, 16, 16, device=device)
    lengths = torch.tensor([5, 9], device=device)
    words = torch.randn(2, 20, int(transformer.config.text_dim), device=device)  # type: ignore[attr-defined,arg-type]
    words = words * (torch.arange(20, device=device)[None, :, None] < lengths[:, None, None])
    time = torch.tensor([300.0, 700.0], device=device)
    with torch.no_grad():
        full = transformer(x, time, F.pad(words, (0, 0, 0, 512 - 20)), return_dict=False)[0]
        ours = net(
            x,
            time[:, None].expand(2, 2),
            F.pad(words, (0, 0, 0, 1)),
            text_bias(lengths, 20),
            torch.arange(2, device=device),
        )
    error = float((full - ours).norm() / full.norm())
    if not error < 5e-3:
        raise RuntimeError(f"the slot form differs from the library's forward by {error:.1e}")
    print(f"slot form against the library: relative error {error:.1e}", flush=True)


def train_flow(
    out: Path,
    workers: Workers,
    minutes: float,
    steps: int | None,
    seed: int,
    toy: bool,
    batch: int,
    lr: float,
    clips: int,
) -> None:
    """Train on the VAE in `out`, resuming from `flow.part*` there, and write `flow.part*` (averaged weights)."""
    device = workers.device
    cuda = device.type == "cuda"
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    clock = Clock(minutes, steps)
    held_vae = load_parts(out, "vae")
    if held_vae is None:
        raise FileNotFoundError(f"no vae.part* in {out}: run the vae stage first")
    sizes = TOY if toy else FULL
    vae = build_vae(sizes).to(device)
    vae.load_state_dict(strip("vae", held_vae))
    stats = held_vae["latents_mean"].to(device), held_vae["latents_std"].to(device)
    transformer, encoder = build_transformer(sizes).to(device), build_text_encoder(sizes).to(device)
    done = 0
    held = load_parts(out, "flow")
    if held is not None:
        transformer.load_state_dict(strip("transformer", held))
        encoder.load_state_dict(strip("text_encoder", held), strict=False)
        done = int(held["step"])
    for module in (transformer, encoder):
        workers.broadcast_module(module)
        module.train()
    self_check(transformer, device)

    frames = 9 if toy else 81
    parallel = ParallelVAE(vae, torch.bfloat16 if cuda else torch.float32, compiled=cuda)
    parallel.channels_last = cuda
    bank = LatentBank(
        parallel, stats, clips, frames, BANK_SEED + (seed * 64 + workers.rank) * 1_000_000, 4 if toy else 32
    )
    del parallel, vae
    f = bank.latents.shape[2]
    if workers.main:
        spread = bank.latents[:256].float()
        print(
            f"bank of {len(bank.latents)} clips x {workers.count}: {clock.elapsed():.1f} s,"
            f" latent mean {float(spread.mean()):.3f} std {float(spread.std()):.3f}",
            flush=True,
        )

    layouts = [teacher_forcing(f, first) for first in (1, 2, 3)]
    layouts += [bidirectional(f, length) for length in ((f,) if toy else (4, 7, 10, 13, 16, 19))]
    masks = Masks(layouts, 64, device, flex=cuda)
    net = FlowNet(transformer, torch.bfloat16 if cuda else torch.float32, compiled=cuda)
    positions = torch.arange(f, device=device).repeat(2)
    if cuda:
        _check_masks(net, masks, bank, encoder, batch)

    # Data order must differ between processes, weights and layouts must not.
    chooser = random.Random(seed + done)
    torch.manual_seed(seed * 1000 + done * 16 + workers.rank)
    names = [f"transformer.{n}" for n, _ in transformer.named_parameters()]
    names += [f"text_encoder.{n}" for n, _ in encoder.named_parameters()]
    parameters = [*transformer.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda)
    average = Average(parameters, 0.9993)
    blocks = {layout.name: layout.blocks.to(device) for layout in layouts}
    weights = {layout.name: layout.weight.to(device) / layout.weight.mean() for layout in layouts}
    running: dict[str, list[torch.Tensor]] = {"causal": [], "full": []}
    step, progress, saved, started = 0, 0.0, time.monotonic(), time.monotonic()

    def save() -> None:
        state = dict(zip(names, average.shadow, strict=True))
        save_parts(out, "flow", state | {"step": torch.tensor(done + step)})

    while progress < 1.0:
        if step % 10 == 0:
            progress = workers.agree(clock.progress(step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, progress, warmup=300)
        kind = chooser.random()
        layout = chooser.choice(layouts[:3]) if kind < 0.75 else chooser.choice(layouts[3:])
        latents, ids = bank.draw(batch)
        slots, level, target = noised(latents, layout, blocks[layout.name])
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            embeddings, bias = encode_text(encoder, ids)
        velocity = net(slots, level * 1000, embeddings, bias, positions, masks.select(layout.name))
        error = (velocity - target).square().mean(dim=(1, 3, 4))
        loss = (error * weights[layout.name]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        workers.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        running["causal" if kind < 0.75 else "full"].append(loss.detach())
        step += 1
        if step in (1, 5, 20, 60) or step % 250 == 0:
            values = {name: float(torch.stack(v).mean()) if v else 0.0 for name, v in running.items()}
            running = {"causal": [], "full": []}
            if any(value != value for value in values.values()):
                raise RuntimeError(f"the loss is not a number at step {step}")
            if workers.main:
                print(
                    f"flow step {done + step} causal {values['causal']:.4f} full {values['full']:.4f}"
                    f" lr {optimizer.param_groups[0]['lr']:.1e} {step / (time.monotonic() - started):.2f} it/s"
                    f" {clock.elapsed():.0f} s",
                    flush=True,
                )
        if workers.main and time.monotonic() - saved > 110:
            save()
            saved = time.monotonic()
    if workers.main:
        save()


def _check_masks(net: FlowNet, masks: Masks, bank: LatentBank, encoder: UMT5EncoderModel, batch: int) -> None:
    """Stop at once if compiled flex attention and a dense mask differ; also compiles the graph training uses."""
    latents, ids = bank.draw(batch)
    start = time.monotonic()
    positions = torch.arange(latents.shape[2], device=latents.device).repeat(2)
    exact = FlowNet(net.model)
    worst = 0.0
    for name in ("causal1", "causal2", "full7"):
        slots, level, _ = noised(latents, masks.layouts[name], masks.layouts[name].blocks.to(latents.device))
        with torch.no_grad():
            words, bias = encode_text(encoder, ids)
            want = exact(slots[:2], level[:2] * 1000, words[:2], bias[:2], positions, masks.dense(name))
        got = net(slots, level * 1000, words, bias, positions, masks.select(name))
        got.square().mean().backward()
        worst = max(worst, float((got[:2] - want).norm() / want.norm()))
    net.model.zero_grad(set_to_none=True)
    print(
        f"flex in bf16 against a dense mask in fp32: {worst:.1e} ({time.monotonic() - start:.0f} s)",
        flush=True,
    )
    if not worst < 5e-2:
        raise RuntimeError("the flex mask is wrong")
