"""Getting into and out of a pipeline."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel, WanVideoToVideoPipeline
from profiles import assert_nothing_but_profiles_is_missing
from test_policies import generate
from tiny import tiny_components, tiny_pipeline

from diffaccel import (
    Accel,
    AnnSA,
    FlashBlock,
    FrameWindow,
    KnobError,
    NotEngagedError,
    PadCollapse,
    TempCache,
    UnsupportedError,
)
from diffaccel.accel import active_run


@pytest.fixture
def pipe():
    return tiny_pipeline()


def state(pipe):
    return (
        [a.processor for b in pipe.transformer.blocks for a in (b.attn1, b.attn2)],
        set(vars(pipe.transformer)),
        len(pipe.transformer.rope._forward_hooks),
        active_run(pipe),
    )


def test_apply_and_remove(pipe):
    before = state(pipe)
    run = Accel(cache=TempCache()).apply(pipe)
    assert active_run(pipe) is run
    run.remove()
    run.remove()
    assert state(pipe) == before


def test_an_exception_restores_and_is_not_replaced(pipe):
    before = state(pipe)

    def stop(*_):
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        generate(pipe, Accel(reuse=FlashBlock()), callback_on_step_end=stop)
    assert state(pipe) == before


def test_nested_application_is_refused(pipe):
    with Accel()(pipe), pytest.raises(UnsupportedError, match="accelerated already"):
        Accel().apply(pipe)
    assert active_run(pipe) is None


def test_a_foreign_processor_is_refused_and_nothing_is_left_behind(pipe):
    class Mine(type(pipe.transformer.blocks[0].attn1.processor)):
        pass

    pipe.transformer.blocks[-1].attn2.processor = Mine()
    before = state(pipe)
    with pytest.raises(UnsupportedError, match="runs Mine already"):
        Accel().apply(pipe)
    assert state(pipe) == before


def test_policy_in_the_wrong_slot():
    with pytest.raises(KnobError, match=r"Accel\(cache=TempCache\(\)\)"):
        Accel(reuse=TempCache())
    with pytest.raises(KnobError, match="takes a policy such as"):
        Accel(cache="TempCache")
    with pytest.raises(KnobError, match="did you mean 'sdpa'"):
        Accel(kernel="sdpaa")


@pytest.mark.parametrize("accel", [Accel(cache=TempCache()), Accel(reuse=FlashBlock()), Accel(window=FrameWindow())])
def test_block_techniques_are_refused_where_there_are_no_blocks(accel):
    pipe = WanPipeline(**tiny_components())
    with pytest.raises(UnsupportedError, match="WanPipeline generates the whole video at once"):
        accel.apply(pipe)


def test_unknown_pipeline_is_refused():
    with pytest.raises(UnsupportedError, match=r"^object has no model that denoises .* families: Wan, HunyuanVideo, "):
        Accel().apply(object())


def test_stock_pipeline_goes_through_the_seam():
    pipe = WanPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)

    def go():
        generator = torch.Generator().manual_seed(3)
        settings = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent"}
        return pipe("a red circle", generator=generator, guidance_scale=2.0, **settings).frames

    plain = go()
    with Accel()(pipe) as run:
        torch.testing.assert_close(go(), plain, atol=1e-5, rtol=0)
    with Accel(prompt=PadCollapse())(pipe) as run:
        torch.testing.assert_close(go(), plain, atol=1e-4, rtol=0)
    prompt = run.report().slots["prompt"]
    assert prompt.calls == 3 * 2 * 2  # steps, branches, layers
    assert prompt.keys_total == prompt.calls * 512
    assert prompt.keys_read == 3 * 2 * ((4 + 1) + (1 + 1))  # "a red circle </s>" and "</s>", one padding key each
    assert torch.equal(go(), plain)


@pytest.mark.parametrize("kind", [WanPipeline, WanVideoToVideoPipeline])
def test_a_selection_in_a_whole_video_at_once(kind):
    """9 latent frames of 6 tokens; video-to-video runs 4 of 5 steps, and only its scheduler knows which."""
    pipe = kind(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    again = kind is WanVideoToVideoPipeline
    video = {"video": torch.rand(33, 3, 32, 48), "strength": 0.8} if again else {"num_frames": 33}

    def go():
        generator = torch.Generator().manual_seed(3)
        settings = {"height": 32, "width": 48, "num_inference_steps": 5, "output_type": "latent"}
        return pipe(prompt="a red circle", generator=generator, guidance_scale=2.0, **video, **settings).frames

    plain = go()
    with Accel(selection=AnnSA(density=1))(pipe):
        torch.testing.assert_close(go(), plain, atol=1e-5, rtol=0)
    with Accel(selection=AnnSA(0.5, dense_steps=0.2, summaries=False))(pipe) as run:
        assert (go() - plain).abs().max() > 1e-3
    counts, chosen = run.report().slots["selection"], 3 if again else 4  # steps after a dense first one
    assert counts.engaged
    assert counts.calls == 2 * 2 * (1 + chosen)  # branches, layers, steps
    assert counts.keys_total == counts.calls * 54
    assert (counts.keys_read / (2 * 2) - 54) / chosen == pytest.approx(0.5 * 54, abs=4)  # to half a block of keys
    assert torch.equal(go(), plain)


def test_image_conditioned_model_goes_through_the_seam_and_refuses_what_it_cannot_take():
    """Wan's image-to-video form: cross-attention to image tokens beside 512 of text."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=20,
        added_kv_proj_dim=48,
    ).eval()
    pipe = SimpleNamespace(transformer=model)
    latents, text, image = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 512, 16), torch.randn(2, 7, 20)
    arguments = {"timestep": torch.tensor([500.0, 500.0]), "encoder_hidden_states": text, "return_dict": False}

    @torch.no_grad()
    def go(image):
        return model(latents, encoder_hidden_states_image=image, **arguments)[0]

    plain = go(image)
    with Accel()(pipe):
        torch.testing.assert_close(go(image), plain, atol=1e-5, rtol=0)
        assert (go(image.flip(-1)) - plain).abs().max() > 1e-4  # the image is read
    with pytest.raises(UnsupportedError, match="counting back from 512 prompt tokens"):
        Accel(prompt=PadCollapse()).apply(pipe)


IDLE = [
    (Accel(cache=TempCache(threshold=1.0)), {}, r"the most alike had 0\.\d+: lower the threshold"),
    (Accel(cache=TempCache(recent_frames=99)), {}, "no frame ever left the recent ones"),
    (Accel(reuse=FlashBlock(refresh=3)), {"num_inference_steps": 1}, "every one of the 1 steps is a refresh step"),
    (Accel(reuse=FlashBlock(refresh=3)), {"num_frames": 9}, "the video has one block"),
    (Accel(reuse=FlashBlock(refresh=3)), {"num_frames": 21}, r"min_past=2.0 times its own length, the longest was 1 "),
    (Accel(window=FrameWindow(frames=90)), {}, r"no past was ever longer than frames=90"),
]


@pytest.mark.parametrize(("accel", "changes", "reason"), IDLE, ids=lambda x: str(x)[:60])
def test_a_technique_that_never_fires_is_an_error_with_the_reason(pipe, accel, changes, reason):
    before = state(pipe)
    with pytest.raises(NotEngagedError, match=reason):
        generate(pipe, accel, **changes)
    assert state(pipe) == before


def test_prompt_without_padding_is_an_error_with_the_reason(pipe):
    embeds = torch.randn(1, 8, 32)
    with pytest.raises(NotEngagedError, match="no prompt embedding ended in zero padding"):
        generate(pipe, Accel(prompt=PadCollapse()), prompts=(), seeds=(0,), guidance=1.0, prompt_embeds=embeds)


def test_no_generation_is_no_error(pipe):
    with Accel(cache=TempCache())(pipe) as run:
        pass
    assert not run.report().slots["cache"].engaged


def test_report_counts_what_the_settings_imply(pipe):
    """3 blocks of 3 latent frames, 6 tokens a frame, 4 steps, 2 branches, 2 layers; refresh at steps 0 and 2."""
    _, run = generate(pipe, Accel(reuse=FlashBlock(refresh=2, min_past=0)))
    report = run.report()
    reuse = report.slots["reuse"]
    calls = 2 * 2 * (3 * 4 + 2)  # the last block has no clean pass
    assert reuse.calls == calls
    assert reuse.skipped == 2 * 2 * 2 * 2  # blocks with a past, steps 1 and 3
    block, layers_and_branches = 3 * 6, 4
    dense = layers_and_branches * block * (4 * 1 + 4 * 2 + 4 * 3 + 1 + 2)
    assert reuse.keys_total == dense
    assert reuse.keys_read == dense - layers_and_branches * block * 2 * (1 + 2)
    assert report.cache == {"max_tokens": 2 * block, "tokens_per_frame": 6}
    assert report.frames == 2 * 33  # two prompts
    assert report.kernel == "sdpa"


def test_report_is_json_with_stable_keys(pipe):
    _, run = generate(pipe, Accel(cache=TempCache(threshold=0.3)))
    found = json.loads(run.report().to_json())
    assert set(found) == {
        "slots", "kernel", "choices", "seconds", "frames", "fps", "peak_memory_bytes", "cache", "environment", "blocks",
        "layers", "quality",
    }  # fmt: skip
    assert set(found["slots"]["cache"]) == {
        "method", "knobs", "engaged", "calls", "skipped", "keys_kept", "keys_read", "keys_total", "bytes",
    }  # fmt: skip
    assert set(found["seconds"]) == {"attention", "denoise", "decode", "total"}
    assert 0 < found["seconds"]["attention"] < found["seconds"]["denoise"] <= found["seconds"]["total"]
    assert found["peak_memory_bytes"] > 2**20
    assert "TempCache" in str(run.report())


def test_describe_names_what_would_be_patched(pipe):
    [row] = Accel().describe(pipe)
    assert (row["layers"], row["heads"], row["head_dim"], row["causal"]) == (2, 2, 24, True)
    assert_nothing_but_profiles_is_missing(row["refuses"])
    [row] = Accel().describe(WanPipeline(**tiny_components()))
    assert "the whole video at once" in row["refuses"]["TempCache"]
    assert row["refuses"]["PadCollapse"] is None
