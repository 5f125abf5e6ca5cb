"""Muon (Jordan et al., 2024): momentum whose every matrix update is made orthogonal, here in batches of one shape.

`torch.optim.Muon` walks matrix by matrix, thousands of launches a step for a model this small.
"""

from collections.abc import Iterable

import torch

from .checkpoint import learning_rate
from .config import Stage
from .parallel import Workers

# Quintic Newton-Schulz coefficients of the published method: steep at 0, so that five rounds suffice.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """The matrices (N, R, C) with all singular values moved to about 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    flip = x.shape[1] > x.shape[2]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if flip else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """For weight matrices inside a network; embeddings, heads, norms and biases belong to AdamW.

    A convolution counts as the matrix of its output channels against all the rest. The update's size is that of AdamW
    at the same rate (Moonlight, arXiv 2502.16982, section 2.2).
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices, those of one shape together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for members in shapes.values():
                grads = torch.stack([p.grad for p in members])  # type: ignore[misc]
                state = self.state[members[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grads)
                held = state["momentum"].lerp_(grads, 1 - group["momentum"])
                update = orthogonalise(grads.lerp_(held, group["momentum"]).flatten(2))
                scale = 0.2 * max(update.shape[1:]) ** 0.5 * group["lr"]
                torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(members, list(update.view_as(grads).unbind(0)), alpha=-scale)


class Optimisers:
    """Muon for `matrices`, AdamW for `others`; one schedule."""

    def __init__(
        self, matrices: Iterable[torch.nn.Parameter], others: Iterable[torch.nn.Parameter], stage: Stage
    ) -> None:
        matrices, others, rate = list(matrices), list(others), stage.adam_lr
        fused = matrices[0].is_cuda
        self.parameters = [*matrices, *others]
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, stage.lr), stage.lr),
            (torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fused), rate),
        ]

    def step(self, workers: Workers, step: int, progress: float, warmup: int) -> None:
        """Average and clip the gradients, then update."""
        workers.average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, peak in self.parts:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(peak, step, progress, warmup)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
