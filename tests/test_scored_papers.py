"""What the scored caches say of a token, against the formulas of their papers written out."""

from math import exp

import pytest
import torch

from diffaccel import CAKE, H2O, Grid, LazyEviction, SnapKV, TaskKV, TCAStyle
from diffaccel.cache.look import Look

FRAMES, CELLS = 3, 4


def look(columns=(), tokens=12, heads=2, seed=0, layer=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, heads, 8, generator=generator) for n in (5, tokens, tokens))
    held = {"token": torch.arange(tokens).expand(1, heads, -1)}
    held |= {name: torch.zeros(1, heads, tokens) for name in columns}
    there = torch.ones(1, heads, tokens, dtype=torch.bool)
    return Look(layer, q, k, v, held, there, None, Grid(FRAMES, 2, 2), 0)


def after(policy, *looks):
    """Columns carried from look to look, all over the same tokens."""
    for one, following in zip(looks, [*looks[1:], None], strict=True):
        one.columns.update(policy.observe(one))
        if following is not None:
            following.columns.update({name: one.columns[name] for name in policy.columns})
    return looks[-1]


@pytest.mark.parametrize("normalised", [True, False])
def test_h2o_adds_up_probabilities(normalised):
    policy = H2O(normalised=normalised)
    looks = [look(policy.columns, seed=seed) for seed in range(3)]
    masses = torch.stack([one.p.mean(2) for one in looks])
    found = policy.score(after(policy, *looks))
    torch.testing.assert_close(found, masses.mean(0) if normalised else masses.sum(0))


def test_h2o_normalised_does_not_favour_the_old():
    """Two tokens of equal attention, one of which came later."""
    policy = H2O()
    first, second = look(policy.columns, seed=1), look(policy.columns, seed=1)
    first.columns.update(policy.observe(first))
    second.columns.update({name: first.columns[name].clone() for name in policy.columns})
    for name in policy.columns:
        second.columns[name][..., 6:] = 0  # new
    second.columns.update(policy.observe(second))
    torch.testing.assert_close(policy.score(second), second.p.mean(2))
    summed = H2O(normalised=False).score(second)
    assert (summed[..., :6] > 1.99 * second.p.mean(2)[..., :6]).all()


def hits(policy, pattern):
    """Score of one token that probes hit at these blocks; other tokens take the rest of the attention."""
    seen = []
    for hit in pattern:
        one = look(policy.columns, tokens=2, heads=1)
        one.__dict__["p"] = torch.tensor([[[[0.9, 0.1] if hit else [0.0, 1.0]]]])
        seen.append(one)
    return float(policy.score(after(policy, *seen))[0, 0, 0])


def sigmoid(x):
    return 1 / (1 + exp(min(-x, 700)))


@pytest.mark.parametrize(
    ("pattern", "away", "interval"),
    [((1, 0, 0, 1, 0), 1, 3), ((1, 1, 0, 0), 2, 1), ((1, 0, 1, 0, 0, 0, 1), 0, 4), ((1, 0, 0, 0), 3, 0)],
)
def test_lazy_eviction_is_the_papers_and_on_demand_the_codes(pattern, away, interval):
    h1 = 2 * sigmoid(-away / (interval + 1e-5))
    h2 = 2 * sigmoid(-1 / (interval - 1)) if interval > 1 else 0
    assert hits(LazyEviction(alpha=0.5), pattern) == pytest.approx(h1 + h2, abs=1e-5)
    assert hits(LazyEviction(alpha=0.5, h2="off"), pattern) == pytest.approx(h1, abs=1e-5)
    code = 2 * sigmoid(-1 - away / (interval + 1e-5))
    code += 2 / (1 + exp(interval - 1)) if interval else 0
    assert hits(LazyEviction(alpha=0.5, h2="official"), pattern) == pytest.approx(code, abs=1e-5)


def test_lazy_eviction_of_the_paper_ranks_what_recurs_above_what_was_hit_once_and_the_code_does_not():
    recurs, once = (1, 0, 0, 0, 0, 1), (0, 0, 0, 0, 1, 1)
    assert hits(LazyEviction(alpha=0.5), recurs) > hits(LazyEviction(alpha=0.5), (1, 1, 0, 0, 0, 0))
    official = LazyEviction(alpha=0.5, h2="official")
    assert hits(official, recurs) < hits(official, once[4:])


def test_task_kv_describes_a_head_by_the_values_of_its_best_tokens():
    policy, one = TaskKV(top=3, pool=1), look(heads=3)
    meanings = []
    for head in range(3):
        mass = one.p[0, head].mean(0)
        best = mass.argsort(descending=True)[:3]
        meanings.append(sum(mass[at] * one.v[0, at, head] for at in best))
    centre = sum(meanings) / 3
    expected = torch.stack([(meaning - centre).norm() for meaning in meanings])
    torch.testing.assert_close(policy.shares(one)[0], expected)


def test_task_kv_lets_far_heads_keep_everything_within_the_budget():
    policy, shares = TaskKV(beta=0.5, least=1), torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    available = [((20, 20, 20, 20),)] * 2
    first, last = policy.allocate([shares, shares], available, 12)
    assert first == ((20, 4, 20, 4),)
    assert last == ((20, 9, 9, 10),)
    (tight,) = policy.allocate([shares], [((30, 30, 30, 30),)], 12)
    assert tight == ((30, 6, 6, 6),)
    (all_fit,) = policy.allocate([shares], [((5, 9, 9, 9),)], 12)
    assert all_fit == ((5, 9, 9, 9),)


POLICIES = [SnapKV(), CAKE(), TaskKV(), TCAStyle(side=2)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_scores_do_not_depend_on_other_heads(policy):
    both, alone = look(heads=2), look(heads=2)
    alone.__dict__.update(q=both.q[:, :, :1], k=both.k[:, :, :1], v=both.v[:, :, :1], there=both.there[:, :1])
    alone.__dict__["columns"] = {name: column[:, :1] for name, column in both.columns.items()}
    torch.testing.assert_close(policy.score(both)[:, :1], policy.score(alone))


def test_tca_style_budgets_are_what_attention_is_spread_over():
    policy, one = TCAStyle(side=2), look(tokens=12, heads=1)
    mass = torch.tensor([[[0.4, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.15, 0.05, 0.0, 0.0]]])
    assert policy.budgets(one, mass)[0, 0].tolist() == [1] * 4 + [4] * 4 + [2] * 4
    assert policy.rank(one, mass)[0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]


def test_tca_style_blocks_are_squares_of_one_frame_and_ranks_within_them():
    policy, one = TCAStyle(side=2), look(tokens=48, heads=2)
    one.__dict__["grid"] = Grid(2, 4, 6)
    block, count = policy._block(one)
    mass = one.p.mean(2)
    ranks, budgets = policy.rank(one, mass), policy.budgets(one, mass)
    assert count == 12
    for number in range(12):
        places = [at for at in range(48) if (at // 24 * 2 + at % 24 // 6 // 2) * 3 + at % 6 // 2 == number]
        assert (block[0, 0] == number).nonzero().flatten().tolist() == places
        for head in range(2):
            some = mass[0, head, places]
            assert ranks[0, head, places].tolist() == some.argsort(descending=True).argsort().tolist()
            share = some / some.sum()
            assert float(-(share * share.log()).sum().exp()) <= budgets[0, head, places[0]]


def test_tca_style_takes_those_within_budget_first():
    policy, one = TCAStyle(side=2), look(tokens=12, heads=1)
    one.__dict__["p"] = torch.tensor([[[[0.6, 0.1, 0.05, 0.0, 0.02, 0.02, 0.02, 0.02, 0.17, 0.0, 0.0, 0.0]]]])
    score = policy.score(one)[0, 0]
    assert (score > 1).tolist() == [True, True, False, False] + 4 * [True] + [True, False, False, False]
    assert score[2] < score[4:8].min(), "0.05 is more than 0.02, and beyond what its block may keep"
