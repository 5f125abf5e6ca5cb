"""Larger videos than a model was trained for, through both kinds of Wan pipelines and the command line."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanVideoToVideoPipeline
from tiny import tiny_components, tiny_hunyuan_pipeline, tiny_pipeline, tiny_transformer
from typer.testing import CliRunner

from diffaccel import Accel, FlashBlock, InwardWindow, KnobError, PadCollapse, UnsupportedError
from diffaccel import upscale as upscale_module
from diffaccel.cli import app
from diffaccel.pipelines import FreeSwimPipeline
from diffaccel.pipelines.free_swim import enlarge
from diffaccel.pipelines.loading import load
from diffaccel.video import read_video, write_video

NATIVE, LARGE = (32, 48), {"height": 64, "width": 96}
PROMPT = "a red circle moves left"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stock(kind=WanPipeline, scheduler=None):
    parts = tiny_components()
    pipe = kind(**parts | ({} if scheduler is None else {"scheduler": scheduler}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(frames=5, height=32, width=48):
    return np.random.default_rng(0).random((frames, height, width, 3))


def test_block_by_block_it_is_the_noised_video_under_windows():
    """Written out: what the pipeline is given to start from, and what it runs with."""
    pipe, runs = tiny_pipeline(), []
    big = FreeSwimPipeline(pipe, native=NATIVE, tile=(1, 1), guide_every=3)
    settings = {"num_inference_steps": 6, "guidance_scale": 2.0}
    video = clip(9)
    found = big(PROMPT, video, **LARGE, **settings, strength=0.7, generator=seeded(), output_type="latent",
                on_run=runs.append).frames  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    levels = scheduler.timesteps[2:]  # 4 of 6 steps
    pixels = torch.from_numpy(enlarge(video, 64, 96)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    mean, std = (torch.tensor(pipe.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    clean = (pipe.vae.encode(pixels).latent_dist.mode() - mean) / std
    noise = torch.randn(clean.shape, generator=seeded())
    level = float(levels[0]) / 1000
    with big.accel_for(64, 96)(pipe) as run:
        expected = pipe(
            PROMPT, latents=(1 - level) * clean + level * noise, timesteps=levels.tolist(), num_frames=9, **LARGE,
            guidance_scale=2.0, output_type="latent",
        ).frames  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    [once] = runs
    assert once.report().slots == run.report().slots
    assert once.report().slots["window"].keys_read < once.report().slots["window"].keys_total


@pytest.mark.parametrize("shift", [None, 4.0])
def test_at_once_it_is_diffusers_own_video_to_video(shift):
    pipe = stock(scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    big = FreeSwimPipeline(pipe, native=NATIVE)
    settings = {"num_inference_steps": 6, "guidance_scale": 2.0, "strength": 0.7, "output_type": "latent"}
    found = big(PROMPT, clip(), **LARGE, **settings, generator=seeded(), flow_shift=shift).frames
    parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "transformer", "vae")}
    other = WanVideoToVideoPipeline(
        **parts,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift or 9.0
        ),
    )
    other.set_progress_bar_config(disable=True)
    with big.accel_for(64, 96)(other):
        frames = enlarge(clip(), 64, 96).astype(np.float32) / 255
        expected = other(frames, PROMPT, **LARGE, **settings, generator=seeded()).frames
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["causal", "stock"])
def test_without_a_video_one_of_the_native_size_is_made_first(kind):
    pipe = tiny_pipeline() if kind == "causal" else stock()
    big = FreeSwimPipeline(pipe, native=NATIVE)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0}
    found = big(PROMPT, **LARGE, num_frames=5, **settings, generator=seeded(3)).frames
    generator = seeded(3)
    base = pipe(PROMPT, height=32, width=48, num_frames=5, **settings, generator=generator).frames[0]
    assert np.array_equal(found, big(PROMPT, base, **LARGE, **settings, generator=generator).frames)
    assert found.shape == (1, 5, 64, 96, 3)


def test_the_pipeline_is_left_as_it_was():
    pipe = stock()
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    before = pipe(PROMPT, **LARGE, num_frames=5, num_inference_steps=2, generator=seeded(), output_type="latent").frames
    big = FreeSwimPipeline(pipe, native=NATIVE, accel=Accel(prompt=PadCollapse()))
    big(PROMPT, clip(), **LARGE, num_inference_steps=3)
    after = pipe(PROMPT, **LARGE, num_frames=5, num_inference_steps=2, generator=seeded(), output_type="latent").frames
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == config
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["causal", "stock"])
def test_the_vae_goes_tile_by_tile_where_asked_and_is_left_as_it_was(kind):
    pipe = tiny_pipeline() if kind == "causal" else stock()
    pipe.vae.tile_sample_min_height = pipe.vae.tile_sample_min_width = 48
    pipe.vae.tile_sample_stride_height = pipe.vae.tile_sample_stride_width = 32
    big, seen = FreeSwimPipeline(pipe, native=NATIVE), []
    decode = pipe.vae.tiled_decode

    def watched(*args, **given):
        seen.append(args[0].shape)
        return decode(*args, **given)

    pipe.vae.tiled_decode = watched
    for tiling in (False, True):
        frames = big(PROMPT, clip(), **LARGE, num_inference_steps=2, guidance_scale=1.0, vae_tiling=tiling).frames
        assert frames.shape == (1, 5, 64, 96, 3)
        assert len(seen) == tiling
    assert not pipe.vae.use_tiling


@pytest.mark.parametrize("kind", ["causal", "stock"])
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offload_changes_no_bit(kind, offload):
    def made(pipe):
        big = FreeSwimPipeline(pipe, native=NATIVE)
        settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
        return big(PROMPT, num_frames=5, **LARGE, **settings, generator=seeded()).frames

    def fresh():
        return tiny_pipeline() if kind == "causal" else stock()

    pipe = fresh()
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")  # the hooks work alike on every device
    else:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    assert np.array_equal(made(pipe), made(fresh()))


@pytest.mark.parametrize("hold", ["device", "int8", "host"])
@pytest.mark.parametrize("kind", ["causal", "stock"])
def test_what_the_guide_keeps_is_known_beforehand(hold, kind):
    pipe, runs = (tiny_pipeline() if kind == "causal" else stock()), []
    big = FreeSwimPipeline(pipe, native=NATIVE, hold=hold)
    big(PROMPT, clip(9), **LARGE, num_inference_steps=3, guidance_scale=1.0, on_run=runs.append)
    assert runs[0].report().slots["reuse"].bytes == big.kept_bytes(64, 96, 9)


def test_no_guide_is_a_window_alone():
    pipe = tiny_pipeline()
    big = FreeSwimPipeline(pipe, native=NATIVE, guide_every=None)
    assert big.accel == Accel(window=InwardWindow((3, 3), tile=(1, 1)))
    assert big.kept_bytes(64, 96, 9) == 0


@pytest.mark.parametrize("size", [(80, 112), (48, 96), (32, 96)])
def test_any_size_of_whole_tokens_and_no_less_than_native(size):
    pipe = tiny_pipeline()
    big = FreeSwimPipeline(pipe, native=NATIVE)
    height, width = size
    frames = big(PROMPT, clip(), height=height, width=width, num_inference_steps=2, guidance_scale=1.0).frames
    assert frames.shape == (1, 5, height, width, 3)
    assert np.isfinite(frames).all()


BAD = [
    ({"height": 72, "width": 96}, "height is a multiple of 16 .*; got 72, the nearest valid values are 64 and 80"),
    ({"height": 16, "width": 96}, r"larger than the native 32 x 48 .*, got 16 x 96"),
    ({"height": 48, "width": 48}, "3 x 3 tokens is no larger than the window of 3 x 3"),
    ({**LARGE, "strength": 0.0}, r"strength is a share of the steps in \(0, 1\], got 0"),
    ({**LARGE, "strength": 1.5}, r"strength is a share of the steps in \(0, 1\], got 1.5"),
    ({**LARGE, "video": None, "num_frames": 6}, "num_frames .* got 6, the nearest valid values are 5 and 9"),
    ({**LARGE, "video": clip(6)}, "got 6, the nearest valid values are 5 and 9"),
    ({**LARGE, "video": clip()[0]}, "video is frames .*, at least one, got an array of shape"),
    ({**LARGE, "video": clip()[:0]}, "at least one"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_a_bad_argument_is_one_sentence(arguments, message):
    with pytest.raises(KnobError, match=message):
        FreeSwimPipeline(tiny_pipeline(), native=NATIVE)(PROMPT, **{"video": clip(), **arguments})


def test_what_cannot_be_enlarged_is_refused():
    with pytest.raises(UnsupportedError, match="for the pipelines of Wan, got HunyuanVideoPipeline"):
        FreeSwimPipeline(tiny_hunyuan_pipeline())
    with pytest.raises(UnsupportedError, match="has two"):
        FreeSwimPipeline(WanPipeline(**tiny_components(), transformer_2=tiny_transformer(), boundary_ratio=0.5))
    with pytest.raises(UnsupportedError, match="an Accel that has neither"):
        FreeSwimPipeline(tiny_pipeline(), accel=Accel(reuse=FlashBlock()))
    with pytest.raises(KnobError, match="nearest valid values are 16 and 32"):
        FreeSwimPipeline(tiny_pipeline(), native=(24, 48))
    with pytest.raises(KnobError, match="makes no video of its own"):
        FreeSwimPipeline(stock(WanVideoToVideoPipeline), native=NATIVE)(PROMPT, **LARGE)


# -- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    WanPipeline(**tiny_components()).save_pretrained(path)
    usual = {"pipeline": "causal", "width": 48, "height": 32, "num_frames": 9, "fps": 8, "num_inference_steps": 3}
    (path / "generation.json").write_text(json.dumps({**usual, "guidance_scale": 1.5}))
    return path


def upscale(folder, *arguments):
    return CliRunner().invoke(app, ["upscale", *map(str, arguments), "--model", str(folder)])


@pytest.mark.parametrize("pipeline", ["causal", "stock"])
def test_the_command_enlarges_a_prompt(folder, tmp_path, pipeline):
    out, report = tmp_path / "out.mp4", tmp_path / "report.json"
    found = upscale(folder, PROMPT, "--scale", 2, "--pipeline", pipeline, "-o", out, "--report", report)
    assert found.exit_code == 0, found.output
    assert read_video(out).shape == (9, 64, 96, 3)
    assert "48x32 to 96x64" in found.output
    assert "stretched" not in found.output
    content = json.loads(report.read_text())
    assert content["slots"]["window"]["engaged"]
    assert content["slots"]["reuse"]["engaged"]
    assert content["settings"]["height"] == 64
    assert content["estimate"]["seconds"] > 0


def test_the_command_enlarges_a_file(folder, tmp_path):
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    write_video(source, clip(11))
    failed = upscale(folder, source, "--prompt", PROMPT, "--width", 96, "--height", 80, "-o", out)
    assert failed.exit_code == 2
    assert "got 11, the nearest valid values are 9 and 13" in failed.output
    assert not out.exists()
    found = upscale(
        folder, source, "--prompt", PROMPT, "--width", 96, "--height", 80, "-o", out, "--frames", 9, "--tile", "1x1"
    )
    assert found.exit_code == 0, found.output
    assert "so the picture is stretched" in found.output
    assert read_video(out).shape == (9, 80, 96, 3)


MISTAKES = [
    (["--scale", 2, "--height", 64, "--width", 96], "--scale, or --height and --width, got both"),
    ([], "says how large"),
    (["--height", 64], "--height and --width go together"),
    (["--scale", 1.2], "the nearest valid values"),
    (["--scale", 1], "no larger than the window"),
    (["--scale", 2, "--tile", "2"], "--tile takes rows x columns"),
    (["--scale", 2, "--tile", "9x9"], "a tile is no larger than its window"),
    (["--scale", 2, "--steps", 0], "--steps must be at least 1, got 0"),
    (["--scale", 2, "--fps", 0], "--fps must lie in (0, 240]"),
    (["--scale", 2, "--guidance", 1, "--negative", "red"], "--negative acts through guidance, which is 1"),
    (["--scale", 2, "--frames", 6], "the nearest valid values are 5 and 9"),
    (["--scale", 2, "--guide-field", "nativ"], "choose one of native, whole; did you mean 'native'?"),
    (["--scale", 2, "--compile", "sometimes"], "choose one of auto, on, off"),
    (["--scale", 2, "--guide-every", 0], "--guide-every is at least 1"),
    (["--scale", 2, "--strength", 0], r"strength is a share of the steps in (0, 1]"),
    (["--scale", 2, "--hold", "disk"], "choose one of device, int8, host"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(folder, tmp_path, arguments, message):
    found = upscale(folder, PROMPT, *arguments, "-o", tmp_path / "out.mp4")
    assert found.exit_code == 2, found.output
    assert message in " ".join(found.output.split())
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_or_no_video_is_refused(folder, tmp_path):
    found = upscale(folder, tmp_path / "gone.mp4", "--prompt", PROMPT, "--scale", 2, "-o", tmp_path / "out.mp4")
    assert found.exit_code == 2
    assert "gone.mp4" in found.output
    (tmp_path / "text.mp4").write_text("no video")
    found = upscale(folder, tmp_path / "text.mp4", "--prompt", PROMPT, "--scale", 2, "-o", tmp_path / "out.mp4")
    assert found.exit_code == 2
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("remedy", ["--hold int8", "--hold host", "--frames 5", "a smaller frame"])
def test_what_does_not_fit_is_refused_with_the_smallest_change_that_would(folder, tmp_path, monkeypatch, remedy):
    big = FreeSwimPipeline(load(folder), native=NATIVE)
    need = {
        f"--hold {hold}": upscale_module.work_bytes(big, 64, 96, 9) + big.kept_bytes(64, 96, 9, hold)
        for hold in ("device", "int8", "host")
    }
    need["--frames 5"] = upscale_module.work_bytes(big, 64, 96, 5) + big.kept_bytes(64, 96, 5)
    assert need["--frames 5"] < need["--hold host"] < need["--hold int8"] < need["--hold device"]
    monkeypatch.setattr(upscale_module, "free_bytes", lambda device: need.get(remedy, 1))
    found = upscale(folder, PROMPT, "--scale", 2, "-o", tmp_path / "out.mp4")
    assert found.exit_code == 2
    assert f"use {remedy}" in found.output
    assert not list(tmp_path.iterdir())
    if remedy in need:
        assert upscale(folder, PROMPT, "--scale", 2, "-o", tmp_path / "out.mp4", *remedy.split()).exit_code == 0


@pytest.mark.parametrize("field", ["native", "whole"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["causal", "stock"])
def test_the_estimate_counts_every_forward(kind, guidance, field):
    pipe, forwards = (tiny_pipeline() if kind == "causal" else stock()), []
    big = FreeSwimPipeline(pipe, native=NATIVE, guide_every=2, guide_field=field)
    found = upscale_module.estimate(big, 64, 96, 17, steps=5, strength=0.7, guidance=guidance)
    hook = pipe.transformer.register_forward_hook(lambda *_: forwards.append(run[0]._where.full_field))
    run = []
    accelerated = big.accel_for

    class Told(type(accelerated(64, 96))):
        def __call__(self, *given, **more):
            return self._told(super().__call__(*given, **more))

        @contextmanager
        def _told(self, inner):
            with inner as found_run:
                run.append(found_run)
                yield found_run

    big.accel_for = lambda *size: Told(**vars(accelerated(*size)))
    big(PROMPT, clip(17), **LARGE, num_inference_steps=5, strength=0.7, guidance_scale=guidance)
    hook.remove()
    assert len(forwards) == found.forwards
    assert sum(forwards) == found.passes


def test_a_causal_model_keeps_the_past_of_every_branch():
    causal, at_once = (FreeSwimPipeline(pipe, native=NATIVE) for pipe in (tiny_pipeline(), stock()))
    two, one = (upscale_module.work_bytes(causal, 64, 96, 17, branches) for branches in (2, 1))
    frames, tokens, layers, size = 5, 24, 2, 48
    assert two - one == frames * tokens * layers * 2 * size * 4
    assert upscale_module.work_bytes(at_once, 64, 96, 17, 2) == upscale_module.work_bytes(at_once, 64, 96, 17, 1)
