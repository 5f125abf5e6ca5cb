"""Recall against search time of every index, on queries and keys of the bundled model and on a Gaussian of that size.

    python scripts/ann_frontier.py --out out/ann                 # two CPU cores: a minute
    python scripts/ann_frontier.py --out out/ann --frames 325 --device cuda

Queries and keys are those of the last block of a dense run, as attention reads them (rotated), at a step midway, one
problem for each of a few layers' heads; what transforms learn from queries are those of the step before. Metric ip.
Writes frontier.jsonl, a line an index, and frontier.png; prints a table. Faiss is measured where it is installed.
"""

import argparse
import importlib.util
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffaccel import Accel, Plan, Site
from diffaccel.ann import IVF, LSH, Faiss, Index, ProductQuantized, Quantized, Row, frontier
from diffaccel.cache import Entries
from diffaccel.pipelines.loading import load
from diffaccel.policy import Selector

PROMPT = "a large red circle moves left slowly over a teal checkerboard"
TRANSFORMS = ("none", "centre", "scale", "points", "queries", "centre+scale", "centre+points", "centre+queries")
TRANSFORMS += ("centre+scale+points", "centre+scale+queries")
FAMILIES = ("Flat", "LSH", "IVF", "Quantized", "ProductQuantized", "Faiss")


class Problem(NamedTuple):
    """Vectors (heads of layers, count, D): keys, the queries that are asked and those of a step earlier."""

    keys: Tensor
    queries: Tensor
    sample: Tensor


@dataclass(frozen=True)
class Capture(Selector):
    """Reads everything, and notes queries and keys of some layers: the last call with a step number wins."""

    slot: ClassVar[str] = "selection"
    exact: ClassVar[dict[str, Any]] = {}
    layers: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    def plan(self, q: Tensor, entries: Entries, site: Site) -> Plan | None:
        if (site.part, site.branch) == ("self", "cond") and site.layer in self.layers and site.step in self.steps:
            held = self.seen.get((site.layer, site.step))
            if held is None or entries.k.shape[1] >= held[1].shape[1]:
                self.seen[site.layer, site.step] = q[0].transpose(0, 1).clone(), entries.k[0].transpose(0, 1).clone()
        return None


def attention_of(model: str, frames: int, device: str) -> Problem:
    """The first, a middle and the last layer, all heads."""
    pipe = load(model, pipeline="causal", device=device)
    count = pipe.transformer.config.num_layers
    layers, steps = (0, count // 2, count - 1), (3, 4)
    capture = Capture(layers=layers, steps=steps)
    run = Accel(selection=capture).apply(pipe)
    try:
        pipe(
            PROMPT,
            height=128,
            width=128,
            num_frames=frames,
            num_inference_steps=8,
            guidance_scale=2.5,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        )
    finally:
        run.remove(check=False)
    asked, before = ([capture.seen[layer, step] for layer in layers] for step in reversed(steps))
    return Problem(
        *(torch.cat(parts) for parts in ([k for _, k in asked], [q for q, _ in asked], [q for q, _ in before]))
    )


def gaussian_like(problem: Problem) -> Problem:
    generator = torch.Generator().manual_seed(0)
    return Problem(*(torch.randn(part.shape, generator=generator).to(part.device) for part in problem))


def grid() -> dict[str, Index]:
    found: dict[str, Index] = {}
    for candidates in (128, 256, 512, 1024, 2048):
        for tables in (4,) if candidates < 512 else (4, 16):
            found[f"LSH, {tables} tables, {candidates} candidates"] = LSH("ip", tables, candidates=candidates)
    found["LSH, 4 tables, 4 probes, 512 candidates"] = LSH("ip", probes=4, candidates=512)
    for transform in TRANSFORMS:
        found[f"LSH, {transform}"] = LSH("ip", transform=transform)
    for probes in (1, 2, 4, 8, 16, 64):
        found[f"IVF, {probes} of 64 lists"] = IVF("ip", probes=probes)
    found |= {f"Quantized, {bits} bits": Quantized("ip", bits) for bits in (8, 4)}
    found |= {f"ProductQuantized, {parts} parts": ProductQuantized("ip", parts) for parts in (8, 16, 32)}
    if importlib.util.find_spec("faiss") is not None:
        found["Faiss, Flat"] = Faiss("Flat", "ip")
        for probes in (1, 4, 8, 16):
            found[f"Faiss, IVF64,Flat, nprobe={probes}"] = Faiss("IVF64,Flat", "ip", f"nprobe={probes}")
        for effort in (32, 128):
            found[f"Faiss, HNSW16, efSearch={effort}"] = Faiss("HNSW16", "ip", f"efSearch={effort}")
    return found


def table(title: str, rows: list[Row], queries: int) -> str:
    lines = [f"{title}", f"{'':44s} recall   build ms   search us/query   MiB"]
    lines += [
        f"{row.name:44s} {row.recall:6.3f} {1e3 * row.build_seconds:10.1f} {1e6 * row.search_seconds / queries:17.2f}"
        f" {row.bytes / 2**20:5.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def draw(path: Path, measured: dict[str, list[Row]], queries: int, k: int, device: str) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, 2, sharey=True), measured.items(), strict=True):
        for number, family in enumerate(FAMILIES):
            points = [row for row in rows if row.name.split(",")[0] == family]
            if not points:
                continue
            x, y = [row.recall for row in points], [1e6 * row.search_seconds / queries for row in points]
            axes.scatter(
                x,
                y,
                s=90 if family == "Flat" else 22,
                marker="*" if family == "Flat" else "o",
                label=family,
                color=colormaps["tab10"](number),
                zorder=3 if family == "Flat" else 2,
            )
            best = _undominated(sorted(zip(x, y, strict=True), reverse=True))
            axes.plot(*zip(*best, strict=True), color=colormaps["tab10"](number), linewidth=1)
        axes.set(title=title, xlabel=f"recall@{k}", yscale="log", xlim=(0, 1.03))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"search, microseconds a query ({device})")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _undominated(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points by falling recall, those quicker than all with more."""
    kept: list[tuple[float, float]] = []
    for recall, seconds in points:
        if not kept or seconds < kept[-1][1]:
            kept.append((recall, seconds))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for frontier.jsonl and frontier.png")
    parser.add_argument("--model", default="tiny-world", help="a bundled model, or a folder")
    parser.add_argument("--frames", type=int, default=161)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    real = attention_of(options.model, options.frames, options.device)
    problems = {"queries and keys of the model": real, "Gaussian": gaussian_like(real)}
    queries = real.queries.shape[0] * real.queries.shape[1]
    device = (
        torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{len(real.keys)} problems of {real.queries.shape[1]} queries, {real.keys.shape[1]} keys, {device}")
    measured = {}
    with (options.out / "frontier.jsonl").open("w") as lines:
        for title, problem in problems.items():
            rows = frontier(grid(), problem.keys, problem.queries, options.k, sample=problem.sample)
            measured[title] = rows
            about = {"data": title, "k": options.k, "problems": len(problem.keys), "keys": problem.keys.shape[1]}
            about |= {"queries": queries, "dims": problem.keys.shape[2], "device": device, "torch": torch.__version__}
            lines.writelines(json.dumps(about | {"machine": platform.machine()} | row.to_dict()) + "\n" for row in rows)
            print(table(f"\n{title}, recall@{options.k}", rows, queries))
    draw(options.out / "frontier.png", measured, queries, options.k, device)


if __name__ == "__main__":
    main()
