"""The plain KV cache of block-causal generation: everything is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..grid import Grid
from ..policy import CachePolicy
from ..site import Site
from .memory import Memory

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class KVCache(CachePolicy):
    """Keep the keys and values of every finished block, token for token. What runs where no cache is asked for."""

    paper: ClassVar[str] = "Self-Forcing, arXiv 2506.08009"
    summary: ClassVar[str] = "keeps every token of every finished block (the default)"
    exact: ClassVar[dict[str, Any]] = {}

    def expected_tokens(self, video_tokens: int, block: Grid) -> int:
        """Tokens the exact tier should make room for at once."""
        return video_tokens

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """Nothing moves."""
        run.fired("cache")
