"""What a run says of every layer: calls, keys and seconds, and which technique changed what."""

import json

import pytest
import torch
from matrix import MATRIX
from tiny import tiny_pipeline

from diffaccel import Accel, FlashBlock, FrameWindow, HostCache, PadCollapse, SinkRecent

CALL = {"height": 32, "width": 48, "num_frames": 33, "num_inference_steps": 4, "output_type": "latent"}
BLOCK = 3 * 6  # tokens of a block; 3 blocks, 2 branches, 2 layers


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def ran(pipe, accel, **changes):
    with accel(pipe) as run:
        pipe("a red circle moves left", generator=torch.Generator().manual_seed(0), **(CALL | changes))
    return run.report()


def rows(report, part="self"):
    found = [row for row in report.layers if row.part == part]
    assert [row.layer for row in found] == [0, 1]
    return found


def test_counts_are_what_the_settings_imply(pipe):
    """A cache of one block and a reuse at steps 1 and 3."""
    report = ran(pipe, Accel(cache=SinkRecent(3, 0), reuse=FlashBlock(refresh=2, min_past=0), prompt=PadCollapse()))
    for row in rows(report):
        assert row.calls == 2 * (5 + 5 + 4)  # the last block has no clean pass
        assert row.keys_total == 2 * BLOCK * (5 * 1 + 5 * 2 + 4 * 3)
        assert row.keys_kept == 2 * BLOCK * (5 * 1 + 5 * 2 + 4 * 2)
        assert row.keys_read == row.keys_kept - 2 * BLOCK * (2 + 2)
        # the cache left something out in the last block, reuse answered twice in the last two
        assert row.engaged == {"cache": 2 * 4, "reuse": 2 * (2 + 2), "prompt": 0}
        assert row.seconds > 0
    for row in rows(report, "cross"):
        assert row.engaged == {"cache": 0, "reuse": 0, "prompt": row.calls}
        assert row.keys_kept == row.keys_total == row.calls * 512 > row.keys_read


def test_a_window_counts_where_it_leaves_keys_out_and_a_cache_where_it_holds_them_elsewhere(pipe):
    assert [row.engaged for row in rows(ran(pipe, Accel(window=FrameWindow(3))))] == [
        {"window": 2 * 4}
    ] * 2  # of the last block
    [row, _] = rows(ran(pipe, Accel(cache=HostCache())))
    assert row.keys_read == row.keys_total
    assert row.engaged["cache"] > 0


@pytest.mark.parametrize("row", [row for row in MATRIX if row.lossy], ids=lambda row: row.name)
def test_layers_add_up_to_the_slots(pipe, row):
    report = ran(pipe, row.lossy, num_inference_steps=row.steps)
    found = report.layers
    assert sum(layer.seconds for layer in found) == pytest.approx(report.seconds["attention"])
    for slot, counts in report.slots.items():
        part = "cross" if slot == "prompt" else "self"
        mine = [layer for layer in found if layer.part == part]
        assert sum(layer.calls for layer in mine) == counts.calls
        assert sum(layer.keys_total for layer in mine) == counts.keys_total
        assert sum(layer.keys_read for layer in mine) == pytest.approx(counts.keys_read, abs=len(mine))
        assert sum(layer.engaged[slot] for layer in found) > 0
        if slot == "cache":
            assert sum(layer.keys_kept for layer in mine) == counts.keys_kept
        if slot == "reuse" and counts.skipped:
            assert sum(layer.engaged[slot] for layer in mine) == pytest.approx(counts.skipped)
    assert json.loads(report.to_json())["layers"][0]["part"] == "cross"
