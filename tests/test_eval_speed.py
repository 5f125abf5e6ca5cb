"""Speed against length, and sweeps: medians, break-even, what nothing beats, and no speed without its quality."""

import itertools
import json

import pytest
from tiny import tiny_pipeline

import diffaccel.eval.speed as speed
from diffaccel import Accel, FlashBlock, KnobError, TempCache
from diffaccel.eval import Arm, EvalError, Setup, Store
from diffaccel.eval.frontier import marked, pareto, parse_sweep, plot, run_frontier, sweep_arms
from diffaccel.eval.measure import Measures
from diffaccel.eval.speed import break_even, run_throughput, summarize_speed
from diffaccel.settings import UsageError

CALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}
CHANGES = ["cache.recent_frames=0", "reuse.min_past=0"]


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    return pipe


def row(arm, frames, seconds, number=0):
    parts = dict.fromkeys(("attention", "denoise", "decode", "total"), seconds)
    rate = {"denoise": frames / seconds, "end_to_end": frames / seconds}
    key = f"{arm}{frames}{number}"
    return {"key": key, "arm": arm, "frames": frames, "round": number, "seconds": parts, "fps": rate, "tokens": frames,
            "peak_bytes": None, "cache_bytes": 100 + number}  # fmt: skip


def test_medians_spread_and_speed_ups_are_those_of_the_rounds():
    rows = [row("dense", 9, s, n) for n, s in enumerate((4.0, 6.0, 5.0))]
    rows += [row("a", 9, s, n) for n, s in enumerate((2.0, 3.0, 1.0))]
    rows += [row("b", 9, s, n) for n, s in enumerate((4.0, 9.0, 4.5))]
    found = summarize_speed(rows)["lengths"][9]
    assert found["dense"]["seconds"]["total"] == {"median": 5.0, "least": 4.0, "most": 6.0}
    assert found["a"]["speedup"]["total"] == {"ratio": 2.5, "clear": True}
    assert found["b"]["speedup"]["total"] == {"ratio": 5 / 4.5, "clear": False}
    assert found["a"]["fps"]["end_to_end"] == 4.5
    assert found["a"]["cache_bytes"] == 102
    assert "speedup" not in found["dense"]
    rows[0]["seconds"]["attention"] = None
    assert summarize_speed(rows)["lengths"][9]["a"]["speedup"]["attention"] is None


def test_break_even_lies_between_the_lengths_it_was_measured_at():
    assert break_even([(10, 0.5), (30, 1.5)]) == pytest.approx(20)
    assert break_even([(10, 1.2), (20, 0.8), (40, 1.2)]) == pytest.approx(30)  # from there on
    assert break_even([(10, 0.5), (30, 0.9)]) == "never in the range measured, from 10 to 30 frames"
    assert break_even([(10, 1.5), (30, 0.9)]) == "never in the range measured, from 10 to 30 frames"
    assert break_even([(10, 1.0), (30, 2.0)]) == "faster than dense at all that was measured, from 10 to 30 frames"
    assert break_even([(10, 0.5)]) == "never in the range measured, at 10 frames"
    assert break_even([]) is None
    rows = [row("dense", f, 3.0) for f in (10, 30)] + [row("a", 10, 6.0), row("a", 30, 2.0)]
    assert summarize_speed(rows)["break_even"]["a"]["total"] == pytest.approx(20)


def test_arms_alternate_at_every_length_and_a_stopped_run_goes_on(pipe, tmp_path, monkeypatch):
    arms = sweep_arms("balanced", [*CHANGES, "cache.threshold=0"], {"reuse.refresh": ["2"]})
    setup = Setup(pipe, arms, tmp_path / "o", ["a red circle"], [0], CALL)
    order, original = [], speed.run_arm

    def spy(pipe, name, accel, seed, arguments, **named):
        order.append((arguments["num_frames"], name))
        if len(order) == 6:
            raise KeyboardInterrupt
        return original(pipe, name, accel, seed, arguments, **named)

    monkeypatch.setattr(speed, "run_arm", spy)
    with pytest.raises(KeyboardInterrupt):
        run_throughput(setup, [9, 5], 2)
    wanted = [(length, way) for length in (5, 9) for _ in range(2) for way in ("dense", "free_running")]
    assert order == wanted[:6]
    assert len(Store(setup.out).rows("throughput")) == 5
    assert {r["way"] for r in Store(setup.out).rows("quality")} >= {"free_running", "shared_history", "noise_floor"}
    assert Store(setup.out).asked("quality")["frames"] == 9  # the greatest of the lengths
    rows = run_throughput(setup, [9, 5], 2)
    assert order[6:] == wanted[5:]
    assert [(r["frames"], r["arm"]) for r in rows[:2]] == [(5, "dense"), (5, "reuse.refresh=2")]
    assert len(rows) == 8
    assert all(r["fps"]["end_to_end"] == pytest.approx(r["frames"] / r["seconds"]["total"]) for r in rows)
    assert all(r["tokens"] == 6 * (1 + (r["frames"] - 1) // 4) for r in rows)
    with pytest.raises(EvalError, match="lengths differ"):
        run_throughput(setup, [9], 2)


def test_no_speed_is_given_without_its_quality(pipe, tmp_path):
    one, two = Arm(Accel(cache=TempCache(threshold=0.0))), Arm(Accel(reuse=FlashBlock(refresh=2, min_past=0)))
    setup = Setup(pipe, {"one": one}, tmp_path, ["a red circle"], [0], CALL, model="tiny")
    Store(tmp_path).ask({**setup.asked("quality"), "prompts": ["others"], "measures": Measures().to_dict()})
    with pytest.raises(EvalError, match="has no row of quality for one"):
        run_throughput(setup, [9], 1)
    for change, said in (({"arms": {"one": two}}, "one differ"), ({"model": "other"}, "model differ")):
        fields = {
            name: getattr(setup, name) for name in ("pipe", "arms", "out", "prompts", "seeds", "arguments", "model")
        }
        with pytest.raises(EvalError, match=said):
            run_throughput(Setup(**(fields | change)), [9], 1)
    Store(tmp_path).append("quality", {"key": "x", "arm": "one", "way": "free_running"})
    rows = run_throughput(setup, [5], 1)
    assert [r["arm"] for r in rows] == ["dense", "one"]


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_the_grid_of_its_values_or_a_drawn_part_of_it():
    assert parse_sweep("reuse.refresh=2,4") == ("reuse.refresh", ["2", "4"])
    assert parse_sweep("reuse.refresh = 2; 0,3") == ("reuse.refresh", ["2", "0,3"])
    sweeps = {"cache.threshold": ["0.8", "0.9", "0.95"], "reuse.refresh": ["2", "4"]}
    arms = sweep_arms("balanced", ["kernel=sdpa"], sweeps)
    assert len(arms) == 6
    arm = arms["cache.threshold=0.9 reuse.refresh=4"]
    assert (arm.accel.cache.threshold, arm.accel.reuse.refresh, arm.accel.kernel) == (0.9, 4, "sdpa")
    assert arm.to_dict()["set"] == {"kernel": "sdpa", "cache.threshold": "0.9", "reuse.refresh": "4"}
    few = sweep_arms("balanced", [], sweeps, most=3, seed=1)
    assert list(few) == list(sweep_arms("balanced", [], sweeps, most=3, seed=1))
    assert len(few) == 3
    assert list(few) != list(sweep_arms("balanced", [], sweeps, most=3, seed=2))
    for text, said in (("cache.threshold", "--sweep takes"), ("a.b=", "--sweep takes"), ("a.b=1,1", "1 twice")):
        with pytest.raises(UsageError, match=said):
            parse_sweep(text)
    with pytest.raises(UsageError, match="something to sweep"):
        sweep_arms("balanced", [], {})
    with pytest.raises(KnobError, match="threshhold"):
        sweep_arms("balanced", [], {"cache.threshhold": ["1"]})


def test_pareto_points_are_those_that_nothing_beats():
    points = [(1.0, 5.0), (2.0, 9.0), (2.0, 8.0), (3.0, 9.0), (4.0, 10.0), None, (4.0, 10.0)]
    assert pareto(points) == [True, True, False, False, True, False, True]
    cost = [x / 7 % 1 for x in range(1, 40, 3)]
    some = list(zip(cost, reversed(cost), strict=True))
    by_hand = [
        not any(o != p and o[0] <= p[0] and o[1] >= p[1] for o in some)
        for p in some
    ]  # fmt: skip
    assert pareto(some) == by_hand


def point(arm, seconds, psnr):
    quality = {"free_running": {"psnr_pooled": psnr}, "noise_floor": {"psnr_pooled": 90.0}}
    return {"arm": arm, "quality": quality, "speed": {"seconds": {"total": seconds}}, "peak_bytes": None,
            "cache_bytes": int(seconds * 10)}  # fmt: skip


def test_a_setting_that_costs_more_than_dense_is_beaten_by_it():
    points = [point("dense", 4.0, None), point("fast", 2.0, 40.0), point("slow", 5.0, 80.0), point("same", 3.0, None)]
    assert marked(points)["time"] == [False, True, False, True]  # "same" is identical to dense, and faster
    assert marked(points[:3])["memory"] == [True, True, False]


def test_a_frontier_is_quality_and_time_of_every_point_with_dense_beside(pipe, tmp_path):
    arms = sweep_arms("balanced", CHANGES, {"cache.threshold": ["0", "1"], "reuse.refresh": ["2"]})
    setup = Setup(pipe, arms, tmp_path / "o", ["a red circle"], [0], CALL)
    points = run_frontier(setup, Measures(), rounds=1)
    assert [p["arm"] for p in points] == ["dense", *arms]
    assert points == [json.loads(line) for line in (tmp_path / "o" / "frontier.jsonl").read_text().splitlines()]
    quality = {(r["arm"], r["way"]): r["scores"] for r in Store(setup.out).rows("quality")}
    times = {r["arm"]: r["seconds"]["total"] for r in Store(setup.out).rows("throughput")}
    for found in points[1:]:
        assert found["quality"]["shared_history"] == quality[found["arm"], "shared_history"]
        assert found["speed"]["seconds"]["total"] == times[found["arm"]]
        assert found["speed"]["speedup"]["total"]["ratio"] == pytest.approx(times["dense"] / times[found["arm"]])
    assert set(points[0]["quality"]) == {"noise_floor", "other_seed"}
    picture = plot(points, tmp_path / "frontier.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_names_of_points_are_names_of_files():
    from diffaccel.eval.arms import file_name

    names = [f"reuse.refresh={a} cache.threshold={b}" for a, b in itertools.product(("2", "0,3"), ("0.8", "none"))]
    assert len({file_name(name) for name in names}) == 4
    assert all("/" not in file_name(name) and " " not in file_name(name) for name in [*names, "../x y"])
