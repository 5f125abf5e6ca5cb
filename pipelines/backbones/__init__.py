"""One file a family of models: how its attention meets the seam."""

from diffaccel.backbone import register

from .anyflow import AnyFlow
from .anyflow_far import AnyFlowFAR
from .cogvideox import CogVideoX
from .cosmos import Cosmos
from .flux import Flux
from .framepack import FramePack
from .helios import Helios
from .hunyuan_video import HunyuanVideo
from .hunyuan_video15 import HunyuanVideo15
from .kandinsky5 import Kandinsky5
from .ltx2 import LTX2
from .ltx_video import LTXVideo
from .mochi import Mochi
from .qwen_image import QwenImage
from .sana import Sana
from .sana_wm_refiner import SanaWMRefiner
from .skyreels_v2 import SkyReelsV2
from .wan import Wan

register(Wan())
register(HunyuanVideo())
register(FramePack())
register(LTXVideo())
register(SkyReelsV2())
register(Helios())
register(Cosmos())
register(Kandinsky5())
register(Flux())
register(QwenImage())
register(CogVideoX())
register(Mochi())
register(HunyuanVideo15())
register(LTX2())
register(AnyFlow())
register(AnyFlowFAR())
register(SanaWMRefiner())
register(Sana())

__all__ = [
    "LTX2",
    "AnyFlow",
    "AnyFlowFAR",
    "CogVideoX",
    "Cosmos",
    "Flux",
    "FramePack",
    "Helios",
    "HunyuanVideo",
    "HunyuanVideo15",
    "Kandinsky5",
    "LTXVideo",
    "Mochi",
    "QwenImage",
    "Sana",
    "SanaWMRefiner",
    "SkyReelsV2",
    "Wan",
]
