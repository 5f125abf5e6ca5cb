"""The meter counts what implementations written out here do, operation by operation and byte by byte."""

import pytest
import torch
from tiny import tiny_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from diffaccel import Accel, KnobError, SinkRecent
from diffaccel.kernel import KERNELS
from diffaccel.meter import (
    MACHINES,
    Cost,
    Machine,
    attention,
    attention_of,
    busy,
    kinetics,
    measure,
    passes,
    progressive,
    reading,
    spatten,
    tiled,
    traffic,
)
from diffaccel.window.tiles import TileCount

SLOW = Machine("slow", flops=1000.0, memory=10.0, link=1.0)


def test_operations_are_those_that_torch_counts():
    q, k = torch.randn(1, 3, 5, 16), torch.randn(1, 3, 7, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        scaled_dot_product_attention(q, k, k)
    assert attention(5, 7, 3, 16).flops == counter.get_total_flops()


def test_bytes_are_those_of_the_tensors():
    q, k = torch.zeros(5, 6, 16, dtype=torch.bfloat16), torch.zeros(7, 2, 16, dtype=torch.bfloat16)
    assert attention(5, 7, 6, 16, key_heads=2).memory == 2 * (q.nbytes + k.nbytes)
    assert attention(5, 7, 6, 16, key_heads=2, itemsize=4).memory == 4 * (q.nbytes + k.nbytes)
    codes, opened = torch.zeros(7, 2, 16 // 2, dtype=torch.uint8), torch.zeros(7, 2, 16, dtype=torch.bfloat16)
    sizes = torch.zeros(7, 2, 2, dtype=torch.float16)
    assert reading(7, 2, 16, bits=4).memory == 2 * (codes.nbytes + sizes.nbytes + opened.nbytes)


def test_costs_add_and_multiply():
    cost = 2 * Cost(10, 4, 1) + Cost(1, 1, 0)
    assert cost == Cost(21, 9, 2)
    assert cost.intensity == 21 / 9
    assert Cost(1).intensity == float("inf")
    assert cost.eflops(SLOW) == 21 + 100 * 9 + 1000 * 2
    assert cost.seconds(SLOW) == 2.0  # the link
    assert Cost(21, 9).seconds(SLOW) == 0.9
    assert Cost(21000, 9).seconds(SLOW) == 21
    assert Machine("no link", 1000, 10).link_intensity == 0


class Counted:
    """Tensors whose loads are counted in bytes."""

    def __init__(self):
        self.loaded = 0

    def load(self, tensor):
        self.loaded += tensor.nbytes
        return tensor


def written_out(way, q, k, v, group):
    """Attention of one head by passes over the keys, (queries, D), and the bytes it loaded and stored."""
    memory, out = Counted(), torch.empty_like(q)
    tiles = list(zip(k.split(4), v.split(4), strict=True))
    for at in range(0, len(q), group):
        some = memory.load(q[at : at + group])
        top, total, mean = (torch.zeros(len(some), 1) for _ in range(3))
        top -= torch.inf
        if way == "three":
            for key, _ in tiles:
                top = torch.maximum(top, (some @ memory.load(key).T).amax(1, keepdim=True))
            for key, _ in tiles:
                total += torch.exp(some @ memory.load(key).T - top).sum(1, keepdim=True)
            for key, value in tiles:
                mean = mean + torch.exp(some @ memory.load(key).T - top) @ memory.load(value)
        elif way == "two":
            for key, _ in tiles:
                scores = some @ memory.load(key).T
                new = torch.maximum(top, scores.amax(1, keepdim=True))
                total, top = total * torch.exp(top - new) + torch.exp(scores - new).sum(1, keepdim=True), new
            for key, value in tiles:
                mean = mean + torch.exp(some @ memory.load(key).T - top) @ memory.load(value)
        else:
            for key, value in tiles:
                scores = some @ memory.load(key).T
                new = torch.maximum(top, scores.amax(1, keepdim=True))
                weight = torch.exp(scores - new)
                mean = mean * torch.exp(top - new) + weight @ memory.load(value)
                total, top = total * torch.exp(top - new) + weight.sum(1, keepdim=True), new
        out[at : at + group] = memory.load(mean / total)
    return out, memory.loaded


@pytest.mark.parametrize("way", ["three", "two", "one"])
@pytest.mark.parametrize("queries", [8, 24])
def test_traffic_is_that_of_the_passes(way, queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 16) for n in (queries, 20, 20))
    out, loaded = written_out(way, q, k, v, 8)
    torch.testing.assert_close(out, torch.softmax(q @ k.T, 1) @ v)
    assert traffic(way, queries, 20, 16, itemsize=4, sram=2 * 8 * 16 * 4) == loaded


def test_what_goes_over_the_keys_again():
    assert passes("one") < passes("column sums") == passes("two") < passes("three")
    assert passes("probes", probes=32, queries=4680) == 1 + 32 / 4680
    assert passes("progressive", flat=0.25) == 1.25
    assert progressive(4, 4, 0.25) == 5
    with pytest.raises(KnobError, match="way"):
        passes("twelve")


def test_spatten_fetches_what_its_cascade_left():
    tokens, heads = [100, 60, 60, 20], [8, 8, 6, 2]
    fetched = 0
    for n, h in zip(tokens, heads, strict=True):
        keys = torch.zeros(h, n, 64, dtype=torch.float16)
        fetched += keys.nbytes + keys[:, : n // 2].nbytes  # half of the values
    assert spatten(tokens, heads, 64, values=0.5) == fetched
    assert spatten(tokens, heads, 64, bits=8, values=0.5) == fetched / 2


@pytest.mark.parametrize(("tokens", "heads"), [([1, 2], [1, 1]), ([2, 1], [1, 2]), ([2], [1, 1])])
def test_a_cascade_brings_nothing_back(tokens, heads):
    with pytest.raises(KnobError, match="what is pruned stays so"):
        spatten(tokens, heads, 64)


def test_tiles_are_worked_on_whole():
    assert tiled(TileCount(100, 30, 20), (64, 128), 12, 128) == 30 * attention(64, 128, 12, 128).flops


def test_kinetics_is_the_papers_sum():
    p, n, r, d, read, written, i = 1e9, 8, 4, 2048, 1000, 500, 562.5
    cost = kinetics(p, read, written, d, ratio=r, trials=n)
    paper = 2 * n * p * written + 2 * r * n * read * d * written + r * n * d * written**2
    paper += 2 * i * read * d * written + i * n * d * written**2
    assert cost.eflops(Machine("B200", 562.5, 1.0)) == pytest.approx(paper)


def test_a_run_is_counted_as_its_kernel_was_called(monkeypatch):
    """Every call of the kernel is counted by its shapes, and the report gives the same sum."""
    pairs = []
    exact = KERNELS["reference"].partial

    def partial(q, k, v, **options):
        if q.shape[1] == 18 and k.shape[1] % 18 == 0:  # blocks of video; the prompt has 12 or 16 tokens
            pairs.append(q.shape[1] * k.shape[1])
        return exact(q, k, v, **options)

    monkeypatch.setattr(KERNELS["reference"], "partial", partial)
    pipe = tiny_pipeline()
    with Accel(cache=SinkRecent(3, 0), kernel="reference")(pipe) as run:
        size = {"height": 32, "width": 48, "num_frames": 33}  # three blocks of 18 tokens
        pipe("a cat", **size, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    report = run.report()
    cost = attention_of(report, queries=18, heads=2, dim=24, itemsize=4)
    assert sum(pairs) > 0
    assert cost.flops == 4 * 2 * 24 * sum(pairs)


def test_a_machine_is_measured():
    machine = measure(torch.device("cpu"))
    assert 1e8 < machine.memory < 1e13
    assert 1e8 < machine.flops < 1e15
    assert machine.link == 0
    assert "float32" in machine.name
    assert 180 < MACHINES["h200"].intensity < 195


@pytest.mark.parametrize(
    ("queries", "heads", "own", "share"),
    [(1, 12, 12, 12 / 132), (32, 32, 8, 8 / 132), (33, 32, 8, 16 / 132), (1560, 12, 12, 156 / 264), (128, 132, 132, 1)],
)
def test_few_queries_leave_processors_idle(queries, heads, own, share):
    machine = Machine("a machine", 100.0, 10.0, processors=132)
    assert busy(queries, heads, machine, key_heads=own) == pytest.approx(share)
    work, bytes_read = Cost(flops=200), Cost(memory=30)
    assert work.seconds(machine, share) == pytest.approx(2 / share)
    assert bytes_read.seconds(machine, share) == pytest.approx(3 / min(1, 2 * share))
