"""Where a query may look, by position."""

from .frame_window import FrameWindow

__all__ = ["FrameWindow"]
