"""Buffers of merged entries: the fused kernels compute what is written out in PyTorch."""

import pytest
import torch
from oracle import assert_within

from diffaccel.cache import store as stores
from diffaccel.cache.store import Joined, Plain, Quantised, apart_written_out, pool_written_out, row_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(vectors, width, device="cpu", dtype=torch.float32):
    """One row of vectors, (1, vectors, 1, width)."""
    x = torch.randn(1, vectors, 1, width).to(device, dtype)
    store = Plain(x, vectors)
    store.write(torch.arange(vectors, device=device), x[0, :, 0])
    return store, x[0, :, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vectors", "pairs", "width"), [(1, 1, 1), (7, 13, 24), (50, 9, 513), (9, 130, 1536)])
def test_distances_of_pairs(device, dtype, vectors, pairs, width):
    from diffaccel.kernel.fused_rows import squared_distances

    store, x = plain(vectors, width, device, dtype)
    first, second = (torch.randint(vectors, (pairs,), device=device) for _ in range(2))
    exact = (x[first].double() - x[second].double()).square().sum(1)
    for found in (squared_distances(x, first, second, width), apart_written_out(store, first, second)):
        assert_within(found, exact, torch.float32, inputs=4)


@pytest.mark.parametrize("device", DEVICES)
def test_spare_channels_belong_to_no_vector(device):
    from diffaccel.kernel.fused_rows import squared_distances

    heads, dim, spare = 3, 5, 2
    x = torch.randn(1, 9, heads, dim, device=device)
    store, usual = Plain(x, 9, spare), Plain(x, 9)
    for held in (store, usual):
        held.write(torch.arange(9, device=device), x[0].flatten(1))
    store.wide[..., dim:] = 1000.0 * torch.arange(9, device=device)[None, :, None, None]
    where, first, second = torch.tensor([8, 0, 3, 3], device=device), *torch.randint(9, (2, 20), device=device)
    assert (store.width, store.capacity) == (usual.width, usual.capacity)
    assert torch.equal(store.read(where), usual.read(where))
    assert torch.equal(store.opened([store.parts[0][0, :4]], 0), x[:, :4])
    for found in (store.apart(first, second), squared_distances(store.parts[0][0], first, second, dim, spare)):
        torch.testing.assert_close(found, usual.apart(first, second))
    others = joined(1, 8, 5, device)
    store.pool(others)
    usual.pool(others)
    assert torch.equal(store.read(torch.arange(9, device=device)), usual.read(torch.arange(9, device=device)))


def joined(rows, capacity, most, device):
    """Some entries of each row join others, several of them the same one; where `most` is more, nothing joins nothing
    in the last place."""
    parts = []
    for row in range(rows):
        places = torch.randperm(capacity)
        heads, gone = places[: capacity // 3 + 1], places[capacity // 3 + 1 :][:most]
        stays = heads[torch.randint(len(heads), (len(gone),)).sort().values]
        leader = (stays[:, None] == stays).int().argmax(dim=1)
        weight, spare = torch.randint(1, 9, (len(gone),)), most - len(gone)
        before = torch.randint(1, 9, (capacity,))[stays]
        after = before + torch.stack([weight[stays == place].sum() for place in stays])
        last, none = torch.full((spare,), capacity), torch.zeros(spare, dtype=torch.int64)
        leader = torch.cat([leader, torch.arange(len(gone), most)])
        gone, stays = (torch.cat([index, last]) + row * (capacity + 1) for index in (gone, stays))
        numbers = [torch.cat(both).int() for both in ((weight, none), (before, none), (after, none + 1))]
        parts.append((gone, stays, leader, *numbers))
    return Joined(*(torch.stack(column).to(device) for column in zip(*parts, strict=True)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "capacity", "most", "width"), [(1, 2, 1, 1), (3, 17, 11, 24), (2, 9, 4, 1100)])
def test_entries_that_others_join_become_means(monkeypatch, device, dtype, rows, capacity, most, width):
    from diffaccel.kernel.fused_rows import pool

    torch.manual_seed(0)
    _, x = plain(rows * (capacity + 1), width, device, dtype)
    work = joined(rows, capacity, most, device)
    exact, kept = x.double().clone(), torch.arange(len(x), device=device) % (capacity + 1) != capacity
    for row in range(rows):
        for lead in work.leader[row].unique():
            here = work.leader[row] == lead
            where = work.stays[row][here][0]
            total = exact[where] * work.before[row][here][0]
            total = total + (x[work.gone[row][here]].double() * work.weight[row][here][:, None]).sum(0)
            exact[where] = total / work.after[row][here][0]
    fused = x.clone()
    pool(fused, *work)
    for at_once in (2**26, 1):
        monkeypatch.setattr(stores, "_AT_ONCE", at_once)
        again = Plain(x[None, :, None], len(x))
        again.write(torch.arange(len(x), device=device), x)
        pool_written_out(again, work)
        assert_within(again.read(torch.arange(len(x), device=device))[kept], exact[kept], dtype, inputs=4)
    assert_within(fused[kept], exact[kept], dtype, inputs=4)
    assert torch.equal(fused[~kept], x[~kept])  # slots left over cost nothing


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (3, 24), (2, 128)])
def test_quantised_entries_that_others_join_become_means(device, bits, channels, heads, dim):
    from diffaccel.kernel.fused_rows import opened_pool

    torch.manual_seed(0)
    rows, capacity, most = 2, 9, 5
    work, places = joined(rows, capacity, most, device), rows * (capacity + 1)
    x = torch.randn(rows, capacity + 1, heads, dim, device=device)
    stores = []
    for _ in range(2):
        stores.append(Quantised(x, capacity + 1, bits, channels))
        stores[-1].write(torch.arange(places, device=device), x.flatten(0, 1).flatten(1))
    written, fused = stores
    pool_written_out(written, work)
    opened_pool(fused._codes, fused._range, fused._size, bits, *work)
    kept = (torch.arange(places, device=device) % (capacity + 1) != capacity).nonzero().squeeze(1)
    steps = written._range.flatten(0, 1)[kept][..., 1:].float()
    if channels:
        steps = steps * written._size[kept // (capacity + 1), 0]
    apart = (fused.read(kept) - written.read(kept)).abs().unflatten(1, (heads, dim))
    # what lies halfway between two codes may be rounded to either, and a range may differ by rounding of the mean
    assert (apart <= 1.01 * steps + 4e-3).all()
    assert (apart > 0.01 * steps + 4e-3).float().mean() < 0.01
    before = Quantised(x, capacity + 1, bits, channels)
    before.write(torch.arange(places, device=device), x.flatten(0, 1).flatten(1))
    assert (fused.read(kept) - before.read(kept)).abs().max() > 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (3, 24), (12, 128)])
def test_quantised_vectors_are_opened_alike(device, bits, channels, heads, dim):
    from diffaccel.kernel.fused_rows import opened, opened_distances

    rows, capacity = 2, 7
    x = torch.randn(rows, capacity, heads, dim, device=device)
    store = Quantised(x, capacity, bits, channels)
    every = torch.arange(rows * capacity, device=device)
    store.write(every, x.flatten(0, 1).flatten(1))
    where, other = (torch.randint(rows * capacity, (11,), device=device) for _ in range(2))
    held = store._codes, store._range, store._size
    size = held[2][where // capacity, 0]
    exact = store._open(held[0].flatten(0, 1)[where], held[1].flatten(0, 1)[where], size).flatten(1)
    assert_within(opened(*held, where, bits, torch.float32), exact, torch.float32, inputs=8)
    assert_within(opened(*held, where, bits, torch.bfloat16), exact, torch.bfloat16, inputs=8)
    assert_within(store.read(where), exact, torch.float32, inputs=8)
    distances = (store.read(where).double() - store.read(other).double()).square().sum(1)
    assert_within(opened_distances(*held, where, other, bits), distances, torch.float32, inputs=8)
    first = row_of(store, 1, 3)
    assert_within(first[0].flatten(1), store.read(every[capacity : capacity + 3]), torch.float32, inputs=8)
