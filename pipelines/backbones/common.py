"""What the families share: how a model's attention is exchanged and given back, and the one hook on its root."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffaccel.backbone import Geometry
from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.joint import Text
from diffaccel.port import Port, compiled_attend, compiled_attend_projected, compiled_attend_prompt
from diffaccel.run import Run
from diffaccel.spread import Spread, devices_of

from . import step_caches
from ._diffusers import HookRegistry, ModelHook, StateManager
from .plans import is_split_by, plan_of, splits_text
from .step_caches import HOOK


class ToSeam:
    """Mixed into a stock processor, in front of its class: what takes the place of its kernel call."""

    def __init__(self, port: Port) -> None:
        super().__init__()
        self.port, self.handle = port, port.handle

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of (B, S, H, D) queries to (B, N, H, D) keys and values."""
        if torch.compiler.is_compiling():
            return compiled_attend(q, k, v, self.handle)
        return self.port.attend(q, k, v)

    def attend_projected(
        self, q: Tensor, k: Tensor, v: Tensor, q_norm: nn.RMSNorm, k_norm: nn.RMSNorm, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """As `attend`, of queries and keys not yet normed and turned."""
        eps = torch.finfo(q.dtype).eps if q_norm.eps is None else q_norm.eps
        given = (q, k, v, q_norm.weight, k_norm.weight, eps, cos, sin)
        if torch.compiler.is_compiling():
            return compiled_attend_projected(*given, self.handle)
        return self.port.attend_projected(*given)

    def attend_prompt(self, q: Tensor, text: Tensor, to_k: nn.Linear, to_v: nn.Linear, norm: nn.RMSNorm) -> Tensor:
        """Cross-attention of (B, S, H, D) queries to the prompt (B, T, C)."""
        eps = torch.finfo(text.dtype).eps if norm.eps is None else norm.eps
        weights = (to_k.weight, to_k.bias, to_v.weight, to_v.bias, norm.weight)
        if torch.compiler.is_compiling():
            return compiled_attend_prompt(q, text, *weights, eps, self.handle)
        return self.port.attend_prompt(q, text, weights, eps)


class Family:
    """What most families share: a pipeline has one denoiser, and its configuration says how large that is."""

    model: ClassVar[type[nn.Module]]
    parts: ClassVar[tuple[str, ...]]

    def denoisers(self, pipe: Any) -> list[nn.Module]:
        found = getattr(pipe, "transformer", None)
        return [found] if isinstance(found, self.model) else []

    def geometry(self, denoiser: Any) -> Geometry:
        config = denoiser.config
        return Geometry(
            backbone=type(denoiser).__name__,
            layers=self.layers(config),
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            patch=self.patch(config),
            parts=self.parts,
        )

    def layers(self, config: Any) -> int:
        return int(config.num_layers)

    def patch(self, config: Any) -> tuple[int, int, int]:
        """Latents of a token: frames, rows, columns."""
        size = config.patch_size
        if isinstance(size, int):
            return getattr(config, "patch_size_t", None) or 1, size, size
        frames, rows, columns = size
        return frames, rows, columns


def plain(*modules: nn.Module) -> bool:
    """Whether modules are no more than their weights: no adapter, no quantisation, no hook, nothing to train."""
    kinds = (nn.Linear, nn.RMSNorm)
    return all(
        type(module) in kinds
        and not hasattr(module, "_hf_hook")
        and not hasattr(module, "_diffusers_hook")
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and all(type(weight) is nn.Parameter for weight in module.parameters())
        for module in modules
    )


class RootHook(ModelHook):
    """Tells the run where a forward stands before it, and commits a finished block after it.

    diffusers' registry only tells it the context and when a generation ends; hooks of `nn.Module` call it at a forward,
    since model offload writes `forward` anew after each generation, and what was wrapped around it is gone.
    """

    _is_stateful = True
    # of the model's forward, in order
    arguments: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep", "encoder_hidden_states")
    branch_by: ClassVar[str] = "encoder_hidden_states"  # a tensor that pipelines keep, another for each branch

    def __init__(self, run: Run, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.run, self.patch = run, patch
        self.spread: Spread | None = None  # where several devices share the model
        self.contexts = StateManager(dict)
        self.prompts: list[weakref.ref[Tensor]] = []  # of each branch, where the pipeline names none
        self.checked: set[tuple[str, int, int, bool]] = set()  # what step caches depend on, as far as it was met

    def text(self, arguments: dict[str, Any]) -> Text | None:
        """Where the text lies in the tokens of a joint attention; None where the text is read by cross-attention."""
        return None

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        _refuse_compiled(module)
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        if self.spread is not None:
            self.spread.check(module.config.num_attention_heads, self.grid(given).tokens, self.text(given))
        elif devices_of(module) > 1:
            raise UnsupportedError(
                "devices began to share this model while it was accelerated: call enable_parallelism before that"
            )
        self._enter(given)
        self._check_step_cache(module)
        if self.run.looks_first():
            with self.run.full_field() as grid:
                small = self.smaller(given, grid)
                per_token = given["timestep"].shape[1:].numel() > grid.frames
                if per_token and small["hidden_states"] is not given["hidden_states"]:
                    raise UnsupportedError(
                        "passes on a smaller grid are for one noise level a forward, and this pipeline gives each "
                        'token its own: take FullFieldGuide(shrink=1), guide_field="whole" of FreeSwimPipeline'
                    )
                placed = [small.get(name, value) for name, value in zip(self.arguments, args, strict=False)]
                named = {name: small.get(name, value) for name, value in kwargs.items()}
                module(*placed, *args[len(placed) :], **named)
            self._enter(given)
        self.run.keeps_prompt = "_hf_peft_config_loaded" not in vars(module)  # which stays when an adapter is gone
        prompt = self.run.prepare_prompt(given["encoder_hidden_states"])
        place = self.arguments.index("encoder_hidden_states")
        if len(args) > place:
            return (*args[:place], prompt, *args[place + 1 :]), kwargs
        return args, {**kwargs, "encoder_hidden_states": prompt}

    def step(self, given: dict[str, Any]) -> tuple[int | None, int | None]:
        """The denoising step of this forward and how many there are, as far as the pipeline says."""
        context = self.contexts._context
        return (context.step_index, context.num_inference_steps) if context else (None, None)

    def grid(self, given: dict[str, Any]) -> Grid:
        """How the video's tokens lie."""
        return Grid(*(size // side for size, side in zip(given["hidden_states"].shape[2:], self.patch, strict=True)))

    def smaller(self, given: dict[str, Any], grid: Grid) -> dict[str, Any]:
        """The arguments that are others in a forward of as many tokens as `grid` has."""
        return {"hidden_states": self.shrunk(given["hidden_states"], grid)}

    def shrunk(self, latents: Tensor, grid: Grid) -> Tensor:
        """Latents (B, C, L, h, w) of as many tokens as `grid` has, the nearest ones: a mean would have less noise."""
        for axis, tokens in ((3, grid.height), (4, grid.width)):
            many, few = latents.shape[axis], tokens * self.patch[axis - 2]
            if few != many:
                places = ((torch.arange(few, device=latents.device) + 0.5) * many / few).long()
                latents = latents.index_select(axis, places)
        return latents

    def _enter(self, given: dict[str, Any]) -> None:
        context = self.contexts._context
        step, steps = self.step(given)
        self.run.enter(
            self.grid(given),
            branch=context.name if context else self._branch(given[self.branch_by]),
            step=step,
            steps=steps,
            text=self.text(given),
        )

    def _branch(self, prompt: Tensor) -> str:
        """A name for the forwards that get this very tensor: a pipeline keeps one for each branch of guidance."""
        known = [ref() for ref in self.prompts]
        for wanted in (prompt, None):  # its own place, or one whose prompt is gone
            for number, other in enumerate(known):
                if other is wanted:
                    self.prompts[number] = weakref.ref(prompt)
                    return f"branch {number}"
        self.prompts.append(weakref.ref(prompt))
        return f"branch {len(known)}"

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        latents = {**dict(zip(self.arguments, args, strict=False)), **kwargs}["hidden_states"]
        return self.run.forward(latents, lambda: self.fn_ref.original_forward(*args, **kwargs))

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.run.leave()
        return output

    def _check_step_cache(self, module: Any) -> None:
        """Once for all forwards that are alike: a cache may be enabled, and steps be fewer, in the middle of a run."""
        branch, steps = self.run._where.branch, self.run._where.steps
        enabled = id(getattr(module, "_cache_config", None)), getattr(module, "_is_cached", False)
        if (branch, steps, *enabled) not in self.checked:
            self.checked.add((branch, steps, *enabled))
            step_caches.refuse(module, self.run, steps, len({known[0] for known in self.checked}))

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.checked.clear()
        self.run.forget()
        return module


def exchange(
    denoiser: nn.Module,
    ports: Sequence[tuple[Any, Port]],
    stock: Any,
    processor: Callable[[Port], Any],
    hook: RootHook,
) -> Callable[[], None]:
    """Give each attention the `processor` of its port in place of one of class `stock`, and the root its hook.

    Where classes differ, `stock` is a tuple of them.

    Returns what undoes that exactly. Raises `UnsupportedError`, with nothing changed, where an attention runs another
    processor or is split by context parallelism.
    """
    stocks = stock if isinstance(stock, tuple) else (stock,)
    for attention, _ in ports:
        if type(attention.processor) not in stocks:
            raise UnsupportedError(
                f"an attention of this {type(denoiser).__name__} runs {type(attention.processor).__name__} "
                "already: remove it first, diffaccel replaces the stock processor only"
            )
    _refuse_compiled(denoiser)
    step_caches.refuse(denoiser, run := ports[0][1].run)
    run.spread = hook.spread = _spread(denoiser, run)
    before = [attention.processor for attention, _ in ports]
    for attention, port in ports:
        attention.processor, port.spread = processor(port), hook.spread
    take_back = _hook(denoiser, hook)

    def undo() -> None:
        take_back()
        for (attention, _), processor in zip(ports, before, strict=True):
            attention.processor = processor

    return undo


def _spread(denoiser: Any, run: Run) -> Spread | None:
    """Between which devices the heads of a model are shared. Raises `UnsupportedError` where that would go wrong."""
    if devices_of(denoiser) < 2:
        return None
    plan = plan_of(denoiser)
    if not is_split_by(denoiser, plan):
        raise UnsupportedError(
            f"the tokens of this {type(denoiser).__name__} are split otherwise than diffaccel expects: call "
            "share_heads(pipe) of diffaccel.pipelines in place of enable_parallelism"
        )
    return Spread.of(denoiser._parallel_config, run.accel, whole_text=not splits_text(plan))


def _refuse_compiled(denoiser: Any) -> None:
    if denoiser._compiled_call_impl is not None:
        raise UnsupportedError(
            f"this {type(denoiser).__name__} is compiled as a whole, and anew whenever a technique decides otherwise: "
            "leave compile() out and take compile_repeated_blocks(fullgraph=True)"
        )


def _hook(denoiser: Any, hook: RootHook) -> Callable[[], None]:
    """Hang the hook on the root; what undoes it leaves everything there that came or went since."""
    attributes = set(vars(denoiser))
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    below = denoiser.forward
    registry.register_hook(hook, HOOK)
    registry.invalidate_child_registries_cache()
    passing, idle = denoiser.forward, ModelHook()
    hook.fn_ref.pre_forward, hook.fn_ref.post_forward = idle.pre_forward, idle.post_forward
    handles = [
        denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: hook.pre_forward(module, *args, **kwargs), with_kwargs=True
        ),
        denoiser.register_forward_hook(lambda module, _, output: hook.post_forward(module, output)),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        forward = denoiser.forward
        registry.remove_hook(HOOK, recurse=False)
        registry.invalidate_child_registries_cache()
        if forward is not passing:  # offload, or another hook, came or went
            denoiser.forward = forward
            if vars(denoiser).get("_old_forward") is passing:
                denoiser._old_forward = below
        elif not registry.hooks and "forward" not in attributes:
            del denoiser.forward
        if not registry.hooks and "_diffusers_hook" not in attributes:
            del denoiser._diffusers_hook

    return undo
