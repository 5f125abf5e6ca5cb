"""One file a family of models: how its attention meets the seam."""

from diffaccel.backbone import register

from .wan import Wan

register(Wan())

__all__ = ["Wan"]
