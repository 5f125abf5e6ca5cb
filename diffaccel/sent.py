"""From the host to a device without waiting for it."""

import torch
from torch import Tensor


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host, on the device when what is queued there reaches its use."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
