"""`diffaccel tune`: the search on a landscape that is known, what is kept of the finalists, and a tiny real run."""

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_pipeline
from typer.testing import CliRunner

from diffaccel import Accel, FlashBlock
from diffaccel.cli import app
from diffaccel.errors import KnobError
from diffaccel.eval.arms import Arm, Setup
from diffaccel.eval.finals import Generations
from diffaccel.eval.goal import Figures, Final, Goal, best
from diffaccel.eval.space import Space
from diffaccel.eval.store import Store
from diffaccel.eval.tune import Search, TuneError, check_optuna, rungs
from diffaccel.preset_file import read_preset
from diffaccel.settings import build_accel

SPACE = Space(layers=8, frames=21, block=3, causal=True)
ONLY_REUSE = ("cache=none", "selection=none", "prompt=none")
PSNR = {"none": 100.0, 2: 50.0, 3: 44.0, 4: 38.0, 6: 30.0, (0,): 35.5}
SPEEDUP = {"none": 1.0, 2: 1.5, 3: 1.7, 4: 1.8, 6: 1.9, (0,): 2.0}


def refresh(accel):
    return "none" if accel.reuse is None else accel.reuse.refresh


@dataclass
class Landscape:
    """Figures that are known of every setting, at 5 s a quality and 10 s a round on a clock of its own."""

    now: float = 0.0
    asked: list[str] = field(default_factory=list)
    interrupt_at: int | None = None
    idle: str | None = None

    def _spend(self, seconds, *what):
        if len(self.asked) == self.interrupt_at:
            raise KeyboardInterrupt
        self.now += seconds
        self.asked.append(" ".join(map(str, what)))

    def quality(self, accel, prompt):
        self._spend(5, "quality", prompt, accel)
        worse = getattr(accel.cache, "threshold", None)
        worse = 0.0 if worse is None else 40 * (1 - (worse if isinstance(worse, float) else sum(worse) / len(worse)))
        worse += 0.0 if accel.selection is None else 10 * (1 - accel.selection.density)
        held = 100 if accel.cache is None else 40
        idle = self.idle if refresh(accel) == 2 else None
        return {"psnr": PSNR[refresh(accel)] - worse - 0.3 * (prompt == 1), "bytes": held, "idle": idle}

    def timing(self, accel, number):
        self._spend(10, "timing", number, accel)
        return {"dense": 10.0, "arm": 10.0 / (SPEEDUP[refresh(accel)] + 0.01 * number)}


@pytest.fixture
def search(tmp_path):
    """Builds a search; its landscape is `measurer`."""

    def make(goal, *, fixed=ONLY_REUSE, prompts=4, seconds=1e9, landscape=None, folder="search", **more):
        landscape = landscape or Landscape()
        (tmp_path / folder).mkdir(exist_ok=True)
        space = Space(**{**vars(SPACE), "fixed": fixed, "memory": goal.kind == "memory"})
        return Search(
            goal, space, landscape, Store(tmp_path / folder), prompts, seconds, partial(build_accel, "exact"),
            clock=lambda: landscape.now, **more,
        )  # fmt: skip

    return make


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "wanted"),
    [
        (Goal("psnr", 35), (0,)),  # its second prompt has 35.2 dB
        (Goal("psnr", 35.3), 4),  # which is not enough here
        (Goal("psnr", 60), "none"),
        (Goal("speedup", 1.7), 3),
        (Goal("speedup", 1.95), (0,)),
        (Goal("memory", 1000), "none"),
    ],
)
def test_the_best_of_a_small_space_is_found(search, goal, wanted):
    searched = search(goal)
    found = searched.finalists(searched.run())
    assert refresh(found[0].accel) == wanted
    assert found[0].prompts == 4
    assert found[0].figures.psnr == pytest.approx(PSNR[wanted] - 0.3)
    assert all(goal.missing(one.figures) <= 0 for one in found)
    assert searched.stopped.startswith("every setting")


def test_more_is_found_in_the_whole_space_than_the_presets_have(search):
    goal = Goal("psnr", 34)
    searched = search(goal, fixed=(), trials=70)
    candidates = searched.run()
    starts = list(searched.tried.values())[:3]
    assert [one.name.split(";")[0] for one in starts] == [
        "prompt PadCollapse",
        "cache TempCache(threshold=0.95), prompt PadCollapse, reuse FlashBlock(refresh=2)",
        "cache TempCache, prompt PadCollapse, reuse FlashBlock",
    ]
    found = searched.finalists(candidates)[0]
    assert goal.score(found.figures) > max(goal.score(one.figures) for one in starts)
    assert refresh(found.accel) in (4, (0,))
    layers = [one.accel.selection.layers for one in candidates if one.accel.selection is not None]
    assert len(set(layers)) > 1
    assert any(layer not in (None, ()) for layer in layers)
    assert any(isinstance(getattr(one.accel.cache, "threshold", None), tuple) for one in candidates)


def counts(searched):
    """Settings whose quality was measured on the first prompt, the second, ..."""
    return [sum(key.startswith(f"quality {prompt:03d}") for key in searched.rows) for prompt in range(4)]


def test_the_better_half_goes_on(search):
    searched = search(Goal("memory", 1000), fixed=(), trials=60)
    searched.run()
    first, second, *_, last = counts(searched)
    assert first > 20
    assert 0 < last < second <= 0.6 * first


def test_what_has_missed_is_not_measured_on(search):
    searched = search(Goal("psnr", 34), fixed=("cache=none", "prompt=none"), trials=60)
    searched.run()
    missed = {row["key"].split(" ", 2)[2] for row in searched.rows.values() if row.get("psnr", 99) < 34}
    assert missed
    assert not [key for key in searched.rows if key.startswith("timing") and key.split(" ", 2)[2] in missed]


@pytest.mark.parametrize("seconds", [12, 60, 240])
def test_the_time_is_kept(search, seconds):
    landscape = Landscape()
    searched = search(Goal("psnr", 35), fixed=(), seconds=seconds, keep=6, landscape=landscape)
    candidates = searched.run()
    kept = min(30, seconds / 2)
    assert landscape.now == searched.spent <= seconds - kept + 10  # a kind's first has no usual time yet
    assert searched.spent > 0.5 * (seconds - kept) - 10
    assert searched.stopped.startswith("the time is up")
    assert candidates


def test_a_target_that_nothing_reaches_has_a_nearest(search):
    goal = Goal("speedup", 3)
    searched = search(goal)
    candidates = searched.run()
    assert searched.finalists(candidates) == []
    nearest = searched.nearest(candidates)
    assert refresh(nearest.accel) == (0,)
    assert goal.missed_by(nearest.figures) == "2.00 times dense, 1.00 too little"
    goal = Goal("memory", 10)
    searched = search(goal, folder="memory")
    candidates = searched.run()
    assert searched.finalists(candidates) == []
    assert goal.missed_by(searched.nearest(candidates).figures) == "100 bytes, 90 bytes too much"


def test_what_never_engaged_is_no_finalist(search):
    searched = search(Goal("psnr", 45), landscape=Landscape(idle="FlashBlock never engaged"))
    candidates = searched.run()
    assert [refresh(one.accel) for one in searched.finalists(candidates)] == ["none"]
    assert candidates[-1].idle == "FlashBlock never engaged"


def test_a_killed_search_goes_on_as_if_it_had_not_been(search, tmp_path):
    goal, whole = Goal("psnr", 34), Landscape()
    searched = search(goal, fixed=(), seconds=600, landscape=whole, folder="whole")
    found = [one.name for one in searched.run()]
    first, second = Landscape(interrupt_at=17), Landscape()
    with pytest.raises(KeyboardInterrupt):
        search(goal, fixed=(), seconds=600, landscape=first).run()
    with (tmp_path / "search" / "tune.jsonl").open("a") as file:
        file.write('{"key": "quality 000 torn')
    again = search(goal, fixed=(), seconds=600, landscape=second)
    assert [one.name for one in again.run()] == found
    assert first.asked + second.asked == whole.asked
    assert again.rows == searched.rows
    longer = Landscape()
    search(goal, fixed=(), seconds=700, landscape=longer).run()  # and with more time, further
    assert 0 < longer.now <= 700 - whole.now
    assert not set(longer.asked) & set(whole.asked)


def test_rungs():
    assert [rungs(count) for count in (1, 2, 3, 4, 6)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6]]


# -- the space ---------------------------------------------------------------------------------------------------------


def suggested(space, **chosen):
    """The setting of a trial that takes `chosen` (spaces and dots written as _) and else the first of everything."""

    def take(name, first):
        return chosen.get(name.replace(".", "_").replace(" ", "_"), first)

    trial = SimpleNamespace(
        suggest_categorical=lambda name, choices: take(name, choices[0]),
        suggest_int=lambda name, low, high, step=1: take(name, low),
    )
    return build_accel("exact", space.suggest(trial))


def test_switches_are_layer_by_layer():
    tuned = suggested(
        SPACE, cache="TempCache", cache_threshold_first=90, cache_threshold_last=97, selection="AnnSA",
        selection_layers_first=False, selection_density=30,
    )  # fmt: skip
    assert tuned.cache.threshold == (0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97)
    assert tuned.selection.layers == (3, 4, 5, 6, 7)
    assert tuned.selection.density == 0.3
    none = dict.fromkeys(("selection_layers_first", "selection_layers_middle", "selection_layers_last"), False)
    assert suggested(SPACE, selection="AnnSA", **none).selection is None


def test_what_is_set_is_not_searched(tmp_path):
    fixed = Space(**{**vars(SPACE), "fixed": ("reuse=FlashBlock", "reuse.refresh=5", "cache=none", "kernel=sdpa")})
    tuned = suggested(fixed, reuse="none", cache="TempCache")
    assert (tuned.reuse, tuned.cache, tuned.kernel) == (FlashBlock(refresh=5), None, "sdpa")
    changes = Space(**{**vars(SPACE), "fixed": ("reuse.profile=fb.json", "selection.profile=annsa.json")}).suggest(
        SimpleNamespace(
            suggest_categorical=lambda name, choices: choices[1], suggest_int=lambda name, low, high, step=1: 50
        )
    )
    assert "reuse.share=0.5" in changes
    assert "selection.sparse_layers=0.5" in changes
    assert not [change for change in changes if change.startswith(("reuse.refresh", "selection.layers"))]


def test_a_stock_pipeline_is_offered_what_it_takes():
    stock = Space(**{**vars(SPACE), "causal": False})
    tuned = suggested(stock, cache="TempCache", reuse="FlashBlock", selection="AnnSA")
    assert set(tuned.policies()) == {"prompt", "selection"}


# -- what is kept ------------------------------------------------------------------------------------------------------


def final(name, psnr, least, middle, most, held=0):
    return Final(name, Figures(psnr, (10 / middle,), held), (least, middle, most), (9.5, 10, 10.5))


@pytest.mark.parametrize(
    ("goal", "kept"),
    [
        (Goal("psnr", 35), "nearer"),  # as fast as the fastest, up to the spread, and nearer to dense
        (Goal("psnr", 45), "slow"),
        (Goal("psnr", 55), None),  # reached, but no faster than dense beyond the spread
        (Goal("speedup", 1.5), "nearer"),
        (Goal("speedup", 2.04), "fast"),
        (Goal("speedup", 2.2), None),
        (Goal("memory", 50), "fast"),
        (Goal("memory", 5), None),
    ],
)
def test_faster_is_faster_only_beyond_the_spread(goal, kept):
    finals = [
        final("fast", 36.0, 4.7, 4.8, 5.1, 40),
        final("nearer", 40.0, 5.0, 5.2, 5.3, 60),
        final("slow", 50.0, 7.0, 7.1, 7.2, 60),
        final("exact", math.inf, 9.4, 9.7, 9.9, 100),
    ]
    found = best(goal, finals)
    assert (found and found.name) == kept


def test_targets_that_cannot_be_are_refused():
    for goal in (("psnr", 0), ("psnr", math.nan), ("speedup", 1), ("memory", -1)):
        with pytest.raises(KnobError, match="lies between"):
            Goal(*goal)


# -- the command -------------------------------------------------------------------------------------------------------

FIXED = ("cache=SinkRecent", "cache.recent_frames=2", "reuse=none", "selection=none", "prompt=none")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--size", "48x32", "--steps", "2", "--guidance", "1", "--frames", "17", "--device", "cpu"]

    def invoke(*arguments, fixed=FIXED):
        sets = [part for change in fixed for part in ("--set", change)]
        command = ["tune", "a red circle", *small, "--model", "model", *sets, *map(str, arguments)]
        return CliRunner().invoke(app, command, catch_exceptions=False)

    return invoke


def test_a_preset_comes_out_and_is_taken_everywhere(run, tmp_path):
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    pipe.save_pretrained(tmp_path / "model")
    result = run("--memory", "1MB", "-o", "kept.toml")
    assert result.exit_code == 0, result.output
    assert "1 settings were tried, 1 of them on all prompts" in result.stdout
    accel = read_preset(Path("kept.toml"))
    assert accel == build_accel("exact", FIXED)
    text = Path("kept.toml").read_text()
    for said in ("\n# diffaccel", "model: 17 frames of 48x32, 2 steps", "noise floor ", "another seed", "Denoising: "):
        assert said in text
    assert {"report.html", "frontier.jsonl", "search"} <= {file.name for file in Path("kept.tune").iterdir()}
    rows = Store("kept.tune/search").rows("tune")
    page = CliRunner().invoke(app, ["report", "kept.tune"], catch_exceptions=False)
    assert page.exit_code == 0, page.output
    # another target, of the same measurements, which nothing reaches
    result = run("--memory", "1kB", "-o", "kept.toml")
    assert result.exit_code == 1
    assert "no setting reached 1 kB of memory: the nearest, cache SinkRecent(recent_frames=2)" in result.stderr
    assert "no preset was written" in result.stderr
    assert Store("kept.tune/search").rows("tune") == rows
    assert len(rows) == 1
    small = ["--model", "model", "--size", "48x32", "--steps", "2", "--guidance", "1", "--frames", "17"]
    made = CliRunner().invoke(
        app, ["generate", "a red circle", *small, "--preset", "kept.toml", "--report", "r.json"], catch_exceptions=False
    )
    assert made.exit_code == 0, made.output
    assert "preset kept.toml: cache SinkRecent(recent_frames=2); kernel auto" in made.stdout
    evaluated = ["eval", "quality", "a red circle", *small, "--presets", "exact,kept.toml", "-o", "out"]
    made = CliRunner().invoke(app, evaluated, catch_exceptions=False)
    assert made.exit_code == 0, made.output
    assert {row["arm"] for row in Store("out").rows("quality")} == {"exact", "kept", "dense"}


def test_a_speed_is_timed_beside_dense_and_a_quality_is_with_shared_history(tmp_path):
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    call = {"height": 32, "width": 48, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 1.0}
    setup = Setup(pipe, {"exact": Arm(Accel())}, tmp_path, ["a red circle"], [0], call)
    measurer, lossy = Generations(setup), Accel(reuse=FlashBlock(refresh=2, min_past=0.0))
    found = measurer.quality(lossy, 0)
    assert 10 < found["psnr"] < measurer.quality(Accel(kernel="split"), 0)["psnr"]
    assert found["bytes"] > 0
    assert found["idle"] is None
    assert "FlashBlock" in measurer.quality(Accel(reuse=FlashBlock(min_past=99.0)), 0)["idle"]
    seconds = measurer.timing(lossy, 0)
    assert set(seconds) == {"dense", "arm"}
    assert all(0 < value < 60 for value in seconds.values())
    with Accel()(pipe):  # nothing is left in the pipeline
        pass


def test_a_target_below_the_rounding_is_refused_before_the_search(run, tmp_path):
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    pipe.save_pretrained(tmp_path / "model")
    result = run("--target-psnr", 190)
    assert result.exit_code == 1
    assert (
        "no setting can be told to reach 190 dB to dense: dense attention that is rounded otherwise is" in result.stderr
    )
    assert not Path("preset.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "tune takes one of --target-psnr, --target-speedup and --memory, got none"),
        (["--target-psnr", 35, "--memory", "8GB"], "got 2"),
        (["--memory", "8 frames"], 'a memory is a number of bytes with its unit ("8GB"), got'),
        (["--target-speedup", 0.5], "a target of speedup lies between 1 and 1000 times, got 0.5"),
        (["--target-psnr", 35, "--minutes", 0], "--minutes must be above 0, got 0"),
        (["--target-psnr", 35, "-o", "preset.json"], "-o must name a .toml file, got 'preset.json'"),
        (["--target-psnr", 35, "--set", "cache.size=3"], "unknown knob of"),
    ],
)
def test_mistakes_are_one_sentence(run, arguments, said):
    result = run(*arguments, fixed=("cache=TempCache",))
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(TuneError, match=r"pip install 'diffaccel\[tune\]'"):
        check_optuna()
