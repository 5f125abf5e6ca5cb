"""One file a family of models: how its attention meets the seam."""

from diffaccel.backbone import register

from .cogvideox import CogVideoX
from .hunyuan_video import HunyuanVideo
from .hunyuan_video15 import HunyuanVideo15
from .ltx2 import LTX2
from .ltx_video import LTXVideo
from .mochi import Mochi
from .wan import Wan

register(Wan())
register(HunyuanVideo())
register(LTXVideo())
register(CogVideoX())
register(Mochi())
register(HunyuanVideo15())
register(LTX2())

__all__ = ["LTX2", "CogVideoX", "HunyuanVideo", "HunyuanVideo15", "LTXVideo", "Mochi", "Wan"]
