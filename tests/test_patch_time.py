"""Entering and leaving `with accel(pipe)` takes no time that anyone would notice, at the size of published models."""

import sys
from pathlib import Path

import pytest
from families import FAMILIES

from diffaccel.backbone import find

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import bench_patch

MOST = 100.0  # milliseconds, the best of three


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_patching_and_restoring(family):
    pipe = bench_patch.published(family)
    assert find(pipe)[0].geometry(pipe.transformer).layers >= 20  # no tiny model
    patch, restore = bench_patch.measure(pipe, bench_patch.asked(family), rounds=3)
    assert min(patch) < MOST
    assert min(restore) < MOST
