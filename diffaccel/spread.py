"""One model on several devices: tokens are split between them everywhere but in self-attention, where heads are.

Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509): two exchanges of everybody with everybody around an attention. A cache
then holds a device's own heads, so memory and attention are divided by the number of devices, and what a policy does
head by head it does here as on one. Text in one attention with the video is split as the video is, or whole everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UnsupportedError
from .joint import Text
from .policy import PromptPolicy

if TYPE_CHECKING:
    from .accel import Accel


@dataclass(frozen=True, eq=False)
class Spread:
    """The `size` devices of a `group`, of which this is number `rank`.

    `whole_text`: each has all text tokens of a joint attention; otherwise they are split, as the video's are.
    """

    group: Any
    size: int
    rank: int
    whole_text: bool = False

    @staticmethod
    def of(config: Any, accel: "Accel", whole_text: bool = False) -> "Spread | None":
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
        return Spread(mesh.get_group(), parallel.ulysses_degree, mesh.get_local_rank(), whole_text)

    def check(self, heads: int, tokens: int, text: Text | None = None) -> None:
        """Refuse what does not divide."""
        words = 0 if text is None or self.whole_text else text.tokens
        for count, what, remedy in (
            (heads, "heads", ""),
            (tokens, "tokens of a forward", ", a size of frame or frames_per_block"),
            (words, "tokens of a prompt", " or a longer max_sequence_length, or pad prompt_embeds and their mask"),
        ):
            if count % self.size:
                raise UnsupportedError(
                    f"{count} {what} cannot be shared by {self.size} devices: choose a number of devices{remedy} "
                    "that divides"
                )

    def heads(self, parts: Sequence[Tensor], text: Text | None = None) -> tuple[Tensor, ...]:
        """A device's own tokens of all heads, each (B, s, H, D), become all tokens of its own heads (B, S, h, D).

        All of the parts in one exchange. What comes are views of it: channels lie together, tokens need not.
        """
        sent = torch.stack([x.unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4) for x in parts], 3)
        if text is None:
            whole = self._exchange(sent).flatten(0, 1)
        else:
            if self.whole_text:
                video, words = text.split(sent)
                video, words = self._exchange(video).flatten(0, 1), words[self.rank]
            else:
                share = replace(text, tokens=text.tokens // self.size)
                video, words = (x.flatten(0, 1) for x in share.split(self._exchange(sent)))
            whole = text.join(video[None], words[None])[0]
        return whole.transpose(0, 1).unbind(2)

    def tokens(self, x: Tensor, text: Text | None = None) -> Tensor:
        """The way back, (B, S, h, D) to (B, s, H, D)."""
        if text is None:
            sent = self._by_device(x)
        else:
            video, words = text.split(x)
            every = words.transpose(0, 1).expand(self.size, -1, -1, -1, -1)
            sent = text.join(self._by_device(video), every if self.whole_text else self._by_device(words))
        return self._exchange(sent).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _by_device(self, x: Tensor) -> Tensor:
        """(B, S, h, D) as (N, s, B, h, D)."""
        return x.unflatten(1, (self.size, -1)).permute(1, 2, 0, 3, 4)

    def mean(self, x: Tensor) -> Tensor:
        """Over the devices."""
        dist.all_reduce(x := x.clone(), group=self.group)
        return x / self.size

    def most(self, x: Tensor) -> Tensor:
        """The largest of the devices'."""
        dist.all_reduce(x := x.clone(), dist.ReduceOp.MAX, group=self.group)
        return x

    def least(self, number: int) -> int:
        """The smallest of the devices' numbers, told from host to host: no device is waited for."""
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=_hosts(self.group))
        return int(found)

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
    """How many devices share a forward of a model."""
    config = getattr(model, "_parallel_config", None)
    parallel = getattr(config, "context_parallel_config", None)
    return 1 if parallel is None else int(parallel.ulysses_degree * parallel.ring_degree)


def group_of(model: Any) -> Any:
    """The processes that share the heads of a model."""
    return model._parallel_config.context_parallel_config._ulysses_mesh.get_group()


@cache
def _hosts(group: Any) -> Any:
    """The same processes, through their hosts."""
    if "cpu:gloo" in dist.get_backend_config(group):
        return group
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


def _sees_a_share(accel: "Accel") -> str | None:
    """What of these techniques looks across heads, or at all queries of a cross-attention."""
    if getattr(accel.cache, "heads", "per_head") != "per_head":
        return "entries are shared by all heads: set cache.heads='per_head'"
    if getattr(accel.cache, "variant", "phase") == "paper":
        return "keys are turned back by tables of which each has a share: set cache.variant='phase'"
    for slot in ("cache", "reuse"):
        if getattr(getattr(accel, slot), "profile", None) is not None:
            return f"a profile tells heads apart by their number in the whole model: leave {slot}.profile out"
    if accel.prompt is not None and type(accel.prompt).near is not PromptPolicy.near:
        return f"{type(accel.prompt).__name__} chooses by all queries: leave it out"
    if getattr(accel.selection, "groups", "") == "prompt":
        return "selection.groups='prompt' goes by all queries: take 'kmeans'"
    if why := getattr(accel.selection, "across_heads", ""):
        return f"{why}, of which each has a share: take selection=AnnSA"
    return None
