"""Arms of `cache_quality.py --suite policies`: caches that keep what scores best, at equal memory, and controls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel import Accel, SinkRecent, Site, SnapKV, TempCache
from diffaccel.cache import Memory
from diffaccel.cache.look import Look
from diffaccel.cache.remainder import REMAINDERS
from diffaccel.cache.scored import Scored
from diffaccel.run import Run
from diffaccel.techniques import TECHNIQUES

PERCENT = (25, 10)
BLOCK, SINK = 3, 1


@dataclass(frozen=True)
class RandomKeep(Scored):
    """Keeps tokens by lot, drawn once for each: what a score must beat."""

    paper: ClassVar[str] = "a control"
    summary: ClassVar[str] = "keeps tokens by lot"
    columns: ClassVar[tuple[str, ...]] = ("lot",)

    def observe(self, look: Look) -> dict[str, Tensor]:
        lot = look.columns["lot"]
        generator = torch.Generator().manual_seed(1000 * look.layer + look.start)
        drawn = torch.rand(lot.shape, generator=generator).to(lot.device).clamp(min=1e-6)
        return {"lot": torch.where(lot > 0, lot, drawn)}

    def score(self, look: Look) -> Tensor:
        return look.columns["lot"]


Masses = dict[tuple[str, int], dict[int, Tensor]]
"""By branch and layer, and by a block's first frame: mass (B, H, T) of its probes on each token of the video so far."""


@dataclass(frozen=True)
class OracleKeep(Scored):
    """Keeps the tokens with most of the attention of all blocks to come: what no score can know.

    `masses` is filled by a dense generation (`watched`), and is of the same prompts and noise.
    """

    paper: ClassVar[str] = "a control"
    summary: ClassVar[str] = "keeps what later blocks attend to"

    masses: Masses = field(default_factory=dict, metadata={"help": "what later blocks attend to"}, hash=False)
    watching: bool = False
    _branch: list[str] = field(default_factory=lambda: [""], hash=False)

    def commit(self, memories: Sequence[Memory], site: Site, run: Run) -> None:
        self._branch[0] = site.branch
        super().commit(memories, site, run)

    def observe(self, look: Look) -> dict[str, Tensor]:
        if self.watching:
            end = (look.start + look.grid.frames) * look.grid.tokens_per_frame
            mass = look.p.new_zeros(*look.token.shape[:2], end)
            mass.scatter_(-1, look.token, look.p.mean(2) * look.there)
            self.masses.setdefault((self._branch[0], look.layer), {})[look.start] = mass.cpu()
        return {}

    def score(self, look: Look) -> Tensor:
        later = [mass for start, mass in self.masses[self._branch[0], look.layer].items() if start > look.start]
        total = torch.zeros_like(look.p[:, :, 0])
        for mass in later:
            total += mass.to(total.device).gather(-1, look.token.clamp(max=mass.shape[-1] - 1))
        return total


def arms(frames: int, watched: Callable[[Accel], Any], profiles: dict[str, str]) -> list[tuple[str, Accel]]:
    """Names and settings, for a video of so many latent frames.

    `watched` runs a dense generation under an `Accel`; `profiles` has files of techniques that go by one, without which
    they are left out.
    """
    found = []
    oracle = OracleKeep(f"{2 * frames} frames", recent_frames=BLOCK, sink_frames=SINK, watching=True)
    watched(Accel(cache=oracle))
    for percent in PERCENT:
        held = round(frames * percent / 100)
        if held < SINK + 2 * BLOCK:
            continue
        knobs: dict[str, Any] = {"budget": f"{held} frames", "sink_frames": SINK, "recent_frames": BLOCK}
        name = f"budget {percent} %"
        found += [
            (f"{name}: SinkRecent", Accel(cache=SinkRecent(held - SINK, SINK))),
            (f"{name}: SinkRecent, cell summaries", Accel(cache=SinkRecent(held - SINK - 1, SINK, "cell"))),
            (f"{name}: TempCache", Accel(cache=TempCache(0.9, budget=f"{held} frames", sink_frames=SINK))),
            (f"{name}: random", Accel(cache=RandomKeep(**knobs))),
            (f"{name}: random, mean key", Accel(cache=RandomKeep(**knobs, dropped="mean"))),
            (f"{name}: oracle", Accel(cache=OracleKeep(**knobs, masses=oracle.masses))),
        ]
        for technique in TECHNIQUES:
            if issubclass(technique, Scored):
                if technique.needs == "calibration" and technique.__name__ not in profiles:
                    continue
                own = {} if technique.needs == "nothing" else {"profile": profiles[technique.__name__]}
                found.append((f"{name}: {technique.__name__}", Accel(cache=technique(**knobs, **own))))
        found += [
            (f"{name}: SnapKV, {dropped}", Accel(cache=SnapKV(**knobs, dropped=dropped)))
            for dropped in REMAINDERS
            if dropped != "host"
        ]
    return found
