"""What machines reach: rates that were measured, not those of a data sheet."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Machine:
    """Floating-point operations a second in matrix products, bytes a second of its memory, read and written, and of the
    link to the host's memory; 0 where there is no link. `processors` work side by side."""

    name: str
    flops: float
    memory: float
    link: float = 0.0
    processors: int = 1

    @property
    def intensity(self) -> float:
        """Operations in the time of one byte of memory: work with fewer a byte waits for memory."""
        return self.flops / self.memory

    @property
    def link_intensity(self) -> float:
        """Operations in the time of one byte over the link."""
        return self.flops / self.link if self.link else 0.0


MACHINES = {"h200": Machine("NVIDIA H200, bfloat16", 795e12, 4.24e12, processors=132)}
"""Measured: a product of 8192 x 8192 matrices, and a copy on the device. Others by `measure`."""

_ROUNDS = 5


def measure(device: torch.device, dtype: torch.dtype | None = None) -> Machine:
    """The rates of this device: the best of a few products and copies, and of uploads where it is a GPU."""
    cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    size, count = (8192, 2**30) if cuda else (1024, 2**26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / _best(lambda: a @ b, device)
    given = torch.empty(count, dtype=torch.uint8, device=device)
    taken = torch.empty_like(given)
    memory = 2 * count / _best(lambda: taken.copy_(given), device)
    link, processors = 0.0, 1
    if cuda:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        host = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        link = count / _best(lambda: taken.copy_(host, non_blocking=True), device)
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return Machine(f"{name}, {str(dtype).removeprefix('torch.')}", flops, memory, link, processors)


def _best(work: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the fastest of a few calls, after one that does not count."""
    work()
    found = []
    for _ in range(_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found)
