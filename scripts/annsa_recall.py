"""Recall of attention mass against density, on a model's own queries and keys: AnnSA between random and best choices.

    python scripts/annsa_recall.py --out out/recall    # the bundled model, two CPU cores: four minutes
    python scripts/annsa_recall.py --out out/recall --model DIR --frames 81 --size 832x480 --device cuda

Generation is dense. At some steps of some blocks of the video, what each method would read of the past is worked out
on the side. Recall is the share of the softmax mass over the past that the keys read hold: the mean over queries,
heads, prompts, layers, steps and blocks. A bidirectional model has no past; its queries choose from the whole video.

AnnSA reads no means and no frames that it did not choose (summaries=False, sink_frames=0), as the others do not. Its
index grows block by block as in use, and it chooses at the step that is looked at (refresh="step"):

AnnSA, kmeans | hash | place     its blocks of keys and of queries, and its ranking, for each `groups`
block-mean top-k                 consecutive blocks, ranked by the product of their mean key and the mean query
random blocks                    consecutive blocks, drawn for each block of queries
oracle: blocks of ...            the blocks of largest true mass, for each block of queries
oracle: keys of each query       the keys of largest true mass, for each query

All read equally many keys in blocks of the sizes that AnnSA takes. Writes recall.jsonl, a line a method, density and
call, recall.png and table.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import torch
from cache_quality import PROMPTS
from torch import Tensor
from torch.nn.functional import pad

from diffaccel import Accel, AnnSA, Site
from diffaccel.cache import Entries
from diffaccel.kernel import resolve
from diffaccel.kernel.block_sparse import BlockLists
from diffaccel.pipelines.inputs import block_ranges
from diffaccel.pipelines.loading import defaults, load
from diffaccel.plots import check_plots
from diffaccel.policy import Selector
from diffaccel.selection.recall import mass_read

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
LAYERS_AT = 0.3
GROUPS = {"kmeans": "blocks of kmeans", "hash": "blocks of hash", "place": "consecutive blocks"}
MEANS, RANDOM, KEYS = "block-mean top-k", "random blocks", "oracle: keys of each query"
METHODS = (*(f"AnnSA, {groups}" for groups in GROUPS), MEANS, RANDOM)
METHODS += (*(f"oracle: {blocks}" for blocks in GROUPS.values()), KEYS)
DENSE_STEPS, STEPS = 0.3, 2  # as AnnSA the first steps are left out; of the others the first and the last are looked at


def annsa(density: float, groups: str) -> AnnSA:
    return AnnSA(density, groups, summaries=False, min_past=0.0, refresh="step", dense_steps=0.0, sink_frames=0)


def recalls(q: Tensor, entries: Entries, site: Site, density: float) -> dict[str, tuple[float, float]]:
    """Of each method, the share of `entries` that queries (B, S, H, D) read and the share of the mass on it."""
    scale, found = q.shape[-1] ** -0.5, {}
    kernel = resolve("auto", q.device, q.dtype, q.shape[-1])
    for groups, name in GROUPS.items():
        chosen = annsa(density, groups).plan(q, entries, site)
        oracle, others = f"oracle: {name}", (MEANS, RANDOM, KEYS) if groups == "place" else ()
        if chosen is None:  # everything
            found |= dict.fromkeys((f"AnnSA, {groups}", oracle, *others), (1.0, 1.0))
            continue
        share = chosen.keys_read / entries.count
        found[f"AnnSA, {groups}"] = share, float(mass_read(kernel, q, entries, chosen, scale).mean())
        mass = block_mass(q, chosen.k, chosen.blocks, scale, chosen.order)
        listed, short = chosen.blocks.listed(mass.shape[-1]), chosen.k.shape[1] % chosen.blocks.key_block != 0
        scores = {oracle: mass}
        if groups == "place":
            asked, keys = _means(q, chosen.blocks.query_block), _means(chosen.k, chosen.blocks.key_block)
            scores |= {MEANS: asked @ keys.mT, RANDOM: torch.rand_like(mass)}
            best = [p.topk(chosen.keys_read).values.sum(-1).mean() for p in attention(q, entries.k, scale)]
            found[KEYS] = share, float(torch.stack(best).mean())
        for method, score in scores.items():
            found[method] = share, float((mass * highest(score, listed, short)).sum((-2, -1)).mean())
    return found


def attention(q: Tensor, k: Tensor, scale: float, order: Tensor | None = None) -> Iterator[Tensor]:
    """The softmax map (S, N), fp32, of each row and head; `order` (B, H, S) permutes the queries."""
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            asked = q[row, :, head] if order is None else q[row, order[row, head], head]
            yield (asked.float() @ k[row, :, head].float().T * scale).softmax(-1)


def block_mass(q: Tensor, k: Tensor, blocks: BlockLists, scale: float, order: Tensor | None) -> Tensor:
    """Mass between blocks of queries and of keys, (B, H, QB, NB); that of a head adds up to 1."""
    found = []
    for p in attention(q, k, scale, order):
        whole = pad(p, (0, -p.shape[1] % blocks.key_block, 0, -p.shape[0] % blocks.query_block))
        cells = whole.unflatten(1, (-1, blocks.key_block)).sum(2).unflatten(0, (-1, blocks.query_block)).sum(1)
        found.append(cells / p.shape[0])
    return torch.stack(found).unflatten(0, (q.shape[0], q.shape[2]))


def highest(scores: Tensor, listed: Tensor, short: bool) -> Tensor:
    """As many blocks as each list of `listed` names, those of the highest scores; bool (B, H, QB, NB).

    A short last block stays where it is listed, so that as many keys are read.
    """
    scores = scores.clone()
    if short:
        scores[..., -1] = torch.where(listed[..., -1], torch.inf, -torch.inf)
    return scores.argsort(-1, descending=True).argsort(-1) < listed.sum(-1, keepdim=True)


def _means(x: Tensor, block: int) -> Tensor:
    """Of consecutive blocks, (B, H, blocks, D)."""
    return torch.stack([part.mean(1, dtype=torch.float32) for part in x.split(block, 1)], 2)


@dataclass(frozen=True)
class Watch(Selector):
    """Reads everything, and notes what others would have read."""

    slot: ClassVar[str] = "selection"
    exact: ClassVar[dict[str, Any]] = {}
    layers: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    others: tuple[int, ...] = ()  # blocks in which the indexes grow and nothing is noted
    rows: list[dict[str, Any]] = field(default_factory=list, compare=False)

    def apart(self, site: Site) -> bool:
        return True

    def plan(self, q: Tensor, entries: Entries, site: Site) -> None:
        if site.phase != "denoise" or site.branch == "uncond" or entries.at_work or site.layer not in self.layers:
            return
        steps = evenly(range(ceil(DENSE_STEPS * site.steps), site.steps), STEPS)
        if site.block in self.blocks and site.step in steps:
            where = {name: getattr(site, name) for name in ("layer", "step", "block")} | {"keys": entries.count}
            for density in DENSITIES:
                for method, (share, recall) in recalls(q, entries, site, density).items():
                    self.rows.append({"method": method, "density": density, "read": share, "recall": recall, **where})
        elif site.block in self.others and site.step == steps[0]:
            for density in DENSITIES:
                for groups in GROUPS:
                    annsa(density, groups).plan(q, entries, site)


def evenly(values: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many, first and last among them."""
    picks = torch.linspace(0, len(values) - 1, min(most, len(values))).round().int().tolist()
    return tuple(values[pick] for pick in picks)


def watch(options: argparse.Namespace) -> list[dict[str, Any]]:
    pipe = load(options.model, dtype=options.dtype, device=options.device)
    given = defaults(pipe, options.model)
    width, height = map(int, options.size.lower().split("x")) if options.size else (given.width, given.height)
    blocks = [0]
    if getattr(pipe, "block_causal", False):
        latents = 1 + (options.frames - 1) // pipe.vae_scale_factor_temporal
        ranges = block_ranges(0, latents, pipe.config.frames_per_block)
        blocks = [number for number, r in enumerate(ranges) if r.start >= max(1, options.min_past * len(r))]
    if not blocks:
        sys.exit(f"no block has a past of min_past={options.min_past} times its length: raise --frames")
    layers = evenly(range(pipe.transformer.config.num_layers), options.layers)
    policy = Watch(layers, evenly(blocks, options.blocks), tuple(blocks))
    prompts = list(PROMPTS[: options.prompts])
    run = Accel(selection=policy).apply(pipe)
    try:
        pipe(
            prompts,
            height=height,
            width=width,
            num_frames=options.frames,
            num_inference_steps=options.steps or given.num_inference_steps,
            guidance_scale=given.guidance_scale,
            generator=[torch.Generator().manual_seed(number) for number in range(len(prompts))],
            output_type="latent",
        )
    finally:
        run.remove(check=False)
    return policy.rows


def mean(rows: Iterable[dict[str, Any]], value: str = "recall", **where: Any) -> float:
    found = [row[value] for row in rows if all(row[name] == wanted for name, wanted in where.items())]
    return sum(found) / len(found)


def tables(rows: list[dict[str, Any]]) -> str:
    """Recall by density, AnnSA's distance to the oracle of its blocks, and recall by layer."""
    layers = sorted({row["layer"] for row in rows})

    def line(name: str, values: Iterable[str]) -> str:
        return f"| {name} | " + " | ".join(values) + " |"

    def header(name: str, values: Iterable[Any]) -> list[str]:
        return [line(name, map(str, values)), "|---" * (1 + len(list(values))) + "|"]

    recall = {(m, d): mean(rows, method=m, density=d) for m in METHODS for d in DENSITIES}
    lines = header("recall at density", DENSITIES)
    lines.append(line("share read", (f"{mean(rows, 'read', density=d):.3f}" for d in DENSITIES)))
    lines += [line(method, (f"{recall[method, d]:.3f}" for d in DENSITIES)) for method in METHODS]
    for groups, name in GROUPS.items():
        apart = [100 * (recall[f"oracle: {name}", d] - recall[f"AnnSA, {groups}", d]) for d in DENSITIES]
        lines.append(line(f"AnnSA, {groups}: points below its oracle", (f"{value:.1f}" for value in apart)))
    lines += ["", *header(f"recall at {LAYERS_AT}, layer", layers)]
    for method in METHODS:
        each = (mean(rows, method=method, density=LAYERS_AT, layer=layer) for layer in layers)
        lines.append(line(method, (f"{value:.3f}" for value in each)))
    return "\n".join(lines)


def draw(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    colours = {name: colormaps["tab10"](number) for number, name in enumerate(GROUPS)}
    styles = {f"AnnSA, {name}": (colours[name], "-o") for name in GROUPS}
    styles |= {f"oracle: {blocks}": (colours[name], "--") for name, blocks in GROUPS.items()}
    styles |= {MEANS: ("tab:red", "-s"), RANDOM: ("gray", "-x"), KEYS: ("black", "--")}
    for method, (colour, style) in styles.items():
        read, recall = ([mean(rows, v, method=method, density=d) for d in DENSITIES] for v in ("read", "recall"))
        axes.plot(read, recall, style, color=colour, label=method, markersize=4)
    axes.set(title=title, xlabel="share of the keys read", ylabel="recall of attention mass", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="folder of a checkpoint, block-causal or not; default: the bundled one")
    parser.add_argument("--frames", type=int, default=161, help="pixel frames, 1 + 4k")
    parser.add_argument("--size", help="pixels, WxH; default: the checkpoint's")
    parser.add_argument("--prompts", type=int, default=2, help=f"up to {len(PROMPTS)}, all in one batch")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the checkpoint's")
    parser.add_argument("--layers", type=int, default=8, help="how many to look at, evenly spaced")
    parser.add_argument("--blocks", type=int, default=3, help="of those whose past is long enough")
    parser.add_argument("--min-past", type=float, default=AnnSA().min_past, help="keys a query from which it is")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device")
    options = parser.parse_args(arguments)
    check_plots()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    began = time.perf_counter()
    rows = watch(options)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    settings = {name: getattr(options, name) for name in ("model", "frames", "size", "prompts", "dtype")}
    settings |= {"device": device, "torch": torch.__version__}
    with (options.out / "recall.jsonl").open("w") as lines:
        lines.writelines(json.dumps(settings | row) + "\n" for row in rows)
    sampled = {name: sorted({row[name] for row in rows}) for name in ("layer", "step", "block", "keys")}
    print(f"{device}, {time.perf_counter() - began:.0f} s; sampled", ", ".join(f"{n} {v}" for n, v in sampled.items()))
    (options.out / "table.md").write_text(tables(rows) + "\n")
    print(tables(rows))
    draw(options.out / "recall.png", rows, f"{options.model or 'bundled model'}, {options.frames} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
