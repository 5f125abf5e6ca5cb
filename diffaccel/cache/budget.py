"""How much a cache may hold: a number of tokens, of latent frames, or of bytes."""

import re
from dataclasses import dataclass

import torch

from ..errors import KnobError
from ..grid import Grid

_UNITS = {"tokens": 1, "frames": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_RULE = 'a budget is a number of tokens (40000), of latent frames ("32 frames") or of bytes of all layers ("8GB")'


@dataclass(frozen=True)
class Extent:
    """What a generation is about to hold: `frames` latent frames in blocks of the grid `block`, in every layer.

    `rows` counts the videos of the batch, `branches` the passes of guidance; each keeps a cache of its own.
    """

    frames: int
    block: Grid
    layers: int
    heads: int
    head_dim: int
    rows: int
    branches: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, rows and branches."""
        return 2 * self.vectors * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def vectors(self) -> int:
        """Keys of one token: one a layer, row and branch."""
        return self.layers * self.rows * self.branches


def parse_budget(budget: int | str) -> tuple[float, str]:
    """Amount and unit. Raises `KnobError` for what is no budget."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(budget).lower())
    if isinstance(budget, bool) or found is None:
        raise KnobError(f"{_RULE}, got {budget!r}")
    amount, unit = float(found[1]), found[2] or "tokens"
    unit = {"token": "tokens", "frame": "frames"}.get(unit, unit)
    if unit not in _UNITS or amount <= 0 or (unit in ("tokens", "frames") and amount % 1):
        raise KnobError(f"{_RULE}, units {', '.join(_UNITS)}, above 0; got {budget!r}")
    return amount, unit


def parse_bytes(text: str) -> int:
    """A number of bytes, such as "8GB". Raises `KnobError` for what is none."""
    amount, unit = parse_budget(text)
    if unit in ("tokens", "frames"):
        raise KnobError(f'a memory is a number of bytes with its unit ("8GB"), got {text!r}')
    return int(amount * _UNITS[unit])


def readable(size: int) -> str:
    """Bytes in the largest unit of which there is one."""
    unit = next((name for name in ("GB", "MB", "kB") if size >= _UNITS[name.lower()]), "bytes")
    return f"{size / _UNITS.get(unit.lower(), 1):.3g} {unit}"


def room_for(budget: int | str, extent: Extent, exact_tokens: int, bytes_per_token: int, spare: int = 0) -> int:
    """Tokens a layer may hold beside `exact_tokens` under `budget`, at `bytes_per_token` in all layers; may be < 0.

    A budget in bytes is that of the buffers, which have room for one block and `spare` tokens more.
    """
    amount, unit = parse_budget(budget)
    if unit == "tokens":
        return int(amount) - exact_tokens
    if unit == "frames":
        return int(amount) * extent.block.tokens_per_frame - exact_tokens
    left = parse_bytes(str(budget)) - exact_tokens * extent.bytes_per_token
    return left // bytes_per_token - extent.block.tokens - spare
