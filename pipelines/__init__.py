if __name__ == "pipelines":
    raise ImportError("this folder is the package diffaccel.pipelines; write `from diffaccel.pipelines import ...`")

# Pipelines that generate a video block by block, and what they need: streaming decode, checkpoint loading; language
# models that write block by block.
# Names are imported when first used, because diffusers takes seconds to import.

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .block_lm import BlockLM
    from .canvas_lm import CanvasLM
    from .causal_wan import CausalWanPipeline
    from .checkpoints import CheckpointError, load_self_forcing
    from .free_swim import FreeSwimPipeline
    from .inputs import block_ranges
    from .sharing import share_heads
    from .streaming import StreamingDecoder

_HOME = {
    "BlockLM": "block_lm",
    "CanvasLM": "canvas_lm",
    "CausalWanPipeline": "causal_wan",
    "block_ranges": "inputs",
    "FreeSwimPipeline": "free_swim",
    "StreamingDecoder": "streaming",
    "share_heads": "sharing",
    "CheckpointError": "checkpoints",
    "load_self_forcing": "checkpoints",
}

__all__ = [
    "BlockLM",
    "CanvasLM",
    "CausalWanPipeline",
    "CheckpointError",
    "FreeSwimPipeline",
    "StreamingDecoder",
    "block_ranges",
    "load_self_forcing",
    "share_heads",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
