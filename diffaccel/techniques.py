"""Every technique that ships, in the order in which `diffaccel methods` lists them: the one place they are exported."""

from .cache.cake import CAKE
from .cache.compress_kv import CompressKV
from .cache.duo_attention import DuoAttention
from .cache.h2o import H2O
from .cache.host import HostCache
from .cache.lazy_eviction import LazyEviction
from .cache.razor_attention import RazorAttention
from .cache.remote import RemoteCache
from .cache.rkv import RKV
from .cache.sink_recent import RollingRebased, SinkRecent
from .cache.snapkv import SnapKV
from .cache.task_kv import TaskKV
from .cache.tca_style import TCAStyle
from .cache.tempcache import TempCache
from .cache.think import ThinK
from .cache.tri_attention import TriAttention
from .cache.zipcache import ZipCache
from .policy import Policy
from .prompt.annca import AnnCA
from .prompt.pad_collapse import PadCollapse
from .reuse.flashblock import FlashBlock
from .reuse.flow_cache import FlowCache
from .reuse.full_field_guide import FullFieldGuide
from .selection.annsa import AnnSA
from .selection.head_shard import HeadShard
from .selection.hip import HiP
from .selection.hylra import HyLRA
from .selection.lychee_decode import LycheeDecode
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
    RemoteCache,
    ZipCache,
    ThinK,
    SnapKV,
    H2O,
    CAKE,
    RKV,
    TaskKV,
    LazyEviction,
    TriAttention,
    RazorAttention,
    DuoAttention,
    CompressKV,
    TCAStyle,
    AnnSA,
    TokenSelect,
    HiP,
    HyLRA,
    LycheeDecode,
    RetrievalAttention,
    HeadShard,
    Routed,
    Sticky,
    SpAttenCascade,
    MassRouter,
    FlashBlock,
    FlowCache,
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
    "RKV",
    "AnnCA",
    "AnnSA",
    "CompressKV",
    "DuoAttention",
    "FlashBlock",
    "FlowCache",
    "FrameWindow",
    "FullFieldGuide",
    "HeadShard",
    "HiP",
    "HostCache",
    "HyLRA",
    "InwardWindow",
    "LazyEviction",
    "LycheeDecode",
    "MassRouter",
    "NeighborhoodAttention",
    "PadCollapse",
    "RazorAttention",
    "RemoteCache",
    "RetrievalAttention",
    "RollingRebased",
    "Routed",
    "SinkRecent",
    "SnapKV",
    "SpAttenCascade",
    "Sticky",
    "TCAStyle",
    "TaskKV",
    "TempCache",
    "ThinK",
    "TokenSelect",
    "TriAttention",
    "ZipCache",
]
