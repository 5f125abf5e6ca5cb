"""Gates of heads, learned with all weights frozen: how much of the middle of a video does the output need?

DuoAttention (arXiv 2410.10819, section 2). In each dense video the last clean pass is made over and over, where
every head reads a mixture of everything and of the first and the newest frames.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .cache import KVCache, Memory, Reader
from .cache.duo_attention import DuoAttention
from .kernel import Partial
from .profile import Axes, Tables
from .site import Site

if TYPE_CHECKING:
    from .run import Run

ROUNDS = 100
"""Steps of Adam for each video."""

RATE, PRESSURE = 0.02, 0.05


class Gated(Memory):
    """Answers a block with gate * (attention to everything) + (1 - gate) * (attention to what streaming keeps)."""

    count, bytes = 1, 0

    def __init__(self, k: Tensor, v: Tensor, near: Tensor, gates: Tensor) -> None:
        super().__init__()
        self._past, self._near, self._gates = (k, v), near, gates  # (B, N, H, D), (N,) bool, (H,)
        self._block: tuple[Tensor, Tensor] = (k, v)

    def place(self, k: Tensor, v: Tensor, site: Site, queries: Tensor | None = None) -> None:
        self._block = k, v

    def past_and_block(self) -> list[Any]:
        return [self]

    def partial(self, q: Tensor, read: Reader) -> Partial:
        gates = self._gates[:, None].to(q.dtype)
        out = gates * self._over(q, torch.ones_like(self._near)) + (1 - gates) * self._over(q, self._near)
        return Partial(out, q.new_zeros(q.shape[:3], dtype=torch.float32))

    def _over(self, q: Tensor, some: Tensor) -> Tensor:
        """Attention over some of the past and the block; of no kernel of ours, as gradients go through it."""
        k, v = (torch.cat([past[:, some], own], 1) for past, own in zip(self._past, self._block, strict=True))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class GateLearner(KVCache):
    """Keeps everything, and moves the gates when the last block that is committed was."""

    paper: ClassVar[str] = DuoAttention.paper
    summary: ClassVar[str] = "keeps everything and learns which heads need it"
    is_exact = True

    policy: DuoAttention = field(default_factory=DuoAttention)
    call: list[tuple[Any, Any, Any]] = field(default_factory=list)  # of this forward: the denoiser, its arguments
    gates: list[Tensor] = field(default_factory=list)  # (layers, heads)
    adam: list[torch.optim.Adam] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @contextmanager
    def listening(self, denoiser: nn.Module) -> Iterator[None]:
        """Note what each forward is called with."""

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.call[:] = [(module, args, kwargs)]

        handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self.call.clear()

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        super().commit(memories, site, run)
        assert run.extent is not None
        left = run.extent.frames - site.start - site.grid.frames
        if site.branch != "uncond" and left <= run.extent.block.frames:
            self._learn(memories, site, run)

    def _learn(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Make the clean pass anew, where its past has a middle."""
        frames = memories[0].exact.past().entries.frames
        assert frames is not None
        frames = frames[frames < site.start]
        near = (frames < self.policy.sink_frames) | (frames >= site.start - self.policy.recent_frames)
        if near.all():
            return
        pasts = [memory.exact.past().entries for memory in memories]
        k, v = ([getattr(past, name)[:, : len(frames)] for past in pasts] for name in "kv")
        if not self.gates:
            open_ = torch.ones(len(pasts), k[0].shape[2], device=k[0].device, requires_grad=True)
            self.gates.append(open_)
            self.adam.append(torch.optim.Adam(self.gates, lr=RATE))
        [gates], near, [(denoiser, args, kwargs)] = self.gates, near.to(k[0].device), self.call

        def velocity(gates: Tensor) -> Tensor:
            for layer, row in enumerate(gates):
                run._memories[site.branch, layer] = Gated(k[layer], v[layer], near, row)
            # told to be no clean pass, which would be committed
            told = {name: getattr(site, name) for name in ("block", "start", "step", "steps", "branch", "noise")}
            with run.at(**told), denoiser.cache_context(site.branch):
                return denoiser(*args, **kwargs)[0].float()

        where = run._where
        try:
            with torch.no_grad():
                wanted, worst = velocity(torch.ones_like(gates)), velocity(torch.zeros_like(gates))
                scale = (worst - wanted).square().mean().clamp(min=torch.finfo(torch.float32).tiny)
            for _ in range(ROUNDS):
                with torch.enable_grad():
                    loss = (velocity(gates) - wanted).square().mean() / scale + PRESSURE * gates.mean()
                    [gates.grad] = torch.autograd.grad(loss, self.gates)
                self.losses.append(float(loss))
                self.adam[0].step()
                gates.data.clamp_(0, 1)
        finally:
            run._where, run._told = where, True
            run._memories.update({(site.branch, layer): memory for layer, memory in enumerate(memories)})

    def idle(self, run: "Run") -> str | None:
        return None if self.gates else ": no block had frames between the first and the newest: generate more frames"

    def means(self, layers: int) -> tuple[Axes, Tables]:
        return {}, {"reach": self.gates[0].detach().cpu().double().numpy()}
