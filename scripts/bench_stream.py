"""How many frames a second a stream gives from end to end, at the shape of Wan2.1-1.3B with its VAE; checked first.

    python scripts/bench_stream.py --out DIR          # one GPU, some minutes
    python scripts/bench_stream.py --toy --out DIR    # any machine, seconds; figures mean nothing

480x832, blocks of 3 latent frames, 4 denoising steps and the clean pass, random weights, keys replayed as in
`bench_cache.py`, the transformer's blocks compiled. First the decoder: diffusers' own, and the short way
(`fast_vae`), milliseconds a pixel frame. Then arms that have one technique more each, at 10, 60 and 120 seconds of
video: a block's milliseconds with nothing waited for inside, medians of several blocks; frames a second of denoising,
and with the VAE one after the other, beside it on a stream of its own, and on a second GPU where there is one; and for
how much of a block the GPU works. At each length the parts of one block follow, each waited for.
Graphs are compared with the forwards they stand for.
Results go to DIR/stream.jsonl as they come.
"""

import argparse
import copy
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_cache import STEPS, Rollout, check_exact, synchronise
from bench_seam import FRAMES, SHAPES, Bench
from diffusers import AutoencoderKLWan
from timing import medians
from torch import Tensor

from diffaccel import Accel, FlashBlock, PadCollapse, SinkRecent, TempCache
from diffaccel.cache import KVCache
from diffaccel.pipelines import StreamingDecoder
from diffaccel.pipelines.graphed import GraphedForwards
from diffaccel.pipelines.streaming import Decodes
from diffaccel.policy import CachePolicy

SECONDS = {
    3: 12,
    5: 21,
    10: 39,
    60: 240,
    120: 480,
}  # of video, 16 frames a second: latent frames before the block
MOST_DENSE = 240  # 120 s of keys and values are 138 GB
BLOCKS = 5
PIXELS = 4 * FRAMES
WAYS = ("launched", "replayed")


class Stream(Rollout):
    """A rollout whose blocks run as a stream's do."""

    forwards: GraphedForwards | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache.waits = False

    def forward_of(self, step: int, graphs: bool) -> Tensor:
        """The output of one forward of the block at work."""
        latents, t = self.bench.latents[self.block % 2], 0.0 if step == STEPS else 500.0
        with self.at(step, "clean" if step == STEPS else "denoise"):
            if self.forwards is None or not graphs:
                return self.bench.forward(latents, t)
            return self.forwards(latents, torch.full((1,), t, device=self.bench.device), self.bench.text)

    def steps(self) -> Tensor:
        """Launches a block's forwards; its last output."""
        for step in range(STEPS + 1):
            out = self.forward_of(step, graphs=True)
        self.block += 1
        return out

    def check(self) -> None:
        """Replayed forwards are those that are launched."""
        allowed = 4 * torch.finfo(self.bench.dtype).eps
        for step in range(STEPS):
            launched, replayed = (self.forward_of(step, graphs) for graphs in (False, True))
            off = float((launched.float() - replayed.float()).norm() / launched.float().norm())
            if not off <= allowed:
                raise SystemExit(f"RED: step {step} replayed is off by {off:.3g} of {allowed:.3g}")

    def parts(self) -> dict[str, float]:
        """Milliseconds of a block's parts, each waited for: what stands beside one another in a block overlaps."""
        found: defaultdict[str, float] = defaultdict(float)
        self.cache.waits = True
        for step in range(STEPS + 1):
            synchronise(self.bench.text)
            began = time.perf_counter()
            self.forward_of(step, graphs=True)
            synchronise(self.bench.text)
            name = "first_step" if step == 0 else "later_steps" if step < STEPS else "clean_pass"
            found[name] += 1e3 * (time.perf_counter() - began)
        self.block, self.cache.waits = self.block + 1, False
        found["commit"] = 1e3 * self.cache.seconds
        found["clean_pass"] -= found["commit"]
        return found

    def timed(self, each: Callable[[], object], blocks: int = BLOCKS) -> float:
        """Median milliseconds of a block."""
        times = []
        for _ in range(blocks):
            synchronise(self.bench.text)
            began = time.perf_counter()
            each()
            synchronise(self.bench.text)
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)

    def busy(self, ms: float) -> float:
        """Milliseconds of a block's kernels over those of the block, which were taken without a profiler."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            self.timed(self.steps, 1)
        return sum(e.self_device_time_total for e in found.key_averages()) / 1e3 / ms


def decoders(bench: Bench, vae: AutoencoderKLWan, latents: Tensor) -> None:
    """The decoder's ways, and how far the short one is from the stock one."""
    made, times = {}, {}
    for name, fast in (("diffusers", False), ("the short way", True)):
        decoder = StreamingDecoder(vae, fast=fast)
        made[name] = [decoder.decode(latents) for _ in range(2)][1].float()
    off = float((made["diffusers"] - made["the short way"]).norm() / made["diffusers"].norm())
    allowed = 8 * torch.finfo(vae.dtype).eps + 1e-5
    bench.say("the short way agrees with diffusers", relative_error=off, allowed=allowed)
    if not off <= allowed:
        raise SystemExit("RED: the decoder's short way differs")
    arms = {name: StreamingDecoder(vae, fast=fast) for name, fast in (("diffusers", False), ("the short way", True))}
    for decoder in arms.values():
        decoder.decode(latents)
    times = bench.time({name: lambda d=d: d.decode(latents) for name, d in arms.items()}, 5)
    for name, ms in times.items():
        bench.say(f"decoder, {name}", ms_a_frame=ms / PIXELS, speedup=times["diffusers"] / ms)


def arms(toy: bool, cuda: bool) -> dict[str, tuple[CachePolicy, Accel, bool]]:
    """Each with one technique more; whether forwards are captured."""
    few = TempCache(0.9, budget="9 frames" if toy else "12 frames")
    flash: Any = FlashBlock(refresh=(0,), min_past=0)
    recent = SinkRecent(5, 1) if toy else SinkRecent(20, 1)
    found = {
        "dense": (KVCache(), Accel(), False),
        "SinkRecent(20, 1)": (recent, Accel(), False),
        "SinkRecent(20, 1), graphs": (recent, Accel(), True),
        "TempCache, 12 frames": (few, Accel(), False),
        "+ FlashBlock at step 0": (few, Accel(reuse=flash), False),
        "+ graphs": (few, Accel(reuse=flash), True),
        "+ PadCollapse": (few, Accel(reuse=flash, prompt=PadCollapse()), True),
        "what `auto` takes": (TempCache(0.9, budget="24 frames"), Accel(reuse=FlashBlock(refresh=2)), False),
        "what `auto` takes, graphs": (TempCache(0.9, budget="24 frames"), Accel(reuse=FlashBlock(refresh=2)), True),
    }
    return {name: arm for name, arm in found.items() if cuda or not arm[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for stream.jsonl")
    parser.add_argument(
        "--roofline", action="store_true", help="no streams: the decoder, and a forward by its roofline"
    )
    parser.add_argument("--only", default="", help="streams whose name holds this text, and dense")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    seconds = {1: 9, 2: 15} if options.toy else SECONDS
    with torch.no_grad():
        bench = Bench(SHAPES["toy" if options.toy else "wan-1.3b"], device, options.out, 1, "stream.jsonl")
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        bench.say("environment", device=name, torch=torch.__version__, kernel=bench.kernel, tokens=bench.tokens)
        check_exact(bench)
        small: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1} if options.toy else {}
        vae = AutoencoderKLWan(**small).eval().to(device, bench.dtype)
        latents = bench.randn(1, 16, FRAMES, bench.shape["h"], bench.shape["w"])
        decoders(bench, vae, latents)
        if device == "cuda":
            began = time.perf_counter()
            bench.model.compile_repeated_blocks(fullgraph=True)
            check_exact(bench)
            bench.say("compiled", seconds=time.perf_counter() - began)
        roofline(bench)
        if not options.roofline:
            streams(bench, vae, latents, seconds, options.toy, options.only)


def roofline(bench: Bench) -> None:
    """A forward over a past of eight frames beside what its matrix products and attention take by themselves."""
    window = 8
    rollout = Stream(bench, SinkRecent(window - 1, 1), 30 * FRAMES, Accel())
    rollout.forwards = GraphedForwards(bench.model, rollout.run) if bench.device.type == "cuda" else None
    while rollout.block * FRAMES < 2 * window:
        rollout.skip()
    for _ in range(3):
        rollout.steps()
    shape, side = bench.shape, 8192 if bench.device.type == "cuda" else 64
    keys = (window + FRAMES) * bench.tokens // FRAMES
    q, k, v = (bench.randn(1, n, shape["heads"], shape["dim"]) for n in (bench.tokens, keys, keys))
    square, kernel = bench.randn(side, side), rollout.run.kernel_for(q, keys)
    times = bench.time({way: lambda way=way: rollout.forward_of(1, graphs=way == "replayed") for way in WAYS}, 7)
    alone = {"attention": lambda: kernel.partial(q, k, v, scale=0.1), "product": lambda: square @ square}
    times |= medians(alone, 7, bench.device, calls=20)
    weights = sum(p.numel() for name, p in bench.model.named_parameters() if name.startswith("blocks") and p.ndim == 2)
    products = 2 * weights * bench.tokens / (2 * side**3 / times["product"])
    bound = products + shape["layers"] * times["attention"]
    for name in WAYS:
        bench.say(
            f"a forward over {keys - bench.tokens} keys, {name}", ms=times[name], products_ms=products,
            attention_ms=shape["layers"] * times["attention"], of_roofline=times[name] / bound,
            product_tflops=2 * side**3 / times["product"] / 1e9,
        )  # fmt: skip
    rollout.close()


def streams(
    bench: Bench, vae: AutoencoderKLWan, latents: Tensor, seconds: dict[int, int], toy: bool, only: str
) -> None:
    dense: dict[int, float] = {}
    for arm, (cache, accel, graphs) in arms(toy, bench.device.type == "cuda").items():
        if only not in arm and arm != "dense":
            continue
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        lengths = {s: n for s, n in seconds.items() if arm != "dense" or n <= MOST_DENSE}
        room = FRAMES * (10 if arm == "dense" else 3 * BLOCKS + 9)  # blocks that are run
        rollout = Stream(bench, cache, max(lengths.values()) + room, accel)
        for length, frames in lengths.items():
            while rollout.block * FRAMES < frames:
                rollout.skip()
            if graphs and rollout.forwards is None:
                rollout.forwards = GraphedForwards(bench.model, rollout.run)
            for _ in range(3):  # kernels are chosen, graphs captured
                rollout.steps()
            if graphs:
                rollout.check()
            ms = rollout.timed(rollout.steps, 2 if arm == "dense" else BLOCKS)
            if arm == "dense":
                dense[length] = ms
            cached = sum(memory.bytes for memory in rollout.run.all_memories())
            peak = torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else 0.0
            bench.say(
                f"{arm}, {length} s", block_ms=ms, fps=1e3 * PIXELS / ms, over_dense=dense.get(length, math.nan) / ms,
                cache_gb=cached / 1e9, peak_gb=peak, **rollout.parts(),
            )  # fmt: skip
        if arm != "dense":
            with_vae(bench, f"{arm}, {length} s", rollout, vae, latents, ms)
        if graphs and not rollout.run.replayed:
            raise SystemExit("RED: nothing was replayed")
        rollout.close()


def with_vae(bench: Bench, what: str, rollout: Stream, vae: AutoencoderKLWan, latents: Tensor, block_ms: float) -> None:
    """A block and its pixels, one after the other, overlapped, and with the VAE on a second GPU where there is one."""
    decoder = StreamingDecoder(vae)
    decoder.decode(latents)
    fps = {"after": rollout.timed(lambda: (rollout.steps(), decoder.decode(latents)))}

    def beside(decodes: Decodes) -> None:
        waiting = None
        for _ in range(BLOCKS):
            rollout.steps()
            pixels = decodes.submit(latents)
            if waiting is not None:
                waiting()
            waiting = pixels
        assert waiting is not None
        waiting()
        synchronise(latents)

    ways = {"beside": Decodes(decoder)}
    if torch.cuda.device_count() > 1:
        ways["second_gpu"] = Decodes(StreamingDecoder(copy.deepcopy(vae).to("cuda:1")))
    for way, decodes in ways.items():
        beside(decodes)
        fps[way] = rollout.timed(lambda decodes=decodes: beside(decodes), 1) / BLOCKS
    share = rollout.busy(block_ms) if bench.device.type == "cuda" else 0.0
    found = {f"fps_{way}": 1e3 * PIXELS / ms for way, ms in fps.items()}
    bench.say(f"{what}, with the VAE", **found, gpu_busy=share)


if __name__ == "__main__":
    main()
