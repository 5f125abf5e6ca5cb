"""What a forward of a whole clip takes, at the shape of Wan2.1-1.3B, eager and compiled; checked first.

    python scripts/bench_forward.py --out DIR          # one GPU, about two minutes
    python scripts/bench_forward.py --toy --out DIR    # any machine, seconds; figures mean nothing

81 frames at 480x832 (32 760 tokens), 30 layers, one guidance branch, random weights. Arms alternate, a few denoising
steps at a time: the model as diffusers runs it, under `Accel()`, and under AnnSA, each with and without its blocks
compiled. AnnSA sorts and chooses at the first of its steps and reads what was chosen at the later ones, so these stand
apart. Results go to DIR/forward.jsonl as they come.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bench_cache import synchronise
from bench_seam import SHAPES, Bench
from torch import Tensor

from diffaccel import Accel, AnnSA
from diffaccel.pipelines.compiling import _blocks

FRAMES = {"wan-1.3b": 21, "toy": 5}
DENSITIES = (0.3, 0.1)


class Whole(Bench):
    """A bidirectional model whose blocks may be compiled or not from one call to the next."""

    def __init__(self, shape: str, device: str, out: Path) -> None:
        super().__init__(SHAPES[shape], device, out, 5, "forward.jsonl")
        self.pipe.block_causal = False
        self.clip = self.randn(1, 16, FRAMES[shape], self.shape["h"], self.shape["w"])
        self.compiled: list[Any] = []

    def compile(self) -> None:
        self.model.compile_repeated_blocks(fullgraph=True)
        self.compiled = [block._compiled_call_impl for block in _blocks(self.model)]

    @contextmanager
    def blocks(self, compiled: bool) -> Iterator[None]:
        for block, call in zip(_blocks(self.model), self.compiled, strict=True):
            block._compiled_call_impl = call if compiled else None
        yield

    def once(self, accel: Accel | None, compiled: bool) -> Tensor:
        """One forward."""
        return next(self.steps(accel, compiled))

    def steps(self, accel: Accel | None, compiled: bool) -> Iterator[Tensor]:
        """Forwards of the denoising steps from the tenth of twenty on."""
        with self.blocks(compiled):
            run = None if accel is None else accel.apply(self.pipe)
            try:
                for step in range(10, 20):
                    with nullcontext() if run is None else run.at(block=0, start=0, step=step, steps=20):
                        yield self.forward(self.clip, 500.0)
            finally:
                if run is not None:
                    run.remove(check=False)

    def timed(self, accel: Accel | None, compiled: bool) -> list[float]:
        """Milliseconds of the first step and of two later ones."""
        found, steps = [], self.steps(accel, compiled)
        for _ in range(3):
            synchronise(self.clip)
            began = time.perf_counter()
            next(steps)
            synchronise(self.clip)
            found.append(1e3 * (time.perf_counter() - began))
        steps.close()
        return found

    def check(self, arms: dict[str, Accel | None]) -> None:
        """Compiled and eager agree in every arm, and Accel() with the stock model, as layers let roundings grow.

        What is chosen may change with a rounding, so more is allowed there.
        """
        made = {
            (name, compiled): self.once(accel, compiled) for name, accel in arms.items() for compiled in (False, True)
        }
        pairs = [((name, False), (name, True)) for name in arms] + [(("diffusers", False), ("Accel()", False))]
        for one, other in pairs:
            eps = torch.finfo(self.dtype).eps
            allowed = (12 if self.dtype == torch.bfloat16 else 500) * (5 if "AnnSA" in one[0] else 1) * eps
            off = float((made[one].float() - made[other].float()).norm() / made[one].float().norm())
            self.say(f"{one} and {other}", relative_difference=off, allowed=allowed)
            if not off <= allowed:
                raise SystemExit("RED: they differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for forward.jsonl")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    arms: dict[str, Accel | None] = {"diffusers": None, "Accel()": Accel()}
    for density in DENSITIES:
        arms[f"AnnSA({density})"] = Accel(selection=AnnSA(density, dense_steps=0, min_past=0))
    with torch.no_grad():
        bench = Whole("toy" if options.toy else "wan-1.3b", device, options.out)
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        bench.say("environment", device=name, torch=torch.__version__, kernel=bench.kernel)
        began = time.perf_counter()
        bench.compile()
        bench.check(arms)
        bench.say("compiled and checked", seconds=time.perf_counter() - began)
        times: defaultdict[tuple[str, bool], list[list[float]]] = defaultdict(list)
        for _ in range(bench.rounds):
            for name, accel in arms.items():
                for compiled in (False, True):
                    times[name, compiled].append(bench.timed(accel, compiled))
        later = {arm: statistics.median(ms for found in rounds for ms in found[1:]) for arm, rounds in times.items()}
        for (name, compiled), rounds in times.items():
            ms = later[name, compiled]
            bench.say(
                f"{name}{', compiled' if compiled else ''}", ms=ms, first_ms=statistics.median(x[0] for x in rounds),
                over_diffusers=later["diffusers", False] / ms, over_dense=later["Accel()", compiled] / ms,
            )  # fmt: skip


if __name__ == "__main__":
    main()
