"""Layers in place of attention, which need training: mixers, and how one is put in and taught.

`samples/mixers/README.md` says what each is and how near it comes.
"""

from .attention_gate import AttentionGate
from .based import Based, TaylorTier
from .cca import CCA
from .cis import Cis
from .convert import Replaced, convert, distil, errors
from .flowformer import Flowformer
from .flux_router import FluxRouter
from .group_shift import GroupShift
from .lightning import Lightning, Lightning2
from .local_linear import LocalLinear, LocalLinearTier
from .mixer import Mixer
from .titans import Titans

MIXERS: tuple[type[Mixer], ...] = (
    Flowformer,
    Lightning,
    Lightning2,
    Based,
    LocalLinear,
    CCA,
    Titans,
    GroupShift,
    AttentionGate,
    FluxRouter,
    Cis,
)
"""Every mixer that ships."""

__all__ = [
    "CCA",
    "MIXERS",
    "AttentionGate",
    "Based",
    "Cis",
    "Flowformer",
    "FluxRouter",
    "GroupShift",
    "Lightning",
    "Lightning2",
    "LocalLinear",
    "LocalLinearTier",
    "Mixer",
    "Replaced",
    "TaylorTier",
    "Titans",
    "convert",
    "distil",
    "errors",
]
