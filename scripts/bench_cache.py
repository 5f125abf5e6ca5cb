"""How fast and how large a long rollout is, dense and with bounded caches, at the shape of Wan2.1-1.3B.

    python scripts/bench_cache.py --out DIR          # one GPU
    python scripts/bench_cache.py --out DIR --suite policies    # caches that score, and that hold less precisely
    python scripts/bench_cache.py --out DIR --suite selectors   # every selector, at a tenth of the keys
    python scripts/bench_cache.py --toy --out DIR    # any machine, seconds; figures mean nothing

480x832, blocks of 3 latent frames, 4 denoising steps and the clean pass, random weights. A random model's keys have no
redundancy in time, so those of a finished block are replaced by replayed ones before its cache is committed: a token
lives for 1 / RESETS frames on average, drifting a little, then becomes another, in all layers alike. That makes
TempCache(0.9) without a budget keep about the share of a dense cache that its paper reports (16 %); the share met is in
the results. Blocks between the measured ones are committed without being denoised.

Some arms of the first suite run again with the transformer's blocks compiled. Techniques that go by a profile have a
made-up one, which changes what they keep and not how long that takes.

For each arm and each measured frame: milliseconds of the first denoising step, where selectors choose, of a later one,
of the clean pass and of the commit in it, keys in a layer, bytes of the cache, and the peak of the allocator.
Correctness first: TempCache(None) must equal dense.
Results go to DIR/cache.jsonl line by line.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_seam import FRAMES, SHAPES, Bench
from torch import Tensor

from diffaccel import Accel, Grid, SinkRecent, Site, SnapKV, TempCache, ThinK, ZipCache
from diffaccel.cache import Extent, KVCache, Memory
from diffaccel.cache.remainder import REMAINDERS
from diffaccel.cache.scored import Scored
from diffaccel.policy import CachePolicy, Policy
from diffaccel.profile import Model, Profile, fingerprint
from diffaccel.selection.ranked import Choosing
from diffaccel.techniques import TECHNIQUES

RESETS, DRIFT, STEPS = 0.1, 0.02, 4
MEASURED = (30, 60, 120, 240, 480, 750)
MOST_DENSE = 240


class Replay:
    """Keys and values of a video that mostly stays: (T, H, D) a frame, the same for every layer up to a factor."""

    def __init__(self, like: Tensor, per_frame: int) -> None:
        self.generator = torch.Generator(device=like.device).manual_seed(0)
        self.shape, self.like = (per_frame, *like.shape[2:]), like
        self.k, self.v = self._new(), self._new()

    def _new(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, device=self.like.device)

    def frame(self) -> tuple[Tensor, Tensor]:
        reset = torch.rand(self.shape[0], 1, 1, generator=self.generator, device=self.like.device) < RESETS
        self.k = torch.where(reset, self._new(), self.k + DRIFT * self._new())
        self.v = torch.where(reset, self._new(), self.v)
        return self.k.to(self.like), self.v.to(self.like)


class Replayed:
    """A cache policy that sees replayed keys, and how long its commits take, if they are waited for."""

    def __init__(self, inner: CachePolicy) -> None:
        self.inner, self.replay, self.seconds, self.waits = inner, None, 0.0, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def commit(self, memories: list[Memory], site: Site, run: Any) -> None:
        per_frame, tokens = site.grid.tokens_per_frame, site.grid.tokens
        if self.replay is None:
            self.replay = Replay(memories[0].exact.past().entries.k, per_frame)
        frames = [self.replay.frame() for _ in range(site.grid.frames)]
        k, v = (torch.cat([frame[i] for frame in frames])[None] for i in range(2))
        for memory in memories:
            entries = memory.exact.past().entries
            entries.k[:, -tokens:], entries.v[:, -tokens:] = k, v
        if self.waits:
            synchronise(k)
        began = time.perf_counter()
        self.inner.commit(memories, site, run)
        if self.waits:
            synchronise(k)
            self.seconds = time.perf_counter() - began


def synchronise(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()


class Rollout:
    """One arm: an applied run whose blocks are denoised where they are measured."""

    def __init__(self, bench: Bench, cache: CachePolicy, frames: int, accel: Accel | None = None) -> None:
        self.bench, self.grid = bench, Grid(FRAMES, bench.shape["h"] // 2, bench.shape["w"] // 2)
        accel = replace(accel or Accel(), cache=None if isinstance(cache, KVCache) else cache)
        self.run = accel.apply(bench.pipe)
        self.cache = Replayed(cache)
        self.run.cache = self.cache  # type: ignore[assignment]
        shape = bench.shape
        self.extent = Extent(
            frames, self.grid, shape["layers"], shape["heads"], shape["dim"], rows=1, branches=1, dtype=bench.dtype
        )
        self.run.begin(frames, self.extent)
        self.block = 0

    def at(self, step: int, phase: str) -> Any:
        return self.run.at(block=self.block, start=self.block * FRAMES, step=step, steps=STEPS, phase=phase)  # type: ignore[arg-type]

    def forward(self, step: int, phase: str = "denoise") -> float:
        """Milliseconds of one forward."""
        synchronise(self.bench.text)
        began = time.perf_counter()
        with self.at(step, phase):
            self.bench.forward(self.bench.latents[self.block % 2], 500.0 if phase == "denoise" else 0.0)
        synchronise(self.bench.text)
        return 1e3 * (time.perf_counter() - began)

    def skip(self) -> None:
        """Commit a block without running the model: its keys are replayed anyway."""
        zeros = torch.zeros(
            1,
            self.grid.tokens,
            self.extent.heads,
            self.extent.head_dim,
            device=self.bench.device,
            dtype=self.bench.dtype,
        )
        with self.at(STEPS, "clean"):
            self.run.enter(self.grid, None, None, None)
            for layer in range(self.extent.layers):
                site = self.run.site(layer, "self")
                self.run.memory(site).place(zeros, zeros, site, zeros)
            self.run.leave()
        self.block += 1

    def measure(self) -> dict[str, float]:
        first = self.forward(0)
        steps = [self.forward(step) for step in range(1, STEPS)]
        clean = self.forward(STEPS, "clean")
        self.block += 1
        memories = list(self.run._memories.values())
        step, commit = sorted(steps)[len(steps) // 2], 1e3 * self.cache.seconds
        return {
            "first_ms": first,
            "step_ms": step,
            "clean_ms": clean,
            "commit_ms": commit,
            "block_ms": (block := first + (STEPS - 1) * step + clean),
            "fps": 4 * FRAMES / block * 1e3,
            "commit_share": commit / block,
            "keys": sum(memory.count for memory in memories) / len(memories),
            "kept": sum(memory.count for memory in memories) / len(memories) / memories[0].seen,
            "cache_gb": sum(memory.bytes for memory in memories) / 1e9,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
        }

    def close(self) -> None:
        self.run.remove(check=False)


def check_exact(bench: Bench) -> None:
    """TempCache that never merges reads what a dense cache reads."""
    found = []
    for cache in (KVCache(), TempCache(threshold=None)):
        rollout = Rollout(bench, cache, 9)
        rollout.skip()
        rollout.skip()
        with rollout.at(0, "denoise"):
            found.append(bench.forward(bench.latents[0], 500.0))
        rollout.close()
    if not torch.equal(*found):
        raise SystemExit("RED: TempCache(None) differs from a dense cache")
    bench.say("TempCache(threshold=None) equals dense, bit for bit")


@dataclass(frozen=True)
class Arm:
    cache: CachePolicy
    accel: Accel = field(default_factory=Accel)
    most: int = 10**6  # frame up to which it is measured
    compiled: bool = False  # whether once more with compiled blocks


def bounds(toy: bool) -> tuple[dict[str, Arm], Sequence[int]]:
    """What a bound saves, and the frames at which it is measured."""
    measured = (9, 15, 24, 30) if toy else MEASURED
    few, small, most = ("10 frames", "9 frames", 24) if toy else ("24 frames", "12 frames", MOST_DENSE)
    arms = {
        "dense": Arm(KVCache(), most=most, compiled=True),
        "TempCache 0.9": Arm(TempCache(0.9), most=most),
        "SinkRecent 20+1": Arm(SinkRecent(5 if toy else 20, 1), most=measured[-1], compiled=True),
        f"TempCache 0.9, {few}": Arm(TempCache(0.9, budget=few), compiled=True),
        f"TempCache 0.9, {small}": Arm(TempCache(0.9, budget=small), compiled=True),
        f"TempCache 0.9, {few}, 8 bits": Arm(TempCache(0.9, budget=few, bits=8)),
    }
    return arms, measured


def policies(toy: bool, bench: Bench) -> dict[str, Arm]:
    """Caches of the same size by what they keep, and those that hold everything less precisely."""
    held = 9 if toy else 12
    knobs: dict[str, Any] = {"budget": f"{held} frames", "sink_frames": 1, "recent_frames": FRAMES}
    arms = {
        "dense": Arm(KVCache()),
        "SinkRecent": Arm(SinkRecent(held - 1, 1)),
        "TempCache": Arm(TempCache(0.9, budget=f"{held} frames", sink_frames=1)),
        "ZipCache": Arm(ZipCache(0.6)),
        "ThinK": Arm(ThinK(0.6)),
    }
    for technique in TECHNIQUES:
        if issubclass(technique, Scored):
            arms[technique.__name__] = Arm(technique(**knobs, **profile(technique, bench)))
    dropped = {f"SnapKV, {kind}": Arm(SnapKV(**knobs, dropped=kind)) for kind in REMAINDERS}
    return arms | dropped


def selectors(bench: Bench) -> dict[str, Arm]:
    """Selectors that read a tenth of the keys, at every step."""
    arms = {"dense": Arm(KVCache())}
    for technique in TECHNIQUES:
        if issubclass(technique, Choosing) and "density" in technique.knobs():
            knobs: dict[str, Any] = {"density": 0.1, "dense_steps": 0.0, "min_past": 0.0}
            arms[technique.__name__] = Arm(KVCache(), Accel(selection=technique(**knobs, **profile(technique, bench))))
    return arms


def profile(technique: type[Policy], bench: Bench) -> dict[str, str]:
    """The knob of a technique that goes by a profile, of random tables."""
    if technique.needs != "calibration":
        return {}
    shape, random = bench.shape, np.random.default_rng(0)
    weights = fingerprint(bench.model)
    model = Model(type(bench.model).__name__, shape["layers"], shape["heads"], shape["dim"], weights)
    places = [tuple(map(float, range(shape["dim"] // 2))) for _ in technique.axes]
    size = (*map(len, places), model.layers, model.heads)
    tables = {name: random.uniform(0.1, 1, size) for name in technique.tables}
    video = {"width": 8 * shape["w"], "height": 8 * shape["h"], "frames": 9, "steps": STEPS}
    path = bench.out / f"{technique.__name__}.json"
    made = Profile(technique.__name__, model, video, 1, {}, {}, dict(zip(technique.axes, places, strict=True)), tables)
    made.save(path)
    return {"profile": str(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for cache.jsonl")
    parser.add_argument("--suite", default="bounds", choices=("bounds", "policies", "selectors"))
    parser.add_argument("--only", default="", help="arms whose name holds this text")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    with torch.no_grad():
        bench = Bench(SHAPES["toy" if options.toy else "wan-1.3b"], device, options.out, 1, "cache.jsonl")
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        bench.say("environment", device=name, torch=torch.__version__, kernel=bench.kernel, tokens=bench.tokens)
        check_exact(bench)
        if options.suite == "bounds":
            arms, measured = bounds(options.toy)
        elif options.suite == "policies":
            arms, measured = policies(options.toy, bench), (15, 24) if options.toy else (60, 120)
        else:  # twice: kernels are compiled in the first
            arms, measured = selectors(bench), (21, 24) if options.toy else (57, 60)
        rollouts(bench, arms, measured, options.only)
        if device == "cuda" and options.suite == "bounds":
            bench.model.compile_repeated_blocks(fullgraph=True)
            arms = {f"{name}, blocks compiled": arm for name, arm in arms.items() if arm.compiled}
            rollouts(bench, arms, [frame for frame in measured if frame >= MOST_DENSE], options.only)


def rollouts(bench: Bench, arms: dict[str, Arm], measured: Sequence[int], only: str) -> None:
    for name, arm in arms.items():
        if only not in name:
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        frames = [frame for frame in measured if frame <= arm.most]
        rollout = Rollout(bench, arm.cache, frames[-1] + FRAMES, arm.accel)
        rollout.forward(0)  # from which caches know how keys are rotated
        for frame in frames:
            while (rollout.block + 1) * FRAMES <= frame:
                rollout.skip()
            bench.say(f"{name}, frame {frame}", arm=name, frame=frame, **rollout.measure())
        rollout.close()


if __name__ == "__main__":
    main()
