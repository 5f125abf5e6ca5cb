"""The bundled language model: documents and their solver, what is held out, the training mask, the trainer, scores."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from tiny_lm.blocks import (  # noqa: E402
    bound,
    cross_entropy,
    denoise,
    draw_masked,
    exact,
    layout,
    window_logits,
    without_table,
)
from tiny_lm.export import export  # noqa: E402
from tiny_lm.model import build_model, build_tokenizer, load_config  # noqa: E402
from tiny_lm.tasks import (  # noqa: E402
    EOS,
    MASK,
    PAD,
    TASKS,
    VOCABULARY,
    Draw,
    draw_training,
    held_out,
    is_held_out,
    make,
    score,
    solve,
    to_text,
)
from tiny_lm.train import Training, draw_batch, train  # noqa: E402
from tiny_world.checkpoint import TrainingError  # noqa: E402

CPU = torch.device("cpu")


def draw(seed=0):
    return Draw(torch.Generator().manual_seed(seed))


@pytest.fixture
def toy():
    config = load_config("cpu")
    return replace(config, hidden=32, layers=2, feed_forward=32, heads=2, tokens=480, minutes=5, check_seconds=999)


@pytest.fixture
def model(toy):
    torch.manual_seed(0)
    return build_model(toy)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [96, 512])
def test_the_answer_is_what_the_rules_say_and_nothing_else_is(task, length):
    source = draw()
    for _ in range(4):
        documents = draw_training(task, 3, length, length // 4, source)
        assert documents.ids.shape == (3, length)
        for ids in documents.ids:
            prompt, answer = to_text(ids[: documents.start]), to_text(ids[documents.start : documents.stop])
            assert prompt.startswith(f"<bos> {task} ")
            assert prompt.endswith(" =")
            assert set(ids[documents.stop :].tolist()) == {EOS}
            assert score(prompt, answer) == 1
            words = answer.split()
            for at in range(len(words)):
                other = VOCABULARY[(ids[documents.start + at].item() + 1) % len(VOCABULARY)]
                assert score(prompt, " ".join([*words[:at], other, *words[at + 1 :]])) == 0
            assert score(prompt, " ".join(words[:-1])) == 0
            assert score(prompt, f"{answer} {words[-1]}") == 0


def test_small_documents_solved_by_hand():
    assert solve("<bos> recall #08 bad #07 gan #09 gas | so from #07 to #08 =") == "#07 gan #08 bad"
    assert solve("<bos> walk > bas #07 > #11 bas > #07 fit > fit #11 | and from bas to #11 =") == "#07 fit #11"
    assert solve("<bos> edit #98 bas #99 den #00 fit swap #98 #00 set #99 des | from #98 to #00 =") == (
        "#98 fit #99 des #00 bas"
    )
    assert solve("<bos> sum #02 -5 #01 +4 #03 +3 | from #01 to #03 =") == "#01 4 #02 9 #03 2"
    assert solve("<bos> close bas den fit ) fit des | from des to bas =") == "den bas"


def test_more_entries_than_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit 64 tokens"):
        make("walk", 1, 64, 8, 30, draw())


def test_held_out_documents_are_those_training_gives_no_weight(toy):
    for task in TASKS:
        documents = held_out(task, 4, 96, 12, 0)
        assert bool(is_held_out(documents.ids).all())
        assert torch.equal(documents.ids, held_out(task, 4, 96, 12, 0).ids)
        assert not torch.equal(documents.ids, held_out(task, 4, 96, 12, 1).ids)
    left_out = 0
    source = draw()
    for _ in range(30):
        ids, answer, padding = draw_batch(replace(toy, tasks=TASKS, tokens=4800), 48, source)
        ids = ids[:, padding:]
        left_out += int(is_held_out(ids).sum())
        assert torch.equal(answer.any(1), ~is_held_out(ids))
    assert left_out > 0


@pytest.mark.parametrize("block", [4, 8])
def test_the_mask_is_block_causal(block):
    length, window = 32, 16
    mask, positions = layout(length, window, block, CPU)
    tokens = [("noisy", at) for at in range(length - window, length)] + [("clean", at) for at in range(length)]
    assert positions[0].tolist() == [at for _, at in tokens]
    for q, (kind, at) in enumerate(tokens):
        for k, (other, there) in enumerate(tokens):
            if kind == "clean":
                expected = other == "clean" and there // block <= at // block
            elif other == "noisy":
                expected = there // block == at // block
            else:
                expected = there // block < at // block
            assert bool(mask[0, 0, q, k]) == expected, (tokens[q], tokens[k])
    with pytest.raises(ValueError, match="do not divide"):
        layout(30, 16, block, CPU)


@torch.no_grad()
def test_a_block_knows_nothing_of_later_blocks_nor_of_other_noisy_ones(model):
    ids = make("walk", 2, 48, 16, 6, draw()).ids
    noisy = ids[:, -32:].clone()
    noisy[:, 8:16] = MASK
    logits = window_logits(model, noisy, ids, 8)
    changed, other = ids.clone(), noisy.clone()
    changed[:, 24:] = 7  # the block itself and all later ones, clean
    other[:, :8], other[:, 16:] = 9, 9
    again = window_logits(model, other, changed, 8)
    torch.testing.assert_close(again[:, 8:16], logits[:, 8:16], rtol=0, atol=1e-6)
    changed[:, 20] = 11  # an earlier block
    assert float((window_logits(model, other, changed, 8)[:, 8:16] - logits[:, 8:16]).abs().max()) > 1e-6


@torch.no_grad()
def test_a_document_behind_padding_is_the_document_alone(model):
    ids = make("recall", 2, 48, 8, 4, draw()).ids
    noisy = ids[:, -32:].clone()
    noisy[:, 8:16] = MASK
    padded = torch.nn.functional.pad(ids, (16, 0), value=PAD)
    alone = window_logits(model, noisy, ids, 8)
    torch.testing.assert_close(window_logits(model, noisy, padded, 8, padding=16), alone, rtol=1e-4, atol=1e-5)
    assert float((window_logits(model, noisy, padded, 8) - alone).abs().max()) > 1e-4


def test_only_answers_are_masked_few_at_most_while_told_so():
    answer = torch.zeros(256, 32, dtype=torch.bool)
    answer[:, 5:29] = True
    masked = draw_masked(answer, 8, torch.Generator().manual_seed(0))
    assert not (masked & ~answer).any()
    assert 0.45 < float(masked[:, 8:24].float().mean()) < 0.6
    assert masked[:, 8:16].all(1).any()
    few = draw_masked(answer, 8, torch.Generator().manual_seed(0), 0.5)
    assert 0.2 < float(few[:, 8:24].float().mean()) < 0.3


def test_a_step_lowers_the_loss(toy, tmp_path):
    training = Training(replace(toy, tasks=TASKS, lr=1e-2, adam_lr=1e-2), tmp_path, CPU, 0)
    ids, answer, padding = draw_batch(training.config, 48, training.draw)

    def loss():
        masked = draw_masked(answer, 8, torch.Generator().manual_seed(1))
        clean = ids[:, -32:]
        with torch.no_grad():
            logits = window_logits(training.model, clean.masked_fill(masked, MASK), ids, 8, padding=padding)
        return float((cross_entropy(logits, clean) * masked).sum() / masked.sum())

    before = loss()
    training.step = 100  # past the warm-up
    training.update_on(ids, answer, 8, padding)
    assert loss() < before


class Oracle:
    """Knows the documents; is sure of a block's first masked token only."""

    def __init__(self, ids, wrong_at=None):
        self.ids, self.wrong_at = ids, wrong_at
        self.model = self

    def __call__(self, input_ids, **_):
        window = input_ids.shape[1] - self.ids.shape[1]
        hidden = torch.nn.functional.one_hot(self.ids[:, -window:], len(VOCABULARY)).float()
        if self.wrong_at is not None:
            hidden[:, self.wrong_at - self.ids.shape[1]] = hidden[:, self.wrong_at - self.ids.shape[1]].roll(1, -1)
        sure = torch.linspace(40, 20, window)[None, :, None]
        return type("Output", (), {"last_hidden_state": hidden * sure})

    def lm_head(self, hidden):
        return hidden


def test_blocks_are_denoised_until_the_answer_is_there():
    documents = make("sum", 3, 96, 16, 20, draw())
    answers, steps = denoise(Oracle(documents.ids), documents, 8, 0.9)
    assert steps == 1
    assert bool(exact(documents, answers).all())
    answers, steps = denoise(Oracle(documents.ids), documents, 8, 1.1)
    assert steps == 8  # nothing is that sure: one token a step and block
    assert bool(exact(documents, answers).all())
    answers, _ = denoise(Oracle(documents.ids, documents.start + 3), documents, 8, 0.9)
    assert not exact(documents, answers).any()


def test_the_control_loses_the_table_and_keeps_the_answer():
    documents = make("recall", 2, 256, 16, 40, draw())
    cut = without_table(documents, 24, 8)
    assert cut.ids.shape[1] % 8 == 0
    assert cut.start == 25
    assert torch.equal(cut.ids[:, cut.start : cut.stop], documents.ids[:, documents.start : documents.stop])
    assert torch.equal(cut.ids[:, 1 : cut.start], documents.ids[:, documents.start - 24 : documents.start])


def test_the_bound_is_zero_where_nothing_is_uncertain():
    documents = make("close", 2, 96, 16, 10, draw())
    assert bound(Oracle(documents.ids), documents, 8, 4, 0) < 1e-3


def test_text_survives_the_tokenizer():
    tokenizer = build_tokenizer()
    for task in TASKS:
        ids = held_out(task, 1, 96, 12, 0).ids[0]
        text = to_text(ids)
        assert tokenizer(text.removeprefix("<bos> "))["input_ids"] == ids.tolist()
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.mask_token_id == MASK
    padded = tokenizer(["walk", "walk bas"], padding=True)
    assert padded["attention_mask"] == [[0, 1, 1], [1, 1, 1]]


def test_a_run_resumes_exports_and_is_scored(toy, tmp_path):
    train(toy, tmp_path, CPU, 0, steps=3)
    assert train(toy, tmp_path, CPU, 0, steps=5).step == 5
    with pytest.raises(TrainingError, match="holds a model of"):
        Training(replace(toy, hidden=64), tmp_path, CPU, 0)
    folder = tmp_path / "tiny-lm"
    export(toy, tmp_path, folder, CPU, rows=3)
    assert "| recall | 0.000 |" in (folder / "README.md").read_text()
    usual = json.loads((folder / "generation.json").read_text())
    assert re.fullmatch(usual["prompt_pattern"], usual["prompt_example"])
    assert f'diffaccel text "{usual["prompt_example"]}"' in (folder / "README.md").read_text()
    import score_tiny_lm

    bare, tokenizer, usual = score_tiny_lm.load_model(folder)
    setting = score_tiny_lm.Setting(usual, 8, 0.9, batch=2)
    drawn = held_out("recall", 2, 48, 7, 0)
    model = score_tiny_lm.BlockLM(bare, 8)
    written = score_tiny_lm.generate(model, tokenizer, drawn, setting)
    dense = score_tiny_lm.BlockLM(bare, 8, cache=False)
    assert score_tiny_lm.generate(dense, tokenizer, drawn, setting).texts == written.texts
    # What the pipeline writes block by block is what all blocks at once give, as long as the past is the same.
    first = 8 - drawn.start % 8
    answers, _ = denoise(bare, drawn, 8, 0.9)
    for text, row in zip(written.texts, answers, strict=True):
        expected = [word for i in row[:first].tolist() if not (word := VOCABULARY[i]).startswith("<")]
        assert text.split()[: len(expected)] == expected[: len(text.split())]
    scores = score_tiny_lm.score_task(model, tokenizer, "recall", setting, 3, 48)
    assert (scores["documents"], scores["external_share"]) == (3, 1)
    assert 1 <= scores["steps_per_block"] <= 8


def test_right_is_what_the_rules_say_of_the_document():
    import score_tiny_lm

    documents = held_out("recall", 2, 48, 8, 0)
    answers = [to_text(ids[documents.start : documents.stop]) for ids in documents.ids]
    words = answers[1].split()
    half = " ".join([*words[: len(words) // 2], *["and"] * (len(words) - len(words) // 2)])
    assert score_tiny_lm.right(documents, [answers[0], half]) == ([1, 0], [1, 0.5])
    assert score_tiny_lm.right(documents, [f"{answers[0]} #00", ""]) == ([0, 0], [1, 0])


def test_a_damaged_checkpoint_is_named(toy, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"half")
    with pytest.raises(TrainingError, match="delete it to start anew"):
        train(toy, tmp_path, CPU, 0, steps=1)
    with pytest.raises(TrainingError, match="run the train stage first"):
        export(toy, tmp_path / "empty", tmp_path / "to", CPU)
