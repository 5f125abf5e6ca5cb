"""The bundled models: their size, their words, and that they show what they are told."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from diffaccel.pipelines.loading import BUNDLED_MODELS, bundled_model, defaults, load
from diffaccel.pipelines.presets import balanced

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from tiny_world.metrics import judge, read
from tiny_world.world import SPRITE_RGB, Scene, Sprite

WORDS = (
    "circle square triangle cross ring red yellow green cyan blue purple white small large banded striped shaded moves "
    "left right up down circles bounces stays still slowly quickly leaves comes back passes behind turns black gray "
    "navy maroon plain gradient checkerboard the camera is static pans a over"
)


@pytest.fixture(scope="module", params=BUNDLED_MODELS)
def pipe(request):
    return load(request.param, device="cpu")


def generate(pipe, prompt, frames, **settings):
    given = defaults(pipe, pipe.name_or_path)
    usual = {"num_inference_steps": given.num_inference_steps, "guidance_scale": given.guidance_scale}
    settings = usual | {"height": 128, "width": 128} | settings
    return pipe(prompt, num_frames=frames, generator=torch.Generator().manual_seed(1), **settings).frames[0]


def test_they_are_small_and_plain_weights():
    folders = [bundled_model(name) for name in BUNDLED_MODELS]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".jpg", ".gif"}
    for folder in folders:
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "WanPipeline"


def test_it_knows_its_words_and_says_which_it_does_not(pipe):
    unknown = pipe.tokenizer.unk_token_id
    assert [word for word in WORDS.split() if unknown in pipe.tokenizer(word).input_ids] == []
    generate(pipe, "a large red dodecahedron moves left", 1, num_inference_steps=1)
    [sentence] = pipe.prompt_warnings
    assert '"dodecahedron"' in sentence


@pytest.mark.parametrize("name", ["red", "blue"])
def test_it_shows_what_it_is_told(pipe, name):
    prompt = f"a large {name} square moves right quickly over a plain gray background. the camera is static"
    frames = generate(pipe, prompt, 33)
    reading = read((frames * 255).round().astype(np.uint8))
    square = Sprite("square", name, "large", "plain", "right", "quickly", 22.5, (64.0, 64.0), 1.0)
    found = judge(reading, Scene("plain", "gray", "static", (square,)))
    assert {score for score, right in found.items() if not right} <= {"shape", "all", "size"}, found


@pytest.mark.parametrize("block", [1, 4])
def test_the_prompt_may_change_at_a_block(pipe, block):
    found = defaults(pipe, pipe.name_or_path)
    stream = pipe.stream(
        "a large red circle moves left slowly over a plain gray background",
        height=128,
        width=128,
        num_frames=12 * (block + 2) + 1,
        num_inference_steps=found.num_inference_steps,
        guidance_scale=found.guidance_scale,
        generator=torch.Generator().manual_seed(0),
    )
    chunks = []
    for number, chunk in enumerate(stream):
        chunks.append(chunk[0])
        if number == block:
            stream.change_prompt("a large blue circle moves up slowly over a plain gray background")
    frames, change = np.concatenate(chunks), sum(map(len, chunks[: block + 1]))
    red, blue = (np.abs(frames - np.array(SPRITE_RGB[name])).max(-1) < 0.25 for name in ("red", "blue"))
    assert red[:change].mean() > 0.05 > blue[:change].mean()
    assert blue[-8:].mean() > 0.05 > red[-8:].mean(), (blue[-8:].mean(), red[-8:].mean())


def test_balanced_engages(pipe):
    with balanced()(pipe) as run:
        frames = generate(pipe, "a small yellow cross moves right over navy", 37)
    assert frames.shape == (37, 128, 128, 3)
    assert all(slot.engaged for slot in run.report().slots.values())


def test_the_stock_pipeline_runs_on_the_same_weights():
    stock = WanPipeline.from_pretrained(bundled_model())
    stock.set_progress_bar_config(disable=True)
    frames = generate(stock, "a small yellow cross moves right over navy", 5, num_inference_steps=2)
    assert np.isfinite(frames).all()
    assert frames.std() > 0.01
