"""How a layer's attention reaches `attend`: called directly, or as one opaque operator inside compiled code.

Under `torch.compile` policies must not be traced: their state would be guarded on and every layer would get its own
graph. The operator takes the layer as a tensor, so that all layers share one graph, whatever the policies do and
however long the cache grows.
"""

import weakref

import torch
from torch import Tensor

from .attend import attend
from .run import Run
from .site import Part

_PORTS: "weakref.WeakValueDictionary[int, Port]" = weakref.WeakValueDictionary()
_next = 0


class Port:
    """One attention of one layer. `handle` is a 0-d int64 tensor on the host."""

    def __init__(self, run: Run, layer: int, part: Part) -> None:
        global _next
        self.run, self.layer, self.part = run, layer, part
        self.handle = torch.tensor(_next)
        _PORTS[_next] = self
        _next += 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with self.run.timed(q.device, self.layer, self.part):
            return attend(q, k, v, self.run.site(self.layer, self.part), self.run)


@torch.library.custom_op("diffaccel::attend", mutates_args=())
def compiled_attend(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> Tensor:
    """`Port.attend` of the port with that handle; queries (B, S, H, D) in, (B, S, H, D) contiguous out."""
    return _PORTS[int(handle)].attend(q, k, v).contiguous()


@compiled_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
