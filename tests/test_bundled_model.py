"""The model in samples/tiny-world: its size, its words, and that it shows what it is told."""

import json

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.loading import bundled_model
from diffaccel.pipelines.presets import balanced

WORDS = (
    "circle square triangle star ring red orange yellow green cyan blue purple white small large moves left right "
    "up down diagonally circles bounces stays still slowly quickly black gray navy maroon olive brown plain gradient "
    "striped checkerboard dotted wavy the camera is static pans a over"
)


@pytest.fixture(scope="module")
def pipe():
    pipe = CausalWanPipeline.from_pretrained(bundled_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt, frames, **settings):
    settings = {"num_inference_steps": 6, "guidance_scale": 2.5, "height": 128, "width": 128} | settings
    return pipe(prompt, num_frames=frames, generator=torch.Generator().manual_seed(1), **settings).frames[0]


def test_it_is_small_and_plain_weights():
    files = [path for path in bundled_model().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".jpg"}
    assert json.loads((bundled_model() / "model_index.json").read_text())["_class_name"] == "WanPipeline"


def test_it_knows_its_words_and_says_which_it_does_not(pipe):
    unknown = pipe.tokenizer.unk_token_id
    assert [word for word in WORDS.split() if unknown in pipe.tokenizer(word).input_ids] == []
    generate(pipe, "a large red dodecahedron moves left", 1, num_inference_steps=1)
    [sentence] = pipe.prompt_warnings
    assert '"dodecahedron"' in sentence


@pytest.mark.parametrize(("name", "rgb"), [("red", (0.93, 0.1, 0.15)), ("blue", (0.15, 0.3, 1.0))])
def test_it_shows_the_colour_it_is_told(pipe, name, rgb):
    frames = generate(pipe, f"a large {name} square stays still over a plain gray background. the camera is static", 13)
    near = np.abs(frames - np.array(rgb)).max(-1) < 0.25
    assert near.mean() > 0.02, f"{near.mean():.1%} of the pixels are {name}"


def test_balanced_engages_and_the_stock_pipeline_runs_on_the_same_weights(pipe):
    with balanced()(pipe) as run:
        frames = generate(pipe, "a small yellow star moves right over navy", 37)
    assert frames.shape == (37, 128, 128, 3)
    assert all(slot.engaged for slot in run.report().slots.values())
    stock = WanPipeline.from_pretrained(bundled_model())
    stock.set_progress_bar_config(disable=True)
    frames = generate(stock, "a small yellow star moves right over navy", 5, num_inference_steps=2)
    assert np.isfinite(frames).all()
    assert frames.std() > 0.01
