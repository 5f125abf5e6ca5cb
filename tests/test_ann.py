"""Every index against exact search, and exact search against distances written out."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffaccel import ann
from diffaccel.ann import IVF, LSH, Flat, ProductQuantized, Quantized, frontier, recall

EXHAUSTIVE = {
    "Flat": lambda metric, count: Flat(metric),
    "LSH": lambda metric, count: LSH(metric, n_tables=3, n_bits=5, candidates=3 * count),
    "LSH, probes": lambda metric, count: LSH(metric, n_tables=2, n_bits=3, candidates=8 * count, probes=4),
    "IVF": lambda metric, count: IVF(metric, lists=min(5, count), probes=min(5, count)),
}
INDEXES = {
    "Flat": Flat("ip"),
    "LSH": LSH("ip", candidates=64, transform="centre+scale+queries", probes=2),
    "IVF": IVF("ip", lists=8, probes=2),
    "Quantized, 8": Quantized("ip"),
    "Quantized, 4": Quantized("ip", bits=4),
    "ProductQuantized": ProductQuantized("ip", parts=4, bits=5),
}
ODD = [((), 17, 5, 3), ((2, 3), 33, 7, 33), ((4,), 1, 2, 1), ((1,), 129, 1, 128), ((3,), 64, 0, 2)]


def distances(metric, queries, points):
    queries, points = queries.double(), points.double()
    if metric == "l2":
        return (queries[..., :, None, :] - points[..., None, :, :]).square().sum(-1)
    if metric == "cosine":
        return 1 - torch.cosine_similarity(queries[..., :, None, :], points[..., None, :, :], dim=-1)
    return -(queries[..., :, None, :] * points[..., None, :, :]).sum(-1)


def clustered(lead=(2,), count=2000, asked=100, dims=32, clusters=50, apart=3.0):
    """Points around centres, and queries among them."""
    centres = apart * torch.randn(*lead, clusters, dims)
    which = torch.randint(clusters, (*lead, count + asked))[..., None].expand(*lead, count + asked, dims)
    vectors = centres.gather(-2, which) + torch.randn(*lead, count + asked, dims)
    return vectors[..., :count, :], vectors[..., count:, :]


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize(("lead", "count", "asked", "k"), ODD)
@pytest.mark.parametrize("name", EXHAUSTIVE)
def test_read_exhaustively_an_index_is_exact(name, metric, lead, count, asked, k):
    points, queries = torch.randn(*lead, count, 19), torch.randn(*lead, asked, 19)
    ids, found = EXHAUSTIVE[name](metric, count).fit(points).search(queries, k)
    exact = distances(metric, queries, points)
    expected = exact.topk(k, largest=False).values
    assert ids.shape == found.shape == (*lead, asked, k)
    assert (ids.dtype, found.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exact.gather(-1, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", INDEXES)
def test_a_problem_alone_gives_what_it_gives_in_a_batch(name):
    points, queries = torch.randn(2, 3, 150, 16), torch.randn(2, 3, 40, 16)
    together = INDEXES[name].fit(points, queries).search(queries, 7)
    for batch in range(2):
        for head in range(3):
            alone = INDEXES[name].fit(points[batch, head], queries[batch, head]).search(queries[batch, head], 7)
            torch.testing.assert_close(together.distances[batch, head], alone.distances, atol=2e-5, rtol=2e-5)
            assert (together.ids[batch, head] == alone.ids).float().mean() > 0.98  # ties may fall otherwise


@pytest.mark.parametrize("name", INDEXES)
def test_queries_in_chunks_give_what_they_give_at_once(name, monkeypatch):
    points, queries = torch.randn(2, 150, 16), torch.randn(2, 40, 16)
    index = INDEXES[name].fit(points, queries)
    at_once = index.search(queries, 7)
    monkeypatch.setattr("diffaccel.ann.index._AT_ONCE_ON_CPU", 7000)
    chunked = index.search(queries, 7)
    torch.testing.assert_close(chunked.distances, at_once.distances)
    assert (chunked.ids == at_once.ids).float().mean() > 0.98


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype(name, dtype):
    points, queries = torch.randn(60, 16).to(dtype), torch.randn(5, 16).to(dtype)
    found = INDEXES[name].fit(points, queries).search(queries, 60)
    assert found.distances.dtype == torch.float32
    assert found.ids.sort(-1).values.tolist() == [list(range(60))] * 5  # never the same point twice


@pytest.mark.parametrize(
    ("index", "least"),
    [
        (LSH("l2"), 0.75),
        (LSH("cosine"), 0.75),
        (LSH("ip"), 0.75),
        (IVF("l2"), 0.95),
        (IVF("l2", sample=500), 0.94),
        (IVF("cosine"), 0.95),
        (IVF("ip"), 0.9),
        (Quantized("ip"), 0.97),
        (Quantized("l2", bits=4), 0.7),
        (ProductQuantized("l2", parts=16), 0.65),
    ],
)
def test_recall_of_the_defaults_on_clusters(index, least):
    points, queries = clustered()
    assert recall(index.fit(points), queries, 10, Flat(index.metric).fit(points)) > least


@pytest.mark.parametrize(
    ("index", "knob", "values"),
    [
        (LSH("ip", n_tables=4), "candidates", (128, 512, 2048, 8000)),
        (IVF("ip"), "probes", (1, 4, 16, 64)),
    ],
)
def test_query_knobs_trade_recall_for_time_without_building_again(index, knob, values):
    points, queries = torch.randn(2000, 16), torch.randn(50, 16)
    truth, fitted = Flat("ip").fit(points), index.fit(points)
    found = [recall(fitted.at(**{knob: value}), queries, 10, truth) for value in values]
    assert found == sorted(found)
    assert found[0] < 0.9
    assert found[-1] == 1
    assert fitted.at(**{knob: values[0]})._fitted.state is fitted._fitted.state


def test_fit_leaves_the_index_it_was_called_on_alone():
    index = LSH()
    first, second = torch.randn(40, 8), torch.randn(50, 8)
    a, b = index.fit(first), index.fit(second)
    assert a.search(first, 1).ids.squeeze(1).tolist() == list(range(40))
    assert b.search(second, 1).ids.squeeze(1).tolist() == list(range(50))
    with pytest.raises(ValueError, match="not fitted: search what fit returns"):
        index.search(first, 1)


def test_recall_counts_ties_and_misses():
    points = torch.tensor([[0.0], [1.0], [1.0], [5.0]])
    truth = Flat("l2").fit(points)

    class Fixed:
        metric = "l2"

        def __init__(self, ids):
            self.ids = torch.tensor([ids])

        def search(self, queries, k):
            return self

    query = torch.tensor([[0.0]])
    assert recall(Fixed([0, 1]), query, 2, truth) == 1
    assert recall(Fixed([0, 2]), query, 2, truth) == 1  # as near as point 1
    assert recall(Fixed([0, 3]), query, 2, truth) == 0.5
    assert recall(Fixed([0, -1]), query, 2, truth) == 0.5  # nothing found
    with pytest.raises(ValueError, match="same metric, got 'l2' and 'ip'"):
        recall(Fixed([0, 1]), query, 2, Flat("ip").fit(points))


def test_a_frontier_has_flat_on_it():
    points, queries = clustered(count=300, asked=20)
    rows = frontier({"coarse": IVF("l2", lists=16, probes=1), "bytes": Quantized("l2")}, points, queries, 5)
    assert [row.name for row in rows] == ["Flat", "coarse", "bytes"]
    assert rows[0].recall == 1
    assert rows[1].knobs == {"metric": "l2", "lists": 16, "iterations": 10, "seed": 0, "probes": 1, "sample": None}
    assert all(0 < row.recall <= 1 and row.build_seconds > 0 and row.search_seconds > 0 for row in rows)
    assert rows[0].bytes == points.numel() * 4
    assert rows[2].bytes == points.numel() + points.shape[0] * points.shape[1] * 4  # a byte a channel, and a scale
    with pytest.raises(ValueError, match="one metric, got ip, l2"):
        frontier({"a": Flat("ip"), "b": Flat("l2")}, points, queries, 5)


def test_quantised_distances_are_those_of_the_codes():
    points, queries = torch.randn(50, 7), torch.randn(4, 7)
    for bits, steps in ((8, 127), (4, 7)):
        step = points.abs().amax(-1, keepdim=True) / steps
        opened = (points / step).round() * step
        ids, found = Quantized("l2", bits=bits).fit(points).search(queries, 50)
        torch.testing.assert_close(
            found.double(), distances("l2", queries, opened).gather(-1, ids), atol=1e-4, rtol=1e-4
        )


def test_product_quantisation_is_exact_where_words_suffice():
    points = torch.randn(30, 8)  # no more points than words: each is a word of its own
    ids, found = ProductQuantized("l2", parts=2).fit(points).search(points, 1)
    assert ids.squeeze(1).tolist() == list(range(30))
    assert float(found.max()) < 1e-5


def test_four_bits_are_half_the_bytes_of_eight():
    points = torch.randn(100, 65)
    eight, four = (Quantized(bits=bits).fit(points).bytes - 400 for bits in (8, 4))
    assert (eight, four) == (6500, 3300)


def test_a_point_is_its_own_nearest():
    points = torch.randn(50, 8)
    for metric in ("cosine", "l2"):
        for index in (Flat(metric), LSH(metric), IVF(metric, lists=4)):
            ids, found = index.fit(points).search(points, 1)
            assert ids.squeeze(1).tolist() == list(range(50))
            assert float(found.max()) < 1e-5


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda: Flat("dot"), r"metric is one of cosine, ip, l2, got 'dot'"),
        (lambda: LSH(n_bits=17), "n_bits is between 1 and 16, got n_bits=17"),
        (lambda: LSH(n_tables=0), "n_tables is a whole number >= 1, got n_tables=0"),
        (lambda: LSH(candidates=0), "candidates=0"),
        (lambda: LSH(n_bits=4, probes=6), r"between 1 and n_bits \+ 1.*got probes=6 with n_bits=4"),
        (lambda: LSH(transform="center"), "transform is none or steps of centre, scale, points, queries.*'center'"),
        (lambda: LSH("l2", transform="scale"), "keeps inner products and no l2 distances"),
        (lambda: LSH(transform="points+centre"), r"centre comes first.*'points\+centre'"),
        (lambda: IVF(lists=4, probes=5), "probes is between 1 and lists, got probes=5 with lists=4"),
        (lambda: IVF(lists=4, sample=3), "sample.*3"),
        (lambda: Quantized(bits=3), "bits is 8 or 4, got bits=3"),
        (lambda: ProductQuantized(bits=9), "bits is between 1 and 8"),
    ],
)
def test_bad_knobs_name_the_values(index, message):
    with pytest.raises(ValueError, match=message):
        index()


@pytest.mark.parametrize("index", [*EXHAUSTIVE.values(), lambda metric, count: Quantized(metric)])
def test_bad_vectors_name_the_values(index):
    points = torch.randn(2, 6, 4)
    fitted = index("ip", 6).fit(points)
    for poison in (torch.nan, torch.inf):
        bad = points.clone()
        bad[1, 3, 2] = poison
        with pytest.raises(ValueError, match="points must be finite"):
            index("ip", 6).fit(bad)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k={k} with 6 points"):
            fitted.search(points, k)
    with pytest.raises(ValueError, match=r"dimensions \(2,\) and the 4 channels.*got queries \(2, 6, 3\)"):
        fitted.search(points[..., :3], 1)
    with pytest.raises(ValueError, match=r"got queries \(6, 4\)"):
        fitted.search(points[0], 1)
    with pytest.raises(ValueError, match=r"float dtype, got \(2, 6, 4\) of torch.int64"):
        fitted.search(points.long(), 1)
    with pytest.raises(ValueError, match=r"at least one point, got points \(2, 0, 4\)"):
        index("ip", 6).fit(points[:, :0])


def test_what_does_not_fit_the_points_names_the_values():
    points = torch.randn(6, 4)
    with pytest.raises(ValueError, match="got lists=7 with 6 points"):
        IVF(lists=7).fit(points)
    with pytest.raises(ValueError, match="parts=3 with 4 channels"):
        ProductQuantized(parts=3).fit(points)
    with pytest.raises(ValueError, match=r"transform='centre\+queries' looks at queries: fit\(points, queries="):
        LSH(transform="centre+queries").fit(points)
    with pytest.raises(ValueError, match="for IVF is probes; got lists"):
        IVF(lists=2, probes=1).fit(points).at(lists=3)
    with pytest.raises(ValueError, match="for Flat is nothing; got metric"):
        Flat().fit(points).at(metric="ip")


def test_it_imports_nothing_of_diffaccel():
    for path in Path(ann.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, path
                assert not (node.module or "").startswith("diffaccel"), path


def test_faiss_is_imported_only_when_used():
    code = "import sys, diffaccel.ann; print('faiss' in sys.modules)"
    shown = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
