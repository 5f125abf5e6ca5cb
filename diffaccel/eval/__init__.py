"""Many prompts, many settings: what they cost and what they gain, in folders that survive a kill.

    from diffaccel.eval import quality
    from diffaccel.pipelines.presets import balanced, fast

    rows = quality(pipe, {"balanced": balanced(), "fast": fast()}, "out", prompts=prompts, num_frames=81)

README.md in this folder says what the files hold.
"""

from .arms import Arm, Setup
from .measure import Measures
from .runs import Progress, quality
from .store import EvalError, Store

__all__ = ["Arm", "EvalError", "Measures", "Progress", "Setup", "Store", "quality"]
