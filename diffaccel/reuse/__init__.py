"""Is attention to everything outside the block needed again at this step?"""

from .flashblock import FlashBlock

__all__ = ["FlashBlock"]
