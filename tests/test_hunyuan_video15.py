"""HunyuanVideo-1.5: image and two texts behind the video in one attention, sorted so that padding comes last.

What holds for every family is in `test_families.py`.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, FlowMatchEulerDiscreteScheduler, HunyuanVideo15Pipeline
from diffusers.guiders import ClassifierFreeGuidance
from families import GRID, STEPS, WORDS, hunyuan15, hunyuan_video15, noise
from test_inward_window import Masked
from tiny import CHANNELS, TEXT_DIM
from torch._dynamo.testing import CompileCounter

from diffaccel import Accel, AnnSA, InwardWindow
from diffaccel.joint import Text

GLYPHS, IMAGE = 6, 3  # tokens
SIZE = {"height": 16 * GRID.height, "width": 16 * GRID.width, "num_frames": 9}
LOSSY = AnnSA(0.4, dense_steps=0, min_past=0)


@pytest.fixture
def pipe():
    torch.manual_seed(1)
    small = {"block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1}
    found = HunyuanVideo15Pipeline(
        transformer=hunyuan_video15(in_channels=2 * CHANNELS + 1),
        vae=AutoencoderKLHunyuanVideo15(latent_channels=CHANNELS, **small).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    found.vision_num_semantic_tokens = IMAGE
    found.set_progress_bar_config(disable=True)
    return found


def generate(pipe, lengths=(7,), glyphs=(2,), negative=(3,)):
    """Latents of one generation, of prompts and words to write of so many tokens before padding."""
    text = {}
    for name, number, many, few in (("", 1, lengths, glyphs), ("negative_", 3, negative, [0] * len(negative))):
        text[f"{name}prompt_embeds"] = noise(len(many), WORDS, TEXT_DIM, seed=number)
        text[f"{name}prompt_embeds_mask"] = mask(many, WORDS)
        text[f"{name}prompt_embeds_2"] = noise(len(few), GLYPHS, 16, seed=number + 1)
        text[f"{name}prompt_embeds_mask_2"] = mask(few, GLYPHS)
    generator = torch.Generator().manual_seed(5)
    return pipe(**text, **SIZE, num_inference_steps=STEPS, generator=generator, output_type="latent").frames


def mask(lengths, tokens):
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


CASES = [((7,), (0,), (3,)), ((12,), (6,), (1,)), ((4, 9), (0, 3), (2, 2))]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("accel", [Accel(), Accel(selection=AnnSA(density=1))], ids=["none", "AnnSA"])
def test_exact_settings_are_the_stock_pipeline(pipe, case, accel):
    stock = generate(pipe, *case)
    with accel(pipe):
        torch.testing.assert_close(generate(pipe, *case), stock, atol=3e-5, rtol=0)
    assert torch.equal(generate(pipe, *case), stock)
    shorter = generate(pipe, tuple(n - 1 for n in case[0]), *case[1:])
    assert (shorter - stock).abs().max() > 1e-3  # where padding begins is felt


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_window_is_the_mask_of_its_tokens_and_text_is_read_whole(pipe, case):
    window, stock = InwardWindow((3, 3), ratio=1), generate(pipe, *case)
    with Accel(window=Masked(window))(pipe):
        expected = generate(pipe, *case)
    with Accel(window=window)(pipe) as run:
        found = generate(pipe, *case)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
    assert (found - stock).abs().max() > 1e-3
    counts, text = run.report().slots["window"], sum(map(sum, case)) / len(case[0])  # of both branches together
    assert counts.keys_total == pytest.approx(STEPS * 2 * (2 * GRID.tokens + text), abs=1)
    assert counts.keys_read == pytest.approx(STEPS * 2 * (2 * 9 * GRID.frames + text), abs=1)


def test_guiders_name_the_branches_and_the_scheduler_tells_the_step(pipe, monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(args[-1]) or plan(*args))
    with Accel(selection=LOSSY)(pipe):
        generate(pipe)
    assert [site.branch for site in seen[::2]] == ["pred_cond", "pred_uncond"] * STEPS
    assert [site.step for site in seen[::4]] == list(range(STEPS))
    assert [site.text for site in seen[::2]][:2] == [Text(WORDS + GLYPHS + IMAGE, (count,)) for count in (9, 3)]


@pytest.mark.parametrize(
    ("image", "positional", "meanflow"), [("none", 0, False), ("one", 4, True), ("one row", 8, True), ("one", 0, False)]
)
def test_image_to_video_however_the_model_is_called(image, positional, meanflow):
    """Where no image is given its tokens are zero in all rows, and none of them is read."""
    model, given = hunyuan_video15(use_meanflow=meanflow), hunyuan15(2, 0)
    given["encoder_attention_mask"][0, 0], given["encoder_attention_mask"][0, 9] = 0, 1  # wherever the ones are
    if image != "none":
        given["image_embeds"] = noise(2, IMAGE, 16, seed=6)
    if image == "one row":
        given["image_embeds"][0] = 0
    arguments = {
        "hidden_states": noise(2, CHANNELS, GRID.frames, GRID.height, GRID.width, seed=7),
        "timestep": torch.tensor([300.0, 700.0]),
        "encoder_hidden_states": given["encoder_hidden_states"],
        "encoder_attention_mask": given["encoder_attention_mask"],
        "timestep_r": torch.tensor([200.0, 600.0]) if meanflow else None,
        "encoder_hidden_states_2": given["encoder_hidden_states_2"],
        "encoder_attention_mask_2": given["encoder_attention_mask_2"],
        "image_embeds": given["image_embeds"],
    }
    placed, named = list(arguments.values())[:positional], dict(list(arguments.items())[positional:])

    @torch.no_grad()
    def go():
        return model(*placed, **named, return_dict=False)[0]

    stock, read = go(), 0 if image == "none" else IMAGE
    with Accel()(SimpleNamespace(transformer=model)) as run:
        torch.testing.assert_close(go(), stock, atol=2e-5, rtol=0)
        assert run.site(0, "self").text == Text(WORDS + GLYPHS + IMAGE, (7 + 1 + read, 8 + 2 + read))


def test_blocks_compile_into_as_many_graphs_as_of_the_stock_model(pipe):
    def lossy():
        with Accel(selection=LOSSY)(pipe):
            return generate(pipe)

    counts, outs = [], []
    expected = [generate(pipe), lossy()]
    counter = CompileCounter()
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    for go in (lambda: generate(pipe), lossy):
        torch._dynamo.reset()
        counter.clear()
        outs.append(go())
        counts.append(counter.frame_count)
    torch.testing.assert_close(outs, expected, atol=2e-5, rtol=0)
    assert counts[1] == counts[0]
