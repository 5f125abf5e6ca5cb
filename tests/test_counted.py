"""Entries that stand for several tokens each, read in one launch of which only the buffer's size is fixed."""

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel.cache.entries import Entries, Room
from diffaccel.kernel import KERNELS
from diffaccel.kernel.merge import HAS_TRITON
from diffaccel.kernel.weighted import over_entries

if HAS_TRITON:
    from diffaccel.kernel import fused_counted
    from diffaccel.kernel.fused_block_sparse import Config

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
SCALE = 0.3
SHAPES = {  # queries, entries, places, heads, channels, rows
    "one of each": (1, 1, 1, 1, 64, 1),
    "a tile exactly": (32, 32, 32, 2, 64, 1),
    "odd": (37, 83, 101, 3, 48, 2),
    "a full buffer": (33, 70, 70, 2, 128, 1),
    "wide": (17, 19, 40, 1, 256, 1),
    "none": (5, 0, 24, 2, 64, 1),
}


def room(n, places, heads, dim, rows, device, dtype):
    """Entries as a cache holds them, one row after another and heads side by side; what lies behind is as large."""
    k, v = (torch.randn(rows, places, heads * dim, device=device, dtype=dtype).unflatten(2, (heads, dim)) for _ in "kv")
    counts = torch.arange(1, places + 1, device=device).div(5, rounding_mode="floor") + 1
    log_weight = torch.where(torch.arange(places, device=device) < n, counts.float().log(), -torch.inf)
    return Room(k, v, log_weight, torch.tensor([n], device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_with_every_entry_as_often_as_it_counts(shape, tma, dtype):
    """By Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("gpu: Triton's interpreter reads bfloat16 as integers")
    queries, n, places, heads, dim, rows = SHAPES[shape]
    q = torch.randn(rows, heads, queries, dim, device=device, dtype=dtype).transpose(1, 2)  # heads outside of tokens
    held = room(n, places, heads, dim, rows, device, dtype)
    found = fused_counted.attend(q, held, SCALE, Config(16, 32, 4, 2, tma=tma))
    out, lse = attention64(q, held.k[:, :n], held.v[:, :n], scale=SCALE, log_weight=held.log_weight[:n])
    assert_within(found[0], out, dtype, inputs=float(held.v.abs().max()))
    assert_within(found[1], lse, torch.float32)


def test_what_lies_behind_the_last_entry_is_not_read():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = room(20, 50, 2, 64, 1, device, torch.float16)
    q = torch.randn(1, 9, 2, 64, device=device, dtype=torch.float16)
    before = fused_counted.attend(q, held, SCALE)
    held.k[:, 20:], held.v[:, 20:] = 1e4, -1e4
    for one, other in zip(before, fused_counted.attend(q, held, SCALE), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("config", fused_counted.CANDIDATES if HAS_TRITON else [])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_configuration_at_the_size_of_a_model(config, dim):
    q = torch.randn(1, 300, 2, dim, device="cuda", dtype=torch.bfloat16)
    held = room(2500, 3000, 2, dim, 1, "cuda", torch.bfloat16)
    found = fused_counted.attend(q, held, dim**-0.5, config)
    out, lse = attention64(q, held.k[:, :2500], held.v[:, :2500], log_weight=held.log_weight[:2500])
    assert_within(found[0], out, torch.bfloat16, inputs=float(held.v.abs().max()))
    assert_within(found[1], lse, torch.float32)


@pytest.mark.gpu
def test_a_graph_reads_what_there_is_at_its_replay():
    held = room(20, 3000, 2, 128, 1, "cuda", torch.bfloat16)
    q = torch.randn(1, 300, 2, 128, device="cuda", dtype=torch.bfloat16)
    fused_counted.attend(q, held, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fused_counted.attend(q, held, SCALE)
    for n in (20, 0, 2999, 1):
        held.used.fill_(n)
        held.log_weight.copy_(torch.where(torch.arange(3000, device="cuda") < n, 1.0, -torch.inf))
        graph.replay()
        out, lse = attention64(q, held.k[:, :n], held.v[:, :n], scale=SCALE, log_weight=held.log_weight[:n])
        assert_within(found[0], out, torch.bfloat16, inputs=float(held.v.abs().max()))
        assert_within(found[1], lse, torch.float32)


@pytest.mark.gpu
def test_a_cache_is_read_so_unless_a_kernel_was_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(fused_counted, "attend", lambda q, *rest: calls.append(q) or (q, q[..., 0].float()))
    q = torch.randn(1, 300, 2, 128, device="cuda", dtype=torch.bfloat16)
    held = room(20, 30, 2, 128, 1, "cuda", torch.bfloat16)
    entries = Entries(held.k[:, :20], held.v[:, :20], multiplicity=((15, 1), (5, 2)), room=held)
    alike = Entries(held.k[:, :20], held.v[:, :20], multiplicity=((20, 2),), room=held)
    sdpa = KERNELS["sdpa"]
    over_entries(sdpa, q, entries, SCALE, None)
    over_entries(sdpa, q, alike, SCALE, None, asked=False)
    assert not calls
    over_entries(sdpa, q, entries, SCALE, None, asked=False)
    assert len(calls) == 1
