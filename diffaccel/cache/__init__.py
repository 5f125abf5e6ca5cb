"""What is kept of earlier blocks, and how."""

from .dense import KVCache
from .entries import Entries
from .memory import Memory
from .tiers import ExactTier, Fixed, RowTier, Tier

__all__ = ["Entries", "ExactTier", "Fixed", "KVCache", "Memory", "RowTier", "Tier"]
