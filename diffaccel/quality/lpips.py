"""LPIPS, the distance of two frames to a network that sees: one number a frame."""

import pickle
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .clips import Clip, as_pair
from .multiscale import MetricError

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of the colours of ImageNet on the scale [-1, 1]."""

URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
"""AlexNet as torchvision has it, 233 MB, which is what LPIPS 0.1 sees through."""


class Lpips(nn.Module):
    """Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", 2018: v0.1 on AlexNet.

    AlexNet's weights are `weights`, a file as torchvision saves them; by default the one that torchvision or
    `Lpips.download` left in torch's cache. The weights of the five layers' channels come with torchmetrics. The
    convolutions are written out here so that torchvision, which has to match torch to the letter, is not needed.

    Raises `MetricError` where either is missing or is something else.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.features = nn.Sequential(  # numbered as torchvision's
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        file = cached() if weights is None else Path(weights)
        if not file.is_file():
            where = "in torch's cache" if weights is None else f"at '{file}'"
            raise MetricError(
                f"the weights of AlexNet, which LPIPS sees through, are not {where}; name a file with "
                "--lpips-weights, or --lpips-weights download (233 MB)"
            )
        try:
            held = torch.load(file, map_location="cpu", weights_only=True)
            self.features.load_state_dict({k[9:]: v for k, v in held.items() if k.startswith("features.")})
        except (OSError, RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            first = str(error).strip().splitlines()[0]
            raise MetricError(f"'{file}' does not hold AlexNet as torchvision saves it: {first}") from error
        self.channels = _channel_weights()
        self.eval().requires_grad_(False)

    @staticmethod
    def download() -> Path:
        """Fetch AlexNet's weights into torch's cache, and say where. Raises `MetricError` where they cannot be had."""
        try:
            torch.hub.download_url_to_file(URL, str(_made(cached())), hash_prefix="7be5be79", progress=False)
        except (OSError, RuntimeError) as error:
            raise MetricError(f"the weights of AlexNet cannot be fetched from {URL}: {error}") from error
        return cached()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def frames(self, a: Clip, b: Clip) -> NDArray[np.float64]:
        """LPIPS of every frame, shape (F,); 0 where two frames are identical. Sides of 31 pixels or more."""
        left, right = as_pair(a, b)
        return np.array([self._pair(x, y) for x, y in zip(left, right, strict=True)])

    def _pair(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        both = torch.from_numpy(np.stack([x, y])).float().permute(0, 3, 1, 2).to(self.device)
        shift, scale = (torch.tensor(rgb, device=both.device).view(1, 3, 1, 1) for rgb in (_SHIFT, _SCALE))
        seen, total = (2 * both - 1 - shift) / scale, 0.0
        layers = iter(self.channels)
        for layer in self.features:
            seen = layer(seen)
            if isinstance(layer, nn.ReLU):
                unit = seen / (seen.square().sum(1, keepdim=True).sqrt() + 1e-8)
                total += float(((unit[0] - unit[1]).square() * next(layers).to(unit.device)).sum(0).mean())
        return total


def cached() -> Path:
    """Where torch keeps the weights that torchvision downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _channel_weights() -> list[Tensor]:
    """One weight a channel (C, 1, 1) of each of the five layers."""
    try:
        import torchmetrics.functional.image.lpips as theirs

        held = torch.load(
            Path(theirs.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu", weights_only=True
        )
    except (ImportError, OSError) as error:
        raise MetricError(
            "torchmetrics, which has the weights of LPIPS, is not installed: pip install 'diffaccel[eval]'"
        ) from error
    return [held[f"lin{number}.model.1.weight"][0] for number in range(5)]
