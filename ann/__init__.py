"""Nearest neighbours over vectors. This package knows nothing of video: points in, ids and distances out."""

if __name__ == "ann":
    raise ImportError("this folder is the package diffaccel.ann; write `from diffaccel.ann import ...`")

from .balanced import Ordered, inverse, order, ordered
from .faiss import Faiss
from .flat import Flat
from .index import Found, Index
from .ivf import IVF
from .kmeans import KMeans
from .lsh import LSH
from .quantized import ProductQuantized, Quantized
from .recall import Row, frontier, recall

__all__ = [
    "IVF",
    "LSH",
    "Faiss",
    "Flat",
    "Found",
    "Index",
    "KMeans",
    "Ordered",
    "ProductQuantized",
    "Quantized",
    "Row",
    "frontier",
    "inverse",
    "order",
    "ordered",
    "recall",
]
