"""What counting costs: a forward of the bundled model with and without it.

    python scripts/bench_overhead.py                  # some three minutes on a CPU
    python scripts/bench_overhead.py --device cuda

A block of 3 latent frames at 128x128 over a past of 4 blocks, dense and with four techniques, at a step that computes
everything and at one where FlashBlock reuses. One arm counts calls and keys for every slot and layer (`Run.close`), the
other counts nothing; they alternate. A second arm that counts says how far scatter goes. The last column is the time
spent inside of `Run.close`, over that of the forward.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from timing import medians

from diffaccel import Accel, FlashBlock, FrameWindow, PadCollapse, TempCache
from diffaccel.pipelines.loading import BUNDLED_MODELS, load
from diffaccel.run import Run

PAST, FRAMES, STEPS = 4, 3, 8  # blocks, latent frames of one, denoising steps
FOUR = Accel(cache=TempCache(0.5), reuse=FlashBlock(refresh=2, min_past=0), prompt=PadCollapse(), window=FrameWindow(9))
CLOSE = Run.close


class Forward:
    """A forward of the block after PAST blocks that the run remembers."""

    def __init__(self, pipe: Any, run: Run) -> None:
        self.model, self.run = pipe.transformer, run
        generator = torch.Generator().manual_seed(0)
        config, like = self.model.config, {"device": self.model.device, "dtype": self.model.dtype}
        self.latents = torch.randn(1, config.in_channels, FRAMES, 16, 16, generator=generator).to(**like)
        self.text = torch.randn(1, 512, config.text_dim, generator=generator).to(**like)
        self.text[:, 16:] = 0  # a prompt's padding
        run.begin(FRAMES * (PAST + 1))
        for block in range(PAST):
            self.step(STEPS, block=block, phase="clean")
        self.step(0)

    def step(self, step: int, block: int = PAST, phase: Any = "denoise") -> None:
        timestep = torch.full((1,), 1000 * (1 - step / STEPS), device=self.model.device)
        with self.run.at(block=block, start=block * FRAMES, step=step, steps=STEPS, phase=phase):
            self.model(self.latents, timestep, self.text, return_dict=False)

    def uncounted(self, step: int) -> None:
        with patch.object(Run, "close", lambda *_, **__: None):
            self.step(step)

    def seconds_of_counting(self, step: int) -> float:
        spent = 0.0

        def close(*args: Any, **given: Any) -> None:
            nonlocal spent
            began = time.perf_counter()
            CLOSE(*args, **given)
            spent += time.perf_counter() - began

        with patch.object(Run, "close", close):
            self.step(step)
        return spent


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    pipe = load(BUNDLED_MODELS[0], device=options.device)
    for name, accel, steps in (("dense", Accel(), ("computed",)), ("four", FOUR, ("computed", "reused"))):
        with accel(pipe) as run:
            forward = Forward(pipe, run)
            for step, what in enumerate(steps):
                counted = partial(forward.step, step)
                arms = {"not": partial(forward.uncounted, step), "counted": counted, "again": counted}
                ms = medians(arms, options.rounds, torch.device(options.device))
                inside = 1e3 * statistics.median(forward.seconds_of_counting(step) for _ in range(options.rounds))
                cost, scatter = ms["counted"] / ms["not"] - 1, ms["again"] / ms["counted"] - 1
                print(
                    f"{name}, {what}: {ms['not']:.2f} ms, counted {ms['counted']:.2f} ms: {cost:+.2%}, "
                    f"scatter {scatter:+.2%}; {inside:.3f} ms inside, {inside / ms['not']:.2%}"
                )


if __name__ == "__main__":
    main()
