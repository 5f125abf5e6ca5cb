"""Data parallelism for models this small: one flat all-reduce of the gradients per step."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist


class Workers:
    """The processes of one run; a single process when not started by `torchrun`."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.count > 1:
            dist.init_process_group("nccl" if cuda else "gloo")

    @property
    def main(self) -> bool:
        """Whether this process writes the log and the checkpoints."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line once."""
        if self.main:
            print(line, flush=True)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.count == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self.count
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])

    def agree(self, value: float) -> float:
        """The value of process 0, in every process."""
        if self.count == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box.item())

    def wait(self) -> None:
        """Until every process has come this far."""
        if self.count > 1:
            dist.barrier()

    def broadcast_module(self, module: torch.nn.Module) -> None:
        """Start every process from the weights of process 0."""
        if self.count > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, 0)

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1:
            dist.destroy_process_group()
