"""One model on several devices: tokens are split between them everywhere but in self-attention, where heads are.

Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509): two exchanges of everybody with everybody around an attention. A cache
then holds a device's own heads, so memory and attention are divided by the number of devices, and what a policy does
head by head it does here as on one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UnsupportedError
from .policy import PromptPolicy, ReusePolicy

if TYPE_CHECKING:
    from .accel import Accel


@dataclass(frozen=True, eq=False)
class Spread:
    """The `size` devices of a `group`, of which this is number `rank`."""

    group: Any
    size: int
    rank: int

    @staticmethod
    def of(config: Any, accel: "Accel") -> "Spread | None":
        """What diffusers' `enable_parallelism` set up, None where it did not.

        Raises `UnsupportedError` where it is no plain Ulysses, and for techniques that would see a share of what they
        decide by.
        """
        parallel = getattr(config, "context_parallel_config", config)
        if parallel is None:
            return None
        if parallel.ring_degree > 1 or parallel.ulysses_anything:
            raise UnsupportedError(
                "context parallelism goes by heads here, ContextParallelConfig(ulysses_degree=N): ring attention and "
                f"uneven shares split the keys of a cache, got ring_degree={parallel.ring_degree}, "
                f"ulysses_anything={parallel.ulysses_anything}"
            )
        if why := _sees_a_share(accel):
            raise UnsupportedError(f"each of several devices holds some heads or some tokens, and {why}")
        mesh = parallel._ulysses_mesh
        return Spread(mesh.get_group(), parallel.ulysses_degree, mesh.get_local_rank())

    def check(self, heads: int, tokens: int) -> None:
        """Refuse what does not divide."""
        for count, what in ((heads, "heads"), (tokens, "tokens of a forward")):
            if count % self.size:
                raise UnsupportedError(
                    f"{count} {what} cannot be shared by {self.size} devices: choose a number of devices, a size of "
                    "frame or frames_per_block that divides"
                )

    def heads(self, x: Tensor) -> Tensor:
        """A device's own tokens of all heads (B, s, H, D) become all tokens of its own heads (B, S, h, D)."""
        return self._exchange(x.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4)).transpose(0, 1).flatten(1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """The way back, (B, S, h, D) to (B, s, H, D)."""
        split = x.unflatten(1, (self.size, -1)).transpose(0, 1)
        return self._exchange(split).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def mean(self, x: Tensor) -> Tensor:
        """Over the devices."""
        dist.all_reduce(x := x.clone(), group=self.group)
        return x / self.size

    def most(self, x: Tensor) -> Tensor:
        """The largest of the devices'."""
        dist.all_reduce(x := x.clone(), dist.ReduceOp.MAX, group=self.group)
        return x

    def own(self, table: Tensor, dim: int) -> Tensor:
        """This device's share of something that all have whole."""
        return table.chunk(self.size, dim)[self.rank]

    def _exchange(self, x: Tensor) -> Tensor:
        """Part i of (N, ...) goes to device i; what they sent, by device."""
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.group)
        return out


def devices_of(model: Any) -> int:
    """How many devices share the heads of a model."""
    config = getattr(model, "_parallel_config", None)
    parallel = getattr(config, "context_parallel_config", None)
    return 1 if parallel is None else int(parallel.ulysses_degree)


def _sees_a_share(accel: "Accel") -> str | None:
    """What of these techniques looks across heads, or at all queries of a cross-attention."""
    if getattr(accel.cache, "heads", "per_head") != "per_head":
        return "entries are shared by all heads: set cache.heads='per_head'"
    if getattr(accel.cache, "variant", "phase") == "paper":
        return "keys are turned back by tables of which each has a share: set cache.variant='phase'"
    if getattr(accel.reuse, "profile", None) is not None:
        return "a profile tells heads apart by their number in the whole model: leave reuse.profile out"
    if accel.prompt is not None and type(accel.prompt).near is not PromptPolicy.near:
        return f"{type(accel.prompt).__name__} chooses by all queries: leave it out"
    if accel.reuse is not None and type(accel.reuse).cross is not ReusePolicy.cross:
        return f"{type(accel.reuse).__name__} keeps cross-attention of the whole frame: leave it out"
    if getattr(accel.selection, "groups", "") == "prompt":
        return "selection.groups='prompt' goes by all queries: take 'kmeans'"
    return None
