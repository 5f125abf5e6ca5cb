"""A pipeline without its weights: what a model looks like, from its configuration files alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from diffaccel.errors import DiffaccelError

from .loading import (
    _HUB_NAME,
    LoadError,
    _base,
    _components,
    _find,
    _first_line,
    _hub_index,
    _lacking,
    _pipeline_class,
    _read_generation,
    check_checkpoint,
)


def outline(model: str | Path | None = None, *, pipeline: Literal["causal", "stock"] | None = None) -> Any:
    """The pipeline that `load` opens, with the parameters of its diffusers models on the meta device.

    Text and image encoders and tokenizers are None. It takes no memory worth mentioning, and of a hub name only
    configuration files are fetched. Raises as `load`.
    """
    source = _find(model)
    local = Path(source)
    base, lacking = None, {}
    if local.exists() or isinstance(source, Path) or not _HUB_NAME.fullmatch(str(source)):
        index = check_checkpoint(local)
        base, lacking = _base(local), _lacking(local, index)
        pipeline = pipeline or _read_generation(local).get("pipeline")
    else:
        index = _hub_index(str(source))
    cls = _pipeline_class(index["_class_name"], pipeline, str(source))
    try:
        parts = {
            name: _empty(kind, str(base if name in lacking else source), name)
            for name, (_, kind) in _components(index).items()
        }
        with _no_progress_bar():
            return cls.from_pretrained(str(source), **parts)
    except DiffaccelError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise LoadError(f"'{source}' cannot be opened as {cls.__name__}: {_first_line(error)}") from error


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
