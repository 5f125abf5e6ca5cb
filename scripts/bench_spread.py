"""One stream on one GPU and on several that share its heads, at the shape of Wan2.1-1.3B; correctness is checked first.

    torchrun --nproc-per-node 2 scripts/bench_spread.py --out DIR         # so many GPUs of one machine, 1 too; a minute
    torchrun --nproc-per-node 2 scripts/bench_spread.py --toy --out DIR   # any machine; figures mean nothing

480x832, blocks of 3 latent frames, 4 denoising steps and the clean pass, blocks compiled, keys replayed as in
`bench_cache.py`, 60 seconds into a video. Tokens are split between the GPUs, heads in self-attention. A block's
milliseconds (median of five, dense: two), and what the caches of one GPU hold. Results go to DIR/0/spread.jsonl as they
come, from the first process.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_seam import FRAMES, SHAPES, Bench
from bench_stream import BLOCKS, PIXELS, Stream
from diffusers import ContextParallelConfig
from torch import Tensor

from diffaccel import Accel, FlashBlock, SinkRecent, TempCache
from diffaccel.cache import KVCache
from diffaccel.policy import CachePolicy
from diffaccel.spread import devices_of


class Shared(Stream):
    """A stream whose cache holds this process's heads."""

    def __init__(self, bench: Bench, cache: CachePolicy, frames: int, accel: Accel) -> None:
        super().__init__(bench, cache, frames, accel)
        self.extent = replace(self.extent, heads=self.extent.heads // devices_of(bench.model))
        self.run.begin(frames, self.extent)


def arms(toy: bool) -> dict[str, tuple[CachePolicy, Accel]]:
    few = TempCache(0.9, budget="9 frames" if toy else "12 frames", heads="per_head")
    flash: Any = FlashBlock(refresh=(0,), min_past=0)
    return {
        "dense": (KVCache(), Accel()),
        "SinkRecent(20, 1)": (SinkRecent(5, 1) if toy else SinkRecent(20, 1), Accel()),
        "+ FlashBlock at step 0": (SinkRecent(5, 1) if toy else SinkRecent(20, 1), Accel(reuse=flash)),
        "TempCache, 12 frames, head by head, + FlashBlock": (few, Accel(reuse=flash)),
    }


def first_output(bench: Bench) -> Tensor:
    """Of the third block of a dense stream."""
    rollout = Shared(bench, KVCache(), 12, Accel())
    rollout.cache.commit = rollout.cache.inner.commit  # type: ignore[method-assign]  # its own keys, not replayed ones
    for _ in range(2):
        rollout.steps()
    out = rollout.forward_of(0, graphs=False)
    rollout.close()
    return out


def measure(bench: Bench, say: Callable[..., None], frames: int, toy: bool, gpus: int) -> None:
    for name, (cache, accel) in arms(toy).items():
        rollout = Shared(bench, cache, frames + FRAMES * (3 * BLOCKS + 9), accel)
        while rollout.block * FRAMES < frames:
            rollout.skip()
        for _ in range(3):
            rollout.steps()
        ms = rollout.timed(rollout.steps, 2 if name == "dense" else BLOCKS)
        held = sum(memory.bytes for memory in rollout.run.all_memories()) / 1e9
        say(f"{name}, {gpus} GPUs", block_ms=ms, fps=1e3 * PIXELS / ms, cache_gb=held)
        rollout.close()
        del rollout
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on CPUs if there are no GPUs")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for spread.jsonl")
    options = parser.parse_args()
    cuda, rank, world = torch.cuda.is_available(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not cuda and not options.toy:
        raise SystemExit("the full shape needs GPUs; --toy runs anywhere")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.accelerator.device_count = lambda: world  # diffusers divides by it
    dist.init_process_group("nccl" if cuda else "gloo")
    frames = 15 if options.toy else 240
    with torch.no_grad():
        shape = SHAPES["toy" if options.toy else "wan-1.3b"]
        bench = Bench(shape, "cuda" if cuda else "cpu", options.out / str(rank), 1, "spread.jsonl")
        say = bench.say if rank == 0 else lambda *_, **__: None
        say("environment", device=torch.cuda.get_device_name() if cuda else "cpu", torch=torch.__version__, gpus=world)
        alone = first_output(bench)
        if world > 1:
            bench.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
        off = float((first_output(bench).float() - alone.float()).norm() / alone.float().norm())
        allowed = (4 if cuda else 100) * torch.finfo(bench.dtype).eps
        say("together they compute what one does", relative_difference=off, allowed=allowed)
        if not off <= allowed:
            raise SystemExit("RED: they differ")
        if cuda:
            bench.model.compile_repeated_blocks(fullgraph=True)
        measure(bench, say, frames, options.toy, world)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
