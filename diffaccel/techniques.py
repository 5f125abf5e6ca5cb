"""Every technique that ships, in the order in which `diffaccel methods` lists them: the one place they are exported."""

from .cache.cake import CAKE
from .cache.h2o import H2O
from .cache.host import HostCache
from .cache.lazy_eviction import LazyEviction
from .cache.sink_recent import RollingRebased, SinkRecent
from .cache.snapkv import SnapKV
from .cache.task_kv import TaskKV
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
from .window.neighborhood import NeighborhoodAttention

TECHNIQUES: tuple[type[Policy], ...] = (
    TempCache,
    SinkRecent,
    RollingRebased,
    HostCache,
    SnapKV,
    H2O,
    CAKE,
    TaskKV,
    LazyEviction,
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
    NeighborhoodAttention,
    FullFieldGuide,
    AnnCA,
    PadCollapse,
)

__all__ = [
    "CAKE",
    "H2O",
    "AnnCA",
    "AnnSA",
    "FlashBlock",
    "FrameWindow",
    "FullFieldGuide",
    "HeadShard",
    "HiP",
    "HostCache",
    "InwardWindow",
    "LazyEviction",
    "MassRouter",
    "NeighborhoodAttention",
    "PadCollapse",
    "RetrievalAttention",
    "RollingRebased",
    "Routed",
    "SinkRecent",
    "SnapKV",
    "SpAttenCascade",
    "Sticky",
    "TaskKV",
    "TempCache",
    "TokenSelect",
]
