"""How the benchmarks time, and how they say what they found."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import IO

import torch


def medians(
    arms: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, calls: int = 1
) -> dict[str, float]:
    """Median milliseconds of every arm, the arms alternating, after two calls that do not count.

    With several `calls` at a time launches overlap with what runs, as they do in a model.
    """
    for arm in arms.values():
        arm(), arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(calls):
                    arm()
                end.record()
                end.synchronize()
                took = start.elapsed_time(end)
            else:
                began = time.perf_counter()
                for _ in range(calls):
                    arm()
                took = 1e3 * (time.perf_counter() - began)
            times[name].append(took / calls)
    return {name: statistics.median(found) for name, found in times.items()}


class Says:
    """Mixed into a benchmark: a line on the screen and in `log`, as it comes."""

    log: IO[str]

    def say(self, what: str, **figures: object) -> None:
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())
        print(f"{what:58s} " + "  ".join(shown), flush=True)
        self.log.write(json.dumps({"what": what, **figures}) + "\n")
        self.log.flush()
