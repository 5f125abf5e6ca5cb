"""AnyFlow through its own pipelines, above all FAR, block by block; what holds for every family is in
`test_families.py`, which technique works in `test_support.py`."""

import pytest
import torch
from diffusers import AnyFlowPipeline, FlowMapEulerDiscreteScheduler
from diffusers.models.transformers import transformer_anyflow_far
from families import anyflow, anyflow_far, noise
from tiny import CHANNELS, HEIGHT, WIDTH, tiny_components
from torch._dynamo.testing import CompileCounter

from diffaccel import (
    Accel,
    AnnSA,
    FlashBlock,
    FrameWindow,
    FullFieldGuide,
    HostCache,
    InwardWindow,
    PadCollapse,
    SinkRecent,
    TempCache,
    UnsupportedError,
    port,
)
from diffaccel.attend import attend
from diffaccel.cache import KVCache
from diffaccel.grid import Grid
from diffaccel.pipelines.backbones import anyflow_far as far
from diffaccel.rotary import rotate

PARTS = (1, 2, 1, 1, 1, 1, 1, 1)  # latent frames of the blocks
STARTS = (0, 1, 3, 4, 5, 6, 7, 8)
LAYERS, FULL, FAR = 2, Grid(1, 8, 16), Grid(1, 4, 8)  # tokens of a frame
SIZE = {"height": 128, "width": 256, "num_frames": 33}
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def generate(pipe, prompt="a red circle moves left", **settings):
    given = SIZE | {"num_inference_steps": 2} | settings
    return pipe(prompt, **given, generator=torch.Generator().manual_seed(0), output_type="latent").frames


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def pipe():
    return anyflow_far()


@pytest.fixture(scope="module")
def stock(pipe):
    return generate(pipe)


EXACT = [
    Accel(), Accel(cache=HostCache(recent_frames=1)), Accel(selection=AnnSA(density=1), reuse=FlashBlock(refresh=1)),
    Accel(TempCache(threshold=None), prompt=PadCollapse(), window=FrameWindow(frames=None)),
]  # fmt: skip


@pytest.mark.parametrize("accel", EXACT, ids=lambda accel: "+".join(accel.policies()))
def test_exact_settings_are_the_stock_pipeline(pipe, stock, accel):
    with accel(pipe):
        close(generate(pipe), stock)
    assert torch.equal(generate(pipe), stock)


@pytest.mark.parametrize("limit", [2, 4, 9])
def test_any_number_of_full_blocks(stock, limit):
    pipe = anyflow_far(full_chunk_limit=limit)
    expected = generate(pipe)
    assert (expected - stock).abs().max() > 1e-3  # so that it is felt which blocks are far
    with Accel()(pipe):
        close(generate(pipe), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 3.0},
        {"video_latents": noise(1, 3, CHANNELS, 16, 32, seed=5)},
        {"prompt": ["a red circle", "the blue square moves up"]},
        {"chunk_partition": [3, 3, 3]},
        {"num_inference_steps": 4, "use_mean_velocity": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_the_pipeline_takes(pipe, settings):
    expected = generate(pipe, **settings)
    with Accel()(pipe):
        close(generate(pipe, **settings), expected)


def test_padding_is_not_read(monkeypatch):
    """The stock pipeline reads zeros behind its keys, up to a multiple of 128 of its queries."""
    pipe = anyflow_far(compressed_patch_size=(1, 4, 2))
    size = {"height": HEIGHT, "width": WIDTH}
    padded = generate(pipe, **size)
    with Accel()(pipe):
        found = generate(pipe, **size)
    dispatch = transformer_anyflow_far.dispatch_attention_fn

    def without(query, key, value, attn_mask=None, **given):
        if attn_mask is None and key.shape[1] != value.shape[1] - 1:
            there = (key != 0).any((0, 2, 3))
            if not there.all():
                assert not value[:, ~there].any()
                key, value = key[:, there], value[:, there]
        return dispatch(query, key, value, attn_mask=attn_mask, **given)

    monkeypatch.setattr(transformer_anyflow_far, "dispatch_attention_fn", without)
    close(found, generate(pipe, **size))
    assert (found - padded).abs().max() > 1e-2


def test_where_the_run_stands(pipe, monkeypatch):
    denoised, finished = [], []
    monkeypatch.setattr(port, "attend", lambda *args: denoised.append(args[3]) or attend(*args))
    monkeypatch.setattr(KVCache, "commit", lambda self, memories, site, run: finished.append((site, memories)))
    with Accel()(pipe) as run:
        generate(pipe)
    sites = [site for site in denoised if (site.layer, site.part) == (0, "self")]
    steps = 2
    assert [(site.block, site.start) for site in sites] == [(b, s) for b, s in enumerate(STARTS) for _ in range(steps)]
    assert [site.step for site in sites] == [0, 1] * len(PARTS)
    assert [site.noise for site in sites] == [1.0, pytest.approx(5 * 0.5 / 3)] * len(PARTS)
    assert [site.grid for site in sites[::steps]] == [Grid(n, FULL.height, FULL.width) for n in PARTS]
    assert {(site.phase, site.steps, site.branch) for site in sites} == {("denoise", steps, "cond")}
    becomes = range(len(PARTS) - 3)  # when three more are there; behind the last one no pass runs
    assert [(site.block, site.start, site.phase, site.step) for site, _ in finished] == [
        (block, STARTS[block], "clean", steps) for block in becomes
    ]
    assert [site.grid for site, _ in finished] == [Grid(PARTS[block], FAR.height, FAR.width) for block in becomes]
    assert {len(memories) for _, memories in finished} == {LAYERS}
    assert run.extent.block == Grid(2, FAR.height, FAR.width)
    assert run.extent.frames >= STARTS[len(becomes)]


def test_what_is_held_and_read(pipe):
    """The last block reads the far frames, each a quarter of the tokens, two full ones and itself."""
    with Accel(reuse=FlashBlock(refresh=2, min_past=0))(pipe) as run:
        generate(pipe)
        memory = run.all_memories()[0]
        frames = [tier.frames()[0].tolist() for tier in memory.past()]
        assert frames[0] == [f for f in range(6) for _ in range(FAR.tokens)]
        assert frames[1] == [f for f in (6, 7) for _ in range(FULL.tokens)]
        assert memory.seen == memory.count == 6 * FAR.tokens + 2 * FULL.tokens
        assert memory.exact._k.shape[1] <= 2 * (6 * FAR.tokens + 2 * FULL.tokens)  # room for far blocks, not full ones
    blocks = run.report().blocks
    assert [block["frame"] for block in blocks] == [1, 3, 4, 5, 6]
    layer = next(layer for layer in run.report().layers if layer.part == "self")
    reads = 0  # blocks read all at step 0 and themselves at step 1
    for block, size in enumerate(PARTS):
        full = sum(PARTS[max(block - 2, 0) : block])
        reads += (2 * size + full) * FULL.tokens + sum(PARTS[: max(block - 2, 0)]) * FAR.tokens
    for last in range(len(PARTS) - 1):  # passes over finished blocks
        far_frames, frame = sum(PARTS[: max(last - 1, 0)]), 0
        if last >= 2:
            reads += far_frames * FAR.tokens
        for block in range(max(last - 1, 0), last + 1):
            frame += PARTS[block]
            reads += far_frames * FAR.tokens + frame * FULL.tokens
    assert layer.keys_read == reads


def test_a_finished_block_costs_the_same_whenever_it_is_finished(pipe, monkeypatch):
    tokens, caches, masks = [], [], []
    project = pipe.transformer.blocks[0].attn1.to_q.register_forward_hook(
        lambda module, args, out: tokens.append(out.shape[1])
    )
    note = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: caches.append(given["kv_cache"]), with_kwargs=True
    )
    build = transformer_anyflow_far._build_far_block_mask_from_far_cfg
    monkeypatch.setattr(
        transformer_anyflow_far,
        "_build_far_block_mask_from_far_cfg",
        lambda *args, **given: masks.append(0) or build(*args, **given),
    )
    one = {"num_inference_steps": 1, "chunk_partition": [1] * 9}
    try:
        with Accel()(pipe):
            generate(pipe, **one)
        ours, stock_tokens, held = tokens[1::2], tokens, caches[-1]
        assert ours == [FULL.tokens, 2 * FULL.tokens] + [FAR.tokens + 2 * FULL.tokens] * 6
        assert all(tensor.numel() == 0 for cache in held.values() for tensor in cache.values())
        assert not masks
        stock_tokens.clear()
        generate(pipe, **one)
        assert stock_tokens[-2] == 6 * FAR.tokens + 2 * FULL.tokens
        assert len(masks) == 8
    finally:
        project.remove()
        note.remove()


def test_bounded_caches_stay_bounded(pipe, stock):
    with Accel(cache=SinkRecent(recent_frames=2, sink_frames=1))(pipe) as run:
        found = generate(pipe)
        far_frames = {memory.exact.count // FAR.tokens for memory in run.all_memories()}
    assert far_frames == {3}
    assert torch.isfinite(found).all()
    assert (found - stock).abs().max() > 1e-3
    assert run.report().cache["max_tokens"] <= 3 * FAR.tokens + 3 * FULL.tokens


def test_rotated_keys_move_in_time(pipe):
    """As `RollingRebased` does: keys of some frame, turned later, are those of the later frame."""
    rope, keys = pipe.transformer.rope, noise(1, FAR.tokens, 2, 24)
    layout = {
        "total_frames": 9, "num_compressed_frames": 9, "full_frame_shape": (FULL.height, FULL.width),
        "compressed_frame_shape": (FAR.height, FAR.width),
    }  # fmt: skip
    freqs = rope(far_cfg=layout, device=torch.device("cpu"))["key"][0, 0].unflatten(0, (9, FAR.tokens))

    def at(frame):
        parts = (freqs[frame].real, freqs[frame].imag)
        real, imag = (part.float().repeat_interleave(2, -1)[None, :, None] for part in parts)
        return rotate(keys, real, imag)

    close(far._later(rope, at(1), 4), at(5))


def test_batch_sizes_may_change_between_generations(pipe):
    both = ["a red circle", "the blue square moves up"]
    lossy = Accel(cache=TempCache(threshold=0.3), selection=AnnSA(0.4, dense_steps=0, min_past=0))
    latents = noise(2, CHANNELS, 9, 16, 32, seed=8)
    with lossy(pipe) as run:
        found = generate(pipe, both, latents=latents)
        for row in range(2):
            alone = generate(pipe, both[row], latents=latents[row : row + 1])
            torch.testing.assert_close(alone, found[row : row + 1], atol=3e-4, rtol=0)
    assert all(counts.engaged for counts in run.report().slots.values())


def test_compiled_blocks_are_the_same(pipe, stock):
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = anyflow_far()
    with Accel()(compiled):
        compiled.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        close(generate(compiled), stock)
        graphs = counter.frame_count
        generate(compiled, num_frames=49, chunk_partition=[1, 2, 3, 2, 1, 2, 2])
    assert 1 <= graphs == counter.frame_count <= 4  # of both kinds of pass, however long the past


def state(pipe):
    modules = list(pipe.transformer.modules())
    return [
        (set(vars(m)), getattr(m, "processor", None), list(m._forward_hooks), list(m._forward_pre_hooks))
        for m in modules
    ]


def test_leaving_restores_everything_also_in_the_middle_of_a_pass(pipe, stock):
    def stop(module, args):
        if len(calls := getattr(stop, "calls", [])) == 12:
            raise RuntimeError("half way")
        stop.calls = [*calls, 0]

    before = state(pipe)
    hook = pipe.transformer.blocks[1].register_forward_pre_hook(stop)
    try:
        with pytest.raises(RuntimeError, match="half way"), Accel()(pipe):
            generate(pipe)
    finally:
        hook.remove()
    assert state(pipe) == before
    assert torch.equal(generate(pipe), stock)


def test_what_is_refused(pipe, stock):
    def refused(accel, match):
        with pytest.raises(UnsupportedError, match=match):
            accel.apply(pipe)

    refused(Accel(window=InwardWindow((3, 3))), "older frames have fewer rows and columns")
    refused(Accel(reuse=FullFieldGuide()), "a past of its own")
    refused(Accel(selection=AnnSA(groups="prompt")), "makes them anew")
    other = anyflow_far(image_dim=16)
    with pytest.raises(UnsupportedError, match="image tokens may stand before"):
        Accel(prompt=PadCollapse()).apply(other)
    with Accel()(pipe), pytest.raises(UnsupportedError, match="use_kv_cache=True"):
        generate(pipe, use_kv_cache=False)
    runs = []

    def enter(pipe, step, t, given):
        runs.append(Accel().apply(pipe) if len(runs) == 2 else None)
        return given

    with pytest.raises(UnsupportedError, match="began before the pipeline was accelerated"):
        generate(pipe, callback_on_step_end=enter)
    runs[-1].remove()
    assert torch.equal(generate(pipe), stock)


def test_blocks_are_finished_in_their_order(pipe):
    """A cache that a caller fills with several blocks at once is none that this model's passes can be cut for."""
    with Accel()(pipe), pytest.raises(UnsupportedError, match="0 of 2 before this one were"):
        pipe.transformer(
            hidden_states=noise(1, 3, CHANNELS, 16, 32), timestep=torch.zeros(1, 3), r_timestep=torch.zeros(1, 3),
            encoder_hidden_states=noise(1, 4, 32), chunk_partition=[1, 1, 1], return_dict=False,
            kv_cache={i: {name: torch.zeros(2, 1, 2, 900, 24) for name in ("full_cache", "compressed_cache")}
                      for i in range(LAYERS)},
            kv_cache_flag={"num_cached_chunks": 0, "is_cache_step": True},
        )  # fmt: skip


@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 3.0}, {"video_latents": noise(1, 1, CHANNELS, 4, 6, seed=5)}], ids=str
)
def test_at_once_exact_settings_are_the_stock_pipeline(settings):
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    pipe = AnyFlowPipeline(**tiny_components() | {"transformer": anyflow(), "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    size = {"height": HEIGHT, "width": WIDTH}
    expected = generate(pipe, **size, **settings)
    with Accel(selection=AnnSA(density=1), prompt=PadCollapse())(pipe) as run:
        close(generate(pipe, **size, **settings), expected)
    assert run.steps == 2
    assert torch.equal(generate(pipe, **size, **settings), expected)
