"""What is kept of earlier blocks, and how."""

from .budget import Extent
from .dense import KVCache
from .entries import Entries, Lasting, Reader
from .memory import Memory
from .tiers import ExactTier, Fixed, Tier

__all__ = ["Entries", "ExactTier", "Extent", "Fixed", "KVCache", "Lasting", "Memory", "Reader", "Tier"]
