"""The same invariants on a CUDA device, where other kernels and the grouped multiplicities run."""

import pytest
import torch
from matrix import MATRIX
from test_policies import generate, ids
from tiny import tiny_pipeline

from diffaccel import Accel, FlashBlock, PadCollapse, TempCache

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def pipe(request):
    return tiny_pipeline(head_dim=32).to("cuda", dtype=request.param)


def allowed(pipe):
    """Rounding of one rollout: measured below between two equal dense kernels, with room for a worse seed."""
    dense, _ = generate(pipe, Accel())
    other, _ = generate(pipe, Accel(kernel="split"))
    return dense, 8 * float((dense - other).abs().max()) + 1e-4


@pytest.mark.parametrize("row", MATRIX, ids=ids)
def test_exact_setting_is_dense_within_rounding(pipe, row):
    dense, room = allowed(pipe)
    found, run = generate(pipe, row.exact)
    assert float((found - dense).abs().max()) <= room
    assert all(slot.engaged for slot in run.report().slots.values())
    if row.bits:
        assert torch.equal(found, dense)


@pytest.mark.parametrize("row", [row for row in MATRIX if row.lossy], ids=lambda row: row.name)
def test_lossy_setting_is_finite_and_counted(pipe, row):
    found, run = generate(pipe, row.lossy)
    assert torch.isfinite(found).all()
    report = run.report()
    assert all(slot.engaged and slot.keys_read < slot.keys_total for slot in report.slots.values())
    assert report.peak_memory_bytes > 0
    assert report.kernel in ("fa3", "sdpa")


def test_grouped_multiplicities_equal_a_written_out_bias(pipe):
    """The lossy cache read group by group on the GPU, against the reference kernel's one biased pass."""
    accel = Accel(cache=TempCache(threshold=0.3))
    fast, _ = generate(pipe, accel, num_frames=33)
    slow, _ = generate(pipe, Accel(cache=accel.cache, kernel="reference"), num_frames=33)
    _, room = allowed(pipe)
    assert float((fast - slow).abs().max()) <= room


def test_one_compiled_graph_for_all_layers():
    pipe = tiny_pipeline(layers=6, head_dim=32).to("cuda", dtype=torch.bfloat16)
    accel = Accel(cache=TempCache(threshold=0.3), reuse=FlashBlock(refresh=2), prompt=PadCollapse())
    expected, _ = generate(pipe, accel)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    found, _ = generate(pipe, accel)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert float((found - expected).abs().mean()) < 0.1 * float(expected.abs().mean())


def test_attention_is_timed_only_when_asked():
    pipe = tiny_pipeline(head_dim=32).to("cuda", dtype=torch.bfloat16)
    with Accel()(pipe) as run:
        pipe("a red circle", height=32, width=48, num_frames=9, num_inference_steps=2, output_type="latent")
    assert run.report().seconds["attention"] is None
    with Accel()(pipe, timing=True) as run:
        pipe("a red circle", height=32, width=48, num_frames=9, num_inference_steps=2, output_type="latent")
    seconds = run.report().seconds
    assert 0 < seconds["attention"] < seconds["denoise"]
