"""k-means, and the order of equal blocks that is made of it."""

import pytest
import torch

from diffaccel.ann import KMeans, inverse, order


def blobs(lead=(3,), clusters=8, each=25, dims=6, apart=20.0):
    centres = apart * torch.randn(*lead, clusters, dims)
    points = centres[..., None, :] + torch.randn(*lead, clusters, each, dims)
    shuffled = torch.randperm(clusters * each)
    return points.flatten(-3, -2)[..., shuffled, :], (torch.arange(clusters * each) // each)[shuffled]


def inertia(kmeans, points):
    centroids, assigned = kmeans.centroids, kmeans.assign(points)
    return (points - centroids.gather(-2, assigned[..., None].expand_as(points))).square().sum(-1).mean()


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_clusters_that_are_there(seed):
    points, label = blobs()
    assigned = KMeans(8, seed=seed).fit(points).assign(points)
    for found in assigned:
        pairs = set(zip(found.tolist(), label.tolist(), strict=True))
        assert len(pairs) == 8  # one cluster a label


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("lead", "count", "clusters"), [((), 1, 1), ((2,), 17, 17), ((2, 3), 33, 5), ((1,), 65, 64)])
def test_assign_and_centroids_are_as_written_out(metric, lead, count, clusters):
    points = torch.randn(*lead, count, 7)
    fitted = KMeans(clusters, metric, iterations=3).fit(points)
    centroids, assigned = fitted.centroids, fitted.assign(points)
    assert centroids.shape == (*lead, clusters, 7)
    unit = points / points.norm(dim=-1, keepdim=True) if metric == "cosine" else points
    apart = (unit[..., :, None, :] - centroids[..., None, :, :]).square().sum(-1)
    torch.testing.assert_close(apart.gather(-1, assigned[..., None]).squeeze(-1), apart.amin(-1), atol=1e-5, rtol=1e-5)
    if metric == "cosine":
        torch.testing.assert_close(centroids.norm(dim=-1), torch.ones(*lead, clusters))


def test_one_iteration_is_the_mean_of_what_was_assigned():
    points = torch.randn(50, 4)
    start = points[:5]
    assigned = torch.cdist(points, start).argmin(1)
    expected = torch.stack([points[assigned == number].mean(0) for number in range(5)])
    torch.testing.assert_close(KMeans(5, iterations=1).fit(points, centroids=start).centroids, expected)


def test_a_warm_start_needs_fewer_iterations():
    points = torch.randn(2, 600, 8)
    before = KMeans(20, iterations=30).fit(points)
    moved = points + 0.05 * torch.randn_like(points)
    warm = KMeans(20, iterations=1).fit(moved, centroids=before.centroids)
    cold = KMeans(20, iterations=1).fit(moved)
    assert inertia(warm, moved) < inertia(cold, moved)
    assert inertia(warm, moved) < 1.02 * inertia(KMeans(20, iterations=30).fit(moved), moved)


def test_iterations_never_make_it_worse():
    points = torch.randn(2, 400, 8)
    found = [float(inertia(KMeans(16, iterations=count).fit(points), points)) for count in (0, 1, 2, 5, 20)]
    assert found == sorted(found, reverse=True)


def test_a_cluster_that_runs_empty_takes_the_farthest_point():
    points = torch.tensor([[0.0, 0], [0.1, 0], [5, 0], [100, 0]])
    start = torch.tensor([[0.0, 0], [900, 0], [5, 0]])  # the second is nearest to none
    found = KMeans(3, iterations=1).fit(points, centroids=start).centroids
    assert [100.0, 0.0] in found.tolist()
    assert KMeans(3, iterations=3).fit(points, centroids=start).assign(points).unique().numel() == 3


def test_points_that_are_all_alike_are_no_trouble():
    points = torch.ones(2, 20, 4)
    for metric in ("l2", "cosine"):
        assert KMeans(5, metric).fit(points).centroids.isfinite().all()


def test_a_problem_alone_gives_what_it_gives_in_a_batch(monkeypatch):
    points = torch.randn(3, 120, 6)
    together = KMeans(7).fit(points)
    monkeypatch.setattr("diffaccel.ann.index._AT_ONCE_ON_CPU", 100)  # and in chunks what it gives at once
    for number in range(3):
        alone = KMeans(7).fit(points[number])
        torch.testing.assert_close(alone.centroids, together.centroids[number])


def test_the_seed_decides():
    points = torch.randn(200, 6)
    first, again, other = (KMeans(9, iterations=0, seed=seed).fit(points).centroids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bad_arguments_name_the_values():
    points = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match="one of l2, cosine, got 'ip'"):
        KMeans(metric="ip")
    with pytest.raises(ValueError, match="clusters=0"):
        KMeans(0)
    with pytest.raises(ValueError, match="iterations=-1"):
        KMeans(iterations=-1)
    with pytest.raises(ValueError, match="got clusters=7 with 6 points"):
        KMeans(7).fit(points)
    with pytest.raises(ValueError, match=r"here \(2, 3, 4\), got \(3, 4\)"):
        KMeans(3).fit(points, centroids=points[0, :3])
    with pytest.raises(ValueError, match="not fitted"):
        KMeans(3).assign(points)
    with pytest.raises(ValueError, match=r"dimensions \(2,\) and the 4 channels.*got \(6, 4\)"):
        KMeans(3).fit(points).assign(points[0])


def spread(points, permutation, block):
    """Mean squared distance to the block's mean, over that to the mean of all."""
    sorted_ = points.gather(-2, permutation[..., None].expand_as(points))
    blocks = sorted_.unflatten(-2, (-1, block))
    within = (blocks - blocks.mean(-2, keepdim=True)).square().sum(-1).mean()
    return float(within / (points - points.mean(-2, keepdim=True)).square().sum(-1).mean())


@pytest.mark.parametrize("method", ["lsh", "kmeans"])
@pytest.mark.parametrize(("lead", "count", "dims"), [((), 1, 5), ((2, 3), 33, 1), ((4,), 200, 19), ((1,), 129, 3)])
def test_an_order_is_a_permutation(method, lead, count, dims):
    points = torch.randn(*lead, count, dims)
    found = order(points, method)
    assert (found.shape, found.dtype) == ((*lead, count), torch.int64)
    places = torch.arange(count).expand(*lead, count)
    assert found.sort(-1).values.equal(places)
    assert found.gather(-1, inverse(found)).equal(places)


@pytest.mark.parametrize(("method", "bound"), [("lsh", 0.35), ("kmeans", 0.1)])
def test_blocks_are_tight(method, bound):
    points, _ = blobs(clusters=16, each=32)
    assert spread(points, torch.arange(512).expand(3, -1), 32) > 0.9
    assert spread(points, order(points, method, clusters=16), 32) < bound
    assert spread(points, order(points, method, clusters=16), 16) < bound


def test_blocks_are_tight_in_each_problem():
    points, _ = blobs(clusters=16, each=32)
    together = order(points, "kmeans")
    for number in range(3):
        alone = order(points[number], "kmeans")
        assert abs(spread(points[number], alone, 32) - spread(points[number], together[number], 32)) < 0.02


def test_a_curve_is_followed():
    """Points along a line: the chain of clusters, and points within them, run along it."""
    line = torch.randperm(256).float()
    points = line[:, None] * torch.tensor([1.0, -2.0, 0.5])
    for method in ("lsh", "kmeans"):
        assert spread(points, order(points, method, clusters=8), 16) < 0.02, method


def test_bad_orders_name_the_values():
    points = torch.randn(8, 4)
    with pytest.raises(ValueError, match="method is one of lsh, kmeans, got 'pca'"):
        order(points, "pca")
    with pytest.raises(ValueError, match="n_bits=17"):
        order(points, n_bits=17)
    with pytest.raises(ValueError, match="clusters=0"):
        order(points, clusters=0)
