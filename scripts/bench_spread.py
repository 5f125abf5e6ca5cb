"""A video on one GPU and on several that share its heads, at the shape of Wan2.1-1.3B; correctness is checked first.

    torchrun --nproc-per-node 2 scripts/bench_spread.py --out DIR         # so many GPUs of one machine, 1 too; minutes
    torchrun --nproc-per-node 2 scripts/bench_spread.py --toy --out DIR   # any machine; figures mean nothing

Tokens are split between the GPUs, heads in self-attention; 480x832, blocks compiled. First a video that is made at
once: a forward of 21 latent frames, 32 760 tokens, dense and with AnnSA, which reads what it chose before or chooses
anew (medians of seven). Then a stream: blocks of 3 latent frames, 4 denoising steps and the clean pass, keys replayed
as in `bench_cache.py`, 60 seconds into a video; a block's milliseconds (median of five, dense: two), and what the
caches of one GPU hold. Graphs are compared with the forwards they stand for. Results go to DIR/0/spread.jsonl as they
come, from the first process.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from bench_seam import FRAMES, SHAPES, Bench
from bench_stream import BLOCKS, PIXELS, Stream
from diffusers import ContextParallelConfig
from torch import Tensor

from diffaccel import Accel, AnnSA, FlashBlock, SinkRecent, TempCache
from diffaccel.cache import KVCache
from diffaccel.pipelines.graphed import GraphedForwards
from diffaccel.policy import CachePolicy
from diffaccel.spread import devices_of


class Shared(Stream):
    """A stream whose cache holds this process's heads."""

    def __init__(self, bench: Bench, cache: CachePolicy, frames: int, accel: Accel) -> None:
        super().__init__(bench, cache, frames, accel)
        self.extent = replace(self.extent, heads=self.extent.heads // devices_of(bench.model))
        self.run.begin(frames, self.extent)


def arms(toy: bool, cuda: bool) -> dict[str, tuple[CachePolicy, Accel, bool]]:
    """Of a stream; whether forwards are captured."""
    few = TempCache(0.9, budget="9 frames" if toy else "12 frames", heads="per_head")
    flash: Any = FlashBlock(refresh=(0,), min_past=0)
    recent = SinkRecent(5, 1) if toy else SinkRecent(20, 1)
    found = {
        "dense": (KVCache(), Accel(), False),
        "SinkRecent(20, 1)": (recent, Accel(), False),
        "SinkRecent(20, 1), graphs": (recent, Accel(), True),
        "+ FlashBlock at step 0": (recent, Accel(reuse=flash), False),
        "+ FlashBlock at step 0, graphs": (recent, Accel(reuse=flash), True),
        "TempCache, 12 frames, head by head, + FlashBlock": (few, Accel(reuse=flash), False),
    }
    return {name: arm for name, arm in found.items() if cuda or not arm[2]}


AT_ONCE = {
    "dense": Accel(),
    "AnnSA(0.3), chosen before": Accel(selection=AnnSA(0.3, dense_steps=0)),
    "AnnSA(0.1), chosen before": Accel(selection=AnnSA(0.1, dense_steps=0)),
    "AnnSA(0.1), chosen anew": Accel(selection=AnnSA(0.1, dense_steps=0, refresh="step")),
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


CHECKED = ("dense", "AnnSA(0.3), chosen before")


class AtOnce:
    """Forwards of a whole video under one Accel."""

    def __init__(self, bench: Bench, accel: Accel, frames: int) -> None:
        self.bench, self.run = bench, accel.apply(SimpleNamespace(transformer=bench.model))
        self.latents = bench.randn(1, 16, frames, bench.shape["h"], bench.shape["w"])

    def forward(self) -> Tensor:
        return self.bench.forward(self.latents, 500.0)

    def close(self) -> None:
        self.run.remove(check=False)


def first_of_a_video(bench: Bench, name: str, frames: int) -> Tensor:
    torch.manual_seed(1)  # of the latents, which all processes and both times have alike
    video = AtOnce(bench, AT_ONCE[name], frames)
    out = video.forward()
    video.close()
    return out


def measure_at_once(bench: Bench, say: Callable[..., None], frames: int, gpus: int, only: str) -> None:
    for name, accel in AT_ONCE.items():
        if only in f"at once, {name}":
            video = AtOnce(bench, accel, frames)
            ms = bench.time({name: video.forward}, 7)[name]
            say(f"at once, {name}, {gpus} GPUs", forward_ms=ms, tokens=bench.tokens * frames // FRAMES)
            video.close()


def measure(bench: Bench, say: Callable[..., None], frames: int, toy: bool, gpus: int, only: str) -> None:
    for name, (cache, accel, graphs) in arms(toy, bench.device.type == "cuda").items():
        if only not in f"stream, {name}":
            continue
        rollout = Shared(bench, cache, frames + FRAMES * (3 * BLOCKS + 9), accel)
        while rollout.block * FRAMES < frames:
            rollout.skip()
        if graphs:
            rollout.forwards = GraphedForwards(bench.model, rollout.run)
        for _ in range(3):
            rollout.steps()
        if graphs:
            rollout.check()
        ms = rollout.timed(rollout.steps, 2 if name == "dense" else BLOCKS)
        held = sum(memory.bytes for memory in rollout.run.all_memories()) / 1e9
        replayed = rollout.run.replayed
        say(f"stream, {name}, {gpus} GPUs", block_ms=ms, fps=1e3 * PIXELS / ms, cache_gb=held, replayed=replayed)
        if graphs and not replayed:
            raise SystemExit("RED: nothing was replayed")
        rollout.close()
        del rollout
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on CPUs if there are no GPUs")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for spread.jsonl")
    parser.add_argument("--only", default="", help="arms whose name holds this text, such as 'at once' or 'stream'")
    options = parser.parse_args()
    cuda, rank, world = torch.cuda.is_available(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not cuda and not options.toy:
        raise SystemExit("the full shape needs GPUs; --toy runs anywhere")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.accelerator.device_count = lambda: world  # diffusers divides by it
    dist.init_process_group("nccl" if cuda else "gloo")
    frames, video = (15, 6) if options.toy else (240, 21)
    with torch.no_grad():
        shape = SHAPES["toy" if options.toy else "wan-1.3b"]
        bench = Bench(shape, "cuda" if cuda else "cpu", options.out / str(rank), 1, "spread.jsonl")
        say = bench.say if rank == 0 else lambda *_, **__: None
        say("environment", device=torch.cuda.get_device_name() if cuda else "cpu", torch=torch.__version__, gpus=world)
        alone = [first_output(bench), *(first_of_a_video(bench, name, video) for name in CHECKED)]
        if world > 1:
            bench.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
        shared = [first_output(bench), *(first_of_a_video(bench, name, video) for name in CHECKED)]
        allowed = (4 if cuda else 100) * torch.finfo(bench.dtype).eps
        for what, one, several in zip(("a stream", *CHECKED), alone, shared, strict=True):
            off = float((several.float() - one.float()).norm() / one.float().norm())
            say(f"together they compute what one does: {what}", relative_difference=off, allowed=allowed)
            if not off <= allowed:
                raise SystemExit("RED: they differ")
        if cuda:
            bench.model.compile_repeated_blocks(fullgraph=True)
        measure_at_once(bench, say, video, world, options.only)
        measure(bench, say, frames, options.toy, world, options.only)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
