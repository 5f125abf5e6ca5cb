"""How alike the choices of layers and steps are, in dense videos: what `HyLRA` and `LycheeDecode` go by."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .policy import Selector
from .profile import Axes, Tables
from .selection.asked import Asked
from .selection.borrowed import Borrowing
from .selection.ranked import Ranked

if TYPE_CHECKING:
    from .cache import Entries
    from .run import Run
    from .site import Site

GAPS = 8
"""Steps that a choice is compared over."""

_QUERIES = 4  # of each block, whose attention is measured


class _Choice(NamedTuple):
    mask: Tensor  # (B, H, QB, KB) bool, of the blocks that may be chosen
    mass: Tensor  # (B, H, QB, KB), attention on each of them


@dataclass(frozen=True)
class _Watch(Ranked):
    """Chooses at every call, and notes that."""

    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "chooses and notes it"

    def rank(self, asked: Asked) -> Tensor:
        return asked.mass()

    def choose(self, asked: Asked) -> None:
        super().choose(asked)
        keys, q = asked.keys, asked.samples(_QUERIES)
        assert keys.lists is not None
        mask = keys.lists.listed(keys.count // keys.block + 1)[..., : keys.choices]
        mass = asked.scores(q.flatten(2, 3)).flatten(3).softmax(-1).unflatten(-1, (keys.choices, -1)).sum(-1)
        asked.lasting.notes["choice"] = _Choice(mask, mass.unflatten(2, (q.shape[2], -1)).mean(3))


@dataclass(frozen=True, eq=False)
class OverlapRecorder(Selector):
    """Reads everything, and compares what each layer would choose with the choices of layers and steps before."""

    slot: ClassVar[str] = "selection"
    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "reads everything and compares what layers would choose"
    exact: ClassVar[dict[str, Any]] = {"policy": None}
    is_exact = True

    policy: Borrowing
    seen: dict[tuple[str, int, int], dict[int, Tensor]] = field(default_factory=dict)  # branch, block, step: by layer
    sums: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)  # (gap, source, layer): (2, H)
    counts: Counter[tuple[int, int, int]] = field(default_factory=Counter)

    @property
    def watch(self) -> _Watch:
        shared = {name: getattr(self.policy, name) for name in _Watch.knobs()}
        return _Watch(**shared | {"refresh": "step", "summaries": False})

    def apart(self, site: "Site") -> bool:
        return self.watch.apart(site)

    def plan(self, q: Tensor, entries: "Entries", site: "Site") -> None:
        if self.watch.plan(q, entries, site) is None:
            return
        own: _Choice = entries.lasting.notes["choice"]
        for past in [at for at in self.seen if at[0] == site.branch and at[1] != site.block]:
            del self.seen[past]
        self.seen.setdefault((site.branch, site.block, site.step), {})[site.layer] = own.mask
        for gap in range(GAPS):
            for source, mask in self.seen.get((site.branch, site.block, site.step - gap), {}).items():
                overlap = (mask & own.mask).sum(-1) / own.mask.sum(-1)
                found = torch.stack([overlap.mean((0, 2)), (own.mass * mask).sum(-1).mean((0, 2))])
                key = (gap, source, site.layer)
                self.sums[key] = self.sums[key] + found if key in self.sums else found
                self.counts[key] += 1

    def idle(self, run: "Run") -> str | None:
        return None if self.counts else f": {self.watch.why_idle(run)}"

    def means(self, layers: int) -> tuple[Axes, Tables]:
        """Overlap and mass (gaps, layers, layers, heads); 0 for a layer that had not chosen yet."""
        gaps = 1 + max(gap for gap, _, _ in self.counts)
        found = torch.zeros(2, gaps, layers, layers, next(iter(self.sums.values())).shape[1], dtype=torch.float64)
        for key, count in self.counts.items():
            found[:, *key] = self.sums[key].cpu().double() / count
        axes: Axes = {"gap": tuple(map(float, range(gaps))), "source": tuple(map(float, range(layers)))}
        return axes, dict(zip(self.policy.tables, found.numpy(), strict=True))
