"""What a policy sees of one layer when a block is finished: everything kept, and how some queries read it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, pad
from torch.quasirandom import SobolEngine

from ..grid import Grid


@dataclass(frozen=True, eq=False)
class Look:
    """Queries of a block's clean pass over N entries of its past and itself; B rows, H heads, n probes.

    `token` is the place of an entry's token in the video, frame by frame; `columns` are what the policy noted.
    """

    layer: int
    q: Tensor  # (B, n, H, D), rotated
    k: Tensor  # (B, N, H, D), rotated
    v: Tensor
    columns: dict[str, Tensor]  # (B, H, N)
    there: Tensor  # (B, H, N) bool
    beside: Tensor | None  # (B, n, H): log-sum-exp of the probes over what is held in other forms
    grid: Grid  # of the block
    start: int  # its first latent frame
    rotary: tuple[Tensor, Tensor] | None = None  # its tables (1, S, 1, D), where the model's family gives them
    later: Callable[[Tensor, int], Tensor] | None = None  # rotated vectors (B, N, H, D), some frames later

    @property
    def token(self) -> Tensor:
        """(B, H, N) int64."""
        return self.columns["token"]

    @property
    def frame(self) -> Tensor:
        """Latent frame of each entry, (B, H, N)."""
        return self.token // self.grid.tokens_per_frame

    @cached_property
    def p(self) -> Tensor:
        """Attention probabilities of the probes, (B, H, n, N) fp32: exact, as all that they read is here."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        q, k = (x.to(wide).transpose(1, 2) for x in (self.q, self.k))
        scores = (q @ k.transpose(2, 3)) * self.q.shape[-1] ** -0.5
        scores = scores.masked_fill(~self.there[:, :, None], -torch.inf)
        lse = scores.logsumexp(-1)
        if self.beside is not None:
            lse = torch.logaddexp(lse, self.beside.transpose(1, 2))
        return torch.exp(scores - lse[..., None])

    def pooled(self, score: Tensor, width: int) -> Tensor:
        """Each score (B, H, N) becomes the mean over the entries that are there up to width // 2 frames, rows and
        columns away."""
        if width == 1:
            return score
        frames = self.start + self.grid.frames
        shape = (frames, self.grid.height, self.grid.width)
        given = torch.stack([score * self.there, self.there.to(score)])
        flat = given.new_zeros(2, *score.shape[:2], frames * self.grid.tokens_per_frame)
        flat.scatter_add_(-1, self.token.expand(2, -1, -1, -1), given)
        means = avg_pool3d(pad(flat.view(-1, *shape), [width // 2] * 6), width, stride=1)
        total, count = means.view_as(flat)
        return total.gather(-1, self.token) / count.gather(-1, self.token).clamp(min=1e-12)


def probes(grid: Grid, count: int) -> Tensor:
    """Places of `count` tokens of a block, spread evenly over frames, rows and columns, (n,) int64, ascending.

    The last tokens of a block, which language models probe with, would be one corner of its last frame.
    """
    points = SobolEngine(3).draw(min(count, grid.tokens), dtype=torch.float64) + 0.5 / count
    t, y, x = (points * torch.tensor([grid.frames, grid.height, grid.width])).long().unbind(1)
    return ((t * grid.height + y) * grid.width + x).unique()
