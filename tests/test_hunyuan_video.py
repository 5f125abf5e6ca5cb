"""HunyuanVideo: attention joint over video and text, of which only the video's to itself is ever thinned."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import ContextParallelConfig, HunyuanImageTransformer2DModel
from oracle import assert_within, attention64
from tiny import CHANNELS, HEIGHT, WIDTH, text_of, tiny_hunyuan_pipeline, tiny_hunyuan_video
from torch._dynamo.testing import CompileCounter
from typer.testing import CliRunner

from diffaccel import Accel, AnnSA, FlashBlock, FrameWindow, Grid, PadCollapse, Plan, TempCache, UnsupportedError
from diffaccel.attend import attend
from diffaccel.compare import decode
from diffaccel.joint import Text
from diffaccel.policy import Selector, knob
from diffaccel.run import Run

STEPS, LAYERS, VIDEO = 4, 4, 9 * 6  # tokens: 9 latent frames of 2 x 3
LOSSY = AnnSA(0.5, dense_steps=0.25, summaries=False)


@dataclass(frozen=True)
class NearFrames(Selector):
    """A window as bidirectional models have it: a query reads the frames around its own."""

    slot: ClassVar[str] = "window"
    exact: ClassVar[dict[str, Any]] = {"frames": None}
    frames: int | None = knob(1, "latent frames to either side")

    def plan(self, q, entries, site):
        numbers = torch.arange(site.grid.frames)
        near = (numbers - numbers[:, None]).abs() <= self.frames
        return Plan(near, q.shape[1], entries.count, *[site.grid.tokens_per_frame] * 2)


@pytest.fixture
def pipe():
    return tiny_hunyuan_pipeline()


def generate(pipe, lengths=(5,), negative=None, rows=None, seed=3, output_type="latent"):
    """Latents of one generation; `rows` takes only those of the batch."""
    text = text_of(lengths, seed=1)
    if negative:
        text |= {f"negative_{name}": value for name, value in text_of(negative, seed=2).items()}
        text["true_cfg_scale"] = 2.0
    latents = torch.randn(
        len(lengths), CHANNELS, 9, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(seed)
    )
    inputs = {**text, "latents": latents}
    if rows is not None:
        inputs = {name: x[rows] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    settings = {"height": HEIGHT, "width": WIDTH, "num_frames": 33, "num_inference_steps": STEPS}
    return pipe(**inputs, **settings, output_type=output_type).frames


def accelerated(pipe, accel, *args, **kwargs):
    with accel(pipe) as run:
        return generate(pipe, *args, **kwargs), run.report()


@pytest.mark.parametrize(
    ("lengths", "negative"), [((5,), None), ((7, 7), None), ((3, 9), None), ((12, 4), (2, 5))], ids=str
)
@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["distilled", "plain"])
@pytest.mark.parametrize("accel", [Accel(), Accel(selection=AnnSA(density=1))], ids=["exact", "AnnSA(1)"])
def test_exact_settings_are_the_stock_pipeline(lengths, negative, guidance_embeds, accel):
    pipe = tiny_hunyuan_pipeline(guidance_embeds=guidance_embeds)
    plain = generate(pipe, lengths, negative)
    found, _ = accelerated(pipe, accel, lengths, negative)
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=0)
    shorter = generate(pipe, tuple(max(1, n - 1) for n in lengths), negative)
    assert (shorter - plain).abs().max() > 1e-3  # where padding begins is felt


@pytest.mark.parametrize("kind", [None, "latent_concat", "token_replace"])
@pytest.mark.parametrize("positional", [0, 3, 6])
def test_every_form_of_the_model_however_it_is_called(kind, positional):
    model = tiny_hunyuan_video(image_condition_type=kind)
    text = text_of((4, 11))
    text["prompt_attention_mask"][0, 0], text["prompt_attention_mask"][0, 9] = (
        0,
        1,
    )  # ones are counted, wherever they are
    arguments = {
        "hidden_states": torch.randn(2, CHANNELS, 3, 4, 6),
        "timestep": torch.tensor([300, 700]),
        "encoder_hidden_states": text["prompt_embeds"],
        "encoder_attention_mask": text["prompt_attention_mask"],
        "pooled_projections": text["pooled_prompt_embeds"],
        "guidance": torch.full((2,), 6000.0),
    }
    given, named = list(arguments.values())[:positional], dict(list(arguments.items())[positional:])

    @torch.no_grad()
    def go():
        return model(*given, **named, return_dict=False)[0]

    plain = go()
    with Accel()(SimpleNamespace(transformer=model)):
        torch.testing.assert_close(go(), plain, atol=1e-5, rtol=0)
    assert torch.equal(go(), plain)


@pytest.mark.parametrize(("lengths", "negative"), [((5,), None), ((3, 9), (4, 4))], ids=str)
def test_a_selection_engages_reads_what_it_says_and_counts_all_keys(pipe, lengths, negative):
    found, report = accelerated(pipe, Accel(selection=LOSSY), lengths, negative)
    assert (found - generate(pipe, lengths, negative)).abs().max() > 1e-3
    branches = [lengths, negative] if negative else [lengths]
    text = sum(sum(each) / len(each) for each in branches)
    counts = report.slots["selection"]
    assert counts.engaged
    assert counts.calls == STEPS * LAYERS * len(branches)
    assert counts.keys_total == STEPS * LAYERS * (VIDEO * len(branches) + text)
    dense = LAYERS * (VIDEO * len(branches) + text)  # one step of four: the scheduler tells which
    read = (counts.keys_read - dense) / ((STEPS - 1) * LAYERS) - text
    assert read == pytest.approx(0.5 * VIDEO * len(branches), abs=4 * len(branches))  # to half a block of keys


def test_a_batch_row_equals_the_row_alone(pipe):
    both, _ = accelerated(pipe, Accel(selection=LOSSY), (3, 9))
    for row in range(2):
        alone, _ = accelerated(pipe, Accel(selection=LOSSY), (3, 9), rows=slice(row, row + 1))
        torch.testing.assert_close(alone, both[row : row + 1], atol=1e-4, rtol=0)


def test_same_seed_same_bits_and_generations_of_one_run_do_not_mix(pipe):
    alone, _ = accelerated(pipe, Accel(selection=LOSSY))
    with Accel(selection=LOSSY)(pipe):
        generate(pipe, (9,), seed=4)
        assert torch.equal(generate(pipe), alone)


# -- one call, against attention written out --------------------------------------------------------------------------


def call(accel, text, grid, heads=2, dim=16):
    """Queries, keys and values of a joint call, what `attend` makes of them, and the run."""
    run = Run(accel, causal=False)
    run.enter(grid, None, 3, 4, text)
    q, k, v = (torch.randn(len(text.valid), grid.tokens + text.tokens, heads, dim) for _ in range(3))
    return (q, k, v), attend(q, k, v, run.site(0, "self"), run), run


def written_out(q, k, v, text, reads):
    """Row by row in fp64; `reads` is bool (video queries, video keys), and text is read whole and reads all."""
    rows = []
    for row, valid in enumerate(text.valid):
        video = reads.shape[0]
        mask = torch.ones(video + text.tokens, video + text.tokens, dtype=torch.bool)
        mask[:video, :video] = reads
        mask[:, video + valid :] = False
        if text.first:
            mask = mask.roll((text.tokens, text.tokens), (0, 1))
        rows.append(attention64(*(x[row : row + 1] for x in (q, k, v)), mask=mask)[0])
    return torch.cat(rows)


TEXTS = [Text(7, (5,)), Text(7, (4, 4)), Text(7, (2, 7)), Text(7, (0, 3)), Text(7, (7, 5), first=True)]


@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("frames", [None, 1])
def test_a_window_is_over_video_alone_wherever_the_text_lies(text, frames):
    grid = Grid(5, 2, 3)
    accel = Accel() if frames is None else Accel(window=NearFrames(frames))
    (q, k, v), out, run = call(accel, text, grid)
    of = grid.frame_of_token()
    reads = (of - of[:, None]).abs() <= (99 if frames is None else frames)
    assert_within(out, written_out(q, k, v, text, reads), torch.float32, inputs=4)
    if frames is not None:
        counts, valid = run.report().slots["window"], sum(text.valid) / len(text.valid)
        assert (counts.keys_total, counts.keys_read) == (round(30 + valid), round(6 * 13 / 5 + valid))


@pytest.mark.parametrize("text", TEXTS[:3], ids=str)
def test_a_selection_of_keys_is_merged_with_all_text(text, monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(plan(*args)) or seen[-1])
    grid = Grid(8, 3, 4)
    (q, k, v), out, _ = call(Accel(selection=AnnSA(0.3, summaries=False)), text, grid)
    [chosen] = seen  # asked once: of the text's keys there is nothing to choose, and its queries are not asked about
    dense = written_out(q, k, v, text, torch.ones(grid.tokens, grid.tokens, dtype=torch.bool))
    assert_within(out[:, grid.tokens :], dense[:, grid.tokens :], torch.float32, inputs=4)
    assert (out - dense)[:, : grid.tokens].abs().max() > 0.01
    listed = chosen.blocks.listed(-(-grid.tokens // chosen.blocks.key_block))
    for row, valid in enumerate(text.valid):
        words = slice(grid.tokens, grid.tokens + valid)
        for head in range(q.shape[2]):
            for place, at in enumerate(chosen.order[row, head].tolist()):
                kept = listed[row, head, place // chosen.blocks.query_block]
                kept = kept.repeat_interleave(chosen.blocks.key_block)[: grid.tokens]
                keys, values = (
                    torch.cat([of_video[row, kept, head], of_all[row, words, head]])[None, :, None]
                    for of_video, of_all in ((chosen.k, k), (chosen.v, v))
                )
                expected, _ = attention64(q[row, at, head].view(1, 1, 1, -1), keys, values)
                assert_within(out[row, at, head], expected.view(-1), torch.float32, inputs=4)


# -- getting in and out -----------------------------------------------------------------------------------------------


def state(pipe):
    blocks = (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks)
    return [block.attn.processor for block in blocks], set(vars(pipe.transformer))


def test_leaving_restores_bit_for_bit(pipe):
    plain, before = generate(pipe), state(pipe)
    accelerated(pipe, Accel(selection=LOSSY))
    assert state(pipe) == before
    assert torch.equal(generate(pipe), plain)


def test_the_text_refiner_is_left_alone(pipe):
    inside = [block.attn.processor for block in pipe.transformer.context_embedder.token_refiner.refiner_blocks]
    with Accel()(pipe):
        blocks = pipe.transformer.context_embedder.token_refiner.refiner_blocks
        assert [block.attn.processor for block in blocks] == inside


REFUSED = [
    (Accel(prompt=PadCollapse()), "PadCollapse .* its prompt is read in one attention with the video"),
    (Accel(cache=TempCache()), "generates the whole video at once"),
    (Accel(reuse=FlashBlock()), "generates the whole video at once"),
    (Accel(window=FrameWindow()), "generates the whole video at once"),
]


@pytest.mark.parametrize(("accel", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_it_cannot_take_is_refused(pipe, accel, message):
    before = state(pipe)
    with pytest.raises(UnsupportedError, match=message):
        accel.apply(pipe)
    assert state(pipe) == before


def test_what_would_be_split_or_replaced_is_refused(pipe):
    attention = pipe.transformer.single_transformer_blocks[-1].attn
    stock = attention.processor
    attention.processor = type("Mine", (type(stock),), {})()
    with pytest.raises(UnsupportedError, match="runs Mine already"):
        Accel().apply(pipe)
    attention.processor = stock
    config = SimpleNamespace(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    pipe.transformer._parallel_config = config
    with pytest.raises(UnsupportedError, match=r"split otherwise than diffaccel expects: call share_heads\(pipe\)"):
        Accel().apply(pipe)


def test_another_class_of_the_house_is_refused():
    other = HunyuanImageTransformer2DModel
    pipe = SimpleNamespace(transformer=other.__new__(other))
    with pytest.raises(
        UnsupportedError, match=r"with HunyuanImageTransformer2DModel .* no known family.*: Wan, HunyuanVideo, "
    ):
        Accel().apply(pipe)


def test_branches_are_told_apart_where_the_pipeline_names_none(pipe, monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(args[-1].branch) or plan(*args))
    monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda *_: torch.no_grad())
    accelerated(pipe, Accel(selection=LOSSY), (5,), (8,))
    first, second = seen[0], seen[LAYERS]
    assert first != second
    assert seen == ([first] * LAYERS + [second] * LAYERS) * STEPS


def test_blocks_compile_into_as_many_graphs_as_of_the_stock_model(pipe):
    counts, outs = [], []
    expected = [generate(pipe), accelerated(pipe, Accel(selection=LOSSY))[0]]
    counter = CompileCounter()
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    for go in (lambda: generate(pipe), lambda: accelerated(pipe, Accel(selection=LOSSY))[0]):
        torch._dynamo.reset()
        counter.clear()
        outs.append(go())
        counts.append(counter.frame_count)
    torch.testing.assert_close(outs, expected, atol=1e-5, rtol=0)
    assert counts[1] == counts[0]


def test_latents_are_decoded_as_by_the_pipeline(pipe):
    expected = generate(pipe, output_type="np")[0]
    assert np.array_equal(decode(pipe, generate(pipe)), expected)
    assert expected.std() > 0.01


def test_on_the_command_line(pipe, tmp_path):
    from diffaccel.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    [row] = Accel().describe(pipe)
    assert (row["layers"], row["heads"], row["head_dim"], row["patch"]) == (LAYERS, 2, 24, (1, 2, 2))
    pipe.save_pretrained(tmp_path / "model")
    [row] = json.loads(run("info", tmp_path / "model", "--size", "96x32", "--json").stdout)
    assert row["tokens_per_frame"] == 6 * 2
    text = run("info", tmp_path / "model").stdout
    assert "4 layers x joint attention" in text
    assert "AnnSA: yes" in text
    assert "AnnCA: no" in text

    size = ("--size", f"{WIDTH}x{HEIGHT}", "--frames", 33, "--steps", STEPS)
    generate = ("generate", "a red circle", "--model", tmp_path / "model", "-o", tmp_path / "a.mp4", *size)
    refused = run(*generate)
    assert refused.exit_code == 2
    assert refused.stderr.endswith("stays (here: --set prompt=none)\n")
    assert "true_cfg_scale" in run(*generate, "--negative", "blue").stderr
    done = run(*generate, "--set", "prompt=none", "--set", "selection=AnnSA", "--report", tmp_path / "a.json")
    assert done.exit_code == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["slots"]["selection"]["engaged"]
    assert found["frames"] == 33
