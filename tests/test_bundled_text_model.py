"""The bundled language model: it answers what `diffaccel text` asks, reuse is counted, and odd prompts are refused."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffaccel import SnapKV
from diffaccel.cli import app
from diffaccel.pipelines.block_lm import BlockLM, TokenCount
from diffaccel.pipelines.loading import BUNDLED_MODELS, BUNDLED_TEXT_MODEL, LoadError, bundled_text_model
from diffaccel.settings import UsageError
from diffaccel.text import compare, load, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from score_policies import judge
from score_tiny_lm import Setting, score_task
from text_quality import Arm, arms, table
from tiny_lm.tasks import held_out, score, solve, to_text

TASKS = ("recall", "edit", "sum")  # those it answers without a mistake
SEED = 40  # of documents that neither the trainer nor the scores draw


@pytest.fixture(scope="module")
def model():
    return load(None, device="cpu")


def prompts(task, rows, length=512, answer=26):
    documents = held_out(task, rows, length, answer, SEED)
    return [to_text(ids[1 : documents.start]) for ids in documents.ids]


def command(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def test_it_is_small_and_plain_weights():
    files = [path for path in bundled_text_model().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_documents_it_was_not_trained_on(model, task):
    for prompt in prompts(task, 6):
        text = write(model, prompt, model.writer()).text
        assert score(prompt, text) == 1, f"{text}, not {solve(prompt)}"


@pytest.mark.parametrize("length", [40, 100, 300])
def test_it_stops_wherever_an_answer_ends(model, length):
    for task in TASKS:
        for prompt in prompts(task, 3, length, 10):
            assert score(prompt, write(model, prompt, model.writer()).text) == 1, prompt


@pytest.mark.parametrize("threshold", [None, 1.1])
def test_the_cache_writes_what_the_whole_text_forwarded_does(model, threshold):
    for task in TASKS:
        [prompt] = prompts(task, 1, 128)
        arms = compare(model, prompt, model.writer(threshold=threshold)).arms
        assert arms["asked"].tokens == arms["dense"].tokens
        assert arms["asked"].report["tokens_forwarded"] < arms["dense"].report["tokens_forwarded"] / 2


@pytest.mark.parametrize("dirty", ["keep", "drop", "recompute"])
def test_reuse_is_reported_and_the_answer_still_right(model, dirty):
    for task in TASKS:
        [prompt] = prompts(task, 1)
        written = write(model, prompt, model.writer(threshold=1.1), TokenCount(tau=2, dirty=dirty))
        assert written.idle is None
        assert written.report["external_reused"] > 0
        assert 0.4 < written.report["external_share"] < 0.7
        assert score(prompt, written.text) == 1


def test_one_table_answers_several_questions_unless_its_tokens_were_dropped(model):
    options = Namespace(documents=2, questions=2, length=160, entries=48)
    whole, cut = (
        judge(BlockLM(model.lm, 8, cache=cache), "recall", options, model.tokenizer.mask_token_id, model.usual)
        for cache in (True, SnapKV(budget=32, recent_frames=16, sink_frames=4))
    )
    assert whole == {"seen": 1, "next": 1, "blind": 1}
    assert max(cut.values()) < 1


def test_the_arms_of_the_study_differ_in_what_changed_tokens_read(model):
    assert [(arm.rule, arm.tau) for arm in arms(("drop", "none"), (2, 9), 4)] == [
        ("exact", 1),
        ("drop", 2),
        ("drop", 5),
        ("none", 5),
    ]
    setting = Setting(model.usual, 8, 1.1, batch=1)
    rows = []
    for rule in ("drop", "recompute", "keep", "none"):
        found = score_task(Arm(rule, 9).model(model.lm, 8), model.tokenizer, "sum", setting, 3, 128)
        rows.append({"block": 8, "threshold": 1.1, "rule": rule, "tau": 9, "task": "sum", **found})
    shares = {row["rule"]: row["external_share"] for row in rows}
    assert max(shares["drop"], shares["keep"], shares["none"]) < 0.3 < shares["recompute"] < 1
    assert rows[-1]["exact"] == 0  # without the past nothing can be right
    assert len({row["tokens"] for row in rows}) == 4
    assert table(rows).count("never") == 4


def test_its_own_example_is_one(model):
    example = model.usual["prompt_example"]
    result = command("text", example)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == solve(example)
    named = command("text", example, "--model", BUNDLED_TEXT_MODEL)
    assert named.stdout.splitlines()[0] == solve(example)


@pytest.mark.parametrize(
    ("prompt", "met"),
    [
        ("Tell me a story", "it does not know 'Tell', 'me', 'a' and 1 more"),
        ("sum #02 -5 #01 +4 | so from #01 to #99999 =", "it does not know '#99999'"),
        ("recall #08 bas #07 gan", "this prompt has another"),
        ("<bos> sum #02 -5 #01 +4 | from #01 to #02 =", "this prompt has another"),
    ],
)
def test_a_prompt_it_cannot_read_is_refused_with_one_to_try(model, prompt, met):
    result = command("text", prompt)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"prompts of the form '{model.usual['prompt_form']}' in words of its own, and {met}; try \"" in result.stderr
    assert model.usual["prompt_example"] in result.stderr
    with pytest.raises(UsageError, match="prompts of the form"):
        write(model, prompt, model.writer())


@pytest.mark.parametrize("command_of_video", [("generate", "p", "--model"), ("info",), ("calibrate", "p", "--model")])
def test_video_commands_refuse_it_and_text_refuses_videos(command_of_video):
    for name in (BUNDLED_TEXT_MODEL, bundled_text_model()):
        result = command(*command_of_video, name)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert f"'{name}' is a language model, and this makes videos; use diffaccel text" in result.stderr
    with pytest.raises(LoadError, match="is a video model, and this writes text; use diffaccel generate"):
        load(BUNDLED_MODELS[0])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"prompt_form": "a = b"}, "a text for each of prompt_form, prompt_pattern, prompt_example, or none"),
        ({"prompt_form": "a", "prompt_pattern": 1, "prompt_example": "a"}, "a text for each of"),
        (
            {"prompt_form": "a", "prompt_pattern": "(", "prompt_example": "a"},
            "a regular expression as 'prompt_pattern'",
        ),
    ],
)
def test_a_form_that_cannot_be_used_is_named(tmp_path, content, sentence):
    (tmp_path / "generation.json").write_text(json.dumps(content))
    with pytest.raises(LoadError, match=sentence):
        load(str(tmp_path))
