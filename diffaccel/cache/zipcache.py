"""ZipCache: what is attended to most is held in more bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..grid import Grid
from ..policy import knob
from ..site import Site
from .budget import Extent
from .look import Look
from .memory import Memory
from .ragged import ByHead
from .remainder import Remainder
from .sorting import Sorting
from .store import BITS
from .stored import Stored, in_bits

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class ZipCache(Sorting):
    """Keep every token; of those no longer new, hold the most salient ones in 4 bits and the others in 2.

    ZipCache (arXiv 2405.14256): salience is the attention that a token got over the number of queries that could see it
    (section 4.2), estimated by a few probes (section 4.3); a share of 0.6 is salient. Values are divided by the root of
    their channels' sizes and quantised token by token (section 4.1).

    Beside the authors' code: who could see a token is counted in blocks, as all of a block sees all of the past; probes
    are spread over each block instead of the newest 5 % and 5 % at random; salience adds up over blocks, and is
    compared anew at every block instead of every 100 tokens. What fell to fewer bits stays there: its digits are gone.
    Keys, which the authors quantise channel by channel over many tokens, are divided by their channels' sizes and
    quantised token by token, as tokens change their tier one by one; and they are rotated.

    Saves memory, not time.
    """

    paper: ClassVar[str] = "ZipCache, arXiv 2405.14256"
    summary: ClassVar[str] = "holds every token, the ones attended to most in 4 bits and the others in 2: saves memory"
    exact: ClassVar[dict[str, Any]] = {"salient": None}
    columns: ClassVar[tuple[str, ...]] = ("mass", "seen")

    salient: float | None = knob(0.6, "share of older tokens that is held in `bits`, in (0, 1]; None: all as they are")
    bits: int = knob(4, "bits of salient tokens: 8, 4 or 2")
    other_bits: int = knob(2, "bits of the others, at most `bits`")
    recent_frames: int = knob(3, "newest latent frames that are held as they are, >= 0")
    sink_frames: int = knob(1, "first latent frames of the video that are held as they are, >= 0")
    probes: int = knob(32, "queries of a finished block that say what it read, >= 1")
    normalised: bool = knob(True, "divide what a token got by the number of blocks that could see it")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.salient is None or 0 < self.salient <= 1,
            "salient is a share in (0, 1], or None to quantise nothing",
            salient=self.salient,
        )
        self.require(
            self.bits in BITS and self.other_bits in BITS and self.other_bits <= self.bits,
            "bits and other_bits are 8, 4 or 2, other_bits no more than bits",
            bits=self.bits,
            other_bits=self.other_bits,
        )
        self.require_frames("recent_frames")
        self.require_frames("sink_frames")
        self.require(self.probes >= 1, "probes is a number of queries >= 1", probes=self.probes)
        self.require(isinstance(self.normalised, bool), "normalised is True or False", normalised=self.normalised)

    def observe(self, look: Look) -> dict[str, Tensor]:
        """Add the mean probability over this block's probes."""
        return {"mass": look.columns["mass"] + look.p.mean(2), "seen": look.columns["seen"] + 1}

    def score(self, look: Look) -> Tensor:
        """Attention a block, or the sum over blocks."""
        mass = look.columns["mass"]
        return mass / look.columns["seen"] if self.normalised else mass

    def tiers(self, layers: int) -> Sequence[tuple[ByHead, *tuple[Remainder, ...]]]:
        return [(Stored(in_bits(self.bits)), Stored(in_bits(self.other_bits))) for _ in range(layers)]

    def capacity(self, extent: Extent, middle: int) -> int:
        """The salient share of all older tokens."""
        assert self.salient is not None
        return max(1, round(self.salient * middle))

    def commit(self, memories: Sequence[Memory], site: Site, run: "Run") -> None:
        """As `Sorting`, and what is held in fewer bits counts as changed."""
        super().commit(memories, site, run)
        run.fired("cache", any(memory.older for memory in memories))

    def expected_tokens(self, video_tokens: int, block: Grid) -> int:
        """Room for the protected frames and a block at work."""
        if self.salient is None:
            return video_tokens
        return min(video_tokens, (self.sink_frames + self.recent_frames + block.frames) * block.tokens_per_frame)

    def why_idle(self, run: "Run") -> str:
        return "no frame ever left the first and the newest ones, so nothing was quantised: generate more frames"
