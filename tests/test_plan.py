"""Plans: what they keep, how they combine."""

import pytest
import torch

from diffaccel import Grid, KnobError, Plan


def random_plan(queries, keys, query_block, key_block):
    keep = torch.rand(-(-queries // query_block), -(-keys // key_block)) < 0.5
    return Plan(keep, queries, keys, query_block, key_block)


@pytest.mark.parametrize("sizes", [(10, 13, 4, 3), (7, 5, 7, 1), (16, 16, 8, 8), (5, 9, 1, 4)])
def test_combination_is_that_of_the_masks(sizes):
    queries, keys, query_block, key_block = sizes
    a = random_plan(queries, keys, query_block, key_block)
    b = random_plan(queries, keys, 6, 2)
    assert torch.equal((a & b).mask(), a.mask() & b.mask())
    assert torch.equal((a | b).mask(), a.mask() | b.mask())
    assert a.density == pytest.approx(float(a.mask().float().mean()))
    assert Plan.full(queries, keys).density == 1


def test_groups_cover_every_query_once():
    plan = random_plan(50, 40, 8, 5)
    mask, seen = torch.zeros(50, 40, dtype=torch.bool), []
    for queries, keys in plan.groups():
        mask[queries[:, None], keys[None]] = True
        seen += queries.tolist()
    assert sorted(seen) == list(range(50))
    assert torch.equal(mask, plan.mask())


def test_wrong_shape_is_refused_with_the_rule():
    with pytest.raises(KnobError, match=r"needs a bool tensor of shape \(3, 2\)"):
        Plan(torch.ones(2, 2, dtype=torch.bool), 10, 7, 4, 4)
    with pytest.raises(KnobError, match="combine over the same tokens"):
        Plan.full(3, 4) & Plan.full(3, 5)


def test_grid_order_is_frame_major():
    grid = Grid(2, 3, 4)
    assert grid.tokens == 24
    assert grid.frame_of_token(start=5).tolist() == [5] * 12 + [6] * 12
    with pytest.raises(KnobError, match="at least one token"):
        Grid(0, 3, 4)
