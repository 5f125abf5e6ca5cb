"""What a run says of its cache: a line a block, recall of attention mass, pictures."""

import sys

import pytest
import torch
from tiny import tiny_pipeline

from diffaccel import Accel, HostCache, SinkRecent, TempCache
from diffaccel.plots import PlotError, plot_cache

CALL = {"height": 32, "width": 48, "num_frames": 49, "num_inference_steps": 2, "output_type": "latent"}
TOKENS = 6


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def observed(pipe, cache, **changes):
    with Accel(cache=cache)(pipe, observe=True) as run:
        pipe("a red circle moves left", generator=torch.Generator().manual_seed(0), **(CALL | changes))
    return run.report()


def test_a_line_a_block(pipe):
    blocks = observed(pipe, None).blocks
    assert [block["frame"] for block in blocks] == [1, 4, 7, 10]  # the last block of 13 is never committed
    assert [block["tokens"] for block in blocks] == [block["seen"] for block in blocks] == [6, 24, 42, 60]
    assert all(block["seconds"] > 0 for block in blocks)
    assert blocks[-1]["bytes"] > 0
    kept = observed(pipe, SinkRecent(recent_frames=3, sink_frames=1)).blocks
    assert [block["tokens"] for block in kept] == [6, 24, 24, 24]


def test_recall_is_one_where_everything_is_kept_and_the_kept_share_where_keys_are_dropped(pipe):
    dense = observed(pipe, None).cache["recall"]
    assert sorted(dense) == [0, 1]
    assert [frame for frame, _ in dense[0]] == [1, 4, 7]
    assert all(value == pytest.approx(1, abs=2e-4) for points in dense.values() for _, value in points)
    merged = observed(pipe, TempCache(threshold=None, bits=8)).cache["recall"]
    assert all(value == pytest.approx(1, abs=2e-2) for points in merged.values() for _, value in points)
    dropped = observed(pipe, SinkRecent(recent_frames=3, sink_frames=0), num_frames=97).cache["recall"]
    last = [points[-1][1] for points in dropped.values()]
    # an untrained model spreads its attention: 3 of 19 frames carry about their share
    assert all(0.05 < value < 0.5 for value in last)


def test_nothing_is_observed_unasked(pipe):
    with Accel()(pipe) as run:
        pipe("a red circle moves left", **CALL)
    assert "recall" not in run.report().cache
    assert run.observer is None


def test_an_endless_video_has_a_bounded_number_of_lines(pipe, monkeypatch):
    monkeypatch.setattr("diffaccel.run.MOST_BLOCKS", 8)
    blocks = observed(pipe, SinkRecent(recent_frames=3), num_frames=4 * 90 + 1).blocks
    assert len(blocks) <= 8
    assert blocks[-1]["frame"] == 88
    assert all(0 < block["seconds"] < 5 for block in blocks)


def test_a_picture_of_a_report(pipe, tmp_path):
    import cv2

    report = observed(pipe, TempCache(threshold=0.3)).to_dict()
    picture = cv2.imread(str(plot_cache(report, tmp_path / "cache.png")))
    assert picture.shape[1] > 800
    assert len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, 3).tolist()}) > 5
    with pytest.raises(PlotError, match="no finished block"):
        plot_cache(report | {"blocks": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'diffaccel\[plots\]'"):
        plot_cache({"blocks": [1]}, tmp_path / "cache.png")


@pytest.mark.parametrize("how", ["recompute", "flush"])
def test_a_change_of_prompt_keeps_lines_in_order_and_recall_of_what_is_left(pipe, how):
    call = {**CALL, "num_frames": 61, "on_prompt_change": how}
    with Accel()(pipe, observe=True) as run:
        stream = pipe.stream("a red circle moves left", generator=torch.Generator().manual_seed(0), **call)
        next(stream), next(stream), next(stream)
        stream.change_prompt("the blue square moves up")
        list(stream)
    report = run.report()
    assert [block["frame"] for block in report.blocks] == [1, 4, 7, 10, 13]
    assert all(block["seconds"] > 0 for block in report.blocks)
    recall = dict(report.cache["recall"][0])
    assert sorted(recall) == [1, 4, 7, 10]
    if how == "flush":
        assert recall[4] == 0  # the block before the change is the first of the new cache
        assert 0 < recall[10] < 0.95
    else:
        assert recall[10] > 0.8  # the same tokens, seen under another prompt


def test_a_run_that_was_left_holds_no_cache_and_still_says_what_it_held(pipe):
    for cache in (TempCache(threshold=0.3), HostCache()):
        with Accel(cache=cache)(pipe) as run:
            pipe("a red circle moves left", **CALL)
        assert not run._memories
        assert not run._scratch
        held = run.report().cache
        assert held["max_tokens"] > 0
        assert held.get("merged_tokens", 0) + held.get("host_bytes", 0) > 0
