"""FlashBlock computes the outside when it says, and reuses exactly what it stored (arXiv 2602.05305)."""

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel import Accel, FlashBlock, Grid, Run, Site
from diffaccel.attend import attend


@pytest.mark.parametrize(
    ("policy", "answers"),
    [
        (FlashBlock(refresh=1, min_past=0), "tttt t"),
        (FlashBlock(refresh=2, min_past=0), "srsr t"),
        (FlashBlock(refresh=3, min_past=0), "srrt t"),
        (FlashBlock(refresh=(0, 1), min_past=0), "tsrr t"),
        (FlashBlock(refresh=(2,), min_past=0), "srsr t"),
        (FlashBlock(refresh=2, clean_pass="reuse", min_past=0), "srsr r"),
        (FlashBlock(refresh=3, clean_pass="reuse", min_past=0), "srrs r"),
        (FlashBlock(refresh=1, clean_pass="reuse", min_past=0), "ttts r"),
    ],
    ids=str,
)
def test_schedule(policy, answers):
    """t: together, s: compute apart and store, r: reuse; four steps and the clean pass."""
    steps = answers.replace(" ", "")
    names = {"t": "together", "s": "store", "r": "reuse"}
    for step, letter in enumerate(steps):
        phase = "clean" if step == 4 else "denoise"
        site = Site(0, "self", step, 4, 1, 3, phase, "cond", Grid(1, 1, 1))
        assert policy.answer(site) == names[letter], step


@pytest.mark.parametrize(("start", "answer"), [(3, "together"), (5, "together"), (6, "store"), (30, "store")])
def test_a_short_past_is_read_together(start, answer):
    site = Site(0, "self", 0, 4, 1, start, "denoise", "cond", Grid(3, 1, 1))
    assert FlashBlock(refresh=2, min_past=2).answer(site) == answer


GRID = Grid(2, 1, 3)


def go(run, step, block, q, k, v, phase="denoise", steps=4):
    with run.at(block=block, start=2 * block, step=step, steps=steps, phase=phase):
        run.enter(GRID, None, None, None)
        out = attend(q, k, v, run.site(0, "self"), run)
        run.leave()
    return out


def tensors():
    return [torch.randn(1, GRID.tokens, 2, 16) for _ in range(3)]


def test_a_reused_outside_is_that_of_the_refresh_step_and_the_inside_is_fresh():
    run = Run(Accel(reuse=FlashBlock(refresh=2, min_past=0), kernel="reference"), causal=True)
    run.begin(frames=6)
    first = tensors()
    go(run, 4, 0, *first, phase="clean")
    q0, k0, v0 = tensors()
    q1, k1, v1 = tensors()
    go(run, 0, 1, q0, k0, v0)
    found = go(run, 1, 1, q1, k1, v1)
    scale = 16**-0.5
    out_old, lse_old = attention64(q0, first[1], first[2], scale=scale)
    out_in, lse_in = attention64(q1, k1, v1, scale=scale)
    lse = torch.logaddexp(lse_old, lse_in)
    expected = (lse_old - lse).exp()[..., None] * out_old + (lse_in - lse).exp()[..., None] * out_in
    assert_within(found, expected, torch.float32, inputs=4)
    assert run.slots["reuse"].skipped == 1


def test_frozen_queries_make_reuse_exact():
    run = Run(Accel(reuse=FlashBlock(refresh=(0,), min_past=0), kernel="reference"), causal=True)
    run.begin(frames=6)
    first, (q, k, v) = tensors(), tensors()
    go(run, 4, 0, *first, phase="clean")
    both = [torch.cat([a, b], 1) for a, b in zip(first[1:], (k, v), strict=True)]
    exact = attention64(q, *both)[0]
    for step in range(4):
        assert_within(go(run, step, 1, q, k, v), exact, torch.float32, inputs=4)
    assert run.slots["reuse"].skipped == 3


def test_what_was_stored_for_one_block_or_version_is_never_used_for_another():
    run = Run(Accel(reuse=FlashBlock(refresh=(0,), min_past=0), kernel="reference"), causal=True)
    run.begin(frames=8)
    first, second, (q, k, v) = tensors(), tensors(), tensors()
    go(run, 4, 0, *first, phase="clean")
    go(run, 0, 1, *tensors())
    go(run, 4, 1, *second, phase="clean")
    keys = [torch.cat(x, 1) for x in zip(first[1:], second[1:], (k, v), strict=True)]
    # step 1 of block 2 without its step 0: the schedule says reuse, but nothing stored is valid
    assert_within(go(run, 1, 2, q, k, v), attention64(q, *keys)[0], torch.float32, inputs=4)
    assert run.slots["reuse"].skipped == 0
