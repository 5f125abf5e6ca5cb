"""Training-free acceleration of video diffusion and block diffusion at inference time.

from diffaccel import Accel, TempCache, FlashBlock

with Accel(cache=TempCache(), reuse=FlashBlock())(pipe) as run:
    frames = pipe("a large red circle moves left").frames
print(run.report())
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "ann").is_dir():  # a checkout: pipelines/ and ann/ lie beside this folder, a wheel holds them inside
    __path__.append(str(_here.parent))

from . import techniques  # noqa: E402
from .accel import Accel  # noqa: E402  (the path above must be set first)
from .errors import DiffaccelError, KernelError, KnobError, NotEngagedError, UnsupportedError  # noqa: E402
from .grid import Grid  # noqa: E402
from .plan import Plan  # noqa: E402
from .report import Report  # noqa: E402
from .run import Run  # noqa: E402
from .site import Site  # noqa: E402
from .techniques import *  # noqa: E402, F403
from .version import __version__  # noqa: E402

__all__ = [
    "Accel",
    "DiffaccelError",
    "Grid",
    "KernelError",
    "KnobError",
    "NotEngagedError",
    "Plan",
    "Report",
    "Run",
    "Site",
    "UnsupportedError",
    "__version__",
]
__all__ += techniques.__all__
