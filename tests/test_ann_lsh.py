"""Hash codes, the order they are sorted in, and what transforms are for."""

import pytest
import torch

from diffaccel.ann import LSH, Flat, recall
from diffaccel.ann.hashing import gray_rank, pack, sort_key
from diffaccel.ann.transforms import learn, parse


def attention_like(count=1500, asked=100, dims=32):
    """Keys with a mean and few directions that vary, queries with others, as attention has them."""
    strong = torch.rand(dims).pow(4) * 6 + 0.1
    other = strong * (0.3 + torch.rand(dims))
    keys = torch.randn(2, count, dims) * strong + 3 * torch.randn(2, 1, dims)
    queries = torch.randn(2, 2 * asked, dims) * other + 3 * torch.randn(2, 1, dims)
    return keys, queries[:, :asked], queries[:, asked:]


def test_bits_are_packed_first_highest():
    assert pack(torch.tensor([[1.0, -1.0, 2.0], [-1.0, 0.0, 3.0]])).tolist() == [0b101, 0b001]


@pytest.mark.parametrize("bits", [1, 3, 8, 16])
def test_codes_that_follow_each_other_differ_in_one_bit(bits):
    codes = torch.arange(2**bits)
    rank = gray_rank(codes)
    assert rank.sort().values.equal(codes)
    in_order = rank.argsort()
    steps = in_order[1:] ^ in_order[:-1]
    assert (steps & (steps - 1)).eq(0).all()
    assert steps.ne(0).all()


def test_a_sort_key_orders_by_code_first():
    major, minor = torch.tensor([2, 1, 1, 2**16 - 1]), torch.tensor([-9e9, 3.0, -1.0, torch.inf])
    assert sort_key(major, minor).argsort().tolist() == [2, 1, 0, 3]


def test_a_window_as_large_as_the_bucket_finds_what_shares_it():
    points = torch.cat([torch.randn(40, 16) * 0.01 + centre for centre in 10 * torch.eye(16)])
    index = LSH("l2", n_tables=1, n_bits=10, transform="none", candidates=80).fit(points)
    ids = index.search(points, 20).ids
    assert (ids // 40 == torch.arange(640)[:, None] // 40).float().mean() > 0.95


def test_there_are_k_results_where_no_bucket_has_k_points():
    points = torch.randn(40, 16)
    ids, distances = LSH("ip", n_bits=16, n_tables=2, candidates=2).fit(points).search(torch.randn(3, 16), 20)
    assert all(len(set(row)) == 20 for row in ids.tolist())
    assert distances.isfinite().all()


def test_probes_flip_the_bits_of_least_margin():
    """One bit that tells nothing splits each pair of twins; the flip of it brings the other one back."""
    torch.manual_seed(1)
    points = torch.randn(4000, 24)
    queries = points[:200] + 0.3 * torch.randn(200, 24)
    truth = Flat("cosine").fit(points)
    index = LSH(n_tables=1, n_bits=12, candidates=16).fit(points)
    plain, probed = (recall(index.at(candidates=16 * probes, probes=probes), queries, 1, truth) for probes in (1, 8))
    assert probed > plain + 0.1


def test_the_seed_decides_the_hyperplanes():
    points, queries = torch.randn(500, 16), torch.randn(20, 16)
    first, again, other = (LSH(candidates=40, seed=seed).fit(points).search(queries, 10) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize("transform", ["points", "queries", "centre+scale+points"])
def test_transforms_help_where_queries_are_distributed_otherwise(transform):
    keys, queries, sample = attention_like()
    truth = Flat("ip").fit(keys)
    plain, helped = (
        recall(LSH("ip", transform=name).fit(keys, sample), queries, 32, truth) for name in ("none", transform)
    )
    assert helped > plain + 0.05


def test_centre_and_scale_keep_the_ranking_by_inner_product():
    keys, queries, _ = attention_like(count=50, asked=9)
    space = learn(parse("centre+scale", "ip"), "ip", keys, queries)
    scores = (queries - space.query_shift) @ space.of_queries @ ((keys - space.shift) @ space.of_points).mT
    lost = queries @ keys.mT - scores
    torch.testing.assert_close(lost, lost[..., :1].expand_as(lost), atol=1e-3, rtol=1e-5)  # a constant of the query


def test_scale_gives_both_the_same_second_moment_in_each_channel():
    keys, queries, _ = attention_like()
    space = learn(parse("scale", "ip"), "ip", keys, queries)
    of_keys, of_queries = ((x @ m).square().mean(1) for x, m in ((keys, space.of_points), (queries, space.of_queries)))
    torch.testing.assert_close(of_keys, of_queries, rtol=0.02, atol=0.02)


def test_hyperplanes_drawn_from_the_points_have_their_covariance():
    keys, queries, _ = attention_like()
    space = learn(parse("points", "ip"), "ip", keys, queries)
    torch.testing.assert_close(
        space.of_points @ space.of_points.mT, keys.mT @ keys / keys.shape[1], rtol=0.02, atol=0.01
    )


def test_a_channel_that_never_varies_is_no_trouble():
    points = torch.randn(100, 8)
    points[:, 3] = 0
    for transform in ("centre+points", "scale+points", "queries"):
        found = LSH("ip", transform=transform).fit(points, points).search(points, 5)
        assert found.distances.isfinite().all()
