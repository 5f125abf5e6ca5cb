"""Which diffusers this version was tested with, and one sentence where another one is installed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UnsupportedError
from .version import __version__

TESTED = ">=0.42,<0.43"
"""As in pyproject.toml: hooks and processors are semi-private in diffusers, so one minor version was tested."""

_REMEDY = f'pip install "diffusers{TESTED}"'


@contextmanager
def building_on_diffusers() -> Iterator[None]:
    """Around imports of code that builds on diffusers: with another version than tested they may fail, or mislead.

    Raises `UnsupportedError` where that version lacks what is imported, and warns where it has it.
    """
    import diffusers

    installed = diffusers.__version__
    low, high = (tuple(map(int, bound.strip("<>=").split("."))) for bound in TESTED.split(","))
    tested = low <= tuple(int(part) for part in installed.split(".")[:2]) < high
    try:
        yield
    except ImportError as error:
        if tested:
            raise
        raise UnsupportedError(
            f"diffaccel {__version__} builds on diffusers{TESTED}, and {installed} is installed, which lacks a part "
            f"of it ({error}): {_REMEDY}"
        ) from error
    if not tested:
        warnings.warn(
            f"diffaccel {__version__} was tested with diffusers{TESTED}, and {installed} is installed: if results "
            f"differ from dense attention at an exact setting, {_REMEDY}",
            stacklevel=2,
        )
