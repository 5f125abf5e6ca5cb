"""TriAttention: keys by how they lie to where a head's queries usually are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..policy import knob
from ..profile import Profile
from ..rotary import rotate, unrotate
from .calibrated import Calibrated
from .look import Look, probes

LOW = 0.5
"""Concentration below which most of a query is not in its centre."""


@dataclass(frozen=True)
class TriAttention(Calibrated):
    """Of older tokens keep those that a head's mean query would attend to in frames to come.

    TriAttention (arXiv 2604.04921): queries of a head, before they are rotated, lie around a centre q. A key k at a
    distance d in time is worth sum_f |q_f| |k_f| cos(w_f d + phi_f), over pairs of channels f and averaged over
    distances, plus sum_f (E|q_f| - |q_f|) |k_f|. Only temporal pairs turn: a key is seen from its own place in the
    frame, as in the authors' code for LongLive. Scores are compared within a head, so that they are normalised there
    before heads are compared is left out.

    The first sum is written as a product: the centre, rotated to the key's place and to frames to come, with the key as
    it is rotated itself. So a key's own time is right whatever its head has dropped, where that code takes what is left
    as contiguous. Offsets are 1, 2, 4 ... frames up to `horizon` after the newest one. Centres are measured in clean
    passes. Concentration, |q_f| over E|q_f|, says how far the premise holds for a model; calibration reports it.
    """

    paper: ClassVar[str] = "TriAttention, arXiv 2604.04921"
    summary: ClassVar[str] = "keeps the tokens of the past that a head's mean query would attend to in frames to come"
    axes: ClassVar[tuple[str, ...]] = ("pair",)
    tables: ClassVar[tuple[str, ...]] = ("real", "imag", "size")

    horizon: int = knob(128, "latent frames to come that a key is judged for, >= 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.horizon >= 1, "horizon is a number of latent frames >= 1", horizon=self.horizon)

    def score(self, look: Look) -> Tensor:
        """Both sums."""
        if look.rotary is None or look.later is None:
            raise UnsupportedError("TriAttention moves queries in time, and this model's family does not say how")
        real, imag, size = (self.of_layer(name, look) for name in self.tables)
        centre, cells = torch.stack([real, imag], -1), look.grid.tokens_per_frame  # (F, H, 2)
        q = centre.transpose(0, 1).flatten(1).expand(1, cells, -1, -1)  # (1, cells, H, D)
        q = rotate(q.contiguous(), *(table[:, :cells].float() for table in look.rotary))
        turned = [look.later(q, look.grid.frames)]  # one frame after the newest
        for power in range(self.horizon.bit_length() - 1):
            turned.append(look.later(turned[-1], 2**power))  # families have tables of some length, so step by step
        ahead = torch.stack(turned).mean(0)[0]
        head = torch.arange(ahead.shape[1], device=ahead.device)[:, None]
        seen = ahead[look.token % cells, head]  # (B, H, N, D)
        k = look.k.transpose(1, 2).to(seen)
        spread = size - centre.norm(dim=-1)
        return (seen * k).sum(-1) + torch.einsum("bhnf,fh->bhn", k.unflatten(-1, (-1, 2)).norm(dim=-1), spread)

    def measure(self, look: Look) -> dict[str, Tensor]:
        """Means of the probes before they were rotated, and of their sizes, (pairs, H)."""
        if look.rotary is None:
            raise UnsupportedError("TriAttention turns queries back, and this model's family does not say how")
        at = probes(look.grid, self.probes).to(look.rotary[0].device)
        pairs = unrotate(look.q.float(), *(table[:, at].float() for table in look.rotary)).unflatten(-1, (-1, 2))
        real, imag = pairs.mean((0, 1)).unbind(-1)
        return {"real": real.T, "imag": imag.T, "size": pairs.norm(dim=-1).mean((0, 1)).T}

    def lines(self, profile: Profile) -> Iterator[str]:
        """Concentration: |centre| over mean size of queries, summed over pairs."""
        real, imag, size = (profile.tables[name] for name in self.tables)
        found = ((real**2 + imag**2) ** 0.5).sum(0) / size.sum(0)
        worst, low = found.mean(1).argmin(), float((found < LOW).mean())
        yield f"concentration {found.mean():.3f} of queries, lowest layer {worst} ({found[worst].mean():.3f})"
        if low:
            yield f"low: below {LOW} in {low:.0%} of the heads, whose queries lie around no centre as the score assumes"
