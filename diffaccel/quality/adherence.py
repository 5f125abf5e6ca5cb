"""How well a clip shows what its prompt says, by CLIP."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .clips import Clip, as_float_clip
from .multiscale import MetricError

_FRAMES = 8
"""Spread over the clip; neighbours look alike to CLIP."""


class ClipScore:
    """CLIPScore of a clip (Hessel et al., 2021): 100 max(cos, 0) of a frame's and the prompt's embedding, in [0, 100].

    `model` is a folder or hub name of a CLIP in transformers' format. The mean is over eight frames from the first to
    the last. Raises `MetricError` where it cannot be opened.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        self.name = str(model)
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            self.model: Any = CLIPModel.from_pretrained(str(model)).to(device).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
            self.images: Any = CLIPImageProcessor.from_pretrained(str(model))
        except (OSError, ValueError, ImportError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MetricError(f"'{model}' cannot be opened as a CLIP: {first}") from error

    def __str__(self) -> str:
        return f"CLIPScore by {self.name}"

    @torch.no_grad()
    def __call__(self, clip: Clip, prompt: str) -> float:
        """The score of a clip (F, H, W, 3); of a prompt longer than the model reads, its beginning counts."""
        frames = as_float_clip(clip)
        chosen = frames[np.unique(np.linspace(0, len(frames) - 1, _FRAMES).round().astype(int))]
        most = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer([prompt], truncation=True, max_length=most, return_tensors="pt")
        pixels = self.images(list(np.rint(chosen * 255).astype(np.uint8)), return_tensors="pt")
        device = self.model.device
        found = self.model(
            input_ids=text["input_ids"].to(device),
            attention_mask=text["attention_mask"].to(device),
            pixel_values=pixels["pixel_values"].to(device),
        )
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return float(100 * cosines.clamp(min=0).mean())
