"""Between the host's memory and the device, beside what runs there."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


class Shuttle:
    """Brings tensors from page-locked memory of the host to a device, one set ahead of its use.

    Copies run on a stream of their own. The device waits for what it needs, the host for nothing. On the CPU nothing
    is copied: what is taken is what lies there.
    """

    def __init__(self) -> None:
        self._coming: tuple[Hashable, list[Tensor], torch.cuda.Event | None] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._sent: torch.cuda.Event | None = None

    def fetch(self, key: Hashable, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Start to bring `tensors`; `take` with the same key gets them."""
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

    def take(self, key: Hashable, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """What was fetched under `key`, else fetched now; the device's current stream waits for it."""
        if self._coming is None or self._coming[0] != key:
            self.fetch(key, tensors, device)
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


def host_like(tensor: Tensor) -> Tensor:
    """An empty tensor in the host's memory, page-locked if `tensor` is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
