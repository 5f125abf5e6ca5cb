"""Every technique that ships, in the order in which `diffaccel methods` lists them: the one place they are exported."""

from .cache.cake import CAKE
from .cache.host import HostCache
from .cache.sink_recent import RollingRebased, SinkRecent
from .cache.snapkv import SnapKV
from .cache.tempcache import TempCache
from .policy import Policy
from .prompt.annca import AnnCA
from .prompt.pad_collapse import PadCollapse
from .reuse.flashblock import FlashBlock
from .reuse.full_field_guide import FullFieldGuide
from .selection.annsa import AnnSA
from .selection.head_shard import HeadShard
from .selection.hip import HiP
from .selection.mass_router import MassRouter
from .selection.retrieval import RetrievalAttention
from .selection.routed import Routed
from .selection.spatten import SpAttenCascade
from .selection.sticky import Sticky
from .selection.token_select import TokenSelect
from .window.frame_window import FrameWindow
from .window.inward_window import InwardWindow

TECHNIQUES: tuple[type[Policy], ...] = (
    TempCache,
    SinkRecent,
    RollingRebased,
    HostCache,
    SnapKV,
    CAKE,
    AnnSA,
    TokenSelect,
    HiP,
    RetrievalAttention,
    HeadShard,
    Routed,
    Sticky,
    SpAttenCascade,
    MassRouter,
    FlashBlock,
    FrameWindow,
    InwardWindow,
    FullFieldGuide,
    AnnCA,
    PadCollapse,
)

__all__ = [
    "CAKE",
    "AnnCA",
    "AnnSA",
    "FlashBlock",
    "FrameWindow",
    "FullFieldGuide",
    "HeadShard",
    "HiP",
    "HostCache",
    "InwardWindow",
    "MassRouter",
    "PadCollapse",
    "RetrievalAttention",
    "RollingRebased",
    "Routed",
    "SinkRecent",
    "SnapKV",
    "SpAttenCascade",
    "Sticky",
    "TempCache",
    "TokenSelect",
]
