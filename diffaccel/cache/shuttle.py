"""Between the host's memory and the device, beside what runs there."""

import weakref
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class Shuttle:
    """Brings tensors from page-locked memory of the host to a device, one set ahead of its use.

    Copies run on a stream of their own. The device waits for what it needs, the host for nothing. On the CPU nothing
    is copied: what is taken is what lies there.
    """

    def __init__(self) -> None:
        self._coming: tuple[tuple[weakref.ref[object], int], list[Tensor], torch.cuda.Event | None] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._sent: torch.cuda.Event | None = None

    def fetch(self, owner: object, number: int, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Start to bring `tensors`, which `take` gets by the same owner and number."""
        key = weakref.ref(owner), number  # owners hold the shuttle
        if device.type != "cuda":
            self._coming = key, [tensor.to(device) for tensor in tensors], None
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        if self._sent is not None:
            self._stream.wait_event(self._sent)
        with torch.cuda.stream(self._stream):
            brought = [tensor.to(device, non_blocking=True) for tensor in tensors]
            self._coming = key, brought, self._stream.record_event()

    def take(self, owner: object, number: int, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """What was fetched for it, else fetched now; the device's current stream waits for it."""
        if self._coming is None or self._coming[0] != (weakref.ref(owner), number):
            self.fetch(owner, number, tensors, device)
        assert self._coming is not None
        _, brought, arrived = self._coming
        self._coming = None
        if arrived is not None:
            here = torch.cuda.current_stream(device)
            here.wait_event(arrived)
            for tensor in brought:
                tensor.record_stream(here)
        return brought

    def drop(self) -> None:
        """Forget what was fetched: it is about to change."""
        self._coming = None

    def send(self, tensor: Tensor, target: Tensor) -> None:
        """Copy to page-locked memory; what is fetched from now on comes after it."""
        target.copy_(tensor, non_blocking=True)
        if tensor.is_cuda:
            self._sent = torch.cuda.current_stream(tensor.device).record_event()


class InTurn:
    """What is read piece by piece, and then what is `following`.

    These form a ring, so none holds the next: else all would stay in memory after a run, until Python looks for cycles.
    """

    _following: "weakref.ref[Self] | None" = None

    @property
    def following(self) -> Self | None:
        return None if self._following is None else self._following()

    @following.setter
    def following(self, other: Self) -> None:
        self._following = weakref.ref(other)


def host_like(tensor: Tensor) -> Tensor:
    """An empty tensor in the host's memory, page-locked if `tensor` is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
