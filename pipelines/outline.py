"""A pipeline without its weights: what a model looks like, from its configuration files alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from .loading import components, locate, opening


def outline(model: str | Path | None = None, *, pipeline: Literal["causal", "stock"] | None = None) -> Any:
    """The pipeline that `load` opens, with the parameters of its diffusers models on the meta device.

    Text and image encoders and tokenizers are None. It takes no memory worth mentioning, and of a hub name only
    configuration files are fetched. Raises as `load`.
    """
    source = locate(model, pipeline)
    with opening(source), _no_progress_bar():
        parts = {
            name: _empty(kind, str(source.base if name in source.lacking else source.name), name)
            for name, (_, kind) in components(source.index).items()
        }
        return source.cls.from_pretrained(source.name, **parts)


def _empty(kind: str, source: str, folder: str) -> Any:
    """A component of that class, without weights; None for one that diffusers does not have."""
    import diffusers

    found: Any = getattr(diffusers, kind, None)
    cls: object = found
    if not isinstance(cls, type):
        return None
    if issubclass(cls, diffusers.ModelMixin):
        config = found.load_config(source, subfolder=folder)
        with torch.device("meta"):
            return found.from_config(config)
    return found.from_pretrained(source, subfolder=folder) if issubclass(cls, diffusers.SchedulerMixin) else None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
