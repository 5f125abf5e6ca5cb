"""What FlashBlock saves of a block's attention, one layer at the shape of Wan2.1-1.3B; correctness is checked first.

    python scripts/bench_reuse.py --out DIR          # one GPU, about a minute
    python scripts/bench_reuse.py --toy --out DIR    # any machine, seconds; figures mean nothing

A block of 4 680 queries, 12 heads of 128, over a past of 14 040 keys (LongLive's window), 28 080 and 126 360; four
steps and the clean pass, each through `attend` as a model calls it, four blocks at a time so that launches overlap with
what runs. Both arms use the same kernel. `bound` is the speed-up if time went by keys read alone; what AnnSA chooses is
chosen beforehand. Results go to DIR/reuse.jsonl.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import medians
from torch import Tensor

from diffaccel import Accel, AnnSA, FlashBlock, Grid, Run
from diffaccel.attend import attend
from diffaccel.kernel import merge
from diffaccel.profile import Model, Profile

FULL = {"heads": 12, "dim": 128, "grid": (3, 30, 52), "pasts": (3, 6, 27)}
TOY = {"heads": 4, "dim": 16, "grid": (3, 4, 4), "pasts": (3, 6)}
STEPS, CALLS = 4, 4


class Bench:
    def __init__(self, sizes: dict, device: str, out: Path, rounds: int) -> None:
        self.sizes, self.device, self.rounds = sizes, torch.device(device), rounds
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.grid, self.blocks = Grid(*sizes["grid"]), 0  # of the past
        out.mkdir(parents=True, exist_ok=True)
        self.log, self.profile = (out / "reuse.jsonl").open("w"), out / "profile.json"
        torch.manual_seed(0)
        profile(sizes).save(self.profile)

    def say(self, what: str, **figures: object) -> None:
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())
        print(f"{what:58s} " + "  ".join(shown), flush=True)
        self.log.write(json.dumps({"what": what, **figures}) + "\n")
        self.log.flush()

    def draw(self) -> Tensor:
        shape = (1, self.grid.tokens, self.sizes["heads"], self.sizes["dim"])
        return torch.randn(shape, device=self.device).to(self.dtype)

    def arms(self) -> dict[str, Accel]:
        def flash(**knobs: object) -> FlashBlock:
            return FlashBlock(min_past=0, **knobs)  # type: ignore[arg-type]

        found = {
            "dense": Accel(),
            "all reused, clean pass too": Accel(reuse=flash(refresh=(0,), clean_pass="reuse")),
            "all reused": Accel(reuse=flash(refresh=(0,))),
            "every second step": Accel(reuse=flash(refresh=2)),
            "every second step, extrapolated": Accel(reuse=flash(refresh=2, extrapolate=0.5)),
        }
        for share in (0.5, 0.375):
            found[f"share {share}"] = Accel(reuse=flash(profile=str(self.profile), share=share))
        selection = AnnSA(0.3, summaries=False, dense_steps=0.0, min_past=0.0)
        found["AnnSA 0.3"] = Accel(selection=selection)
        found["AnnSA 0.3, the rest reused"] = Accel(selection=selection, reuse=flash(refresh=(0,), residual=True))
        return found

    def block(self, run: Run, steps: list[list[Tensor]]) -> list[Tensor]:
        """One block's attention in one layer; it is not committed, so that the next is like it."""
        found = []
        number = self.blocks
        for step, (q, k, v) in enumerate(steps):
            phase = "clean" if step == STEPS else "denoise"
            with run.at(block=number, start=3 * number, step=step, steps=STEPS, phase=phase):
                run.enter(self.grid, None, None, None)
                found.append(attend(q, k, v, run.site(0, "self"), run))
        run._histories.clear()
        return found

    def filled(self, accel: Accel, past: list[list[Tensor]]) -> Run:
        run = Run(accel, causal=True)
        run.begin(frames=3 * (len(past) + 1))
        for number, (k, v) in enumerate(past):
            with run.at(block=number, start=3 * number, step=STEPS, steps=STEPS, phase="clean"):
                run.enter(self.grid, None, None, None)
                memory = run.memory(run.site(0, "self"))
                memory.place(k, v, run.site(0, "self"), k)
                memory.finish_block(self.grid.tokens)
        return run

    def compare(self, blocks: int) -> None:
        self.blocks = blocks
        past = [[self.draw(), self.draw()] for _ in range(blocks)]
        still = [[self.draw(), self.draw(), self.draw()]] * (STEPS + 1)
        steps = [[self.draw(), self.draw(), self.draw()] for _ in range(STEPS + 1)]
        arms: dict[str, Callable[[], object]] = {}
        runs = {name: self.filled(accel, past) for name, accel in self.arms().items()}
        dense = self.block(runs["dense"], still)
        for name, run in runs.items():
            if name != "AnnSA 0.3":  # queries that stand still lose nothing
                self.check(name, self.block(run, still), dense)
            arms[name] = lambda run=run: self.block(run, steps)
        keys, own = blocks * self.grid.tokens, self.grid.tokens
        read = {}
        for name, run in runs.items():
            counts = run.slots.get("reuse") or run.slots.get("selection")
            before = 0.0 if counts is None else float(counts.keys_read)
            arms[name]()
            read[name] = (STEPS + 1) * (keys + own) if counts is None else float(counts.keys_read) - before
        times = medians(arms, self.rounds, self.device, CALLS)
        for name, ms in times.items():
            bound = read["dense"] / read[name]
            self.say(f"{own} x {keys}: {name}", ms=ms, speedup=times["dense"] / ms, bound=bound)
        parts = [runs["dense"].kernel_for(q).partial(q, *kv, scale=0.1) for q, *kv in steps[:2]]
        merging = {"merge": lambda: merge(parts)}
        self.say(f"{own} x {keys}: one merge", ms=medians(merging, self.rounds, self.device, CALLS)["merge"])

    def check(self, name: str, found: list[Tensor], dense: list[Tensor]) -> None:
        allowed = 8 * torch.finfo(self.dtype).eps * max(float(x.abs().max()) for x in dense) + 1e-5
        for step, (got, expected) in enumerate(zip(found, dense, strict=True)):
            error = float((got - expected).abs().max())
            if not error <= allowed:
                raise SystemExit(f"RED: {name}, step {step}: off by {error:.3g} of {allowed:.3g}")


def profile(sizes: dict) -> Profile:
    """Drift as a model's: some heads move ten times as far as others, scattered over the layer."""
    heads = sizes["heads"]
    order = np.random.default_rng(0).permutation(heads)
    drift = np.logspace(-3, -1, heads)[order]
    error = drift * np.arange(1, STEPS + 1)[None, :, None, None] * np.ones((STEPS, STEPS, 1, heads))
    axes = {name: tuple(map(float, range(1, STEPS + 1))) for name in ("step", "gap")}
    shape = {"width": 832, "height": 480, "frames": 81, "steps": STEPS}
    tables = {"cos": 1 - error, "lse": error, "error": error}
    return Profile("FlashBlock", Model("synthetic", 1, heads, sizes["dim"], "0"), shape, 1, {}, {}, axes, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for reuse.jsonl")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    with torch.no_grad():
        bench = Bench(TOY if options.toy else FULL, device, options.out, options.rounds)
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        bench.say("environment", device=name, torch=torch.__version__)
        for blocks in bench.sizes["pasts"]:
            bench.compare(blocks)


if __name__ == "__main__":
    main()
