"""Pictures: of the world itself, and of what a training run's weights of the hour make of fixed prompts."""

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from transformers import UMT5EncoderModel

from .models import Sizes, build_scheduler, build_vae
from .prompts import build_tokenizer
from .world import EVENTS, draw_scene, render

COLUMNS = 7

PROMPTS = (
    "a large red circle moves left over a teal checkerboard",
    "a small yellow triangle moves up quickly over a plain navy background",
    "a large banded white cross stays still on a striped maroon background. the camera pans right",
    "a small cyan ring leaves on the left and comes back over a plum gradient",
    "a small blue square moves right quickly behind a large yellow circle over a plain gray background",
    "a large shaded purple square moves down and turns green half way over a black checkerboard",
)


def write_world(path: Path) -> None:
    """Two training clips of each event and four of none, seven frames of each."""
    events = [event for event in (*EVENTS, None, None) for _ in range(2)]
    scenes = [draw_scene(20 + index, (event,)) for index, event in enumerate(events)]
    clips = [render([scene])[0].permute(0, 2, 3, 1).numpy() for scene in scenes]
    rows = [np.concatenate([strip(a), strip(b)], axis=1) for a, b in zip(clips[::2], clips[1::2], strict=True)]
    Image.fromarray(np.concatenate(rows)).save(path, quality=85)


def strip(clip: np.ndarray) -> np.ndarray:
    """Frames of a clip (F, H, W, 3), evenly spread, side by side."""
    picks = np.linspace(0, len(clip) - 1, COLUMNS).round().astype(int)
    return np.concatenate(list(clip[picks]), axis=1)


def write_preview(
    path: Path,
    sizes: Sizes,
    vae: AutoencoderKLWan,
    stats: tuple[torch.Tensor, torch.Tensor],
    transformer: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
    size: int,
    few_step: bool = False,
) -> None:
    """Six clips of 49 frames, seven frames of each, as one PNG."""
    from diffaccel.pipelines import CausalWanPipeline

    held = build_vae(sizes).to(transformer.device)
    held.load_state_dict(vae.state_dict())
    held.register_to_config(latents_mean=stats[0].tolist(), latents_std=stats[1].tolist())
    pipe = CausalWanPipeline(
        build_tokenizer(),
        copy.deepcopy(encoder).eval(),
        held.eval(),
        build_scheduler(few_step),
        copy.deepcopy(transformer).eval(),
        sampler="few_step" if few_step else "multistep",
    )
    pipe.set_progress_bar_config(disable=True)
    steps, guidance = (4, 1.0) if few_step else (8, 2.5)
    toy = size < 128
    frames = pipe(
        list(PROMPTS[: 1 if toy else None]),
        num_frames=5 if toy else 49,
        height=size,
        width=size,
        num_inference_steps=1 if toy else steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1),
    ).frames
    sheet = np.concatenate([strip(clip) for clip in frames])
    Image.fromarray((sheet * 255).round().astype(np.uint8)).save(path)
