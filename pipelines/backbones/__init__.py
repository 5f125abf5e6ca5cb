"""One file a family of models: how its attention meets the seam."""

from diffaccel.backbone import register

from .hunyuan_video import HunyuanVideo
from .ltx_video import LTXVideo
from .wan import Wan

register(Wan())
register(HunyuanVideo())
register(LTXVideo())

__all__ = ["HunyuanVideo", "LTXVideo", "Wan"]
