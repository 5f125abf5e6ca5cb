"""CAKE: layers share a budget by how their attention spreads and shifts."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..policy import knob
from .look import Look
from .scored import Scored


@dataclass(frozen=True)
class CAKE(Scored):
    """SnapKV with a budget of its own for each layer, and a score that favours tokens whose attention varies.

    CAKE (arXiv 2503.12491): a layer's preference is H^(1/tau1) V^(1/tau2), with H the entropy of its mean attention and
    V the summed variance of attention over the probes (section 4.2); layers get shares of the budget in proportion. A
    token is worth the mean of its probabilities and `gamma` times their variance (section 4.3). The paper evicts layer
    after layer while a prompt is read, which ends where one step over all layers does; here it is that one step, at
    every block.
    """

    paper: ClassVar[str] = "CAKE, arXiv 2503.12491"
    summary: ClassVar[str] = "shares a budget among layers by how their attention spreads and shifts"

    tau1: float = knob(1.0, "temperature of the spread, > 0")
    tau2: float = knob(1.0, "temperature of the shift, > 0")
    gamma: float = knob(200.0, "weight of a token's variance beside its mean, >= 0")
    pool: int = knob(1, "frames, rows and columns over which scores are averaged, odd; 1: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.tau1 > 0 and self.tau2 > 0, "tau1 and tau2 are > 0", tau1=self.tau1, tau2=self.tau2)
        self.require(self.gamma >= 0, "gamma is >= 0", gamma=self.gamma)
        self.require(self.probes >= 2, "a variance takes at least 2 probes", probes=self.probes)
        self.require_odd("pool")

    def score(self, look: Look) -> Tensor:
        """Mean and variance over the probes."""
        return look.pooled(look.p.mean(2) + self.gamma * look.p.var(2), self.pool)

    def shares(self, look: Look) -> Tensor:
        """The layer's preference, the same for all of its heads."""
        mean = look.p.mean(2)
        spread = -(mean * mean.clamp(min=1e-10).log()).sum(-1).mean(1)
        shift = look.p.var(2).sum(-1).mean(1)
        preference = spread ** (1 / self.tau1) * shift ** (1 / self.tau2)
        return preference[:, None].expand(mean.shape[:2])
