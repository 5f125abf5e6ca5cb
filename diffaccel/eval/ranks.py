"""Several processes of `accelerate launch`, or the one there is."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
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


def ranks() -> Ranks:
    """Who this process is among those that were launched together."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    state = _state()
    device = None if state.device.type == "cpu" and not state._cpu and not _asks_cpu() else str(state.device)
    return Ranks(state.process_index, state.num_processes, device)


def _state() -> Any:
    from accelerate import PartialState

    # whoever is done first waits for the others, which may take hours: no timeout of the process group
    return PartialState(timeout=timedelta(days=30))


def _asks_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
