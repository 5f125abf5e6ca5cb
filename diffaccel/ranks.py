"""Several processes of `accelerate launch`, or the one there is."""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process is `rank` of `count`, on `device` (None: wherever one process would go)."""

    rank: int = 0
    count: int = 1
    device: str | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks for all, and writes what belongs to all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `count`-th of the items: this process's part."""
        return list(items[self.rank :: self.count])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            _state().wait_for_everyone()

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order from which `share` took them."""
        if self.count == 1:
            return list(items)
        from accelerate.utils import gather_object

        parts: list[list[T]] = gather_object([list(items)])
        longest = max(len(part) for part in parts)
        return [part[index] for index in range(longest) for part in parts if index < len(part)]


def speaks() -> bool:
    """Whether this process says what all of them would: `Ranks.main`, known before any has met the others."""
    return os.environ.get("RANK", "0") == "0"


def ranks() -> Ranks:
    """Who this process is among those that were launched together."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    state = _state()
    return Ranks(state.process_index, state.num_processes, str(state.device))


@cache
def _state() -> Any:
    import torch
    from accelerate import PartialState

    # left to itself, accelerate counts processes on a CPU as one each; and whoever is done first waits for the others,
    # which may take hours, so the process group has no timeout to speak of
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=30))
    atexit.register(state.destroy_process_group)
    return state
