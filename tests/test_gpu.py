"""The same invariants on a CUDA device, where other kernels and the grouped multiplicities run."""

import pytest
import torch
from families import FAMILIES
from matrix import MATRIX
from oracle import assert_within, attention64
from profiles import fitted
from test_families import SELECTION, takes
from test_flashblock import GRID, go
from test_flashblock_heads import policy
from test_policies import generate, ids
from tiny import tiny_pipeline

from diffaccel import Accel, AnnSA, FlashBlock, InwardWindow, PadCollapse, Run, SinkRecent, TempCache
from diffaccel.cache import Entries
from diffaccel.kernel import EXACT, KERNELS
from diffaccel.kernel.weighted import grouped, launches, over_entries
from diffaccel.mixers import MIXERS

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
    found, run = generate(pipe, fitted(row.lossy, pipe), num_inference_steps=row.steps)
    assert torch.isfinite(found).all()
    report = run.report()
    for slot in report.slots.values():
        assert slot.engaged
        assert slot.keys_read < slot.keys_total + row.reads_all
    assert report.peak_memory_bytes > 0
    assert set(report.kernel.split(";")[0].split(", ")) <= {kernel.name for kernel in EXACT}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_its_stock_model_there_and_lossy_settings_engage(family):
    pipe = family.on("cuda")
    stock = family.generate(pipe, 2)
    with Accel(kernel="reference")(pipe):
        room = 8 * float((family.generate(pipe, 2) - stock).abs().max()) + 1e-3  # what another kernel's rounding is
    for accel in (Accel(), Accel(selection=AnnSA(density=1)), Accel(cache=TempCache(threshold=None))):
        if takes(accel, pipe):
            with accel(pipe):
                assert float((family.generate(pipe, 2) - stock).abs().max()) <= room
    assert torch.equal(family.generate(pipe, 2), stock)
    for accel in (
        Accel(selection=SELECTION),
        Accel(window=InwardWindow((1, 1))),
        Accel(cache=SinkRecent(recent_frames=3)),
    ):
        if takes(accel, pipe):
            with accel(pipe) as run:
                assert torch.isfinite(family.generate(pipe)).all()
            [counts] = run.report().slots.values()
            assert counts.engaged
            assert counts.keys_read < counts.keys_total


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.__name__)
def test_a_mixer_computes_there_what_it_computes_here(mixer):
    model = tiny_pipeline(head_dim=32).transformer
    layer, x = model.blocks[0].attn1, torch.randn(1, 96, model.blocks[0].attn1.to_q.in_features)
    made = mixer(layer).eval()
    with torch.no_grad():
        here, _ = made(x)
        there, _ = made.to("cuda")(x.cuda())
    torch.testing.assert_close(there.cpu(), here, atol=2e-3, rtol=2e-3)


def test_grouped_multiplicities_equal_a_written_out_bias(pipe):
    """The lossy cache read group by group on the GPU, against the reference kernel's one biased pass."""
    accel = Accel(cache=TempCache(threshold=0.3))
    fast, _ = generate(pipe, accel, num_frames=33)
    slow, _ = generate(pipe, Accel(cache=accel.cache, kernel="reference"), num_frames=33)
    _, room = allowed(pipe)
    assert float((fast - slow).abs().max()) <= room


@pytest.mark.parametrize("knobs", [{}, {"bits": 8}, {"heads": "per_head"}], ids=str)
def test_entries_come_from_page_locked_memory_as_they_went(pipe, knobs):
    """Copies run beside the kernels: a read that does not wait for its own would see another layer's, or nothing."""
    found = [
        generate(pipe, Accel(cache=TempCache(0.3, hold=hold, **knobs)), num_frames=49) for hold in ("device", "host")
    ]
    if pipe.dtype == torch.float32 or knobs.get("bits"):
        assert torch.equal(found[0][0], found[1][0])
    else:  # on the device they are read in one launch, where they lie
        assert float((found[0][0] - found[1][0]).abs().max()) <= allowed(pipe)[1]
    device, host = (run.report().cache for _, run in found)
    assert "host_bytes" not in device
    assert host["host_bytes"] > 0


MANY = {
    "all small": tuple((1 + 7 * (m % 5), m) for m in range(1, 41)),
    "a large one between": tuple((900 if m in (1, 20) else 1 + 7 * (m % 5), m) for m in range(1, 41)),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sdpa", "split", "fa3", "fa4"])
def test_forty_multiplicities_equal_the_reference_with_a_bias(name, dtype, dim, kind):
    kernel, device = KERNELS[name], torch.device("cuda")
    reason = kernel.unusable(device, dtype, dim)
    if reason:
        pytest.skip(f"{name}: {reason}")
    sizes = MANY[kind]
    count = sum(n for n, _ in sizes)
    q, k, v = (torch.randn(2, n, 3, dim, device=device).to(dtype) for n in (129, count, count))
    entries, scale = Entries(k, v, multiplicity=sizes), dim**-0.5
    alone, together = launches(sizes)
    assert len(alone) == (0 if kind == "all small" else 2)
    assert len(alone) + len(together) == 40
    found = over_entries(kernel, q, entries, scale, None)
    assert found.out.dtype == dtype
    exact = attention64(q, k, v, log_weight=entries.log_weight())
    written_out = KERNELS["reference"].partial(q, k, v, scale=scale, log_weight=entries.log_weight())
    for out, lse in (exact, written_out):
        # each launch rounds its result to the dtype, and the merge once more
        assert_within(found.out, out, dtype, inputs=2 * float(v.abs().max()))
        assert_within(found.lse, lse, torch.float32)


def test_the_small_groups_take_one_launch(monkeypatch):
    """Where the kernel has room for the channels, which every GPU's has at 64."""
    sizes, calls = MANY["a large one between"], []
    count = sum(n for n, _ in sizes)
    q, k, v = (torch.randn(1, n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in (33, count, count))
    sdpa = KERNELS["sdpa"]
    plain = sdpa.partial
    monkeypatch.setattr(sdpa, "partial", lambda *a, **k: calls.append(a[1].shape[-1]) or plain(*a, **k))
    over_entries(sdpa, q, Entries(k, v, multiplicity=sizes), 0.125, None)
    assert calls == [64, 64, 72]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_grouping_does_not_wait_for_the_device():
    sizes = MANY["a large one between"]
    count = sum(n for n, _ in sizes)
    q, k, v = (torch.randn(1, n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in (33, count, count))
    compiled = grouped(KERNELS["sdpa"], q, Entries(k, v, multiplicity=sizes), 0.125)
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:  # entries of their own, as those above have notes of what they worked out
        found = grouped(KERNELS["sdpa"], q, Entries(k, v, multiplicity=sizes), 0.125)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.out, compiled.out)


@pytest.mark.parametrize("extrapolate", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["all heads", "some heads"])
def test_a_block_that_reuses_holds_in_a_cuda_graph(kind, extrapolate, tmp_path):
    """Nothing in it waits for the device, and a replay computes what the calls do."""
    if kind == "all heads":
        reuse = FlashBlock(refresh=2, min_past=0, extrapolate=extrapolate)
    else:
        computed = [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
        reuse = policy(tmp_path / "fb.json", computed, extrapolate=extrapolate)
    run = Run(Accel(reuse=reuse), causal=True)
    run.begin(frames=6)
    first, *steps = ([torch.randn(1, GRID.tokens, 4, 64, device="cuda").bfloat16() for _ in range(3)] for _ in range(5))
    go(run, 4, 0, *first, phase="clean")

    def block():
        run._histories.clear()
        return [go(run, step, 1, *x) for step, x in enumerate(steps)]

    expected, graph = block(), torch.cuda.CUDAGraph()
    assert run.slots["reuse"].skipped == 2
    with torch.cuda.graph(graph):
        found = block()
    for x in found:
        x.fill_(torch.nan)
    graph.replay()
    for got, exact in zip(found, expected, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, while it compiles
def test_one_compiled_graph_for_all_layers():
    pipe = tiny_pipeline(layers=6, head_dim=32).to("cuda", dtype=torch.bfloat16)
    accel = Accel(cache=TempCache(0.3, budget="7 frames"), reuse=FlashBlock(refresh=2), prompt=PadCollapse())
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
