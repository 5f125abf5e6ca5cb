"""MS-SSIM, LPIPS, CLIP, motion and drift: against independent implementations and values computed by hand."""

import math
import sys

import cv2
import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from skimage.metrics import structural_similarity
from tiny import tiny_tokenizer

from diffaccel.quality import ClipError, ClipScore, Lpips, MetricError, drift, motion, ms_ssim, warp_error, windows
from diffaccel.quality.lpips import cached


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture (H, W, 3) in [0, 1]."""
    noise = np.random.default_rng(seed).random((height, width, 3))
    blurred = cv2.GaussianBlur(noise, (0, 0), 3)
    return (blurred - blurred.min()) / (blurred.max() - blurred.min())


def moving(frames: int = 4, height: int = 64, width: int = 80, step: int = 2) -> np.ndarray:
    """A picture that moves right by `step` pixels a frame."""
    wide = texture(height, width + step * frames)
    return np.stack([wide[:, step * (frames - f) :][:, :width] for f in range(frames)])


def noisy(clip: np.ndarray, strength: float = 0.05) -> np.ndarray:
    return np.clip(clip + strength * np.random.default_rng(1).standard_normal(clip.shape), 0, 1)


# -- MS-SSIM ---------------------------------------------------------------------------------------------------------


def by_scikit_image(x: np.ndarray, y: np.ndarray) -> float:
    """Wang's five scales on one frame, each by scikit-image: contrast and structure of all, luminance of the last."""
    weights, value = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), 1.0
    for scale, weight in enumerate(weights):
        kind = {"data_range": 1.0, "channel_axis": -1, "gaussian_weights": True, "sigma": 1.5}
        _, whole = structural_similarity(x, y, use_sample_covariance=False, full=True, **kind)
        mean_x, mean_y = (cv2.GaussianBlur(v, (11, 11), 1.5) for v in (x, y))
        luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
        found = whole if scale == 4 else whole / luminance
        value *= found[5:-5, 5:-5].mean() ** weight
        if scale < 4:
            x, y = (v.reshape(v.shape[0] // 2, 2, v.shape[1] // 2, 2, 3).mean((1, 3)) for v in (x, y))
    return value


def test_ms_ssim_equals_five_scales_by_scikit_image():
    a = texture(176, 192)[None]
    b = noisy(a)
    assert ms_ssim(a, b)[0] == pytest.approx(by_scikit_image(a[0], b[0]), abs=2e-3)  # torchmetrics keeps borders
    assert ms_ssim(a, a) == pytest.approx([1.0])
    assert ms_ssim(a, noisy(a, 0.2))[0] < ms_ssim(a, b)[0] < 1
    assert ms_ssim(a, np.roll(a, 4, axis=2))[0] < 0.9


def test_ms_ssim_refuses_frames_without_five_scales():
    with pytest.raises(ClipError, match="sides above 160 pixels, got 200x160"):
        ms_ssim(np.zeros((1, 160, 200, 3)), np.zeros((1, 160, 200, 3)))


def test_ms_ssim_without_torchmetrics_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(MetricError, match=r"pip install 'diffaccel\[eval\]'"):
        ms_ssim(np.zeros((1, 176, 176, 3)), np.zeros((1, 176, 176, 3)))


# -- LPIPS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """A file such as torchvision's, with random weights."""
    torch.manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    held = {}
    for number, (out, into, side) in shapes.items():
        held[f"features.{number}.weight"] = torch.randn(out, into, side, side) * (2 / (into * side * side)) ** 0.5
        held[f"features.{number}.bias"] = 0.1 * torch.randn(out)
    file = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(held | {"classifier.1.bias": torch.zeros(3)}, file)
    return file


def test_lpips_equals_torchmetrics_on_the_same_weights(alexnet, monkeypatch):
    import torchmetrics.functional.image.lpips as theirs
    from torch import nn

    features = nn.Sequential(  # torchvision's AlexNet, which torchmetrics would take from there
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    held = torch.load(alexnet, weights_only=True)
    features.load_state_dict({k[9:]: v for k, v in held.items() if k.startswith("features.")})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: features)
    judge = theirs._LPIPS(net="alex")
    a, lpips = moving(2), Lpips(alexnet)
    for b in (noisy(a), np.roll(a, 3, axis=2)):
        pair = (torch.from_numpy(clip).float().permute(0, 3, 1, 2) for clip in (a, b))
        assert lpips.frames(a, b) == pytest.approx(judge(*pair, normalize=True).flatten().numpy(), rel=1e-4)
    assert lpips.frames(a, a) == pytest.approx([0, 0], abs=1e-9)
    assert lpips.frames(a, noisy(a, 0.2)).mean() > lpips.frames(a, noisy(a, 0.02)).mean()


def test_lpips_says_which_weights_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MetricError, match="not in torch's cache; name a file with --lpips-weights"):
        Lpips()
    with pytest.raises(MetricError, match=r"not at '.*none\.pth'"):
        Lpips(tmp_path / "none.pth")
    assert cached().parent.parent == tmp_path
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(MetricError, match="does not hold AlexNet"):
        Lpips(tmp_path / "other.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(MetricError, match="does not hold AlexNet"):
        Lpips(tmp_path / "other.pth")


# -- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny_tokenizer(12)
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": 1},
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_the_embeddings_over_frames(clip_model):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    clip = np.rint(np.stack([texture(40, 40, seed) for seed in range(3)]) * 255).astype(np.uint8)
    model, images = CLIPModel.from_pretrained(clip_model), CLIPImageProcessor.from_pretrained(clip_model)
    tokens = AutoTokenizer.from_pretrained(clip_model)("a red circle", return_tensors="pt")
    with torch.no_grad():
        text = model.text_projection(model.text_model(**{k: tokens[k] for k in ("input_ids", "attention_mask")})[1])[0]
        seen = model.visual_projection(model.vision_model(**images(list(clip), return_tensors="pt"))[1])
    cosines = [float(one @ text / one.norm() / text.norm()) for one in seen]
    score = ClipScore(clip_model)
    assert score(clip, "a red circle") == pytest.approx(100 * np.mean([max(c, 0) for c in cosines]), abs=1e-3)
    assert score(clip, "a red circle") != score(clip, "the blue square moves up")
    with torch.no_grad():
        score.model.visual_projection.weight.neg_()  # what was alike is opposed now
    assert score(clip, "a red circle") == pytest.approx(100 * np.mean([max(-c, 0) for c in cosines]), abs=1e-3)
    assert 0 <= score(clip, "a red circle " * 20) <= 100  # longer than it reads


def test_a_folder_that_is_no_clip_is_refused(tmp_path):
    with pytest.raises(MetricError, match="cannot be opened as a CLIP"):
        ClipScore(tmp_path)


# -- motion ----------------------------------------------------------------------------------------------------------


def test_motion_of_a_shift_is_the_shift_and_warping_undoes_it():
    clip = moving(step=2)
    found = motion(clip)
    assert found.flow.shape == (3, 64, 80, 2)
    assert np.median(found.flow[..., 0]) == pytest.approx(2, abs=0.05)
    assert np.median(found.flow[..., 1]) == pytest.approx(0, abs=0.05)
    assert not found.visible[:, :, -1].any()  # what leaves on the right
    assert found.visible.mean() > 0.9
    plain = np.square(np.diff(clip, axis=0)).mean()
    assert warp_error(clip) < plain / 20


def test_warp_error_equals_the_definition_by_hand():
    clip, other = moving(3, 24, 32), noisy(moving(3, 24, 32))
    along, total, count = motion(clip), 0.0, 0
    for f in range(2):
        for y in range(24):
            for x in range(32):
                u, v = along.flow[f, y, x].astype(float)
                if not along.visible[f, y, x]:
                    continue
                left, top = min(int(x + u), 30), min(int(y + v), 22)
                a, b = x + u - left, y + v - top
                four = other[f + 1, top : top + 2, left : left + 2]
                there = (1 - b) * ((1 - a) * four[0, 0] + a * four[0, 1]) + b * ((1 - a) * four[1, 0] + a * four[1, 1])
                total, count = total + np.square(there - other[f, y, x]).mean(), count + 1
    assert warp_error(other, along) == pytest.approx(total / count, rel=0.02)  # OpenCV samples at 1/32 pixel
    assert warp_error(other, along) > 10 * warp_error(clip, along)


def test_what_disappears_is_not_counted():
    clip = np.repeat(texture(96, 96)[None], 2, axis=0)
    clip[0, 30:60, 30:60] = texture(30, 30, 7)  # something else, gone in the next frame
    visible = motion(clip).visible[0]
    assert visible[34:56, 34:56].mean() < 0.3
    assert visible[:, 70:].mean() > 0.95
    still = warp_error(np.repeat(clip[1:], 2, axis=0))
    assert still == pytest.approx(0, abs=1e-9)
    with pytest.raises(ClipError, match="at least 2 frames, got 1"):
        motion(clip[:1])
    with pytest.raises(ClipError, match=r"a clip of shape \(2, 96, 96\), and this one has \(3, 96, 96\)"):
        warp_error(np.zeros((3, 96, 96, 3)), motion(clip))


# -- drift -----------------------------------------------------------------------------------------------------------


def test_a_still_clip_does_not_drift():
    found = drift(np.repeat(texture(32, 32)[None], 6, axis=0), [2, 4])
    assert found.colour == pytest.approx((0, 0), abs=1e-5)
    assert found.sharpness == pytest.approx((1, 1))
    assert found.similarity == pytest.approx((1, 1))


def test_colour_drift_equals_scikit_images_lab():
    clip = np.stack([texture(32, 32) * level for level in (0.9, 0.9, 0.6, 0.5)])
    lab = rgb2lab(clip).mean(axis=(1, 2))
    expected = np.linalg.norm(lab[2:].mean(0) - lab[:2].mean(0))
    assert drift(clip, [2]).colour[0] == pytest.approx(expected, abs=0.1)


def test_sharpness_falls_with_blur_as_the_laplacian_says():
    sharp = noisy(texture(32, 32)[None])[0]
    soft = cv2.GaussianBlur(sharp, (0, 0), 1)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])

    def variance(frame):
        gray = np.pad(frame @ (0.299, 0.587, 0.114), 1, mode="reflect")
        edges = sum(kernel[i, j] * gray[i : i + 32, j : j + 32] for i in range(3) for j in range(3))
        return edges.var()

    found = drift(np.stack([sharp, soft]), [1]).sharpness[0]
    assert found == pytest.approx(variance(soft) / variance(sharp), rel=1e-3)
    assert found < 0.3
    assert math.isnan(drift(np.stack([np.zeros_like(sharp), sharp]), [1]).sharpness[0])


def test_similarity_is_the_share_of_pixels_of_like_colour():
    first, later = np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4, 3))
    later[0, :1] = 1.0  # a quarter of the pixels
    assert drift(np.concatenate([first, later]), [1]).similarity == pytest.approx((0.75,))
    moved = np.roll(later, 2, axis=1)
    assert drift(np.concatenate([later, moved]), [1]).similarity == pytest.approx((1.0,))


def test_borders_that_make_no_blocks_are_refused():
    clip = np.zeros((4, 4, 4, 3))
    for borders in ([], [0], [4], [3, 2], [2, 2]):
        with pytest.raises(ClipError, match=r"borders ascend in 1\.\.3"):
            drift(clip, borders)
    assert windows(49) == (16, 32)
    assert windows(31) == ()
    assert len(drift(np.zeros((33, 4, 4, 3)), windows(33)).colour) == 1
