"""MassRouter: heads that look outside a window read everything, the others the window (Flux, arXiv 2604.07394)."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..cache.look import probes
from ..policy import knob
from .asked import Asked
from .ranked import Choosing

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class MassRouter(Choosing):
    """Measure how much of a head's attention to the past lies outside a window, and let it read all where that is much.

    The window are the `sink_frames`, the `recent_frames`, and the block at work. The share of attention to the past
    outside of it, 1 - exp(lse of the window - lse of the past), is exact for some queries spread over the block.

    Flux Attention learns a router for it: a small network a layer reads the first and last queries and says whether
    the layer attends densely or to 128 first and 2048 newest tokens. Nothing is learned here; heads
    decide, not layers, once a block of video or at every step.
    """

    paper: ClassVar[str] = "Flux Attention, arXiv 2604.07394"
    summary: ClassVar[str] = "lets heads read a window where their attention outside of it was measured to be small"
    exact: ClassVar[dict[str, Any]] = {"outside": 0.0}
    needs_blocks: ClassVar[bool] = True

    outside: float = knob(0.1, "share of a head's attention to the past from which on it reads all of it, in [0, 1]")
    probes: int = knob(32, "queries of the block that say it, >= 1")
    _: KW_ONLY
    summaries: bool = knob(False, "read the mean of a block in place of a block that is not read")
    recent_frames: int = knob(3, "newest latent frames of the past that every query reads")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.outside <= 1, "outside is a share in [0, 1]", outside=self.outside)
        self.require(self.probes >= 1, "probes is a number of queries >= 1", probes=self.probes)

    def choose(self, asked: Asked) -> None:
        wide = self.mass_outside(asked) >= self.outside
        asked.keys.read_all_or_none(wide, asked.q.shape[2], asked.query_block)

    def mass_outside(self, asked: Asked) -> Tensor:
        """The mean over the probes, (B, H)."""
        given, keys = asked.given, asked.keys
        places = probes(asked.site.grid, self.probes).to(given.device)
        q = given[:, places].transpose(1, 2).float() * given.shape[-1] ** -0.5
        outside = asked.scores(q).flatten(3).logsumexp(-1)
        window, weight = keys.behind
        inside = q @ window.float().mT
        inside = (inside if weight is None else inside + weight[:, :, None]).logsumexp(-1)
        return torch.sigmoid(outside - inside).mean(2)

    def why_idle(self, run: "Run") -> str:
        return f"{super().why_idle(run)}; or every head looked outside of the window so much: raise outside"

    def _what_leaves_some(self) -> str:
        return f"outside={self.outside}"
