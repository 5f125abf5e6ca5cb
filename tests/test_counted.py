"""Entries that stand for several tokens each, read in one launch of which only the buffer's size is fixed."""

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel.cache.entries import Entries, Room
from diffaccel.kernel import KERNELS
from diffaccel.kernel.weighted import CHANNELS, can_in_place, channels_of, in_place, over_entries, spare

COUNTS = torch.tensor([1, 2, 3, 7, 240, 65_536])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_channels_add_up_to_the_logarithm_as_exactly_as_fp32(dtype):
    found = channels_of(COUNTS, 128**-0.5, dtype)
    assert found.shape == (len(COUNTS), CHANNELS)
    assert found.dtype == dtype
    exact = COUNTS.double().log() * 128**0.5
    assert ((found.double().sum(1) - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact).all()


def test_where_there_is_no_such_kernel_a_buffer_has_nothing_to_spare():
    assert not can_in_place(torch.device("cpu"), torch.bfloat16, 128)
    assert spare(128) == (CHANNELS, 0)
    assert spare(64) == (CHANNELS, CHANNELS)
    assert spare(256) is None


def held(n, places, heads, dim, device):
    """A buffer of which `n` entries count, 5 of each multiplicity, beginning with 1; and the multiplicities."""
    more = spare(dim)
    k, v = (torch.randn(1, places, heads, dim + extra, device=device, dtype=torch.bfloat16) for extra in more)
    counts = torch.arange(places, device=device) // 5 + 1
    k[..., dim:] = channels_of(counts, dim**-0.5, k.dtype)[None, :, None]
    room = Room(k, v, torch.tensor([n], device=device, dtype=torch.int32), dim**-0.5)
    sizes = tuple((min(5, n - start), start // 5 + 1) for start in range(0, n, 5))
    return Entries(k[:, :n, :, :dim], v[:, :n, :, :dim], multiplicity=sizes, room=room), counts


def close(part, q, room, counts, n):
    dim = q.shape[-1]
    exact = attention64(q, room.k[:, :n, :, :dim], room.v[:, :n, :, :dim], log_weight=counts[:n].double().log())
    assert_within(part.out, exact[0], torch.bfloat16, inputs=float(room.v.abs().max()))
    assert_within(part.lse, exact[1], torch.float32)


def needs_fa3(dim):
    if not can_in_place(torch.device("cuda"), torch.bfloat16, dim):
        pytest.skip("FlashAttention-3 does not run here")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("queries", "n", "places"), [(1, 1, 1), (300, 2500, 3000), (37, 130, 130), (5, 0, 64)])
def test_it_is_attention_with_every_entry_as_often_as_it_counts(queries, n, places, dim):
    needs_fa3(dim)
    q = torch.randn(1, 3, queries, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    entries, counts = held(n, places, 3, dim, "cuda")
    close(in_place(q, entries.room, dim**-0.5), q, entries.room, counts, n)


@pytest.mark.gpu
def test_a_graph_reads_what_there_is_at_its_replay():
    needs_fa3(128)
    q = torch.randn(1, 300, 2, 128, device="cuda", dtype=torch.bfloat16)
    entries, counts = held(20, 3000, 2, 128, "cuda")
    in_place(q, entries.room, 128**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = in_place(q, entries.room, 128**-0.5)
    for n in (20, 0, 2999, 1):
        entries.room.used.fill_(n)
        graph.replay()
        close(found, q, entries.room, counts, n)


@pytest.mark.gpu
def test_it_is_read_so_unless_a_kernel_was_asked_for_or_the_scale_is_another(monkeypatch):
    needs_fa3(128)
    calls = []
    monkeypatch.setattr("diffaccel.kernel.weighted.in_place", lambda *given: calls.append(given))
    q = torch.randn(1, 300, 2, 128, device="cuda", dtype=torch.bfloat16)
    entries, _ = held(20, 30, 2, 128, "cuda")
    alike = Entries(entries.k, entries.v, multiplicity=((20, 2),), room=entries.room)
    sdpa, scale = KERNELS["sdpa"], 128**-0.5
    over_entries(sdpa, q, entries, scale, None)
    over_entries(sdpa, q, alike, scale, None, asked=False)
    over_entries(sdpa, q, entries, 2 * scale, None, asked=False)
    assert not calls
    over_entries(sdpa, q, entries, scale, None, asked=False)
    assert len(calls) == 1
