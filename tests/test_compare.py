"""The comparison measures what it says: which arms run on which noise, in which order, and what is made of them."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_components, tiny_pipeline

from diffaccel import Accel, DiffaccelError, FlashBlock, PadCollapse, TempCache, UnsupportedError
from diffaccel.compare import ARMS, _speedup, compare, decode, generate
from diffaccel.quality import psnr
from diffaccel.video import VideoError, read_video, to_uint8

CALL = {"prompt": "a red circle moves left", "height": 32, "width": 48, "num_frames": 9}
CALL |= {"num_inference_steps": 3, "guidance_scale": 2.0}
LOSSY = Accel(cache=TempCache(threshold=0.0, recent_frames=0), reuse=FlashBlock(refresh=(0,), clean_pass="reuse"))


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    return pipe


@pytest.fixture(scope="module")
def lossy(pipe):
    """One comparison of settings that change the video, and the calls it made."""
    calls = []
    original = type(pipe).__call__

    @functools.wraps(original)
    def spy(self, **arguments):
        calls.append(arguments)
        return original(self, **arguments)

    type(pipe).__call__ = spy
    try:
        arms = []
        result = compare(pipe, LOSSY, seed=5, on_arm=lambda *where: arms.append(where), **CALL)
    finally:
        type(pipe).__call__ = original
    return result, calls, arms


def test_arms_alternate_on_the_same_noise_after_an_untimed_warm_up(lossy):
    result, calls, arms = lossy
    assert [name for name, _, _ in arms] == list(ARMS)
    assert arms[0] == ("dense", 0, 5)
    warm, timed = calls[:2], calls[2:]
    assert [call["num_inference_steps"] for call in warm] == [2, 2]
    assert [call["num_frames"] for call in warm] == [5, 5]
    assert [call["generator"].initial_seed() for call in timed] == [5, 5, 6, 5, 5]
    assert ["history" in call for call in timed] == [False, False, False, True, False]
    assert set(result.reports) == set(ARMS)
    assert all(report.seconds["decode"] > 0 and report.frames == 9 for report in result.reports.values())


def test_the_dense_clip_is_what_the_pipeline_makes_alone(pipe, lossy):
    result, calls, _ = lossy
    frames = pipe(**CALL, generator=torch.Generator().manual_seed(5), output_type="np").frames[0]
    assert np.array_equal(to_uint8(frames), result.dense)
    latents = pipe(**CALL, generator=torch.Generator().manual_seed(5), output_type="latent").frames
    assert np.array_equal(decode(pipe, latents), frames)
    assert torch.equal(calls[5]["history"], latents)


def test_scores_are_those_of_the_two_generations_done_by_hand(pipe, lossy):
    result, _, _ = lossy

    def frames(**more):
        return pipe(**CALL, **more, generator=torch.Generator().manual_seed(5), output_type="np").frames[0]

    dense = frames()
    latents = pipe(**CALL, generator=torch.Generator().manual_seed(5), output_type="latent").frames
    with LOSSY(pipe):
        free, shared = frames(), frames(history=latents)
    assert result.scores["free_running"].psnr == pytest.approx(psnr(dense, free).tolist())
    assert result.scores["shared_history"].psnr == pytest.approx(psnr(dense, shared).tolist())
    assert np.array_equal(result.accelerated, to_uint8(free))


def test_scores_order_as_they_must(lossy):
    result, _, _ = lossy
    scores = result.scores
    assert list(scores) == ["free_running", "shared_history", "noise_floor", "other_seed"]
    assert scores["noise_floor"].psnr_mean > scores["free_running"].psnr_mean > scores["other_seed"].psnr_mean
    assert f"{scores['free_running'].psnr_pooled:.1f} dB" in result.table()
    assert scores["free_running"].psnr != scores["shared_history"].psnr
    assert scores["free_running"].identical_frames >= 1  # nothing is merged or reused in the first block
    assert not math.isnan(scores["free_running"].seam)
    assert result.idle is None


def test_speed_ups_are_ratios_of_means_and_say_when_they_are_losses(lossy):
    result, _, _ = lossy
    seconds = {name: report.seconds["total"] for name, report in result.reports.items()}
    dense, fast = seconds["dense"] + seconds["other_seed"], seconds["free_running"] + seconds["shared_history"]
    assert result.speedup["end_to_end"] == pytest.approx(dense / fast)
    assert result.tokens == 3 * 6


def timed(result, dense, other_seed, free_running, shared_history):
    """The result with other total seconds."""
    seconds = {"dense": dense, "other_seed": other_seed, "free_running": free_running, "shared_history": shared_history}
    reports = {
        arm: replace(result.reports[arm], seconds={"attention": None, "denoise": value, "decode": 0.0, "total": value})
        for arm, value in seconds.items()
    }
    return replace(result, reports=reports, speedup=_speedup(reports))


def test_speed_is_told_with_its_runs_its_losses_and_its_scatter(lossy):
    attention, gain, _ = timed(lossy[0], 4.0, 4.0, 2.0, 2.0).speed_sentences()
    assert attention == "attention: not measured"
    assert gain == "denoising: 2.00x at 18 tokens (4.00 and 4.00 s against 2.00 and 2.00 s)"
    _, _, loss = timed(lossy[0], 2.0, 2.2, 3.0, 3.0).speed_sentences()
    assert loss.startswith("end to end, decoding included: slower here: 0.70x at 18 tokens (")
    _, scatter, _ = timed(lossy[0], 4.0, 2.0, 3.0, 1.0).speed_sentences()
    assert "1.50x" in scatter
    assert scatter.endswith("the runs overlap, so this is no clear difference)")


def test_it_is_written_as_three_videos_and_a_strict_report(lossy, tmp_path):
    result, _, _ = lossy
    paths = result.write(tmp_path / "out", fps=8)
    assert sorted(path.name for path in paths) == ["accelerated.mp4", "dense.mp4", "report.json", "side_by_side.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in paths)
    both = read_video(tmp_path / "out" / "side_by_side.mp4")
    assert len(both) == 9
    assert both.shape[2] >= 512

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=refuse)
    assert report["settings"]["seed"] == 5
    assert report["settings"]["slots"]["cache"]["knobs"]["threshold"] == 0.0
    assert report["quality"]["free_running"]["psnr"][0] is None  # identical, as `identical_frames` says
    assert report["quality"]["free_running"]["identical_frames"] >= 1
    assert len(report["quality"]["other_seed"]["ssim"]) == 9
    assert set(report["arms"]) == {"dense", "other_seed", "shared_history", "noise_floor"}
    assert report["slots"]["cache"]["method"] == "TempCache"
    assert report["speed"] == result.speed_sentences()
    with pytest.raises(VideoError, match="does not exist"):
        result.write(tmp_path / "no" / "out")


def test_a_technique_that_never_engages_is_told_and_the_rest_is_kept(pipe):
    result = compare(pipe, Accel(cache=TempCache(threshold=1.0)), warm_up=False, **CALL)
    assert "TempCache" in result.idle
    assert not result.reports["free_running"].slots["cache"].engaged
    assert str(result).endswith(result.idle)
    assert result.scores["free_running"].psnr_worst > 60


def test_a_stock_pipeline_has_no_shared_history():
    from diffusers import WanPipeline

    pipe = WanPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    result = compare(pipe, Accel(prompt=PadCollapse()), warm_up=False, **CALL)
    assert list(result.scores) == ["free_running", "noise_floor", "other_seed"]
    assert result.scores["free_running"].psnr_worst > 60 > result.scores["other_seed"].psnr_worst
    assert math.isnan(result.scores["free_running"].seam)
    assert "nan" not in result.table()
    seconds = result.reports["dense"].seconds
    assert seconds["denoise"] + seconds["decode"] == pytest.approx(seconds["total"])


def test_what_the_comparison_sets_itself_is_refused(pipe):
    with pytest.raises(DiffaccelError, match="compare sets 'generator' itself"):
        compare(pipe, Accel(), generator=torch.Generator(), **CALL)


def test_latents_that_are_not_known_are_refused_before_anything_is_computed():
    class Pipeline:
        vae = type("AutoencoderKLCogVideoX", (), {})()

        def __call__(self, **_):
            raise AssertionError("it was computed")

    with pytest.raises(UnsupportedError, match=r"not for the AutoencoderKLCogVideoX of Pipeline: .* eval videos"):
        generate(Pipeline(), None, 0, {})
