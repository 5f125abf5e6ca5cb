"""Step caches of diffusers and of cache-dit beside diffaccel: which go together, and why the others do not.

cache-dit is looked for, not required: `pip install cache-dit`.
"""

import pytest
import torch
from composition import KINDS, LOSSY, calls, opened, video
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache
from tiny import HEIGHT, WIDTH, text_of, tiny_hunyuan_pipeline

from diffaccel import Accel, AnnSA, FullFieldGuide, InwardWindow, UnsupportedError

STEPS = 12


def cache_dit(pipe):
    library = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    config = library.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=0.8,
        max_warmup_steps=2,
        num_inference_steps=STEPS,
    )
    library.enable_cache(pipe, cache_config=config)


def enabled(config):
    return lambda pipe: pipe.transformer.enable_cache(config(pipe))


def broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )


def faster(pipe):
    return FasterCacheConfig(
        tensor_format="BCFHW",
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def ratios(pipe):
    return MagCacheConfig(threshold=0.5, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS)


def taylor(pipe):
    return TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+\.attn\d"], taylor_factors_dtype=torch.float32)


# what skips attention of some layers at some steps, and how many calls of the four layers' self-attention are left
WORKS = {
    "FirstBlockCache": (enabled(lambda _: FirstBlockCacheConfig(threshold=0.5)), [24, 2, 2, 2]),
    "MagCache": (enabled(ratios), [8] * 4),
    "TaylorSeerCache": (enabled(taylor), [10] * 4),
    "TaylorSeerCache, lite": (enabled(lambda _: TaylorSeerCacheConfig(use_lite_mode=True)), [10] * 4),
    "SeaCache": (enabled(lambda _: SeaCacheConfig(threshold=5.0)), [10] * 4),
    "cache-dit": (cache_dit, [24, 4, 4, 4]),
}
ENABLED = {name: do for name, (do, _) in WORKS.items() if name != "cache-dit"}
ONE_STATE = "keeps one state for both passes of guidance, and this pipeline runs one after the other"


def made(pipe, **changes):
    return video(pipe, num_frames=21, **{"num_inference_steps": STEPS, **changes})


@pytest.fixture(scope="module")
def dense():
    return made(opened("stock", layers=4))


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
@pytest.mark.parametrize(("enable", "left"), WORKS.values(), ids=WORKS)
def test_it_skips_what_it_would_and_calls_are_counted_as_they_came(dense, enable, left, inside):
    pipe, alone = opened("stock", layers=4), opened("stock", layers=4)
    enable(alone)
    expected = made(alone)
    assert (expected - dense).abs().max() > 1e-3
    if not inside:
        enable(pipe)
    with Accel()(pipe) as run:
        if inside:
            enable(pipe)
        torch.testing.assert_close(made(pipe), expected, atol=1e-5, rtol=0)
        assert calls(run)[1::2] == left
        torch.testing.assert_close(made(pipe), expected, atol=1e-5, rtol=0)  # its state began anew
    assert torch.equal(made(pipe), expected)  # and it is still there
    with Accel(selection=AnnSA(0.5, dense_steps=0, min_past=0))(pipe) as run:
        found = [made(pipe), made(pipe)]
    assert torch.equal(*found)
    assert (found[0] - expected).abs().max() > 1e-3
    assert run.report().slots["selection"].calls == sum(calls(run)[1::2]) < 2 * 4 * 2 * STEPS


@pytest.mark.parametrize("enable", ENABLED.values(), ids=ENABLED)
def test_it_can_be_disabled_after_it_was_enabled_inside(dense, enable):
    """Also where its hook on the root lay above the one that went first."""
    pipe = opened("stock", layers=4)
    with Accel()(pipe):
        enable(pipe)
    assert pipe.transformer.is_cache_enabled
    pipe.transformer.disable_cache()
    assert torch.equal(made(pipe), dense)


@pytest.mark.parametrize("enable", ENABLED.values(), ids=ENABLED)
def test_causal_pipelines_refuse_it(enable):
    """Before anything is computed, or at the next forward."""
    pipe = opened("causal", layers=4)
    with Accel()(pipe):
        enable(pipe)
        with pytest.raises(UnsupportedError, match=r"the clean pass that writes the keys .* take FlashBlock"):
            made(pipe)
    with pytest.raises(UnsupportedError, match=r"call transformer.disable_cache\(\)"):
        LOSSY["causal"].apply(pipe)
    pipe.transformer.disable_cache()
    made(pipe, num_inference_steps=2)


def test_causal_pipelines_refuse_cache_dit():
    """It knows blocks, not this pipeline: `BlockAdapter` is how one forces it."""
    library = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    pipe = opened("causal")
    adapter = library.BlockAdapter(
        transformer=pipe.transformer,
        blocks=pipe.transformer.blocks,
        forward_pattern=library.ForwardPattern.Pattern_2,
        has_separate_cfg=True,
    )
    library.enable_cache(adapter)
    with pytest.raises(UnsupportedError, match=r"cache-dit skips .* call cache_dit.disable_cache\(pipe\)"):
        Accel().apply(pipe)


def test_hooks_without_a_config_are_met_too():
    pipe = opened("causal")
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig())
    with pytest.raises(UnsupportedError, match="FBCHeadBlockHook skips"):
        Accel().apply(pipe)


@pytest.mark.parametrize("enable", [do for do, _ in WORKS.values()], ids=list(WORKS))
def test_few_steps_are_refused(enable):
    pipe = opened("stock")
    enable(pipe)
    with Accel()(pipe), pytest.raises(UnsupportedError, match="among fewer than 10 none do; got 4: call "):
        made(pipe, num_inference_steps=4)


def test_more_steps_first_and_few_then_are_refused():
    pipe = opened("stock")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with Accel()(pipe):
        made(pipe, num_inference_steps=10)
        with pytest.raises(UnsupportedError, match="got 9"):
            made(pipe, num_inference_steps=9)


def test_the_guide_refuses_it():
    pipe = opened("stock")
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(UnsupportedError, match="makes forwards of its own, which FirstBlockCache would take for"):
        Accel(window=InwardWindow((1, 2)), reuse=FullFieldGuide(every=2)).apply(pipe)


def test_one_state_for_two_passes_is_refused():
    pipe = opened("stock")
    pipe.transformer.enable_cache(broadcast(pipe))
    with Accel()(pipe), pytest.raises(UnsupportedError, match=f"PyramidAttentionBroadcast {ONE_STATE}"):
        made(pipe)
    pipe.transformer._reset_stateful_cache()  # diffusers does that only after a generation that ends well
    alone = made(pipe, guidance_scale=1.0)
    with Accel()(pipe) as run:
        torch.testing.assert_close(made(pipe, guidance_scale=1.0), alone, atol=1e-5, rtol=0)
    cross, own, *_ = calls(run)
    assert own < cross == STEPS  # self-attention was skipped at some steps, cross-attention was not


def test_one_state_goes_where_guidance_is_one_pass():
    pipe = tiny_hunyuan_pipeline()
    pipe.transformer.enable_cache(broadcast(pipe))

    def frames():
        settings = {"height": HEIGHT, "width": WIDTH, "num_frames": 9, "output_type": "latent"}
        return pipe(
            **text_of((7,)), **settings, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)
        ).frames

    expected = frames()
    with Accel()(pipe) as run:
        torch.testing.assert_close(frames(), expected, atol=1e-5, rtol=0)
    assert all(count < STEPS for count in calls(run))


@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_half_the_batch_away_is_refused(kind):
    pipe = opened(kind)
    pipe.transformer.enable_cache(faster(pipe))
    sentence = "the clean pass" if kind == "causal" else "FasterCache takes half of the batch away at some steps"
    with pytest.raises(UnsupportedError, match=sentence):
        Accel().apply(pipe)
