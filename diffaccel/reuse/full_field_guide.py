"""FullFieldGuide: cross-attention of a branch that sees the whole frame steers one that sees windows (FreeSwim)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..policy import Answer, ReusePolicy, knob
from ..site import Site

if TYPE_CHECKING:
    from torch import nn

    from ..backbone import Geometry
    from ..run import Run

_CONDITIONAL = ("cond", "main", "branch 0")
"""The branch with the prompt: by the name that a pipeline gives it, or the first to run."""


@dataclass(frozen=True)
class FullFieldGuide(ReusePolicy):
    """Attention to the prompt comes from a forward over the whole field, made at every n-th step and kept in between.

    Windows alone repeat what the prompt names in every part of a large frame. So at some steps the same latents first
    go through the model without windows, and what their cross-attention finds, in every layer, takes the place of that
    of the forward with windows, also at the steps that follow (FreeSwim's cross-attention override). The rest of the
    first forward influences nothing, and no such forward is made at the other steps nor for the branch without a
    prompt: the result is that of the paper's loop over two rows, with fewer of them computed.
    """

    paper: ClassVar[str] = "FreeSwim, arXiv 2511.14712, section 3"
    summary: ClassVar[str] = "takes cross-attention from a pass over the whole frame, made at some steps"
    exact: ClassVar[dict[str, Any]] = {"every": 1}
    needs_blocks: ClassVar[bool] = False

    every: int = knob(2, "steps from one pass over the whole field to the next, >= 1")
    branches: str = knob(
        "cond", 'which branches of guidance are steered: the one with the prompt, or "all"', choices=("cond", "all")
    )
    hold: str = knob(
        "device",
        "how what is kept between steps is held: as it is, rounded to 8 bits, or in host memory",
        choices=("device", "int8", "host"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            isinstance(self.every, int) and self.every >= 1, "every is a number of steps >= 1", every=self.every
        )

    def refuses_model(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        if all("cross" in geometry.parts for geometry, _ in models):
            return None
        return "what steers is cross-attention, which it has not or which stays as it is there: leave the guide out"

    def answer(self, site: Site) -> Answer:
        """Self-attention is computed."""
        return "together"

    def looks_first(self, site: Site, run: "Run") -> bool:
        """Whether a pass over the whole field comes before the forward at `site`; counts the steps of a block."""
        if not self._steers(site):
            return False
        state = run.scratch(self.slot, site.branch)
        block, step, count = state.get("at", (None, 0, 0))
        here = (site.block, site.grid)  # another block or another video, which may be of another size
        count = count + 1 if block == here and step <= site.step else 0
        state["at"] = (here, site.step, count)
        return count % self.every == 0

    def cross(self, site: Site, run: "Run", compute: Callable[[], Tensor]) -> Tensor:
        """Attention to the prompt, from the last pass over the whole field."""
        if not self._steers(site):
            return compute()
        held: dict[int, _Held] = run.scratch(self.slot, site.branch).setdefault("held", {})
        if site.full_field:
            found = compute()
            if site.layer in held:
                held[site.layer].put(found)
            else:
                held[site.layer] = _Held(found, self.hold)
            return found
        if run.accel.window is not None:
            run.fired(self.slot)
        return held[site.layer].get()

    def why_idle(self, run: "Run") -> str:
        if run.accel.window is None:
            return "there is no window to steer, so its passes only cost time: add window=InwardWindow()"
        return "no forward of the branch with the prompt ran"

    def bytes_held(self, run: "Run") -> int:
        return sum(held.bytes for state in run.all_scratch(self.slot) for held in state.get("held", {}).values())

    def _steers(self, site: Site) -> bool:
        return site.phase == "denoise" and (self.branches == "all" or site.branch in _CONDITIONAL)


class _Held:
    """What one layer's cross-attention found, (B, S, H, D), held one way or another."""

    def __init__(self, found: Tensor, hold: str) -> None:
        self.hold, self.dtype, self.device = hold, found.dtype, found.device
        self.kept: list[Tensor] = []
        self.put(found)

    def put(self, found: Tensor) -> None:
        if self.hold == "device":
            self.kept = [found.clone()]  # compiled code may write into what attention gave it, also below
        elif self.hold == "int8":
            wide = found.float()
            scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
            self.kept = [(wide / scale).round().to(torch.int8), scale]
        else:
            if not self.kept or self.kept[0].shape != found.shape:
                self.kept = [torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)]
            self.kept[0].copy_(found, non_blocking=True)

    def get(self) -> Tensor:
        if self.hold == "int8":
            return (self.kept[0].float() * self.kept[1]).to(self.dtype)
        return (
            self.kept[0].clone()
            if self.hold == "device"
            else self.kept[0].to(self.device, non_blocking=True, copy=True)
        )

    @property
    def bytes(self) -> int:
        """On the device."""
        return 0 if self.hold == "host" else sum(x.numel() * x.element_size() for x in self.kept)
