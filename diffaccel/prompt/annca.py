"""AnnCA: prompt tokens that no query of the block is near are not read (FAST-AR, arXiv 2602.01801, section 5.3)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..ann.hashing import MAX_BITS, generator, pack
from ..cache.entries import Entries
from ..cache.tiers import Each, Fixed, Tier
from ..policy import knob
from ..site import Site
from .pad_collapse import PadCollapse

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class AnnCA(PadCollapse):
    """Hash queries and prompt keys into one space, layer by layer, and drop tokens that share no bucket with a query.

    Signs of `bits` random projections make a bucket; a token stays if in any of `tables` such hashes, in any head, a
    query shares its bucket. Keys and queries are hashed less their mean, as they lie apart.
    Worked out at the first step of a block and kept for the others, which waits for the device once a layer and block.

    The padding, collapsed into one key as by `PadCollapse`, always stays: what it draws off is much of the attention.
    Cross-attention is about a hundredth of a large model's time, so this saves little.
    """

    paper: ClassVar[str] = "FAST-AR, arXiv 2602.01801, section 5.3"
    summary: ClassVar[str] = "drops prompt tokens that no query of the block is near, and collapses the padding"
    exact: ClassVar[dict[str, Any]] = {"bits": 0}
    engaged_by_preparing: ClassVar[bool] = False

    bits: int = knob(8, "projections of a hash, 0 to 16: the more, the more tokens are dropped; 0 drops none")
    tables: int = knob(4, "hashes, >= 1: the more, the fewer tokens are dropped")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.bits <= MAX_BITS, f"bits is a number of projections in [0, {MAX_BITS}]", bits=self.bits)
        self.require(self.tables >= 1, "tables is a number of hashes >= 1", tables=self.tables)

    def near(self, q: Tensor, prompt: Entries, site: Site, run: "Run") -> Tier:
        """What is read of the prompt's entries by queries (B, S, H, D)."""
        if not self.bits:
            return Fixed(prompt)
        known: dict[int, Any] = run.scratch("prompt", site.branch).setdefault("near", {})
        before, kept = known.get(site.layer, (None, []))
        place = site.block, prompt.count, run.prompt_number
        if before != place or not run.causal:
            kept = self._kept(q, prompt)
            known[site.layer] = place, kept
        if all(len(stays) == prompt.count for stays, _ in kept):
            return Fixed(prompt)
        run.fired("prompt")
        rows = zip(prompt.k.split(1), prompt.v.split(1), kept, strict=True)
        return Each([Entries(k[:, stays], v[:, stays], multiplicity=groups) for k, v, (stays, groups) in rows])

    def _kept(self, q: Tensor, prompt: Entries) -> list[tuple[Tensor, tuple[tuple[int, int], ...]]]:
        """Which entries of each video stay, in their order, and the tokens each stands for."""
        tokens = torch.tensor([m for count, m in prompt.multiplicity or ((prompt.count, 1),) for _ in range(count)])
        padding = torch.zeros(prompt.k.shape[:2], dtype=torch.bool, device=q.device)
        if tokens[-1] > 1:  # a prompt that is shorter than others of the batch has more of it than the collapsed one
            last = prompt.k[:, -1:].float()
            padding = (prompt.k - last).square().sum((-2, -1)) <= 1e-4 * last.square().sum((-2, -1))
        hashes = torch.randn(q.shape[-1], self.tables * self.bits, generator=generator(0, q.device), device=q.device)
        asked, there = (
            self._codes(q, torch.zeros_like(q[..., 0, 0], dtype=torch.bool), hashes),
            self._codes(prompt.k, padding, hashes),
        )
        occupied = torch.zeros(*asked.shape[:-1], 2**self.bits, dtype=torch.bool, device=q.device)
        occupied.scatter_(-1, asked, True)
        stays = (occupied.gather(-1, there).flatten(1, 2).any(1) | padding).cpu()
        kept = [row.nonzero().squeeze(1) for row in stays]
        return [(row.to(q.device), tuple((1, m) for m in tokens[row].tolist())) for row in kept]

    def _codes(self, x_BNHD: Tensor, padding_BN: Tensor, hashes: Tensor) -> Tensor:
        """Buckets (B, H, tables, N) of vectors less the mean of those that are no padding."""
        x, counts = x_BNHD.transpose(1, 2).float(), (~padding_BN)[:, None, :, None]
        mean = (x * counts).sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp(min=1)
        return pack(((x - mean) @ hashes).unflatten(-1, (self.tables, self.bits))).transpose(2, 3)

    def why_idle(self, run: "Run") -> str:
        return f"every prompt token shared a bucket with some query: raise bits (now {self.bits}) or lower tables"
