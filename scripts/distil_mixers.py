"""Teach every mixer what attention layers of the bundled models compute, and write down how near it comes.

    python scripts/distil_mixers.py --out samples/mixers                    # half an hour on a busy CPU core
    python scripts/distil_mixers.py --out out/mixers --only Based --steps 20 --seeds 1

Arms that the folder's `mixers.json` has at these steps and seeds are not taught again; all are timed anew.

Two layers of each model, taught apart from the rest of it: a step of Adam is the input and the output of the layer in
one forward of the model. Video: `tiny-world` with its stock pipeline, 17 frames of 128x128 (320 tokens, all see each
other), one denoising step of one prompt. Text: `tiny-lm`, 4 documents of 256 tokens in blocks of 8, those of the last
block masked. `error` is the mean square of the difference to the layer's output over that of the output, on other
prompts and documents; 1 is what an output of zeros has. `state` is what a mixer keeps of 256 tokens of text over what
their keys and values take. `ms` is one forward of a layer of the video model in float32, the least of 5 rounds that
alternate.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tiny_lm.tasks import MASK, TASKS, held_out
from tiny_world.prompts import describe
from tiny_world.world import draw_scene
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from diffaccel.mixers import (
    CCA,
    Based,
    Cis,
    Flowformer,
    GroupShift,
    Lightning,
    Lightning2,
    LocalLinear,
    Mixer,
    Titans,
    convert,
    distil,
    errors,
)
from diffaccel.mixers.mixer import Past, Tokens, extended, softmax
from diffaccel.pipelines.loading import bundled_text_model, load

BLOCK, LENGTH = 8, 256  # of text
LENGTHS = (256, 1024, 4096)
LAYERS = (2, 5)
BEGIN, END = "<!-- scripts/distil_mixers.py writes from here -->\n", "<!-- to here -->"


class Window(Mixer):
    """The control: what `Based` reads exactly, and nothing else."""

    paper: ClassVar[str] = "arXiv 2004.05150"
    summary: ClassVar[str] = "a window, for comparison"
    tile = 64

    def mix(self, tokens: Tokens, state: Past | None) -> tuple[Tensor, Any]:
        found = []
        for at in range(0, tokens.x.shape[1], self.tile):
            part = tokens.part(at, at + self.tile)
            near = extended(state, part.k, part.v)
            found.append(softmax(part.q, near.k, near.v).out)
        seen = extended(state, tokens.k, tokens.v)
        return torch.cat(found, 1), Past(seen.k[:, -self.tile :], seen.v[:, -self.tile :])


ARMS: dict[str, Callable[..., Mixer]] = {
    "Window, 64 tokens": Window,
    "Flowformer": Flowformer,
    "Lightning": partial(Lightning, depth=0.5),
    "Lightning2": partial(Lightning2, depth=0.5),
    "Based": Based,
    "CCA, half of the heads": CCA,
    "CCA, half, one for keys (CCGQA)": partial(CCA, kv_heads=1),
    "Titans, linear": Titans,
    "Titans, MLP": partial(Titans, memory="mlp"),
    "GroupShift, 64 tokens, 4 sinks": GroupShift,
    "Cis, half read": Cis,
    "LocalLinear": LocalLinear,
}

Calls = dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]


def record(model: nn.Module, layers: Sequence[str], work: Callable[[], Any]) -> Calls:
    """What the layers are called with while `work` runs."""
    calls: Calls = {name: [] for name in layers}

    def hook(name: str, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        calls[name].append((args, given))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name in layers
    ]
    with torch.no_grad():
        work()
    for each in hooks:
        each.remove()
    return calls


def batches(model: nn.Module, calls: Calls, numbers: Sequence[int]) -> list[Callable[[], Any]]:
    """Forwards of these layers alone, as they were recorded."""

    def forward(number: int) -> None:
        for name, each in calls.items():
            args, given = each[number]
            model.get_submodule(name)(*args, **given)

    return [partial(forward, number) for number in numbers]


def video() -> tuple[nn.Module, Calls, int]:
    """The model, calls of its layers, and how many of them, at the end, are for the test."""
    pipe: Any = load("tiny-world", pipeline="stock", dtype="float32", device="cpu")
    prompts = [describe(draw_scene(seed), random.Random(seed)) for seed in range(8)]
    names = [f"blocks.{layer}.attn1" for layer in LAYERS]

    def work() -> None:
        for seed, prompt in enumerate(prompts):
            pipe(
                prompt, height=128, width=128, num_frames=17, num_inference_steps=8, guidance_scale=1.0,
                output_type="latent", generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip

    return pipe.transformer, record(pipe.transformer, names, work), 16


def text() -> tuple[nn.Module, Calls, int]:
    lm: Any = LlamaForCausalLM.from_pretrained(bundled_text_model(), dtype=torch.float32).eval()
    names = [f"model.layers.{layer}.self_attn" for layer in LAYERS]
    place = torch.arange(LENGTH)
    seen = place[:, None] // BLOCK >= place // BLOCK
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill_(~seen, torch.finfo(torch.float32).min)

    def work() -> None:
        for number in range(40):
            ids = torch.cat([held_out(task, 1, LENGTH, 26, 1000 + number).ids for task in TASKS])
            ids[:, -BLOCK:] = MASK
            lm(input_ids=ids, attention_mask=mask, position_ids=place[None], use_cache=False)

    return lm, record(lm, names, work), 8


def learn(
    model: nn.Module, calls: Calls, test: int, make: Callable[..., Mixer], block: int | None, steps: int, seed: int
) -> tuple[float, float, float]:
    """Error before and after, the mean over layers, and the state a layer keeps over keys and values."""
    torch.manual_seed(seed)
    total = len(next(iter(calls.values())))
    order = torch.randperm(total - test, generator=torch.Generator().manual_seed(seed)).tolist()
    with convert(model, list(calls), partial(make, block=block)) as made:
        unseen = batches(model, calls, range(total - test, total))
        before = errors(made, unseen)
        distil(made, batches(model, calls, [order[i % len(order)] for i in range(steps)]), lr=1e-3)
        after = errors(made, unseen)
        name, put = next(iter(made.items()))
        args, given = calls[name][-1]
        x, pos = (args[0], args[3]) if args else (given["hidden_states"], given["position_embeddings"])
        with torch.no_grad():
            _, state = put.mixer(x, None, pos)
        kept = sum(leaf.numel() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    return statistics.mean(before.values()), statistics.mean(after.values()), kept / (2 * x.numel())


@torch.no_grad()
def milliseconds(layers: dict[str, nn.Module], length: int, width: int) -> dict[str, float]:
    x = torch.randn(1, length, width)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(5):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(x)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: min(each) for name, each in times.items()}


def table(found: dict[str, Any]) -> str:
    lines = [
        "| mixer | video: error before | after | text: error before | after | state | "
        + " | ".join(f"ms, {length}" for length in LENGTHS)
        + " |",
        "|---" * (6 + len(LENGTHS)) + "|",
    ]
    for name, row in found["arms"].items():
        cells = [name]
        for kind in ("video", "text"):
            for when in (0, 1):
                values = [each[when] for each in row[kind]] if kind in row else []
                mean = f"{statistics.mean(values):.3f}" if values else ""
                wide = f" ({min(values):.3f} to {max(values):.3f})" if when and len(values) > 1 else ""
                cells.append(mean + wide)
        cells.append(f"{row['text'][0][2]:.2f}" if "text" in row else "1.00")
        times = [found["ms"][str(length)].get(name) for length in LENGTHS]
        cells += ["" if ms is None else f"{ms:.1f}" for ms in times]
        lines.append(f"| {' | '.join(cells)} |")
    how = (
        f"{found['steps']} steps, learning rate 1e-3, seeds 0 to {found['seeds'] - 1} (mean, and least to most after), "
        f"layers {LAYERS[0]} and {LAYERS[1]}; {found['machine']}, one thread, torch {found['torch']}. "
        "`error`: mean square of the difference to the layer's output over that of the output, of what was not taught. "
        f"`state`: what is kept of {LENGTH} tokens of text over what their keys and values take. "
        "`ms`: a forward of one layer of the video model over so many tokens.\n"
    )
    return "\n".join([*lines, "", how])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", help="arms whose name holds this text")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = {"video": (*video(), None), "text": (*text(), BLOCK)}
    teacher: Any = settings["video"][0].get_submodule(f"blocks.{LAYERS[0]}.attn1")
    width = teacher.to_q.in_features
    how = {"steps": options.steps, "seeds": options.seeds, "machine": f"{platform.machine()} CPU"}
    how["torch"] = torch.__version__
    found: dict[str, Any] = how | {"arms": {"the layer itself": {}}}
    file = options.out / "mixers.json"
    if file.is_file() and how.items() <= (before := json.loads(file.read_text())).items():
        found["arms"] = before["arms"]
    options.out.mkdir(parents=True, exist_ok=True)
    layers: dict[str, nn.Module] = {"the layer itself": teacher}
    for name, make in ARMS.items():
        if options.only not in name:
            continue
        if name not in found["arms"]:
            found["arms"][name] = {
                kind: [learn(model, calls, test, make, block, options.steps, seed) for seed in range(options.seeds)]
                for kind, (model, calls, test, block) in settings.items()
            }
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(name, found["arms"][name], flush=True)
        layers[name] = make(teacher).eval()
    found["arms"] = {name: found["arms"][name] for name in ("the layer itself", *ARMS) if name in found["arms"]}
    found["ms"] = {}
    for length in LENGTHS:
        if length > 1024:
            layers.pop("LocalLinear", None)  # its moments take gigabytes there
        found["ms"][str(length)] = milliseconds(layers, length, width)
    file.write_text(json.dumps(found, indent=1) + "\n")
    readme = options.out / "README.md"
    if readme.is_file():
        head, _, rest = readme.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        readme.write_text(head + BEGIN + table(found) + END + after)
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
