"""SpAttenCascade: keys that a layer drops stay dropped in the layers behind it (SpAtten, arXiv 2012.09852)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..policy import knob
from ..site import Site
from .asked import Asked
from .ranked import Ranked


class _Cascade(NamedTuple):
    at: tuple[int, int, int]  # block and step of the choice, and the tokens of a block of keys
    layer: int
    mass: Tensor  # (B, KB), of all layers so far; -inf for what was dropped


@dataclass(frozen=True)
class SpAttenCascade(Ranked):
    """Sum each key's attention probabilities over heads and layers; a layer drops the least of those still there.

    Of the keys a share of (1 - drop) to the power of the layers so far is left, `density` at least, the same for all
    heads (cascade token pruning). A choice is made while one forward goes through the layers.

    Differences from the paper: blocks of keys are dropped, not single ones; the tokens of the block at work all stay,
    as each becomes a part of the video, so it is the past that falls away; probabilities are those of two queries of
    each block of queries. Of the paper's other parts, heads are not pruned, values are not left out by themselves, and
    nothing is read in fewer bits first: those save traffic of an accelerator, not the time of a dense kernel.
    """

    paper: ClassVar[str] = "SpAtten, arXiv 2012.09852"
    remembers: ClassVar[str] = "a layer goes by what those before it chose"
    across_heads: ClassVar[str] = "all heads drop the same keys"
    summary: ClassVar[str] = "drops keys by attention summed over layers; later layers do without what one dropped"

    drop: float = knob(0.15, "share of the keys still there that a layer drops, in (0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.drop < 1, "drop is a share in (0, 1)", drop=self.drop)

    def whole_frames(self) -> str:
        return "layers go by the same tokens"

    def take(self, keys: int, free: int, blocks: int, site: Site) -> int:
        left = round(blocks * (1 - self.drop) ** (site.layer + 1))
        return max(left, super().take(keys, free, blocks, site))

    def rank(self, asked: Asked) -> Tensor:
        """(B, 1, 1, KB)."""
        site, keys = asked.site, asked.keys
        q = asked.samples(2).flatten(2, 3)
        mass = asked.scores(q).flatten(3).softmax(-1).unflatten(-1, (keys.choices, -1)).sum(-1).mean((1, 2))
        known: _Cascade | None = asked.lasting.shared.get("cascade")
        at = (site.block, site.step, keys.block)
        if known is not None and known.at == at and known.layer < site.layer and known.mass.shape == mass.shape:
            mass = mass + known.mass
        kept = torch.full_like(mass, -torch.inf)
        best = mass.topk(asked.take, dim=-1).indices
        kept.scatter_(-1, best, mass.gather(-1, best))
        asked.lasting.shared["cascade"] = _Cascade(at, site.layer, kept)
        return kept[:, None, None]
