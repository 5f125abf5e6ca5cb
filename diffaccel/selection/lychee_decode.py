"""LycheeDecode: some heads search, the others read what the head of their number found (arXiv 2602.04541)."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..policy import knob
from .asked import Asked
from .borrowed import Borrowed, Borrowing


@dataclass(frozen=True)
class LycheeDecode(Borrowing):
    """Retrieval heads read everything and choose; a head of the same number in the layers behind reads that choice.

    All heads of the first layer are retrieval heads; further ones are those with most to lose by borrowing from the
    layer before: (1 - overlap of the choices) x attention on a head's own choice, in dense videos (`profile`).

    The paper learns which they are: a gate a head, drawn from a stretched Kumaraswamy distribution, trained to
    distil the model with 32 heads left. Calibrated roles are a stand-in that trains nothing. Other differences: blocks
    of keys are chosen, by an estimate, and means stand for the others (`summaries`); instead of a dense pass every 32
    tokens, choices are made anew as `refresh` says.
    """

    paper: ClassVar[str] = "LycheeDecode, arXiv 2602.04541"
    summary: ClassVar[str] = "lets calibrated heads read everything, the others what the head of their number chose"

    retrieval: float = knob(0.3, "share of all heads that search, those of the first layer among them, in (0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.retrieval < 1, "retrieval is a share in (0, 1)", retrieval=self.retrieval)

    @cached_property
    def roles(self) -> NDArray[np.bool_]:
        """Which heads search, (layers, heads)."""
        overlap, mass = (self.measured(name)[0] for name in self.tables)
        layers, heads = overlap.shape[1:]
        gain = np.full((layers, heads), np.inf)
        for layer in range(1, layers):
            gain[layer] = (1 - overlap[layer - 1, layer]) * mass[layer, layer]
        count = max(heads, round(self.retrieval * layers * heads))
        found = np.zeros(layers * heads, bool)
        found[np.argsort(-gain, axis=None, kind="stable")[:count]] = True
        return found.reshape(layers, heads)

    def choose(self, asked: Asked) -> None:
        site, keys, of = asked.site, asked.keys, self.made_for(asked)
        known: Borrowed | None = asked.lasting.shared.get("lychee")
        roles = torch.from_numpy(self.roles[site.layer])
        borrows = known is not None and (known.of, known.step) == (of, site.step) and not bool(roles.all())
        if borrows and not bool(roles.any()):
            keys.lists, keys.read, keys.even = known.lists, asked.take, True  # type: ignore[union-attr]
            return
        super().choose(asked)
        assert keys.lists is not None
        if borrows:
            searches = roles.to(asked.q.device)[:, None, None]
            keys.lists.lists[:] = torch.where(searches, keys.lists.lists, known.lists.lists)  # type: ignore[union-attr]
        asked.lasting.shared["lychee"] = Borrowed(of, site.step, keys.lists)
        keys.read_all_in(roles)
