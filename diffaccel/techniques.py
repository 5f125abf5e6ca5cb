"""Every technique that ships, in the order in which `diffaccel methods` lists them: the one place they are exported."""

from .cache.host import HostCache
from .cache.sink_recent import RollingRebased, SinkRecent
from .cache.tempcache import TempCache
from .policy import Policy
from .prompt.annca import AnnCA
from .prompt.pad_collapse import PadCollapse
from .reuse.flashblock import FlashBlock
from .selection.annsa import AnnSA
from .window.frame_window import FrameWindow

TECHNIQUES: tuple[type[Policy], ...] = (
    TempCache,
    SinkRecent,
    RollingRebased,
    HostCache,
    AnnSA,
    FlashBlock,
    FrameWindow,
    AnnCA,
    PadCollapse,
)

__all__ = [
    "AnnCA",
    "AnnSA",
    "FlashBlock",
    "FrameWindow",
    "HostCache",
    "PadCollapse",
    "RollingRebased",
    "SinkRecent",
    "TempCache",
]
