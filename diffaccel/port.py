"""How a layer's attention reaches `attend`: called directly, or as one opaque operator inside compiled code.

Under `torch.compile` policies must not be traced: their state would be guarded on and every layer would get its own
graph. The operator takes the layer as a tensor, so that all layers share one graph, whatever the policies do and
however long the cache grows.
"""

import weakref
from itertools import count

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from .attend import attend
from .kernel.merge import HAS_TRITON
from .rotary import rotate
from .run import Run
from .site import Part
from .spread import Spread

_PORTS: "weakref.WeakValueDictionary[int, Port]" = weakref.WeakValueDictionary()
_handles = count()  # of threads, each takes the next


class Port:
    """One attention of one layer. `handle` is a 0-d int64 tensor on the host."""

    def __init__(self, run: Run, layer: int, part: Part) -> None:
        self.run, self.layer, self.part = run, layer, part
        self.spread: Spread | None = None  # where several devices share the model
        handle = next(_handles)
        self.handle = torch.tensor(handle)
        _PORTS[handle] = self

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spread = self.spread if self.part == "self" else None  # all devices have the whole prompt
        with self.run.timed(q.device, self.layer, self.part):
            site = self.run.site(self.layer, self.part)
            if spread is None:
                return attend(q, k, v, site, self.run)
            q, k, v = spread.heads((q, k, v), site.text)
            return spread.tokens(attend(q, k, v, site, self.run), site.text)

    def attend_projected(
        self, q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """As `attend`, of queries and keys as they are projected: normed and turned first, where they will stay."""
        if can_fuse(q):
            from .kernel.fused_rotary import norm_rotate

            alone = self.spread is None
            place = self.run.place_for(k, self.run.site(self.layer, self.part)) if alone else None
            q, k, v = norm_rotate(q, k, v, q_norm, k_norm, eps, cos, sin, place)
        else:
            q, k = (
                rotate(rms_norm(x.flatten(2), weight.shape, weight, eps).view_as(x), cos, sin)
                for x, weight in ((q, q_norm), (k, k_norm))
            )
        return self.attend(q, k, v)

    def attend_prompt(
        self, q: Tensor, text: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], eps: float
    ) -> Tensor:
        """Cross-attention to `text` (B, T, C), projected once for all forwards that see the same prompt.

        `weights`: of the projection to keys and its bias, of that to values and its bias, of the keys' norm.
        """
        k_weight, k_bias, v_weight, v_bias, norm = weights

        def project() -> tuple[Tensor, Tensor]:
            k = rms_norm(linear(text, k_weight, k_bias), norm.shape, norm, eps)
            v = linear(text, v_weight, v_bias)
            return k.unflatten(2, q.shape[2:]), v.unflatten(2, q.shape[2:])

        return self.attend(q, *self.run.projected(self.layer, text, weights, project))


def can_fuse(q: Tensor) -> bool:
    """Whether queries (B, S, H, D) are normed and turned in one pass."""
    return HAS_TRITON and q.is_cuda and q.shape[-1] % 2 == 0 and q.dtype != torch.float64


@torch.library.custom_op("diffaccel::attend", mutates_args=())
def compiled_attend(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> Tensor:
    """`Port.attend` of the port with that handle; queries (B, S, H, D) in, (B, S, H, D) contiguous out."""
    return _PORTS[int(handle)].attend(q, k, v).contiguous()


@compiled_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("diffaccel::attend_projected", mutates_args=())
def compiled_attend_projected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    handle: Tensor,
) -> Tensor:
    """`Port.attend_projected` of the port with that handle."""
    return _PORTS[int(handle)].attend_projected(q, k, v, q_norm, k_norm, eps, cos, sin).contiguous()


@compiled_attend_projected.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("diffaccel::attend_prompt", mutates_args=())
def compiled_attend_prompt(
    q: Tensor,
    text: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    norm: Tensor,
    eps: float,
    handle: Tensor,
) -> Tensor:
    """`Port.attend_prompt` of the port with that handle."""
    weights = (k_weight, k_bias, v_weight, v_bias, norm)
    return _PORTS[int(handle)].attend_prompt(q, text, weights, eps).contiguous()


@compiled_attend_prompt.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
