"""FullFieldGuide: cross-attention of a branch that sees the whole frame steers one that sees windows (FreeSwim)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..cache.shuttle import Shuttle, host_like
from ..grid import Grid
from ..policy import Answer, ReusePolicy, knob
from ..site import FIELD, Site

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

    Such a pass reads keys at distances that training never knew, and it costs as much as several forwards with windows.
    With `shrink` it runs on the nearest latents of a smaller grid, such as that of training, and what it finds is
    spread over the larger one: ours, many times cheaper and closer to the base video. In a causal model these passes
    have a past of their own, on their grid.
    """

    paper: ClassVar[str] = "FreeSwim, arXiv 2511.14712, section 3"
    summary: ClassVar[str] = "takes cross-attention from a pass over the whole frame, made at some steps"
    exact: ClassVar[dict[str, Any]] = {"every": 1}
    needs_blocks: ClassVar[bool] = False

    every: int = knob(2, "steps from one pass over the whole field to the next, >= 1")
    shrink: float = knob(
        1.0, "rows and columns of tokens over those of a pass over the whole field, >= 1; ours: 1 is as published"
    )
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
        self.require(self.shrink >= 1, "shrink is a ratio >= 1", shrink=self.shrink)

    def refuses_model(self, models: "Sequence[tuple[Geometry, nn.Module]]") -> str | None:
        if any(geometry.coarse_past for geometry, _ in models):
            return "what steers is a pass with a past of its own, and it keeps one of two sizes: leave the guide out"
        if all("cross" in geometry.parts for geometry, _ in models):
            return None
        return "what steers is cross-attention, which it has not or which stays as it is there: leave the guide out"

    def answer(self, site: Site) -> Answer:
        """Self-attention is computed."""
        return "together"

    def field(self, grid: Grid) -> Grid:
        """Of a pass over the whole field."""
        rows, columns = (max(1, round(side / self.shrink)) for side in (grid.height, grid.width))
        return Grid(grid.frames, rows, columns)

    def looks_first(self, site: Site, run: "Run") -> bool:
        """Whether a pass over the whole field comes before the forward at `site`; counts the steps of a block."""
        if run.causal and site.phase == "clean":
            return self._of_branch(site) and self.field(site.grid) != site.grid  # they have a past of their own
        if not self._steers(site):
            return False
        state = run.scratch(self.slot, _branch(site))
        block, step, count = state.get("at", (None, 0, 0))
        here = (site.block, site.grid)  # another block or another video, which may be of another size
        count = count + 1 if block == here and step <= site.step else 0
        state["at"] = (here, site.step, count)
        return count % self.every == 0

    def cross(self, site: Site, run: "Run", compute: Callable[[], Tensor]) -> Tensor:
        """Attention to the prompt, from the last pass over the whole field."""
        if not self._steers(site):
            return compute()
        state = run.scratch(self.slot, _branch(site))
        if site.full_field:
            found = compute()
            kept: _Kept = state.setdefault("kept", _Kept(self.hold))
            # on a smaller grid a device's tokens lie elsewhere, so there it keeps all of them, of its own heads
            split = run.spread if site.branch.endswith(FIELD) else None
            kept.put(site.layer, found if split is None else split.heads([found])[0])
            return found
        if run.accel.window is not None:
            run.fired(self.slot)
        field = self.field(site.grid)
        found = spread(state["kept"].get(site.layer), field, site.grid)
        return found if run.spread is None or field == site.grid else run.spread.tokens(found)

    def why_idle(self, run: "Run") -> str:
        if run.accel.window is None:
            return "there is no window to steer, so its passes only cost time: add window=InwardWindow()"
        return "no forward of the branch with the prompt ran"

    def bytes_held(self, run: "Run") -> int:
        return sum(state["kept"].bytes for state in run.all_scratch(self.slot) if "kept" in state)

    def _steers(self, site: Site) -> bool:
        return site.phase == "denoise" and self._of_branch(site)

    def _of_branch(self, site: Site) -> bool:
        return self.branches == "all" or _branch(site) in _CONDITIONAL


def _branch(site: Site) -> str:
    return site.branch.removesuffix(FIELD)


def spread(x: Tensor, grid: Grid, larger: Grid) -> Tensor:
    """(B, S, H, D) on `grid` as on a larger one of as many frames: bilinear in each frame."""
    if grid == larger:
        return x
    heads = x.shape[2]
    frames = x.flatten(2).unflatten(1, (grid.frames, grid.height, grid.width)).flatten(0, 1).permute(0, 3, 1, 2)
    frames = interpolate(frames, (larger.height, larger.width), mode="bilinear")
    return frames.permute(0, 2, 3, 1).unflatten(0, (-1, grid.frames)).flatten(1, 3).unflatten(2, (heads, -1))


class _Kept:
    """What each layer's cross-attention found in the last pass of one branch, (B, S, H, D), held one way or another."""

    def __init__(self, hold: str) -> None:
        self.hold, self.shuttle = hold, Shuttle()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.layers: dict[int, list[Tensor]] = {}

    def put(self, layer: int, found: Tensor) -> None:
        self.device, self.dtype = found.device, found.dtype
        if self.hold == "device":
            self.layers[layer] = [found.clone()]  # compiled code may write into what attention gave it, also below
        elif self.hold == "int8":
            wide = found.float()
            scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
            self.layers[layer] = [(wide / scale).round().to(torch.int8), scale]
        else:
            room = self.layers.get(layer)
            if room is None or room[0].shape != found.shape:
                room = self.layers[layer] = [host_like(found)]
            self.shuttle.drop()
            self.shuttle.send(found, room[0])

    def get(self, layer: int) -> Tensor:
        kept = self.layers[layer]
        if self.hold == "device":
            return kept[0].clone()
        if self.hold == "int8":
            return (kept[0].float() * kept[1]).to(self.dtype)
        (found,) = self.shuttle.take(self, layer, kept, self.device)
        following = layer + 1 if layer + 1 in self.layers else min(self.layers)
        self.shuttle.fetch(self, following, self.layers[following], self.device)
        return found if found.is_cuda else found.clone()

    @property
    def bytes(self) -> int:
        """On the device."""
        if self.hold == "host":
            return 0
        return sum(x.numel() * x.element_size() for kept in self.layers.values() for x in kept)
