"""What a bounded cache, a part of the keys, or reuse costs: techniques against dense attention, on a bundled model.

    python scripts/cache_quality.py --out out/cache                 # 8 prompts, 325 frames: minutes on a GPU
    python scripts/cache_quality.py --out out/cache --frames 81 --prompts 2 --only "budget 50"
    python scripts/cache_quality.py --out out/selection --suite selection --frames 161 --returns 0
    python scripts/cache_quality.py --out out/reuse --suite reuse --frames 161 --returns 0    # calibrates first
    python scripts/cache_quality.py --out out/policies --suite policies    # every scored cache at equal memory
    python scripts/cache_quality.py --out out/selectors --suite selectors  # every selector at equal density

Every arm starts from the same noise. PSNR and SSIM of its frames against the dense ones, the first block left out: with
shared history (every block starts from the dense run's past) and free-running. `recall` is the attention mass the cache
answered for (`Observer`), `memory` the share of a dense cache, at the end, that a layer held, `read` the share of
dense attention's keys that were read, steps and passes that read everything included. `returns` is a task that
only memory can solve: clips whose sprite leaves and must come back the same (scripts/score_tiny_world.py). `switches`
is one that memory hinders: from the fifth of seven blocks on the prompt names another colour, which the sprite takes.

Results are appended to results.jsonl in --out as they come; a run that is started again skips what is there, and
`--share 2/4` takes every fourth arm from the second on, so that several processes share the work. At the end table.md
and curve.png are written.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import policy_arms
import selector_arms
import torch
from tiny_world.metrics import Clip, memory_scenes, remembers
from tiny_world.prompts import describe
from tiny_world.world import Scene, draw_scene
from torch import Tensor

from diffaccel import Accel, AnnCA, AnnSA, FlashBlock, Report, SinkRecent, Site, TempCache
from diffaccel.cache.merged import MergedTier, MergedTokens
from diffaccel.calibrate import PROMPTS as CALIBRATION
from diffaccel.calibrate import calibrate, summary
from diffaccel.kernel import Partial
from diffaccel.pipelines.loading import load
from diffaccel.plots import check_plots
from diffaccel.policy import Answer
from diffaccel.quality import psnr, ssim
from diffaccel.techniques import TECHNIQUES

PROMPTS = (
    "a large red circle moves left slowly over a teal checkerboard",
    "a small blue ring bounces over a striped navy background. the camera pans right",
    "a large yellow cross circles over a plain gray background",
    "a small white triangle moves up quickly over a maroon gradient",
    "a large green square moves right and a small purple circle moves left over a plain black background",
    "a small banded cyan cross stays still over a plum checkerboard while the camera pans left",
    "a large shaded purple square moves down slowly over a striped gray background",
    "a small red triangle circles around over a plain teal background. the camera pans up",
)
BLOCK, SINK = 3, 1
TRAINED = 81  # frames of a training clip
STRIDE = 8  # frames between those that SSIM is taken of
RETURNS = ("return", "pan_return")
CHANGE = 4  # block from which on the prompt is another


class RandomEviction(TempCache):
    """A budget kept by throwing anything away: what eviction must beat."""

    def _worth(self, merged: MergedTokens, memories: Any, site: Site) -> Tensor:
        generator = torch.Generator().manual_seed(site.start)
        return torch.rand(merged.count.shape, generator=generator).to(merged.count.device)


class Unweighted(TempCache):
    """Merging without log-multiplicities: every entry counts as one token, as in methods that only average."""

    def commit(self, memories: Any, site: Site, run: Any) -> None:
        super().commit(memories, site, run)
        for memory in memories:
            memory.older = [_OneEach(tier.rows, tier.bytes, tier.host_bytes, tier.heads) for tier in memory.older]


class _OneEach(MergedTier):
    def partial(self, q: Tensor, read: Any) -> Partial:
        return super().partial(q, lambda q, entries: read(q, replace(entries, multiplicity=None)))


@dataclass(frozen=True)
class Arm:
    name: str
    accel: Accel
    seed: int = 0
    tasks: bool = False  # whether it is asked to remember, and to follow another prompt


def arms(frames: int) -> list[Arm]:
    """Every arm, for a video of so many latent frames."""
    found = controls()
    for percent in (25, 50, 35, 15, 10):
        held = round(frames * percent / 100)
        if held < SINK + 2 * BLOCK:
            continue

        def cache(threshold: Any = 0.9, kind: Any = TempCache, held: int = held, **knobs: Any) -> Accel:
            return Accel(cache=kind(threshold, budget=f"{held} frames", sink_frames=SINK, **knobs))

        name, tasks = f"budget {percent} %", percent in (25, 10)
        found += [
            Arm(f"{name}: SinkRecent", Accel(cache=SinkRecent(held - SINK - BLOCK, SINK)), tasks=tasks),
            Arm(f"{name}: TempCache", cache(), tasks=tasks),
            Arm(f"{name}: the paper's form", cache(variant="paper")),
            Arm(f"{name}: random eviction", cache(None, RandomEviction, overflow="recency")),
        ]
        if percent in (10, 25, 50):  # a summary by frames is at most 64 entries, one by cells is one frame of 64
            found += [
                Arm(
                    f"{name}: SinkRecent, {kind} summaries",
                    Accel(cache=SinkRecent(held - SINK - BLOCK - 1, SINK, kind)),
                )
                for kind in ("frame", "cell")
            ]
        if percent in (10, 15):
            found += [
                Arm(f"{name}: TempCache, merging above {bound}", cache(overflow_threshold=bound))
                for bound in (0.3, 0.6)
            ]
        if percent == 25:
            found += [
                Arm(f"{name}: TempCache, one frame recent", cache(recent_frames=1)),
                Arm(f"{name}: TempCache, two frames recent", cache(recent_frames=2)),
                Arm(f"{name}: TempCache, only the budget", cache(None)),
                Arm(f"{name}: TempCache, per head", cache(heads="per_head")),
                Arm(f"{name}: TempCache, unweighted", cache(kind=Unweighted)),
                Arm(f"{name}: TempCache, 8 bits", cache(bits=8)),
                Arm(f"{name}: TempCache, 4 bits", cache(bits=4)),
                Arm(f"{name}: TempCache, evicting by recency", cache(overflow="recency")),
                Arm(f"{name}: TempCache, evicting by mass", cache(overflow="mass")),
            ]
    for threshold in (0.99, 0.97, 0.95, 0.9, 0.85, 0.8):
        found.append(Arm(f"TempCache {threshold}", Accel(cache=TempCache(threshold)), tasks=threshold == 0.9))
    for threshold in (0.97, 0.95, 0.9):
        found.append(
            Arm(f"TempCache {threshold}, the paper's form", Accel(cache=TempCache(threshold, variant="paper")))
        )
    return found


def selections() -> list[Arm]:
    """Arms of `--suite selection`: what is read at densities, how tokens are grouped, what means are worth."""
    found = controls()
    for density in (0.1, 0.2, 0.3, 0.5):
        for groups in ("kmeans", "hash", "prompt", "place"):
            for summaries in (True, False):
                name = f"{groups}{'' if summaries else ', no means'}"
                found.append(Arm(f"{density}: {name}", Accel(selection=AnnSA(density, groups, summaries=summaries))))
    for name, knobs in (
        ("no dense steps", {"dense_steps": 0.0}),
        ("clean pass too", {"clean_pass": "sparse"}),
        ("chosen at every step", {"refresh": "step"}),
        ("any past", {"min_past": 0.0}),
        ("from twice the block on", {"min_past": 2.0}),
        ("from six times the block on", {"min_past": 6.0}),
        ("newest block whole", {"recent_frames": BLOCK}),
        ("sorted anew at every block", {"resort": 1.0}),
        ("sorted anew when grown by half", {"resort": 1.5}),
        ("never sorted anew", {"resort": 1e9}),
    ):
        found.append(Arm(f"0.3: kmeans, {name}", Accel(selection=AnnSA(0.3, **knobs))))  # type: ignore[arg-type]
    both = Accel(selection=AnnSA(0.3), cache=TempCache(0.9))
    found += [Arm("TempCache 0.9", Accel(cache=TempCache(0.9))), Arm("TempCache 0.9 and AnnSA 0.3", both)]
    found += [Arm(f"AnnCA, {bits} bits", Accel(prompt=AnnCA(bits))) for bits in (0, 6, 8, 10, 12)]
    return found


class OnlyOneBlock(FlashBlock):
    """Reuses in the fifth block alone: how far a single block's error carries a free-running video."""

    def answer(self, site: Site) -> Answer:
        return super().answer(site) if site.block == 4 else "together"


def reuses(profile: Path) -> list[Arm]:
    """Arms of `--suite reuse`: fixed steps, least drift, the paper's thresholds, what a selection leaves."""
    found = controls()
    for share, steps in ((0.5, (0, 2, 4, 6)), (0.375, (0, 3, 6)), (0.25, (0, 5)), (0.125, (0,))):
        found.append(Arm(f"{share}: steps {', '.join(map(str, steps))}", Accel(reuse=FlashBlock(refresh=steps))))
        if share > 0.125:
            for damping in (0.0, 0.5):
                reuse = FlashBlock(profile=str(profile), share=share, extrapolate=damping)
                name = f"{share}: least drift{', extrapolated' if damping else ''}"
                found.append(Arm(name, Accel(reuse=reuse)))
            reuse = FlashBlock(refresh=steps, extrapolate=0.5)
            found.append(Arm(f"{share}: steps {', '.join(map(str, steps))}, extrapolated", Accel(reuse=reuse)))
    thresholds = FlashBlock(profile=str(profile))
    selection, first = AnnSA(0.3, summaries=False), (0, 1, 2, 3)
    return [
        *found,
        Arm("the paper's thresholds", Accel(reuse=thresholds)),
        Arm("the paper's thresholds, clean pass too", Accel(reuse=replace(thresholds, clean_pass="reuse"))),
        Arm("0.5: steps 0, 2, 4, 6, clean pass too", Accel(reuse=FlashBlock(refresh=2, clean_pass="reuse"))),
        Arm("0.125: steps 0, in one block only", Accel(reuse=OnlyOneBlock(refresh=(0,)))),
        Arm("AnnSA 0.3, no means", Accel(selection=selection)),
        Arm("first four steps", Accel(reuse=FlashBlock(refresh=first))),  # AnnSA reads everything in the first three
        Arm("first four steps, AnnSA 0.3 reused", Accel(selection=selection, reuse=FlashBlock(refresh=first))),
        Arm(
            "first four steps, what AnnSA 0.3 leaves",
            Accel(selection=selection, reuse=FlashBlock(refresh=first, residual=True)),
        ),
        Arm("TempCache 0.95 and 0.5", Accel(cache=TempCache(0.95), reuse=FlashBlock(refresh=2))),
    ]


def calibrated(options: argparse.Namespace, method: type[Any] = FlashBlock) -> Path:
    """A profile of a technique for the model, made if it is not there."""
    path: Path = options.out / f"{method.__name__.lower()}.json"
    if not path.exists():
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        pipe = load(options.model, pipeline="causal", device=device, dtype=options.dtype)
        pipe.set_progress_bar_config(disable=True)
        size = {"width": 128, "height": 128, "num_frames": min(options.frames, TRAINED)}
        made = calibrate(pipe, method(), prompts=CALIBRATION, num_inference_steps=8, guidance_scale=2.5, **size)
        made.save(path)
        print("\n".join(summary(made)), flush=True)
    return path


def controls() -> list[Arm]:
    """What every table begins with."""
    return [
        Arm("dense", Accel(), tasks=True),
        Arm("noise floor (split kernel)", Accel(kernel="split")),
        Arm("another seed", Accel(), seed=1000),
    ]


def policies(options: argparse.Namespace, bench: "Bench") -> list[Arm]:
    """Arms of `--suite policies`."""
    frames = 1 + (options.frames - 1) // 4
    return controls() + [
        Arm(name, accel, tasks="oracle" not in name)
        for name, accel in policy_arms.arms(frames, bench.generate, profiles(options, "cache"))
    ]


def profiles(options: argparse.Namespace, slot: str) -> dict[str, str]:
    """The file of each technique of a slot that goes by one; where `--only` names techniques, of those."""
    if options.uncalibrated:
        return {}
    needy = [technique for technique in TECHNIQUES if technique.slot == slot and technique.needs == "calibration"]
    if any(technique.__name__ in options.only for technique in TECHNIQUES):
        needy = [technique for technique in needy if technique.__name__ in options.only]
    return {technique.__name__: str(calibrated(options, technique)) for technique in needy}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must agree between results of one table."""
    return {name: getattr(options, name) for name in ("model", "frames", "prompts", "returns", "switches", "dtype")}


class Bench:
    """The model, the dense run and what arms are compared with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = load(options.model, pipeline="causal", device=self.device, dtype=options.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts, self.frames, self.settings = list(PROMPTS[: options.prompts]), options.frames, settings(options)
        self.scenes = [scene for event in RETURNS for scene in memory_scenes(event, options.returns)[0]]
        drawn = (draw_scene(seed, ("recolor",)) for seed in range(10**6))
        self.recolours = list(islice((scene for scene in drawn if len(scene.sprites) == 1), options.switches))
        self.dense, _ = self.generate(Accel())
        self.video = self.decode(self.dense)

    def generate(self, accel: Accel, history: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Report]:
        return self._run(accel, self.prompts, self.frames, seed, history, observe=history is not None)

    def _run(
        self,
        accel: Accel,
        prompts: Sequence[str],
        frames: int,
        seed: int,
        history: Tensor | None,
        observe: bool,
        **more: Any,
    ) -> tuple[Tensor, Report]:
        generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
        run = accel.apply(self.pipe, observe=observe)
        try:
            latents = self.pipe(
                list(prompts),
                height=128,
                width=128,
                num_frames=frames,
                num_inference_steps=8,
                guidance_scale=2.5,
                generator=generators,
                history=history,
                output_type="latent",
                **more,
            ).frames
        finally:
            run.remove(check=False)
        return latents, run.report()

    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 frames (B, F, H, W, 3), one video at a time."""
        rows = (self.pipe.decode_latents(row[None]) for row in latents)
        return np.concatenate([np.rint(255 * np.asarray(row)).astype(np.uint8) for row in rows])

    def distance(self, latents: Tensor) -> dict[str, float]:
        """PSNR (of the error pooled over frames and prompts) and mean SSIM to the dense video, first block left out."""
        first = 1 + 4 * (BLOCK - 1)
        pairs = list(zip(self.decode(latents)[:, first:], self.video[:, first:], strict=True))
        errors = 10 ** (-np.array([psnr(a, b) for a, b in pairs]) / 10)
        return {
            "psnr": pooled(errors),
            "psnr_trained": pooled(errors[:, : TRAINED - first]),
            "psnr_last_block": pooled(errors[:, -4 * BLOCK :]),
            "ssim": round(float(np.mean([ssim(a[::STRIDE], b[::STRIDE]).mean() for a, b in pairs])), 4),
        }

    def returns(self, accel: Accel) -> float:
        """Share of the memory scenes whose sprite comes back the same."""
        prompts = [describe(scene, random.Random(scene.seed)) for scene in self.scenes]
        latents, _ = self._run(accel, prompts, TRAINED, 0, None, observe=False)
        clips = self.decode(latents)
        return float(np.mean([remembers(clip, scene) for clip, scene in zip(clips, self.scenes, strict=True)]))

    def switches(self, accel: Accel) -> float:
        """Share of the scenes whose sprite has the second prompt's colour at the end, and not the first's."""
        before, after = (
            [describe(scene, random.Random(scene.seed)) for scene in scenes]
            for scenes in ([s.before() for s in self.recolours], [s.after() for s in self.recolours])
        )

        def condition(block: int, *_: Any) -> dict[str, Any] | None:
            return {"prompt": after} if block == CHANGE else None

        latents, _ = self._run(accel, before, TRAINED, 0, None, observe=False, condition=condition)
        pairs = zip(self.decode(latents), self.recolours, strict=True)
        return float(np.mean([recoloured(clip, scene) for clip, scene in pairs]))

    def measure(self, arm: Arm) -> dict[str, Any]:
        began = time.perf_counter()
        shared, report = self.generate(arm.accel, self.dense, arm.seed)
        free, _ = self.generate(arm.accel, seed=arm.seed)
        blocks = report.blocks
        recall = [points[-1][1] for points in report.cache.get("recall", {}).values() if points]
        row: dict[str, Any] = {
            "arm": arm.name,
            "settings": self.settings,
            "memory": round(blocks[-1]["tokens"] / blocks[-1]["seen"], 3) if blocks else 1.0,
            "bytes": blocks[-1]["bytes"] if blocks else 0,
            "shared": self.distance(shared),
            "free": self.distance(free),
            "read": min([1.0, *(s.keys_read / s.keys_total for s in report.slots.values())]),
            "recall": round(sum(recall) / len(recall), 3) if recall else None,
            "drift": report.cache.get("drift"),
        }
        if self.scenes and arm.tasks:
            row["returns"] = round(self.returns(arm.accel), 3)
        if self.recolours and arm.tasks:
            row["switches"] = round(self.switches(arm.accel), 3)
        return row | {"seconds": round(time.perf_counter() - began, 1)}


def recoloured(clip: np.ndarray, scene: Scene) -> bool:
    """Whether the last frames of a clip show the sprite of a scene in its second colour."""
    seen = Clip(clip, 2)
    last = seen.within(TRAINED - 9, TRAINED)
    old, new = (seen.track(color).seen[last].mean() for color in (scene.sprites[0].color, scene.event_color))
    return bool(old < 0.5 < new)


def pooled(errors: np.ndarray) -> float:
    """dB of a mean of squared errors; 100 for none, as JSON has no infinity."""
    return round(float(-10 * np.log10(max(errors.mean(), 1e-10))), 2)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    kinds = "PSNR, over the training length, last block, SSIM"
    lines = [f"| arm | memory | read | shared history: {kinds} | free-running | recall | returns | switches |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        names = ("psnr", "psnr_trained", "psnr_last_block")
        cells = [
            ", ".join(f"{row[kind][name]:.1f}" for name in names) + f", {row[kind]['ssim']:.3f}"
            for kind in ("shared", "free")
        ]
        names = ("recall", "returns", "switches")
        tasks = " | ".join("" if row.get(name) is None else f"{row[name]:.2f}" for name in names)
        shares = f"{row['memory']:.2f} | {row['read']:.2f}"
        lines.append(f"| {row['arm']} | {shares} | {cells[0]} | {cells[1]} | {tasks} |")
    return "\n".join(lines)


def curve(rows: Sequence[dict[str, Any]], path: Path, share: str) -> None:
    """PSNR over `share`, what was kept ("memory") or read, one line a method."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = row["arm"].split(": ")[-1] if row["arm"].startswith("budget") else "TempCache, no budget"
        name = "the paper's form, no budget" if row["arm"].endswith("form") and ":" not in row["arm"] else name
        if share == "read":
            name = row["arm"].split(": ")[-1]
        if row["arm"].split()[0] in ("budget", "TempCache") or share == "read":
            families.setdefault(name, []).append(row)
    for axis, kind in zip(axes, ("shared", "free"), strict=True):
        for number, (name, members) in enumerate(families.items()):
            members = sorted(members, key=lambda row: row[share])
            style = "-o" if len(members) > 1 else "x"
            axis.plot(
                [m[share] for m in members],
                [m[kind]["psnr"] for m in members],
                style,
                color=colours[number % 20],
                label=name,
            )
        for row in rows:
            if row["arm"].startswith(("noise", "another")):
                axis.axhline(min(row[kind]["psnr"], 60), ls=":", color="gray")
                axis.text(0.02, min(row[kind]["psnr"], 60), row["arm"], fontsize=7)
        axis.set(
            xlabel={"memory": "share of a dense cache", "read": "share of the keys read"}[share],
            ylabel="PSNR to dense, dB",
            title={"shared": "shared history", "free": "free-running"}[kind],
        )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="folder of a causal checkpoint; default: the bundled one")
    parser.add_argument("--frames", type=int, default=325, help="pixel frames, 1 + 4k")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--returns", type=int, default=16, help="clips of each event of the memory task; 0 for none")
    parser.add_argument("--switches", type=int, default=16, help="clips whose prompt changes; 0 for none")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device")
    parser.add_argument("--suite", default="cache", choices=("cache", "selection", "reuse", "policies", "selectors"))
    parser.add_argument("--only", default="", help="arms whose name holds this text")
    parser.add_argument("--uncalibrated", action="store_true", help="without techniques that go by a profile")
    parser.add_argument("--share", default="1/1", help="which part of the arms, 2/4: the second of four")
    options = parser.parse_args(arguments)
    share, shares = map(int, options.share.split("/"))
    check_plots()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for row in rows:
        if row["settings"] != settings(options):
            print(f"{results} holds results of {row['settings']}; name another --out", file=sys.stderr)
            return 2
    bench = Bench(options)
    suites = {
        "cache": lambda: arms(1 + (options.frames - 1) // 4),
        "selection": selections,
        "reuse": lambda: reuses(calibrated(options)),
        "policies": lambda: policies(options, bench),
        "selectors": lambda: [
            *controls(),
            *(Arm(name, accel) for name, accel in selector_arms.arms(profiles(options, "selection"))),
        ],
    }
    every = suites[options.suite]()
    wanted = [arm for arm in every if options.only in arm.name][share - 1 :: shares]
    for arm in [arm for arm in wanted if arm.name not in {row["arm"] for row in rows}]:
        rows.append(bench.measure(arm))
        with results.open("a") as stream:
            stream.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    (options.out / "table.md").write_text(table(rows) + "\n")
    curve(rows, options.out / "curve.png", "memory" if options.suite in ("cache", "policies") else "read")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
