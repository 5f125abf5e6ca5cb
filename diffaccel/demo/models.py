"""The models that a page offers: each opened once, with one thread that works for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..cli.checks import default_preset, open_pipeline
from ..errors import DiffaccelError
from ..pipelines.loading import BUNDLED_MODELS, BUNDLED_TEXT_MODEL, Defaults
from ..settings import UsageError
from ..suggest import choose
from ..text import Model, load
from .asked import Asked, Larger, Limits, Text, Video
from .worker import Worker

EXAMPLE = "a large red circle moves left over a teal checkerboard"


@dataclass
class VideoModel:
    """A pipeline and what its checkpoint says to generate with."""

    name: str
    pipe: Any
    usual: Defaults
    worker: Worker
    warm: set[Any] = field(default_factory=set)
    """What was run before, so that nothing is timed that happens only once."""

    @property
    def causal(self) -> bool:
        return bool(getattr(self.pipe, "block_causal", False))

    def grows(self) -> bool:
        """Whether FreeSwim can take it."""
        from ..pipelines import FreeSwimPipeline

        try:
            FreeSwimPipeline(self.pipe, native=(self.usual.height, self.usual.width))
        except DiffaccelError:
            return False
        return hasattr(self.pipe, "transformer")


@dataclass
class TextModel:
    """A language model."""

    name: str
    opened: Model
    worker: Worker


class Models:
    """All that a page offers, by name; the first of a kind is the usual one.

    Raises `LoadError` for a model that cannot be opened, `UsageError` for two of one name.
    """

    def __init__(
        self,
        videos: Sequence[str] = BUNDLED_MODELS,
        texts: Sequence[str] = (BUNDLED_TEXT_MODEL,),
        *,
        limits: Limits | None = None,
        dtype: str | None = None,
        device: str | None = None,
        offload: str = "none",
    ) -> None:
        self.limits = limits or Limits()
        self.videos: dict[str, VideoModel] = {}
        self.texts: dict[str, TextModel] = {}
        for source, name in _names(videos):
            pipe, usual = open_pipeline(source, None, dtype, device, offload)
            self.videos[name] = VideoModel(name, pipe, usual, Worker(name, self.limits.waiting))
        for source, name in _names(texts):
            self.texts[name] = TextModel(name, load(source, dtype, device), Worker(name, self.limits.waiting))
        self.larger = {name: model for name, model in self.videos.items() if model.grows()}

    def of(self, asked: Asked) -> VideoModel | TextModel:
        """The model that was asked for. Raises `KnobError` for one that is not offered."""
        tabs: dict[str, dict[str, Any]] = {"video": self.videos, "larger": self.larger, "text": self.texts}
        offered = tabs[asked.tab]
        found: VideoModel | TextModel = offered[choose(asked.model, offered, f"model of the tab {asked.tab}")]
        return found

    def usual(self, tab: str, name: str | None = None) -> Asked:
        """What a page starts with: what the model says, within the limits."""
        if tab == "text":
            name = name if name in self.texts else next(iter(self.texts))
            return self._usual_text(self.texts[name])
        offered: dict[str, VideoModel] = self.larger if tab == "larger" else self.videos
        model = offered[name if name in offered else next(iter(offered))]
        given, limits = model.usual, self.limits
        stride = int(model.pipe.vae_scale_factor_temporal)
        most = 1 + (min(limits.frames, given.num_frames) - 1) // stride * stride
        shared: dict[str, Any] = {
            "prompt": EXAMPLE if model.name in BUNDLED_MODELS else "",
            "model": model.name,
            "steps": min(limits.steps, given.num_inference_steps or 50),
            "guidance": 5.0 if given.guidance_scale is None else given.guidance_scale,
        }
        if tab == "larger":
            return Larger(frames=min(most, 1 + 3 * stride), **shared)
        side: dict[str, Any] = {"width": min(given.width, limits.side), "height": min(given.height, limits.side)}
        return Video(frames=most, preset=default_preset(model.pipe), **side, **shared)

    def _usual_text(self, model: TextModel) -> Text:
        usual = model.opened.usual
        known = {name: usual[name] for name in ("threshold", "temperature") if name in usual}
        tokens = min(self.limits.tokens, usual.get("max_tokens", 128))
        return Text(prompt=usual.get("prompt_example", ""), model=model.name, tokens=tokens, **known)

    def close(self) -> None:
        """Cancels what is going on and ends the threads."""
        models: list[VideoModel | TextModel] = [*self.videos.values(), *self.texts.values()]
        for model in models:
            model.worker.close()


def _names(sources: Sequence[str]) -> list[tuple[str, str]]:
    """Each with the name that pages show, which tells nothing of where on the server a folder lies."""
    named = [(source, Path(source).resolve().name if Path(source).is_dir() else source) for source in sources]
    names = [name for _, name in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two models are called {twice[0]}; rename a folder, or offer one of them")
    return named


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
