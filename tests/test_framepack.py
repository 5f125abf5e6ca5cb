"""FramePack: sections with history in front of them and text behind, in one attention.

What holds for every family is in `test_families.py`.
"""

from math import ceil
from types import SimpleNamespace

import pytest
import torch
from diffusers import HunyuanVideoFramepackPipeline
from families import GRID, HISTORY, STEPS, VIDEO, framepack, framepack_given, noise
from oracle import assert_within, attention64
from test_inward_window import Masked
from tiny import text_of, tiny_hunyuan_pipeline
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from diffaccel import Accel, AnnSA, FlashBlock, Grid, InwardWindow, TempCache, UnsupportedError
from diffaccel.attend import attend
from diffaccel.joint import Text
from diffaccel.site import Site

SECTIONS, PAST, IMAGE = 2, (2, 2, 16), 4  # latent frames of history by scale; tokens of the image
ORDERS = ["inverted_anti_drifting", "vanilla"]
LOSSY = AnnSA(0.4, dense_steps=0, min_past=0, sink_frames=0)


def tokens(frames):
    """Tokens of so many latent frames in full, in half and in quarter resolution, padded."""
    return sum(ceil(count / by) * ceil(6 / by) * ceil(8 / by) for count, by in zip(frames, (1, 2, 4), strict=True))


@pytest.fixture
def pipe():
    parts = tiny_hunyuan_pipeline().components
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    found = HunyuanVideoFramepackPipeline(
        **parts | {"transformer": framepack()},
        image_encoder=SiglipVisionModel(SiglipVisionConfig(**small, image_size=8, patch_size=4)).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 8, "width": 8}),
    )
    found.set_progress_bar_config(disable=True)
    return found


def generate(pipe, lengths=(7,), order="inverted_anti_drifting", steps=STEPS):
    """Latents of all sections of one generation under guidance."""
    text = {**text_of(lengths), **{f"negative_{k}": v for k, v in text_of((3,) * len(lengths), seed=1).items()}}
    size = {"height": 16 * GRID.height, "width": 16 * GRID.width}
    return pipe(
        image=noise(1, 3, *size.values(), seed=2).sigmoid(), **text, **size, true_cfg_scale=2.0,
        num_frames=9 * SECTIONS, latent_window_size=GRID.frames, num_inference_steps=steps,
        sampling_type=order,
        generator=torch.Generator().manual_seed(5), output_type="latent",
    ).frames[-1]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("lengths", [(7,), (12,)], ids=str)
@pytest.mark.parametrize("accel", [Accel(), Accel(selection=AnnSA(density=1))], ids=["none", "AnnSA"])
def test_exact_settings_are_the_stock_pipeline(pipe, order, lengths, accel):
    stock = generate(pipe, lengths, order)
    with accel(pipe):
        torch.testing.assert_close(generate(pipe, lengths, order), stock, atol=3e-5, rtol=0)
    assert torch.equal(generate(pipe, lengths, order), stock)


def test_a_window_is_the_mask_of_its_tokens_and_the_rest_is_read_whole(pipe):
    window, stock = InwardWindow((3, 3), ratio=1), generate(pipe)
    with Accel(window=Masked(window))(pipe):
        expected = generate(pipe)
    with Accel(window=window)(pipe) as run:
        found = generate(pipe)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
    assert (found - stock).abs().max() > 1e-3
    counts = run.report().slots["window"]
    calls = 2 * STEPS * SECTIONS
    beside = 2 * (IMAGE + tokens(PAST)) + 7 + 3  # of both branches
    assert counts.keys_total == calls * (2 * GRID.tokens + beside)
    assert counts.keys_read == calls * (2 * 9 * GRID.frames + beside)


def test_what_was_chosen_is_forgotten_after_a_section_not_after_a_step(pipe, monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(args[2].lasting) or plan(*args))
    with Accel(selection=LOSSY)(pipe):
        generate(pipe)
    per_step = 2 * 2  # layers, branches
    starts = [seen[step * per_step : (step + 1) * per_step] for step in range(SECTIONS * STEPS)]
    assert starts[:STEPS] == starts[:1] * STEPS
    assert starts[STEPS:] == starts[-1:] * STEPS
    assert not {id(notes) for notes in starts[0]} & {id(notes) for notes in starts[-1]}


def test_what_would_keep_keys_of_history_is_refused(pipe):
    for accel in (Accel(cache=TempCache()), Accel(reuse=FlashBlock())):
        with pytest.raises(UnsupportedError, match="has none that stay, for its history passes through the layers"):
            accel.apply(pipe)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positional", [0, 10])
def test_history_lies_before_the_video_however_the_model_is_called(rows, positional):
    model, given = framepack(), framepack_given(rows, 0)
    names = ["encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "image_embeds"]
    names += ["indices_latents", "guidance", "latents_clean", "indices_latents_clean"]
    arguments = {"hidden_states": noise(rows, *VIDEO), "timestep": torch.full((rows,), 300.0)}
    arguments |= {name: given.pop(name) for name in names} | given
    placed, named = list(arguments.values())[:positional], dict(list(arguments.items())[positional:])

    @torch.no_grad()
    def go():
        return model(*placed, **named, return_dict=False)[0]

    stock = go()
    with Accel()(SimpleNamespace(transformer=model)) as run:
        torch.testing.assert_close(go(), stock, atol=2e-5, rtol=0)
        words, valid = (12, (IMAGE + 7, IMAGE + 8)) if rows == 2 else (7, (IMAGE + 7,))
        assert run.site(0, "self").text == Text(IMAGE + words, valid, before=tokens(HISTORY.values()))
    named["latents_history_4x"] = arguments["latents_history_4x"] + noise(1)
    assert (go() - stock).abs().max() > 1e-4  # history is felt


@pytest.mark.parametrize(
    "text", [Text(4, (3, 3), before=5), Text(4, (2, 4), before=5), Text(4, (4, 1), first=True, before=5)], ids=str
)
def test_what_is_before_the_video_is_read_by_all_and_reads_all(text):
    grid = Grid(2, 3, 4)
    shape = (2, text.before + text.tokens + grid.tokens, 2, 8)
    q, k, v = (noise(*shape, seed=seed) for seed in range(3))
    run = Accel().apply(SimpleNamespace(transformer=framepack()))
    site = Site(0, "self", 0, 1, 0, 0, "denoise", "main", grid, text)
    out = attend(q, k, v, site, run)
    first = text.before if text.first else text.before + grid.tokens
    for row, valid in enumerate(text.valid):
        read = torch.ones(shape[1], dtype=torch.bool)
        read[first + valid : first + text.tokens] = False
        expected = attention64(*(x[row : row + 1] for x in (q, k, v)), mask=read.expand(shape[1], -1))[0]
        assert_within(out[row : row + 1], expected, torch.float32, inputs=4)
    video, beside = text.split(q)
    assert torch.equal(text.join(video, beside), q)
    assert video.shape[1] == grid.tokens
