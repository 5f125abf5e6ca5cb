"""Processes that were launched together share one video: each has its own tokens, and its own heads in self-attention.

    torchrun --nproc-per-node 2 script.py

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    pipe = CausalWanPipeline.from_pretrained(...).to("cuda", torch.bfloat16)
    share_heads(pipe)
    with accel(pipe):
        frames = pipe(...).frames  # the same on every process

Every process makes the same calls with the same arguments and noise. All of them have the whole latents after a step,
so each may decode them, or one alone: the others ask for `output_type="latent"`.
"""

from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import nn

from diffaccel import backbone
from diffaccel.errors import UnsupportedError

from .backbones._diffusers import HookRegistry, ModelHook
from .backbones.common import HOOK
from .backbones.plans import plan_of


def share_heads(pipe: Any) -> None:
    """Share the heads of a pipeline's denoisers among all processes of the group, once, before it is accelerated.

    Where diffusers has no plan for a model, or another one, it then only runs under an `Accel`; `Accel()` is dense.

    Raises:
        UnsupportedError: there is one process or no group, no accelerator, a model that cannot be shared, or a number
            of heads that does not divide.
    """
    if not dist.is_initialized() or (devices := dist.get_world_size()) < 2:
        raise UnsupportedError(
            "heads are shared by processes that were launched together, and this one is alone: start it with torchrun "
            "--nproc-per-node N and call torch.distributed.init_process_group first"
        )
    if not torch.accelerator.device_count():
        raise UnsupportedError("diffusers splits tokens between accelerators, and torch finds none here: leave it out")
    family, denoisers = backbone.find(pipe)
    plans = [plan_of(denoiser) for denoiser in denoisers]
    for denoiser in denoisers:
        heads = family.geometry(denoiser).heads
        if heads % devices:
            raise UnsupportedError(
                f"{heads} heads of {type(denoiser).__name__} cannot be shared by {devices} processes: launch a number "
                "that divides"
            )
    for denoiser, plan in zip(denoisers, plans, strict=True):
        model: Any = denoiser
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=devices), cp_plan=plan)
        if plan != model._cp_plan:
            _keep_to_the_seam(model)


def _keep_to_the_seam(model: nn.Module) -> None:
    """Attention that is not replaced reads what is whole, and stock attention in place of the seam would go wrong."""
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = None
    HookRegistry.check_if_exists_or_initialize(model).register_hook(_OnlyAccelerated(), "diffaccel.shared")


class _OnlyAccelerated(ModelHook):
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if HookRegistry.check_if_exists_or_initialize(module).get_hook(HOOK) is None:
            raise UnsupportedError(
                f"after share_heads a {type(module).__name__} runs in `with accel(pipe)` alone; Accel() is dense"
            )
        return args, kwargs
