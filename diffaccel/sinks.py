"""Attention sinks: what heads attend to whatever they look for, in a video or a text.

probe = SinkProbe()
with Accel(cache=probe)(pipe):                      # or BlockLM(lm, block_length=8, cache=probe)
    pipe("a large red circle moves left", num_frames=81)
print("\n".join(probe.lines()))

When Attention Sink Emerges (arXiv 2410.10781, section 3.1): a token is a sink of a head where its attention, mean over
queries, is above eps = 0.3. There queries are all later tokens of a text of 64; here they are probes of each finished
block, and only what lies before that block counts, as a block reads itself most. A video has thousands of tokens, none
of which gets so much; so frames, and places of the frame over all frames, are summed up too. A sink of a video need
not be its first frame: what is found says which frames a cache should protect (`sink_frames`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .cache.look import Look
from .cache.memory import Memory
from .cache.sorting import Looking
from .errors import NotEngagedError
from .site import Site
from .suggest import choose

if TYPE_CHECKING:
    from .run import Run

Unit = Literal["token", "frame", "place"]
UNITS = ("token", "frame", "place")
EPS = 0.3


class Sink(NamedTuple):
    """What a head attends to: the number of a token, frame or place (row * columns + column), and its mean mass."""

    layer: int
    head: int
    at: int
    mass: float


@dataclass(frozen=True, eq=False)
class SinkProbe(Looking):
    """Keeps everything, and sums up at every finished block what its probes attended to."""

    paper: ClassVar[str] = "When Attention Sink Emerges, arXiv 2410.10781"
    summary: ClassVar[str] = "keeps everything and finds what is attended to whatever is looked for"
    is_exact = False  # it looks, and a cache of a text does not where nothing is chosen

    sink_frames: int = 0  # of all that is kept, none is chosen
    probes: int = 32
    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (unit, layer): (H, n) fp32
    counts: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (n,)

    def expected_tokens(self, video_tokens: int, block: object) -> int:
        return video_tokens

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Add the mean over probes and rows of what lies before the newest block."""
        run.fired("cache")
        assert run.extent is not None
        past = site.start + site.grid.frames - min(site.grid.frames, run.extent.block.frames)
        for layer, memory in enumerate(memories if past else ()):
            self.add(self.look(layer, memory, site, run, {}), past)

    def add(self, look: Look, past: int) -> None:
        """Of one layer, whose first `past` frames lie before the newest block."""
        mass = look.p[..., : past * look.grid.tokens_per_frame].mean((0, 2))
        by = mass.unflatten(-1, (past, -1))
        for unit, found in (("token", mass), ("frame", by.sum(-1)), ("place", by.sum(-2))):
            key = unit, look.layer
            self.sums[key] = _longer(self.sums.get(key, found[:, :0]), found.shape[1]) + found
            self.counts[key] = _longer(self.counts.get(key, found[0, :0]), found.shape[1]) + 1

    def masses(self, unit: Unit = "frame") -> Tensor:
        """Mean mass (layers, H, n) of each token, frame or place, over the blocks that came after it.

        Raises `NotEngagedError` before a second block is finished.
        """
        choose(unit, UNITS, "unit")
        keys = sorted(key for key in self.sums if key[0] == unit)
        if not keys:
            raise NotEngagedError("SinkProbe saw no block with others before it: generate more")
        return torch.stack([self.sums[key] / self.counts[key] for key in keys]).cpu()

    def sinks(self, unit: Unit = "frame", eps: float = EPS) -> list[Sink]:
        """What has more than `eps` of a head's attention, by layers and heads."""
        masses = self.masses(unit)
        found = (masses > eps).nonzero().tolist()
        return [Sink(layer, head, at, float(masses[layer, head, at])) for layer, head, at in found]

    def share(self, unit: Unit = "frame", eps: float = EPS) -> Tensor:
        """Share of all heads of which each token, frame or place is a sink, (n,): Sink^eps of the paper."""
        return (self.masses(unit) > eps).float().mean((0, 1))

    def lines(self, eps: float = EPS) -> Iterator[str]:
        """For each unit the sinks of most heads; of a text for tokens."""
        for unit in UNITS if len(self.share("place")) > 1 else UNITS[:1]:
            share = self.share(unit, eps)  # type: ignore[arg-type]
            best = [at for at in share.argsort(descending=True, stable=True).tolist()[:4] if share[at]]
            found = ", ".join(f"{at} ({share[at]:.1%} of heads)" for at in best)
            yield f"{unit}s with more than {eps:g} of the attention: {found or 'none'}"


def _longer(held: Tensor, count: int) -> Tensor:
    """(..., n) with zeros up to at least `count`; blocks only add to what is before them."""
    return torch.nn.functional.pad(held, (0, count - held.shape[-1]))
