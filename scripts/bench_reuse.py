"""What FlashBlock saves of a block, at the shape of Wan2.1-1.3B with random weights; correctness is checked first.

    python scripts/bench_reuse.py --out DIR          # one GPU, about two minutes
    python scripts/bench_reuse.py --toy --out DIR    # any machine, seconds; figures mean nothing

Attention alone: a block of 4 680 queries, 12 heads of 128, over a past of 14 040 keys (LongLive's window), 28 080 and
126 360; four steps and the clean pass of four layers, each through `attend` as a model calls it. Times are a layer's.
`ms` is of calls launched one by one, of which the host takes `host_us` each; `gpu_ms` of the same calls captured in one
CUDA graph and replayed, where the host has no part. All arms use the same kernel and alternate. `bound` is the speed-up
if time went by keys read alone; what AnnSA chooses is chosen beforehand.

Then whole forwards of the model over 14 040 keys: four steps and the clean pass, the blocks eager and compiled. `bound`
is the speed-up if attention reached its own.

Results go to DIR/reuse.jsonl and DIR/model.jsonl.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import bench_seam
import numpy as np
import torch
from timing import Says, medians
from torch import Tensor

from diffaccel import Accel, AnnSA, FlashBlock, Grid, Run, Site
from diffaccel.attend import attend
from diffaccel.kernel import merge
from diffaccel.policy import Answer, ReusePolicy
from diffaccel.profile import Model, Profile

FULL = {"heads": 12, "dim": 128, "grid": (3, 30, 52), "pasts": (3, 6, 27), "model": "wan-1.3b"}
TOY = {"heads": 4, "dim": 16, "grid": (3, 4, 4), "pasts": (3, 6), "model": "toy"}
STEPS, LAYERS = 4, 4
MERGES = 20  # in one graph


def flash(**knobs: object) -> FlashBlock:
    return FlashBlock(min_past=0, **knobs)  # type: ignore[arg-type]


WHOLE = {
    "all reused, clean pass too": flash(refresh=(0,), clean_pass="reuse"),
    "all reused": flash(refresh=(0,)),
    "every second step": flash(refresh=2),
}


class Bench(Says):
    def __init__(self, sizes: dict, device: str, out: Path, rounds: int) -> None:
        self.sizes, self.device, self.rounds = sizes, torch.device(device), rounds
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.grid, self.blocks = Grid(*sizes["grid"]), 0  # of the past
        out.mkdir(parents=True, exist_ok=True)
        self.log, self.profile = (out / "reuse.jsonl").open("w"), out / "profile.json"
        torch.manual_seed(0)
        profile(sizes).save(self.profile)

    def draw(self) -> Tensor:
        shape = (1, self.grid.tokens, self.sizes["heads"], self.sizes["dim"])
        return torch.randn(shape, device=self.device).to(self.dtype)

    def arms(self) -> dict[str, Accel]:
        found = {"dense": Accel()} | {name: Accel(reuse=policy) for name, policy in WHOLE.items()}
        found["every second step, extrapolated"] = Accel(reuse=flash(refresh=2, extrapolate=0.5))
        for share in (0.5, 0.375):
            found[f"share {share}"] = Accel(reuse=flash(profile=str(self.profile), share=share))
        selection = AnnSA(0.3, summaries=False, dense_steps=0.0, min_past=0.0)
        found["AnnSA 0.3"] = Accel(selection=selection)
        found["AnnSA 0.3, the rest reused"] = Accel(selection=selection, reuse=flash(refresh=(0,), residual=True))
        return found

    def block(self, run: Run, steps: list[list[Tensor]]) -> list[Tensor]:
        """One block's attention, of each step in the last layer; it is not committed, so that the next is like it."""
        found = []
        number = self.blocks
        for step, (q, k, v) in enumerate(steps):
            phase = "clean" if step == STEPS else "denoise"
            with run.at(block=number, start=3 * number, step=step, steps=STEPS, phase=phase):
                run.enter(self.grid, None, None, None)
                for layer in range(LAYERS):
                    out = attend(q, k, v, run.site(layer, "self"), run)
                found.append(out)
        run._histories.clear()
        return found

    def captured(self, what: str, arm: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]] | None:
        """Replays what `arm` launches, and where that writes its result; None where it cannot be captured."""
        if self.device.type != "cuda":
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                found = arm()
        except RuntimeError as error:
            self.say(f"{what}: not captured", why=str(error).splitlines()[0])
            return None
        return graph.replay, found

    def host_us(self, arm: Callable[[], object]) -> float:
        """What the host takes for each attention call of a block, while the GPU is behind."""
        times = []
        for _ in range(self.rounds):
            torch.cuda.synchronize()
            began = time.perf_counter()
            arm()
            times.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        return 1e6 * statistics.median(times) / (STEPS + 1) / LAYERS

    def filled(self, accel: Accel, past: list[list[Tensor]]) -> Run:
        run = Run(accel, causal=True)
        run.begin(frames=3 * (len(past) + 1))
        for number, (k, v) in enumerate(past):
            with run.at(block=number, start=3 * number, step=STEPS, steps=STEPS, phase="clean"):
                run.enter(self.grid, None, None, None)
                for layer in range(LAYERS):
                    memory = run.memory(run.site(layer, "self"))
                    memory.place(k, v, run.site(layer, "self"), k)
                    memory.finish_block(self.grid.tokens)
        return run

    def compare(self, blocks: int) -> dict[str, tuple[float, float]]:
        """Of each arm the milliseconds of a layer, by the GPU's time where it was met, and its bound."""
        self.blocks = blocks
        past = [[self.draw(), self.draw()] for _ in range(blocks)]
        still = [[self.draw(), self.draw(), self.draw()]] * (STEPS + 1)
        steps = [[self.draw(), self.draw(), self.draw()] for _ in range(STEPS + 1)]
        arms: dict[str, Callable[[], object]] = {}
        runs = {name: self.filled(accel, past) for name, accel in self.arms().items()}
        keys, own = blocks * self.grid.tokens, self.grid.tokens
        what, read, host = f"{own} x {keys}", {}, {}
        dense = self.block(runs["dense"], still)
        for name, run in runs.items():
            if name != "AnnSA 0.3":  # queries that stand still lose nothing
                self.check(name, self.block(run, still), dense)
            counts = run.slots.get("reuse") or run.slots.get("selection")
            before = 0.0 if counts is None else float(counts.keys_read)
            expected = self.block(run, steps)
            read[name] = (STEPS + 1) * LAYERS * (keys + own) if counts is None else float(counts.keys_read) - before
            arms[name] = lambda run=run: self.block(run, steps)
            if found := self.captured(f"{what}: {name}", arms[name]):
                arms[f"{name}, replayed"], results = found
                for result in results:
                    result.fill_(torch.nan)
                arms[f"{name}, replayed"]()
                self.check(f"{name}, replayed", results, expected)
            if self.device.type == "cuda":
                host[name] = self.host_us(arms[name])
        parts = [runs["dense"].kernel_for(q, kv[0].shape[1]).partial(q, *kv, scale=0.1) for q, *kv in steps[:2]]
        arms["merge"] = lambda: [merge(parts) for _ in range(MERGES)]
        if found := self.captured(f"{what}: merge", lambda: [merge(parts).out for _ in range(MERGES)]):
            arms["merge, replayed"] = found[0]
        times = medians(arms, self.rounds, self.device)
        best = {}
        for name in runs:
            ms, gpu, bound = times[name] / LAYERS, times.get(f"{name}, replayed"), read["dense"] / read[name]
            figures = {"ms": ms, "speedup": times["dense"] / times[name], "bound": bound}
            if gpu is not None and "dense, replayed" in times:
                figures |= {"gpu_ms": gpu / LAYERS, "gpu_speedup": times["dense, replayed"] / gpu}
            if name in host:
                figures["host_us"] = host[name]
            self.say(f"{what}: {name}", **figures)
            best[name] = figures.get("gpu_ms", ms), bound
        figures = {"ms": times["merge"] / MERGES}
        if "merge, replayed" in times:
            figures["gpu_ms"] = times["merge, replayed"] / MERGES
            name = next(iter(WHOLE))  # where every call merges two parts
            figures["share"] = (STEPS + 1) * figures["gpu_ms"] / best[name][0]
        self.say(f"{what}: one merge, and the share of it where all is reused", **figures)
        return best

    def check(self, name: str, found: list[Tensor], dense: list[Tensor]) -> None:
        allowed = 8 * torch.finfo(self.dtype).eps * max(float(x.abs().max()) for x in dense) + 1e-5
        for step, (got, expected) in enumerate(zip(found, dense, strict=True)):
            error = float((got - expected).abs().max())
            if not error <= allowed:
                raise SystemExit(f"RED: {name}, step {step}: off by {error:.3g} of {allowed:.3g}")


class Either(ReusePolicy):
    """The policy of the arm that runs now: all arms read one cache, so that they can alternate."""

    paper = summary = ""
    exact: ClassVar[dict] = {}
    now: ClassVar[ReusePolicy | None] = None

    def answer(self, site: Site) -> Answer:
        return "together" if self.now is None else self.now.answer(site)


def whole(shape: dict, device: str, out: Path, rounds: int, attention: dict[str, tuple[float, float]]) -> None:
    """A block of the whole model: its steps and the clean pass, which is not committed, so that the next is like it."""
    model = bench_seam.Bench(shape, device, out, rounds, "model.jsonl")
    run, step = model.fill_seam(Accel(reuse=Either()), STEPS)
    arms: dict[str, ReusePolicy | None] = {"dense": None, **WHOLE}

    def block(policy: ReusePolicy | None) -> Tensor:
        Either.now = policy
        return torch.stack([step(number) for number in range(STEPS + 1)])

    for compiled in (False, True) if device == "cuda" else (False,):
        if compiled:
            model.model.compile_repeated_blocks(fullgraph=True)
        dense = block(None)
        for name, policy in WHOLE.items():  # the same latents at every step: queries that stand still
            error = float((block(policy) - dense).float().norm() / dense.float().norm())
            model.say(f"the model agrees with dense: {name}", relative_error=error)
            if not error <= (5e-2 if model.dtype == torch.bfloat16 else 1e-5):
                raise SystemExit(f"RED: {name} differs from dense by {error:.3g}")
        times = model.time({name: lambda policy=policy: block(policy) for name, policy in arms.items()}, rounds)
        share = shape["layers"] * attention["dense"][0] / times["dense"]
        for name, ms in times.items():
            model.say(
                f"a block of the model, {'compiled' if compiled else 'eager'}: {name}",
                ms=ms,
                speedup=times["dense"] / ms,
                bound=1 / (1 - share * (1 - 1 / attention[name][1])),
                attention_share=share,
            )
    run.remove(check=False)


def profile(sizes: dict) -> Profile:
    """Drift as a model's: some heads move ten times as far as others, scattered over each layer."""
    heads, draw = sizes["heads"], np.random.default_rng(0)
    drift = np.stack([draw.permutation(np.logspace(-3, -1, heads)) for _ in range(LAYERS)])
    error = drift * np.arange(1, STEPS + 1)[None, :, None, None] * np.ones((STEPS, STEPS, LAYERS, heads))
    axes = {name: tuple(map(float, range(1, STEPS + 1))) for name in ("step", "gap")}
    shape = {"width": 832, "height": 480, "frames": 81, "steps": STEPS}
    tables = {"cos": 1 - error, "lse": error, "error": error}
    return Profile("FlashBlock", Model("synthetic", LAYERS, heads, sizes["dim"], "0"), shape, 1, {}, {}, axes, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the results")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    with torch.no_grad():
        bench = Bench(TOY if options.toy else FULL, device, options.out, options.rounds)
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        bench.say("environment", device=name, torch=torch.__version__)
        if device == "cpu":
            bench.say("no CUDA graphs on the CPU: eager times alone")
        first, *longer = bench.sizes["pasts"]
        found = bench.compare(first)
        shape = bench_seam.SHAPES[bench.sizes["model"]] | {"blocks": first}
        whole(shape, device, options.out, min(options.rounds, 3), found)
        for blocks in longer:
            bench.compare(blocks)


if __name__ == "__main__":
    main()
