"""Which prompt tokens are worth reading in cross-attention."""

from .pad_collapse import PadCollapse

__all__ = ["PadCollapse"]
