"""The same dense attention, rounded otherwise: the keys in two halves, merged.

Autoregressive rollouts amplify rounding. How far a rollout under this kernel ends from one under `sdpa` is the noise
floor a technique has to be read against.
"""

from torch import Tensor

from ..plan import Plan
from . import sdpa
from .gather import planned
from .merge import Partial, merge

name = "split"
unusable = sdpa.unusable
value_width = sdpa.value_width


def partial(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_weight: Tensor | None = None, plan: Plan | None = None
) -> Partial:
    """As `reference.partial`."""
    return planned(_halves, q, k, v, scale, log_weight, plan)


def _halves(q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor | None) -> Partial:
    middle = k.shape[1] // 2
    halves = (slice(0, middle), slice(middle, None))
    return merge(
        [
            sdpa.partial(
                q, k[:, half], v[:, half], scale=scale, log_weight=None if log_weight is None else log_weight[half]
            )
            for half in halves
        ]
    )
