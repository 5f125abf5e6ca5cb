"""What attention costs before it runs: counts of work and of bytes, and what a machine makes of them."""

from .cost import (
    Cost,
    attention,
    busy,
    kinetics,
    passes,
    progressive,
    reading,
    spatten,
    tiled,
    traffic,
)
from .machine import MACHINES, Machine, measure
from .predict import attention_of

__all__ = [
    "MACHINES",
    "Cost",
    "Machine",
    "attention",
    "attention_of",
    "busy",
    "kinetics",
    "measure",
    "passes",
    "progressive",
    "reading",
    "spatten",
    "tiled",
    "traffic",
]
