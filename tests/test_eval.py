"""Quality over prompts, seeds and settings: what a row holds, how a run goes on, and what a folder refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_components, tiny_pipeline

import diffaccel.eval.runs as runs
from diffaccel import Accel, FlashBlock, PadCollapse, TempCache, UnsupportedError
from diffaccel.compare import compare
from diffaccel.eval import Arm, EvalError, Measures, Progress, Setup, Store, quality
from diffaccel.eval.measure import SCORES, load_judge
from diffaccel.eval.store import differing
from diffaccel.eval.summary import remarks, summarize, table, write_summary
from diffaccel.quality import MetricError, drift, psnr, warp_error
from diffaccel.video import read_video

CALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 2.0}
LOSSY = Accel(cache=TempCache(threshold=0.0, recent_frames=0), reuse=FlashBlock(refresh=(0,), clean_pass="reuse"))
PROMPTS = ["a red circle moves left", "a blue square"]


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    return pipe


@pytest.fixture(scope="module")
def made(pipe, tmp_path_factory):
    """A whole evaluation: its folder and rows."""
    folder = tmp_path_factory.mktemp("made") / "out"
    rows = quality(pipe, {"lossy": LOSSY}, folder, prompts=PROMPTS, seeds=[3], model="tiny", **CALL)
    return folder, rows


@pytest.fixture
def arms_run(monkeypatch):
    """The names of the arms that are generated from here on."""
    names, original = [], runs.run_arm

    def spy(pipe, name, *arguments, **named):
        names.append(name)
        return original(pipe, name, *arguments, **named)

    monkeypatch.setattr(runs, "run_arm", spy)
    return names


def again(made, pipe, **changes):
    return quality(
        pipe, {"lossy": LOSSY}, made[0], **({"prompts": PROMPTS, "seeds": [3], "model": "tiny", **CALL} | changes)
    )


# -- rows --------------------------------------------------------------------------------------------------------------


def test_every_prompt_has_its_ways_each_once(made):
    _, rows = made
    assert [(row["prompt"], row["arm"], row["way"]) for row in rows] == [
        (prompt, arm, way)
        for prompt in (0, 1)
        for arm, way in (
            ("dense", "noise_floor"),
            ("dense", "other_seed"),
            ("lossy", "free_running"),
            ("lossy", "shared_history"),
        )
    ]
    assert len({row["key"] for row in rows}) == 8


def test_scores_are_those_of_a_comparison(made, pipe):
    _, rows = made
    result = compare(pipe, LOSSY, prompt=PROMPTS[1], seed=3, warm_up=False, **CALL)
    for row in rows[4:]:
        scores = result.scores[row["way"]]
        assert row["scores"]["psnr_pooled"] == pytest.approx(scores.psnr_pooled, abs=1e-6)
        assert row["scores"]["ssim"] == pytest.approx(scores.ssim_mean)
        assert row["scores"]["seam"] == pytest.approx(scores.seam)
        assert row["reference"]["flicker"] == pytest.approx(scores.flicker_reference)
        assert row["frames"]["psnr"] == [None if math.isinf(v) else pytest.approx(v) for v in scores.psnr]


def test_a_number_that_is_missing_has_a_reason(made):
    for row in made[1]:
        assert set(row["scores"]) == set(SCORES)
        for name, value in row["scores"].items():
            assert (value is None) == (name in row["unmeasured"]), name
        assert {"lpips", "ms_ssim", "text"} == set(row["unmeasured"])
        assert "above 160 pixels" in row["unmeasured"]["ms_ssim"]
        assert row["seconds"]["denoise"] > 0
        assert row["dense_seconds"]["denoise"] > 0


def test_videos_lie_where_the_rows_say_and_are_what_was_measured(made):
    folder, rows = made
    near = {}
    for row in rows:
        clip, dense = (read_video(folder / row[name]) for name in ("video", "dense"))
        assert clip.shape == dense.shape == (9, 32, 48, 3)
        near.setdefault(row["way"] != "other_seed", []).append(psnr(dense, clip).min())
    assert min(near[True]) > max(near[False]) + 6  # both coded alike


def test_motion_and_drift_are_held_against_the_dense_clip(pipe, made):
    from diffaccel.quality import motion

    rng = np.random.default_rng(0)
    dense, clip = (rng.random((9, 32, 48, 3)) for _ in range(2))
    scored = Measures(text=lambda frames, prompt: len(prompt)).against(dense, (1, 5), "four").score(clip)
    assert scored.scores["warp_error"] == pytest.approx(warp_error(clip, motion(dense)))
    assert scored.reference["warp_error"] == pytest.approx(warp_error(dense))
    assert scored.scores["text"] == 4
    assert scored.drift["drift_colour"] == pytest.approx(drift(clip, (1, 5)).colour)
    assert scored.scores["drift_colour"] == pytest.approx(np.mean(drift(clip, (1, 5)).colour))
    one = Measures().against(dense[:1], (), "").score(clip[:1])
    for name in ("warp_error", "flicker", "seam", "drift_similarity"):
        assert one.scores[name] is None
        assert one.unmeasured[name]


def test_lpips_is_measured_where_it_is_given(monkeypatch):
    class Half:
        def frames(self, a, b):
            return np.full(len(a), 0.5)

    clip = np.zeros((3, 16, 16, 3))
    scored = Measures(lpips=Half()).against(clip, (), "").score(clip)
    assert scored.scores["lpips"] == 0.5
    assert scored.frames["lpips"] == [0.5] * 3
    assert scored.scores["psnr_pooled"] is None
    assert scored.unmeasured["psnr_pooled"] == "identical"

    class Broken:
        def frames(self, a, b):
            raise MetricError("no weights")

    assert Measures(lpips=Broken()).against(clip, (), "").score(clip).unmeasured["lpips"] == "no weights"


def test_a_judge_is_loaded_by_name_or_refused():
    assert load_judge("math:dist")((0.0, 0.0), (3.0, 4.0)) == 5
    for name, said in (("math", "MODULE:FUNCTION"), ("no.such:thing", "cannot be had"), ("math:pi", "no function")):
        with pytest.raises(EvalError, match=said):
            load_judge(name)


def test_a_stock_pipeline_has_no_shared_history_and_identical_clips_say_so(tmp_path):
    from diffusers import WanPipeline

    pipe = WanPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    rows = quality(
        pipe, {"same": Accel(), "pad": Accel(prompt=PadCollapse())}, tmp_path / "o", prompts=PROMPTS[:1], **CALL
    )
    assert [row["way"] for row in rows if row["arm"] == "same"] == ["free_running"]
    same = next(row for row in rows if row["arm"] == "same")
    assert same["scores"]["psnr_pooled"] is None
    assert same["unmeasured"]["psnr_pooled"] == same["unmeasured"]["psnr_worst"] == "identical"
    summary = summarize(rows)
    assert summary["arms"]["same"]["free_running"]["identical"] == 1
    assert "same: 1 videos are identical" in "\n".join(remarks(summary))
    assert ["same", "free-running", "1", "identical"] in [line[:4] for line in table(summary)]
    assert "drift_colour" in summary["unmeasured"]  # nine frames made at once are one window


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(made, pipe, arms_run):
    assert again(made, pipe) == made[1]
    assert arms_run == []


def test_a_torn_run_does_what_is_missing_from_the_dense_latents_it_kept(made, pipe, arms_run):
    folder, rows = made
    file = folder / "quality.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    try:
        file.write_bytes(b"".join(lines[:5]) + lines[5][:99])  # killed while it wrote the sixth row
        notes = []
        found = again(made, pipe, progress=Progress(note=notes.append))
        assert notes == [f"the last line of '{file}' was torn by a kill; what it held is done again"] * len(notes)
        assert notes
        assert arms_run == ["free_running", "shared_history", "other_seed"]  # and no dense one
        assert found[:5] == rows[:5]
        for new, old in zip(found[5:], rows[5:], strict=True):
            assert new["scores"] == pytest.approx(old["scores"])
            assert (new["key"], new["video"]) == (old["key"], old["video"])
        assert len(file.read_text().splitlines()) == 8
        arms_run.clear()
        (folder / "latents" / "p001-s3.pt").unlink()
        unfinished = folder / "videos" / "p001-s3" / ".dense.partial-77.mp4"
        unfinished.write_bytes(b"killed")
        file.write_bytes(b"".join(lines[:-1]))
        assert again(made, pipe)[-1]["scores"] == pytest.approx(rows[-1]["scores"])
        assert arms_run == ["dense", "shared_history"]
        assert not unfinished.exists()
    finally:
        file.write_bytes(whole)


def test_a_folder_of_something_else_is_refused_and_says_what_differs(made, pipe, arms_run):
    before = (made[0] / "quality.jsonl").read_bytes()
    for change, said in (
        ({"num_frames": 13}, r"frames differ \(frames there: 9; here: 13\)"),
        ({"prompts": PROMPTS[:1]}, "prompts differ"),
        ({"seeds": [3, 4]}, "seeds differ"),
        ({"model": "other", "guidance_scale": 1.0}, "model, guidance differ"),
        ({"measures": Measures(text=lambda clip, prompt: 1.0)}, "measures differ"),
    ):
        with pytest.raises(EvalError, match=said):
            again(made, pipe, **change)
    with pytest.raises(EvalError, match="arms differ"):
        quality(pipe, {"lossy": replace(LOSSY, reuse=None)}, made[0], prompts=PROMPTS, seeds=[3], model="tiny", **CALL)
    assert arms_run == []
    assert (made[0] / "quality.jsonl").read_bytes() == before


def test_restart_throws_away_results_and_nothing_else(pipe, tmp_path):
    store = Store(tmp_path / "o")
    asked = {**Setup(pipe, {"a": Arm(LOSSY)}, tmp_path / "o", ["x"], [0], CALL).asked("quality")}
    store.ask(asked)
    store.append("quality", {"key": "a"})
    (tmp_path / "o" / "mine.txt").write_text("keep")
    store.ask({**asked, "seeds": [7]}, restart=True)
    assert store.rows("quality") == []
    assert (tmp_path / "o" / "mine.txt").read_text() == "keep"
    assert store.asked("quality")["seeds"] == [7]
    assert differing({**asked, "frames": 13}, asked) == ["frames"]


def test_a_second_kind_in_a_folder_has_a_file_of_its_own(tmp_path):
    store = Store(tmp_path)
    for what in ("quality", "throughput"):
        store.ask({"what": what, "environment": {}})
    assert (tmp_path / "asked.throughput.json").is_file()
    assert [store.asked(what)["what"] for what in ("quality", "throughput")] == ["quality", "throughput"]
    assert store.asked("frontier") is None


def test_results_begun_on_another_machine_are_noted(tmp_path):
    notes = []
    store = Store(tmp_path, note=notes.append)
    store.ask({"what": "quality", "environment": {"device": "one"}})
    store.ask({"what": "quality", "environment": {"device": "two"}})
    assert "device one there and two here" in notes[0]


def test_rows_of_several_processes_are_one_list_and_merge_by_key(tmp_path):
    for rank, keys in ((0, "ca"), (1, "bd")):
        for key in keys:
            Store(tmp_path, rank).append("quality", {"key": key, "rank": rank})
    store = Store(tmp_path)
    assert [row["key"] for row in store.rows("quality")] == list("abcd")
    store.merge("quality")
    assert [path.name for path in tmp_path.iterdir()] == ["quality.jsonl"]
    assert [json.loads(line)["rank"] for line in (tmp_path / "quality.jsonl").read_text().splitlines()] == [0, 1, 0, 1]


def test_a_torn_line_is_cut_off_before_the_next_and_a_damaged_one_is_refused(tmp_path):
    file, store = tmp_path / "quality.jsonl", Store(tmp_path)
    file.write_text('{"key": "a"}\n{"key": "b", "tor')
    assert [row["key"] for row in store.rows("quality")] == ["a"]
    store.append("quality", {"key": "c"})
    assert file.read_text() == '{"key": "a"}\n{"key": "c"}\n'
    file.write_text('{"key": "a"}\nnonsense\n{"key": "c"}\n')
    with pytest.raises(EvalError, match=r"line 2 of .* is damaged"):
        store.rows("quality")
    (tmp_path / "asked.json").write_text('{"what"')
    with pytest.raises(EvalError, match=r"asked\.json' is damaged"):
        store.asked("quality")


# -- what cannot be evaluated ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": []}, "at least one arm, one prompt and one seed"),
        ({"prompts": ["a", "a"]}, "prompts are evaluated once each, and 'a' is there twice"),
        ({"arms": {"dense": Arm(LOSSY)}}, "no arm's name"),
        ({"arms": {"a b": Arm(LOSSY), "a?b": Arm(LOSSY)}}, "names of files"),
        ({"arms": {"a": Arm(LOSSY), "b": Arm(Accel(kernel="sdpa"))}}, "the same kernel, got auto and sdpa"),
        ({"arguments": {"generator": 1}}, "sets 'generator' itself"),
    ],
)
def test_what_cannot_be_evaluated_together_is_refused(pipe, tmp_path, change, said):
    given = {"arms": {"a": Arm(LOSSY)}, "prompts": ["a"], "seeds": [0], "arguments": CALL} | change
    with pytest.raises(EvalError, match=said):
        Setup(pipe, given["arms"], tmp_path, given["prompts"], given["seeds"], given["arguments"])


def test_an_arm_the_pipeline_cannot_take_is_refused_before_the_folder_is_made(tmp_path):
    from diffusers import WanPipeline

    with pytest.raises(UnsupportedError, match="TempCache"):
        quality(WanPipeline(**tiny_components()), {"a": LOSSY}, tmp_path / "o", prompts=["a"], **CALL)
    assert not (tmp_path / "o").exists()


# -- in short ----------------------------------------------------------------------------------------------------------


def test_the_summary_has_means_and_the_worst_row_of_each_way(made):
    folder, rows = made
    summary = write_summary(folder, rows, Store(folder).asked("quality"))
    group = summary["arms"]["lossy"]["free_running"]
    mine = [row for row in rows if row["way"] == "free_running"]
    values = [row["scores"]["psnr_pooled"] for row in mine]
    assert group["mean"]["psnr_pooled"] == pytest.approx(np.mean(values))
    assert group["worst"]["psnr_pooled"] == min(values)
    assert group["worst_row"] == mine[int(np.argmin(values))]["key"]
    assert group["worst"]["warp_error"] == max(row["scores"]["warp_error"] for row in mine)
    sharp = [row["scores"]["drift_sharpness"] for row in mine]
    assert abs(group["worst"]["drift_sharpness"] - 1) == max(abs(value - 1) for value in sharp)
    assert list(summary["arms"]) == ["lossy", "dense"]
    assert summary["dense"]["flicker"] == pytest.approx(np.mean([row["reference"]["flicker"] for row in mine]))
    text = (folder / "summary.md").read_text()
    assert f"| lossy | free-running | 2 | {np.mean(values):.1f} ({min(values):.1f}) |" in text
    assert "lpips was not measured in 8 rows: not asked for" in text
    assert json.loads((folder / "summary.json").read_text())["arms"]["dense"]["other_seed"]["rows"] == 2
