"""One file a family of models: how its attention meets the seam."""

from diffaccel.backbone import register

from .hunyuan_video import HunyuanVideo
from .wan import Wan

register(Wan())
register(HunyuanVideo())

__all__ = ["HunyuanVideo", "Wan"]
