"""A technique of your own in a dozen lines, composed with those that ship: they are partial attentions that merge."""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from diffaccel import Accel, FlashBlock, Plan, TempCache
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.loading import bundled_model
from diffaccel.policy import Selector, knob


@dataclass(frozen=True)
class LongKeys(Selector):
    """Read the share of the keys that are longest: long keys make large scores."""

    slot: ClassVar[str] = "selection"
    exact: ClassVar[dict[str, Any]] = {"share": 1.0}
    share: float = knob(0.5, "share of the keys to read, in (0, 1]")

    def plan(self, q, entries, site) -> Plan:
        length = entries.k.float().square().sum(dim=(0, 2, 3))
        kept = length >= length.quantile(1 - self.share)
        return Plan.columns(kept, queries=q.shape[1])


frames = int(sys.argv[1]) if len(sys.argv) > 1 else 37
pipe = CausalWanPipeline.from_pretrained(bundled_model())
size = {"height": 128, "width": 128, "num_frames": frames, "num_inference_steps": 8, "guidance_scale": 2.5}
with Accel(selection=LongKeys(0.7), cache=TempCache(), reuse=FlashBlock(refresh=2))(pipe) as run:
    pipe("a small green square moves up over gray", generator=torch.Generator().manual_seed(1), **size)
print(run.report())
