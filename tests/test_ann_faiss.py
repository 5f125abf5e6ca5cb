"""Faiss behind the same two verbs."""

import importlib
import importlib.util

import pytest
import torch

from diffaccel.ann import Faiss, Flat, recall

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss is not installed: pip install 'diffaccel[faiss]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")  # SWIG's


@needs_faiss
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize(("lead", "count", "asked", "k"), [((), 17, 5, 3), ((2, 3), 33, 7, 33), ((4,), 1, 2, 1)])
def test_its_flat_is_ours(metric, lead, count, asked, k):
    points, queries = torch.randn(*lead, count, 19), torch.randn(*lead, asked, 19)
    ours, theirs = (index.fit(points).search(queries, k) for index in (Flat(metric), Faiss("Flat", metric)))
    torch.testing.assert_close(theirs.distances, ours.distances, atol=1e-4, rtol=1e-4)
    assert theirs.ids.dtype == torch.int64
    assert (theirs.ids == ours.ids).float().mean() > 0.98


@needs_faiss
def test_parameters_are_those_of_the_search():
    points, queries = torch.randn(2, 1000, 16), torch.randn(2, 30, 16)
    truth, index = Flat("ip").fit(points), Faiss("IVF16,Flat", "ip").fit(points)
    narrow, wide = index, index.at(parameters="nprobe=16")
    assert recall(wide, queries, 10, truth) == 1
    assert recall(narrow, queries, 10, truth) < 0.9  # still, after the other was asked
    assert narrow.bytes > points.nbytes


@needs_faiss
def test_it_says_where_it_finds_too_few():
    points = torch.cat([torch.randn(40, 4) + 50, torch.randn(40, 4) - 50])
    ids, distances = Faiss("IVF2,Flat", "l2").fit(points).search(points[:1], 60)
    assert ids[0, :40].sort().values.tolist() == list(range(40))
    assert ids[0, 40:].eq(-1).all()
    assert distances[0, 40:].isinf().all()


@needs_faiss
def test_vectors_are_handed_over_without_a_copy(monkeypatch):
    from diffaccel.ann import faiss as module

    seen = []
    plain = module._handed_over
    monkeypatch.setattr(module, "_handed_over", lambda x: seen.append(plain(x)) or seen[-1])
    points = torch.randn(2, 20, 8)
    Faiss("Flat", "ip").fit(points)
    assert {array.ctypes.data for array in seen} == {points[0].data_ptr(), points[1].data_ptr()}


@needs_faiss
def test_what_it_does_not_take_names_the_string():
    points = torch.randn(50, 6)
    with pytest.raises(ValueError, match=r"faiss.index_factory takes for 6 channels.*got 'IVF,,Flat'"):
        Faiss("IVF,,Flat").fit(points)
    with pytest.raises(ValueError, match=r"'IVF64,Flat' does not take 50 points of 6 channels: .+"):
        Faiss().fit(points)
    with pytest.raises(ValueError, match=r"ParameterSpace knows for 'Flat'.*got 'nprobes=3'"):
        Faiss("Flat", parameters="nprobes=3").fit(points).search(points, 1)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"pip install 'diffaccel\[faiss\]'"):
        Faiss().fit(torch.randn(100, 4))
