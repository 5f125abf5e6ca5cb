"""The exact index against distances written out."""

import pytest
import torch

from diffaccel.ann import Flat


def distances(metric, queries, points):
    queries, points = queries.double(), points.double()
    if metric == "l2":
        return (queries[..., :, None, :] - points[..., None, :, :]).square().sum(-1)
    if metric == "cosine":
        return 1 - torch.cosine_similarity(queries[..., :, None, :], points[..., None, :, :], dim=-1)
    return -(queries[..., :, None, :] * points[..., None, :, :]).sum(-1)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize(("lead", "count", "asked", "k"), [((), 17, 5, 3), ((2, 3), 33, 7, 33), ((4,), 1, 2, 1)])
def test_flat_is_exact(metric, lead, count, asked, k):
    points, queries = torch.randn(*lead, count, 19), torch.randn(*lead, asked, 19)
    ids, found = Flat(metric).fit(points).search(queries, k)
    exact = distances(metric, queries, points)
    expected = exact.topk(k, largest=False).values
    assert ids.shape == found.shape == (*lead, asked, k)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exact.gather(-1, ids), expected, atol=1e-5, rtol=1e-5)


def test_a_point_is_its_own_nearest():
    points = torch.randn(50, 8)
    for metric in ("cosine", "l2"):
        ids, found = Flat(metric).fit(points).search(points, 1)
        assert ids.squeeze(1).tolist() == list(range(50))
        assert float(found.max()) < 1e-5


def test_bad_arguments_name_the_values():
    with pytest.raises(ValueError, match=r"metric is one of cosine, ip, l2, got 'dot'"):
        Flat("dot")
    with pytest.raises(ValueError, match="k=4 with 3 points"):
        Flat().fit(torch.randn(3, 2)).search(torch.randn(1, 2), 4)
