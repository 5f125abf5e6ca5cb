"""Forwards of the denoiser that repeat each other, captured once as a CUDA graph and replayed.

A block of a stream is a handful of forwards of a thousand kernels each. Where reuse leaves little to compute, the host
takes longer to launch them than the GPU to run them; a graph is launched at once.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffaccel import replay
from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.run import Run
from diffaccel.spread import devices_of, group_of

_MOST = 8  # graphs held, each with what a forward needs
_REMEMBERED = 64
_RUN, _CAPTURE, _REPLAY = range(3)


def forward(model: Any, latents: Tensor, timestep: Tensor, text: Tensor, **given: Any) -> Tensor:
    """The velocity of latents (B, C, n, h, w)."""
    out: Tensor = model(
        hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False, **given
    )[0]
    return out


def unfit(model: Any) -> str | None:
    """Why forwards of a model cannot be captured, or None."""
    if model.device.type != "cuda":
        return f"these are on {model.device}; leave graphs out"
    if devices_of(model) > 1 and "cuda:nccl" not in (backend := dist.get_backend_config(group_of(model))):
        return f"these are of a model that is shared over {backend}, not cuda:nccl; leave graphs out"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "offload moves these; leave one of the two out"
    return None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage stays: among it may be graphs of an earlier run, and to free their memory breaks a capture off."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class GraphedForwards:
    """Calls of one model under one run: forwards that came before in another block are captured, then replayed.

    The first is run as it is, so that kernels are chosen and compiled; forwards that stand alone always are.

    Raises:
        UnsupportedError: the model is not on a GPU, or is moved there and back (offload).
    """

    def __init__(self, model: Any, run: Run) -> None:
        if why := unfit(model):
            raise UnsupportedError(f"forwards are captured as CUDA graphs of weights that stay on a GPU, and {why}")
        self.model, self.run = model, run
        self.captured = 0
        self._seen: OrderedDict[Hashable, int] = OrderedDict()  # the block that a key was first met in
        self._graphs: OrderedDict[Hashable, Callable[..., Tensor]] = OrderedDict()
        self._pool: Any = None
        self._tables: dict[Grid, tuple[int, tuple[Tensor, Tensor]]] = {}  # the start they are of, and they
        run.still = True

    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor, **given: Any) -> Tensor:
        """The velocity of latents (B, C, n, h, w), inside of `run.at`. Tensors in `given` are inputs of a graph too."""
        leaves, form = tree_flatten(given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def now(latents: Tensor, timestep: Tensor, *tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return forward(self.model, latents, timestep, text, **tree_unflatten(filled, form))

        patch = self.model.config.patch_size
        grid = Grid(*(size // side for size, side in zip(latents.shape[2:], patch, strict=True)))
        key, others = replay.key(self.run, grid, text), [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        inputs = (latents, timestep, *tensors)
        if key is not None and all(isinstance(leaf, bool | int | float | str | None) for leaf in others):
            key = key, str(form), *others, *((x.shape, x.dtype, x.device) for x in inputs)
        else:
            key = None
        due = self._due(key)
        if due == _RUN:
            return now(*inputs)
        if due == _CAPTURE:
            self._graphs[key] = self._capture(now, grid, inputs)
            while len(self._graphs) > _MOST:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        self._rotate(grid, latents)
        return self._graphs[key](text, *inputs)

    def _due(self, key: Hashable | None) -> int:
        """What becomes of a forward; devices that share it do alike, whatever lies where on each."""
        due, block = _RUN, self.run._where.block
        if key in self._graphs:
            due = _REPLAY
        elif key is not None and self._seen.setdefault(key, block) != block:
            due = _CAPTURE
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return due if self.run.spread is None else self.run.spread.least(due)

    def _rotate(self, grid: Grid, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary tables of this block, where the graphs read them."""
        start, kept = self._tables.get(grid, (-1, None))
        if kept is None or start != self.run.start:
            tables = self.model.rope(latents)
            if kept is None:
                kept = tuple(table.clone() for table in tables)
            for held, new in zip(kept, tables, strict=True):
                held.copy_(new)
            self._tables[grid] = self.run.start, kept
        return kept

    def _capture(self, now: Callable[..., Tensor], grid: Grid, given: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        inputs = [x.clone() for x in given]
        self.run.tables = self._rotate(grid, given[0])
        try:
            with replay.recording(self.run), replay.counting(self.run) as counted:
                launch, out = self._record(lambda: now(*inputs))
        finally:
            self.run.tables = None
        self.captured += 1
        branch = self.run._where.branch

        def again(text: Tensor, *given: Tensor) -> Tensor:
            for held, new in zip(inputs, given, strict=True):
                held.copy_(new)
            self.run.enter(grid, branch, None, None)
            self.run.prepare_prompt(text)
            replay.repeat(self.run, grid, counted)
            launch()
            self.run.leave()
            self.run.replayed += 1
            return out.clone()

        return again

    def _record(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What launches the forward again, and where that leaves its result."""
        graph = torch.cuda.CUDAGraph()
        # NCCL has a thread of its own that asks the GPU what is done
        mode = "global" if self.run.spread is None else "thread_local"
        try:
            with _no_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
                out = forward()
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise UnsupportedError(
                f"a forward of {type(self.model).__name__} cannot be captured as a CUDA graph: {why}; leave graphs out"
            ) from error
        self._pool = self._pool or graph.pool()
        return graph.replay, out
