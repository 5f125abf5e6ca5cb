"""The training loop; it resumes from `weights.pt` and `optimisers.pt` in the run's folder."""

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_world.checkpoint import TrainingError, record
from tiny_world.muon import Muon
from transformers import LlamaForCausalLM

from .blocks import (
    BINS,
    bound,
    cross_entropy,
    denoise,
    draw_masked,
    exact,
    per_block,
    window_logits,
    without_table,
)
from .model import Config, build_model
from .tasks import MASK, PAD, Documents, Draw, draw_training, held_out, is_held_out

WEIGHTS, OPTIMISERS = "weights.pt", "optimisers.pt"
CHECK_SEED, FINAL_SEED = 1, 2
ANSWERS = (26, 48, 79)
"""Tokens of answer in the held-out documents, a third of them each."""
KEPT = 64
"""Tokens of the prompt that the control keeps."""
LEAST = 32
"""Tokens of the shortest documents."""
DECAY = 0.4
"""Part of a run in which the rate falls to zero."""
EARLY, FEW = 0.25, 0.5
"""Part of a run in which documents are short, and at most so many of a block's tokens masked.

A token is looked up by the one before it; that is only learned while most of them can be seen.
"""


def draw_batch(config: Config, length: int, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Documents of all tasks (rows, length), where their answers and <eos> are in the window (rows, window), and the
    padding in front.

    Half of the batches hold shorter documents: were all equally long, the model would learn to stop by the place of a
    token, and go on and on elsewhere. Compiled layers get one length all the same, others no more than the window.
    """
    unit = max(config.blocks)
    short = draw.one(-(-LEAST // unit), length // unit) * unit if draw.one(0, 1) else length
    length = length if config.compiled else max(short, config.window)
    padding, longest = length - short, min(config.longest, short // 3)
    rows = max(1, config.tokens // (length + config.window) // len(config.tasks))
    parts = [draw_training(task, rows, short, longest, draw) for task in config.tasks]
    place = torch.arange(length - config.window, length, device=draw.device)
    answer = torch.cat([(place >= part.start + padding).expand(len(part.ids), -1) for part in parts])
    ids = torch.cat([part.ids for part in parts])
    answer &= ~is_held_out(ids)[:, None]
    return F.pad(ids, (padding, 0), value=PAD), answer, padding


def check_documents(config: Config, rows: int, seed: int, device: torch.device) -> dict[str, list[Documents]]:
    """Held-out documents of the greatest length and difficulty, `rows` of each task, answers of three lengths."""
    length = max(config.lengths)
    answers = [min(answer, config.longest, length // 4) for answer in ANSWERS]
    out = {}
    for task in config.tasks:
        drawn = [held_out(task, -(-rows // 3), length, answer, seed + 10 * i) for i, answer in enumerate(answers)]
        out[task] = [Documents(task, part.ids.to(device), part.start, part.stop) for part in drawn]
    return out


def measure(
    model: LlamaForCausalLM, config: Config, documents: dict[str, list[Documents]], dtype: torch.dtype | None
) -> dict[str, dict[str, float]]:
    """Per task the share of answers right as a whole, the share of their tokens, and the steps a block."""
    out = {}
    for task, parts in documents.items():
        whole, tokens, steps = [], [], 0
        for part in parts:
            for i in range(0, len(part.ids), 64):
                some = Documents(task, part.ids[i : i + 64], part.start, part.stop)
                answers, taken = denoise(model, some, config.block, config.threshold, dtype)
                whole.append(exact(some, answers).float())
                count = some.stop - some.start
                tokens.append((answers[:, :count] == some.ids[:, some.start : some.stop]).float().mean(1))
                steps = max(steps, taken)
        out[task] = {
            "exact": float(torch.cat(whole).mean()),
            "tokens": float(torch.cat(tokens).mean()),
            "most_steps": float(steps),
        }
    return out


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise TrainingError(f"'{path}' is damaged or cut short ({error}); delete it to start anew") from error


def load_weights(path: Path, config: Config, device: torch.device) -> dict[str, Any]:
    """Weights and progress of a run. Raises `TrainingError` for a damaged file, or a model of other sizes."""
    state = _read(path, device)
    if state["sizes"] != config.sizes():
        raise TrainingError(
            f"'{path}' holds a model of {state['sizes']}, the config asks for {config.sizes()}; "
            "use the config it was trained with, or another --out"
        )
    return state


class Training:
    """Model, optimisers, and how far they are."""

    def __init__(self, config: Config, out: Path, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.config, self.out, self.device = config, out, device
        self.cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else None
        self.model = build_model(config).to(device)
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, config.lr), config.lr),
            (torch.optim.AdamW(others, config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0), config.adam_lr),
        ]
        self.step, self.seconds, self.met_at = 0, 0.0, float("inf")
        self.path = out / WEIGHTS
        if self.path.is_file():
            self._load()
        self.draw = Draw(torch.Generator(device).manual_seed(seed + self.step))

    def save(self) -> None:
        """Write weights and optimisers; each file is complete before it takes its predecessor's place."""
        self.out.mkdir(parents=True, exist_ok=True)
        progress = {"step": self.step, "seconds": self.seconds, "met_at": self.met_at, "sizes": self.config.sizes()}
        held = {"optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers], "step": self.step}
        for path, state in ((self.out / OPTIMISERS, held), (self.path, progress | {"model": self.model.state_dict()})):
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)

    def _load(self) -> None:
        state = load_weights(self.path, self.config, self.device)
        self.model.load_state_dict(state["model"])
        self.step, self.seconds, self.met_at = state["step"], state["seconds"], state["met_at"]
        held = _read(self.out / OPTIMISERS, self.device) if (self.out / OPTIMISERS).is_file() else {"step": None}
        if held["step"] != self.step:
            print("no optimisers of this step: their momentum starts from nothing", flush=True)
            return
        for (optimiser, _), part in zip(self.optimisers, held["optimisers"], strict=True):
            optimiser.load_state_dict(part)

    def rate(self) -> float:
        """Share of the peak learning rate: warm-up, plateau, and down to 0 once targets are met or time is short."""
        budget = self.config.minutes * 60
        fall = 1 - (self.seconds - min(self.met_at, budget * (1 - DECAY))) / (budget * DECAY)
        return min(1.0, (self.step + 1) / 100) * max(0.0, min(1.0, fall))

    def early(self) -> bool:
        """Whether the run is in its first part."""
        return self.seconds < EARLY * self.config.minutes * 60

    def update(self, length: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One step on fresh documents: the cross-entropy of the window's tokens, and their bins of `BINS`, else -1."""
        ids, answer, padding = draw_batch(self.config, length, self.draw)
        return self.update_on(ids, answer, block, padding)

    def update_on(
        self, ids: torch.Tensor, answer: torch.Tensor, block: int, padding: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same on given documents."""
        clean = ids[:, -self.config.window :]
        masked = draw_masked(answer, block, self.draw.generator, FEW if self.early() else 1.0)
        logits = window_logits(self.model, clean.masked_fill(masked, MASK), ids, block, self.dtype, padding)
        loss = cross_entropy(logits, clean)
        # Every block weighs the same, however many of its tokens are masked: where few are, they can be told.
        weight = masked / per_block(masked, block).clamp(min=1)
        ((loss * weight).sum() / weight.sum().clamp(min=1)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        share = self.rate()
        for optimiser, peak in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * share
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        third = (per_block(masked, block) / per_block(answer, block).clamp(min=1) * 3).long().clamp(max=2)
        return loss.detach(), third.masked_fill(~masked, -1)

    def compile(self) -> None:
        """Compile the layers, one graph for all of them and each length; where that fails say so and go on."""
        layers = self.model.model.layers
        forward = torch.compile(type(layers[0]).forward, dynamic=False)
        for layer in layers:
            layer.forward = partial(forward, layer)
        try:
            for length in self.config.lengths:
                ids, _, _ = draw_batch(self.config, length, self.draw)
                clean = ids[:, -self.config.window :]
                cross_entropy(
                    window_logits(self.model, clean, ids, self.config.block, self.dtype), clean
                ).mean().backward()
        except Exception as error:
            for layer in layers:
                del layer.forward
            print(f"the layers run uncompiled: {str(error).splitlines()[0]}", flush=True)
        self.model.zero_grad(set_to_none=True)


def train(config: Config, out: Path, device: torch.device, seed: int, steps: int | None = None) -> Training:
    """Train until the budget is used up, or the targets are met and the rate has fallen since."""
    begin = time.monotonic()
    training = Training(config, out, device, seed)
    budget, cuda = config.minutes * 60, training.cuda
    parameters = sum(p.numel() for p in training.model.parameters()) / 1e6
    print(f"{parameters:.2f} M parameters, {device}, from step {training.step} at {training.seconds:.0f} s", flush=True)
    documents = check_documents(config, 96 if cuda else 48, CHECK_SEED, device)
    if config.compiled and cuda:
        training.compile()
    print(f"ready after {time.monotonic() - begin:.1f} s", flush=True)
    start, checked, saved = time.monotonic() - training.seconds, training.seconds, training.seconds
    sums = torch.zeros(2, len(BINS), device=device)
    while training.seconds < budget and (steps is None or training.step < steps) and training.rate() > 0:
        long = training.step % 4 and not training.early()
        length = max(config.lengths) if long else min(config.lengths)
        loss, third = training.update(length, config.blocks[training.step % len(config.blocks)])
        for index in range(len(BINS)):
            inside = third == index
            sums[0, index] += (loss * inside).sum()
            sums[1, index] += inside.sum()
        if training.step % 10 == 0:
            if cuda:
                torch.cuda.synchronize()
            training.seconds = time.monotonic() - start
        if training.step % 100 == 0 or training.step == 1:
            means = (sums[0] / sums[1].clamp(min=1)).tolist()
            sums.zero_()
            if any(value != value for value in means):
                raise TrainingError(f"the loss is not a number at step {training.step}; lower the rate")
            values = {name: round(value, 4) for name, value in zip(BINS, means, strict=True)}
            record(
                out, "train", step=training.step, seconds=round(training.seconds, 1), rate=training.rate(), loss=values
            )
            print(f"step {training.step} {training.seconds:.0f} s: loss by masked share {values}", flush=True)
        if training.seconds - checked > config.check_seconds:
            checked = training.seconds
            scores = _check(training, documents)
            met = min(value["exact"] for value in scores.values()) >= config.target
            if met and training.seconds < min(training.met_at, budget * (1 - DECAY)):
                training.met_at = training.seconds
                print("targets met: the rate falls from here on", flush=True)
        if training.seconds - saved > 60:
            saved = training.seconds
            training.save()
    training.save()
    return training


def _eager() -> Any:
    return torch.compiler.set_stance("force_eager") if torch.cuda.is_available() else nullcontext()


def _check(training: Training, documents: dict[str, list[Documents]]) -> dict[str, dict[str, float]]:
    training.model.eval()
    with _eager():
        scores = measure(training.model, training.config, documents, training.dtype)
    training.model.train()
    record(training.out, "check", step=training.step, seconds=round(training.seconds, 1), scores=scores)
    line = ", ".join(f"{task} {value['exact']:.3f} ({value['tokens']:.4f})" for task, value in scores.items())
    print(f"step {training.step} {training.seconds:.0f} s: exact match (tokens) {line}", flush=True)
    return scores


def final_scores(
    model: LlamaForCausalLM, config: Config, device: torch.device, rows: int
) -> dict[str, dict[str, float]]:
    """Scores in fp32 on held-out documents that no check saw, with the control and the bound."""
    documents = check_documents(config, rows, FINAL_SEED, device)
    with _eager():
        scores = measure(model, config, documents, None)
        cut = {task: [without_table(part, KEPT, config.block) for part in parts] for task, parts in documents.items()}
        for task, control in measure(model, config, cut, None).items():
            scores[task] |= {"control": control["exact"], "control_tokens": control["tokens"]}
            parts = [Documents(task, part.ids[:32], part.start, part.stop) for part in documents[task]]
            values = [bound(model, part, config.block, 8, FINAL_SEED) for part in parts]
            scores[task]["perplexity_bound"] = float(torch.tensor(values).mean().exp())
    return scores
