"""Metrics against independent implementations and against values computed by hand."""

import json
import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from diffaccel.errors import DiffaccelError
from diffaccel.quality import (
    ClipError,
    as_float_clip,
    chunk_borders,
    compare_clips,
    flicker,
    frame_jumps,
    psnr,
    seam,
    ssim,
)


def smooth_pair(frames: int = 2, height: int = 37, width: int = 52) -> tuple[np.ndarray, np.ndarray]:
    """A clip with structure, and the same with noise that grows from frame to frame."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.stack([np.sin(x / (4 + c) + f) * np.cos(y / 7) for c in range(3)], -1) for f in range(frames)]
    clip = 0.5 + 0.4 * np.stack(waves)
    strength = np.linspace(0.02, 0.1, frames)[:, None, None, None]
    return clip, np.clip(clip + strength * rng.standard_normal(clip.shape), 0, 1)


def as_nchw(clip: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clip).permute(0, 3, 1, 2)


def test_psnr_equals_torchmetrics_on_every_frame():
    a, b = smooth_pair()
    for value, x, y in zip(psnr(a, b), as_nchw(a), as_nchw(b), strict=True):
        assert value == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1.0).item(), abs=1e-4)


def test_psnr_of_one_grey_level_is_what_the_formula_says():
    a = np.full((1, 16, 16, 3), 100, dtype=np.uint8)
    assert psnr(a, a + np.uint8(1))[0] == pytest.approx(20 * math.log10(255), abs=1e-9)
    assert psnr(a, a)[0] == math.inf


def test_ssim_equals_scikit_image_and_torchmetrics_on_every_frame():
    a, b = smooth_pair()
    for value, x, y in zip(ssim(a, b), a, b, strict=True):
        wang = structural_similarity(
            x, y, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert value == pytest.approx(wang, abs=1e-4)
    _, theirs = structural_similarity_index_measure(as_nchw(b), as_nchw(a), data_range=1.0, return_full_image=True)
    inside = theirs[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))  # torchmetrics also counts windows that hang over the border
    assert ssim(a, b) == pytest.approx(inside.numpy(), abs=1e-4)
    assert ssim(a, b)[0] > ssim(a, b)[1]


def test_ssim_is_one_for_identical_frames_and_not_for_a_shifted_one():
    a, _ = smooth_pair()
    assert ssim(a, a) == pytest.approx([1.0, 1.0], abs=1e-12)
    assert ssim(a, np.roll(a, 3, axis=2)).max() < 0.95


def test_uint8_and_float_of_the_same_clip_score_alike():
    a, b = ((clip * 255).round().astype(np.uint8) for clip in smooth_pair())
    assert psnr(a, b) == pytest.approx(psnr(a / 255.0, b.astype(np.float32) / 255.0), abs=1e-4)


def test_flicker_is_zero_for_a_fade_and_four_times_the_amplitude_over_two_for_blinking():
    fade = np.linspace(0, 1, 5)[:, None, None, None] * np.ones((5, 8, 8, 3))
    blink = 0.5 + 0.1 * (-1.0) ** np.arange(6)[:, None, None, None] * np.ones((6, 8, 8, 3))
    assert flicker(fade) == pytest.approx(0.0, abs=1e-12)
    assert flicker(blink) == pytest.approx(0.4)  # 0.6 - 2 * 0.4 + 0.6
    assert math.isnan(flicker(fade[:2]))


def test_seam_is_the_ratio_of_jumps():
    levels = np.cumsum([0.0, 0.01, 0.01, 0.05, 0.01, 0.01])
    clip = levels[:, None, None, None] * np.ones((6, 4, 4, 3))
    assert frame_jumps(clip) == pytest.approx([0.01, 0.01, 0.05, 0.01, 0.01])
    assert seam(clip, [3]) == pytest.approx(5.0)
    assert seam(clip, [2]) == pytest.approx(0.01 / 0.02)
    assert seam(np.zeros_like(clip), [3]) == 1.0
    assert math.isnan(seam(clip, []))
    stop = np.repeat([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 48).reshape(6, 4, 4, 3)
    assert seam(stop, [3]) == math.inf


def test_chunk_borders_follow_the_causal_autoencoder():
    assert chunk_borders(81, frames_per_block=3) == (9, 21, 33, 45, 57, 69)
    assert chunk_borders(9, frames_per_block=1) == (1, 5)
    assert chunk_borders(9, frames_per_block=3) == ()
    assert chunk_borders(25, frames_per_block=3) == (1, 13)  # 7 latent frames: blocks of 1, 3 and 3


def test_scores_ignore_untouched_frames_in_the_mean_but_count_them():
    a, b = smooth_pair(frames=4)
    b[:2] = a[:2]
    scores = compare_clips(a, b, borders=[2])
    assert scores.identical_frames == 2
    assert not scores.identical
    assert scores.psnr_mean == pytest.approx(psnr(a[2:], b[2:]).mean())
    assert scores.psnr_pooled > scores.psnr_mean > scores.psnr_worst == psnr(a, b).min()
    assert scores.ssim_mean == pytest.approx(ssim(a, b).mean())
    assert (scores.flicker, scores.seam) == (flicker(b), seam(b, [2]))
    assert (scores.flicker_reference, scores.seam_reference) == (flicker(a), seam(a, [2]))


def test_scores_of_identical_clips_are_strict_json():
    a, _ = smooth_pair()
    scores = compare_clips(a, a.copy())
    assert scores.identical
    assert scores.psnr_mean == math.inf
    written = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert written["identical"] is True
    assert written["identical_frames"] == 2
    assert written["psnr_mean"] is None
    assert written["psnr"] == [None, None]
    assert written["seam"] is None
    assert written["ssim_mean"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("clip", "sentence"),
    [
        (np.zeros((2, 16, 16)), "must have the shape"),
        (np.zeros((2, 16, 16, 4)), "must have the shape"),
        (np.zeros((0, 16, 16, 3)), "must have the shape"),
        (np.zeros((2, 16, 16, 3), dtype=np.int64), "uint8, or float"),
        (np.full((2, 16, 16, 3), 200.0), r"\[200, 200\]"),
        (np.full((2, 16, 16, 3), -1.0), r"\[0, 1\]"),
        (np.full((2, 16, 16, 3), np.nan), "not finite"),
    ],
)
def test_what_is_no_clip_is_refused(clip, sentence):
    with pytest.raises(ClipError, match=sentence):
        as_float_clip(clip)


def test_clips_of_unequal_shape_are_refused_with_both_shapes():
    a, _ = smooth_pair()
    for measure in (psnr, ssim, compare_clips):
        with pytest.raises(ClipError, match=r"\(2, 37, 52, 3\) and \(1, 37, 52, 3\)"):
            measure(a, a[:1])
    assert issubclass(ClipError, DiffaccelError)
    assert issubclass(ClipError, ValueError)


def test_frames_smaller_than_the_window_and_borders_outside_the_clip_are_refused():
    small = np.zeros((2, 10, 16, 3))
    with pytest.raises(ClipError, match="at least 11x11 pixels, got 16x10"):
        ssim(small, small)
    for border in (0, 2, -1):
        with pytest.raises(ClipError, match=r"chunk borders must lie in 1\.\.1"):
            seam(small, [border])
    with pytest.raises(ClipError, match="temporal factor"):
        chunk_borders(9, 0)
