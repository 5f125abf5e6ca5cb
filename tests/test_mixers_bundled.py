"""Mixers on the bundled models: whole generations run with them, teaching helps there, and the layers come back."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from diffaccel import Accel, AnnSA
from diffaccel.errors import UnsupportedError
from diffaccel.mixers import Based, FluxRouter, GroupShift, convert, distil, errors
from diffaccel.pipelines.loading import bundled_text_model, load

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from distil_mixers import main, table

ROOT = Path(__file__).resolve().parent.parent
LAYER = "blocks.2.attn1"


@pytest.fixture(scope="module")
def video():
    return load("tiny-world", pipeline="stock", dtype="float32", device="cpu")


def generate(pipe, prompt="a large red circle moves left over a teal checkerboard", seed=0):
    return pipe(
        prompt, height=128, width=128, num_frames=5, num_inference_steps=2, guidance_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).frames  # fmt: skip


def test_a_video_is_made_with_mixers_and_as_ever_after(video):
    before = generate(video)
    with convert(video.transformer, [LAYER], FluxRouter):
        torch.testing.assert_close(generate(video), before, rtol=1e-4, atol=1e-4)  # untaught it is the layer
    with convert(video.transformer, [LAYER], partial(GroupShift, group=32)):
        assert (generate(video) - before).norm() > 1e-3 * before.norm()
    assert torch.equal(generate(video), before)


@pytest.mark.parametrize("kind", ["stock", "causal"])
def test_the_seam_refuses_a_model_with_mixers(kind):
    pipe = load("tiny-world", pipeline=kind, dtype="float32", device="cpu")
    accel = Accel(selection=AnnSA()) if kind == "stock" else Accel()
    with (
        convert(pipe.transformer, [LAYER], Based),
        pytest.raises(UnsupportedError, match="runs Based already: remove it first"),
        accel(pipe),
    ):
        generate(pipe)


def test_teaching_helps_on_video(video):
    data = [partial(generate, video, seed=seed) for seed in range(6)]
    with convert(video.transformer, [LAYER], partial(Based, tile=16)) as made:
        [before] = errors(made, [partial(generate, video, "a small blue ring bounces over plain navy")]).values()
        distil(made, data)
        [after] = errors(made, [partial(generate, video, "a small blue ring bounces over plain navy")]).values()
    assert before > 0.01
    assert after < 0.9 * before


def test_text_is_read_block_by_block():
    lm = LlamaForCausalLM.from_pretrained(bundled_text_model(), dtype=torch.float32).eval()
    ids, place = torch.randint(8, 200, (2, 64)), torch.arange(64)
    mask = torch.zeros(1, 1, 64, 64).masked_fill_(place[:, None] // 8 < place // 8, torch.finfo(torch.float32).min)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": place[None], "use_cache": False}
    with torch.no_grad():
        wanted = lm(**given).logits
        with convert(lm, ["model.layers.2.self_attn"], partial(GroupShift, block=8, group=128)):
            torch.testing.assert_close(lm(**given).logits, wanted, rtol=1e-3, atol=1e-3)
        assert torch.equal(lm(**given).logits, wanted)


@pytest.mark.slow
def test_the_script_teaches_an_arm_and_writes_it_down(tmp_path):
    shutil.copy(ROOT / "samples" / "mixers" / "README.md", tmp_path)
    asked = ["--out", str(tmp_path), "--only", "Flowformer", "--steps", "6", "--seeds", "1"]
    assert main(asked) == 0
    found = json.loads((tmp_path / "mixers.json").read_text())
    for kind in ("video", "text"):
        [(before, after, _)] = found["arms"]["Flowformer"][kind]
        assert after < before
    assert table(found) in (tmp_path / "README.md").read_text()
    assert main(asked) == 0  # which finds the arm there
    assert json.loads((tmp_path / "mixers.json").read_text())["arms"] == found["arms"]
