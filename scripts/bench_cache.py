"""How fast and how large a long rollout is, dense and with bounded caches, at the shape of Wan2.1-1.3B.

    python scripts/bench_cache.py --out DIR          # one GPU
    python scripts/bench_cache.py --toy --out DIR    # any machine, seconds; figures mean nothing

480x832, blocks of 3 latent frames, 4 denoising steps and the clean pass, random weights. A random model's keys have no
redundancy in time, so those of a finished block are replaced by replayed ones before its cache is committed: a token
lives for 1 / RESETS frames on average, drifting a little, then becomes another, in all layers alike. That makes
TempCache(0.9) without a budget keep about the share of a dense cache that its paper reports (16 %); the share met is in
the results. Blocks between the measured ones are committed without being denoised.

Some arms run again with the transformer's blocks compiled.

For each arm and each measured frame: milliseconds of a denoising step, of the clean pass and of the commit in it, keys
in a layer, bytes of the cache, and the peak of the allocator. Correctness first: TempCache(None) must equal dense.
Results go to DIR/cache.jsonl line by line.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_seam import FRAMES, SHAPES, Bench
from torch import Tensor

from diffaccel import Accel, Grid, SinkRecent, Site, TempCache
from diffaccel.cache import Extent, KVCache, Memory
from diffaccel.policy import CachePolicy

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
        self.forward(0)
        steps = [self.forward(step) for step in range(1, STEPS)]
        clean = self.forward(STEPS, "clean")
        self.block += 1
        memories = list(self.run._memories.values())
        step, commit = sorted(steps)[len(steps) // 2], 1e3 * self.cache.seconds
        return {
            "step_ms": step,
            "clean_ms": clean,
            "commit_ms": commit,
            "block_ms": STEPS * step + clean,
            "fps": 4 * FRAMES / (STEPS * step + clean) * 1e3,
            "commit_share": commit / (STEPS * step + clean),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for cache.jsonl")
    parser.add_argument("--only", default="", help="arms whose name holds this text")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    measured = (9, 15, 24, 30) if options.toy else MEASURED
    few, small, endless = ("10 frames", "9 frames", 10**6) if options.toy else ("24 frames", "12 frames", 10**6)
    arms: dict[str, tuple[CachePolicy, int]] = {
        "dense": (KVCache(), 24 if options.toy else MOST_DENSE),
        "TempCache 0.9": (TempCache(0.9), 24 if options.toy else MOST_DENSE),
        "SinkRecent 20+1": (SinkRecent(20, 1) if not options.toy else SinkRecent(5, 1), measured[-1]),
        f"TempCache 0.9, {few}": (TempCache(0.9, budget=few), endless),
        f"TempCache 0.9, {small}": (TempCache(0.9, budget=small), endless),
        f"TempCache 0.9, {few}, 8 bits": (TempCache(0.9, budget=few, bits=8), endless),
    }
    compiled = ["dense", "SinkRecent 20+1", f"TempCache 0.9, {few}", f"TempCache 0.9, {small}"]
    with torch.no_grad():
        bench = Bench(SHAPES["toy" if options.toy else "wan-1.3b"], device, options.out, 1, "cache.jsonl")
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        bench.say("environment", device=name, torch=torch.__version__, kernel=bench.kernel, tokens=bench.tokens)
        check_exact(bench)
        rollouts(bench, arms, measured, options.only)
        if device == "cuda":
            bench.model.compile_repeated_blocks(fullgraph=True)
            arms = {f"{arm}, blocks compiled": arms[arm] for arm in compiled}
            rollouts(bench, arms, [frame for frame in measured if frame >= MOST_DENSE], options.only)


def rollouts(bench: Bench, arms: dict[str, tuple[CachePolicy, int]], measured: Sequence[int], only: str) -> None:
    for arm, (cache, most) in arms.items():
        if only not in arm:
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        frames = [frame for frame in measured if frame <= most]
        rollout = Rollout(bench, cache, frames[-1] + FRAMES)
        for frame in frames:
            while (rollout.block + 1) * FRAMES <= frame:
                rollout.skip()
            bench.say(f"{arm}, frame {frame}", arm=arm, frame=frame, **rollout.measure())
        rollout.close()


if __name__ == "__main__":
    main()
