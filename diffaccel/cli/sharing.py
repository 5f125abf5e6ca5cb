"""`--ulysses N`: the processes that torchrun launched share the heads of one video."""

import logging
from collections.abc import Sequence
from typing import Any

from ..ranks import ranks
from .checks import require


def check_sharing(
    devices: int, prompts: Sequence[str], *, comparing: bool, observing: bool, device: str | None, offload: str
) -> None:
    """Rules of --ulysses, before anything is loaded."""
    require(devices >= 2, f"--ulysses is how many processes share a video, at least 2, got {devices}")
    met = ranks().count
    require(
        met == devices,
        f"--ulysses {devices} is for as many processes, and {met} {'runs' if met == 1 else 'run'}: "
        f"torchrun --nproc-per-node {devices} -m diffaccel generate ... --ulysses {devices}",
    )
    require(
        len(prompts) == 1,
        f"--ulysses shares one video, and {len(prompts)} prompts were given: without it each process takes prompts of "
        "its own",
    )
    require(not comparing, "--compare is for one process; leave one of --compare and --ulysses out")
    require(not observing, "--plots looks at what all heads read, of which each process has some; leave it out")
    require(device is None, f"with --ulysses every process takes a device of its own; leave --device {device} out")
    require(offload == "none", f"--offload {offload} is for one process; leave it or --ulysses out")


def share(pipe: Any) -> None:
    """Let the processes share the pipeline's heads."""
    from ..pipelines.sharing import share_heads

    logging.getLogger("diffusers").setLevel(logging.ERROR)  # every process would call it experimental
    share_heads(pipe)


class Elsewhere:
    """In place of a `VideoWriter`, in the processes that do not write."""

    frames = 0

    def append(self, _: Any) -> None: ...

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *_: object) -> None: ...
