"""Nearest neighbours over vectors. This package knows nothing of video: points in, ids and distances out."""

if __name__ == "ann":
    raise ImportError("this folder is the package diffaccel.ann; write `from diffaccel.ann import ...`")

from .flat import Flat, Index

__all__ = ["Flat", "Index"]
