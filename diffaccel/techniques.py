"""Every technique that ships, in the order in which `diffaccel methods` lists them: the one place they are exported."""

from .cache.sink_recent import RollingRebased, SinkRecent
from .cache.tempcache import TempCache
from .policy import Policy
from .prompt.pad_collapse import PadCollapse
from .reuse.flashblock import FlashBlock
from .window.frame_window import FrameWindow

TECHNIQUES: tuple[type[Policy], ...] = (TempCache, SinkRecent, RollingRebased, FlashBlock, FrameWindow, PadCollapse)

__all__ = ["FlashBlock", "FrameWindow", "PadCollapse", "RollingRebased", "SinkRecent", "TempCache"]
