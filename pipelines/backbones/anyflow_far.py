"""AnyFlow-FAR: `AnyFlowFARTransformer3DModel`, which generates block by block and keeps a cache of its own.

FAR (arXiv 2503.19325) reads its newest finished blocks in full and all earlier ones in larger patches, "far". When a
block is finished, the stock pipeline runs the whole history through the model once more. But far blocks read far blocks
alone, so their keys never change; and what is full, a fixed number of blocks, is made anew. So here that pass gets the
block that has just become far and the full ones. The far block is what is finished then: its keys go to the cache, and
every policy acts on those. The full blocks' keys are `Memory.renewed`.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from diffusers import AnyFlowFARTransformer3DModel
from torch import Tensor

from diffaccel.attend import attend
from diffaccel.backbone import Geometry
from diffaccel.cache import Entries, Extent, Fixed
from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.kernel import merge
from diffaccel.port import Port
from diffaccel.rotary import rotate
from diffaccel.run import Run
from diffaccel.site import Part, Site

from ._diffusers import AnyFlowCausalAttnProcessor, AnyFlowCausalRotaryPosEmbed, AnyFlowFARCrossAttnProcessor
from .anyflow import AnyFlow, AnyFlowHook, install


class AnyFlowFAR(AnyFlow):
    """The family of `AnyFlowFARPipeline`."""

    name = "AnyFlow-FAR"
    model = AnyFlowFARTransformer3DModel
    block_causal = True

    def geometry(self, denoiser: Any) -> Geometry:
        return replace(super().geometry(denoiser), coarse_past=True)

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        hook = _Hook(run, self.geometry(denoiser).patch)
        ports: list[tuple[Any, Port]] = []
        for layer, block in enumerate(denoiser.blocks, first_layer):
            ports += [(block.attn1, _Port(run, layer, "self", hook)), (block.attn2, Port(run, layer, "cross"))]
        give_back = install(denoiser, ports, (AnyFlowCausalAttnProcessor, AnyFlowFARCrossAttnProcessor), hook)
        own = vars(denoiser).get("build_attention_mask")
        denoiser.build_attention_mask = _no_mask
        run.later = lambda k_BNHD, frames: _later(denoiser.rope, k_BNHD, frames)

        def undo() -> None:
            hook.stack.close()
            del denoiser.build_attention_mask
            if own is not None:
                denoiser.build_attention_mask = own
            give_back()

        return undo


def _no_mask(**_: Any) -> Tensor:
    """For FAR's mask over all pairs of tokens of the history: who reads whom is known without."""
    return torch.empty(0)


class _Hook(AnyFlowHook):
    arguments = (
        *AnyFlowHook.arguments, "chunk_partition", "encoder_hidden_states_image", "clean_hidden_states",
        "clean_timestep", "kv_cache", "kv_cache_flag", "attention_mask",
    )  # fmt: skip

    def __init__(self, run: Run, patch: tuple[int, int, int]) -> None:
        super().__init__(run, patch)
        self.stack = ExitStack()  # where the run is told to be, from before a forward until after it
        self.stock_cache: weakref.ref[Tensor] | None = None  # one tensor of that of this generation
        self.full: tuple[Site, ...] = ()  # in a pass over finished blocks: those that are full
        self.far = False  # in such a pass: whether a block stands before them that becomes far
        self.skipped = 0  # latent frames before the first of such a pass
        self.steps, self.noise = 1, (torch.empty(0), [0.0])  # of the scheduler, by its tensor
        self.at_work = Grid(1, 1, 1)  # of what the cache takes in this forward
        self.tokens = 1  # of this forward

    def grid(self, given: dict[str, Any]) -> Grid:
        return self.at_work

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        self.stack.close()  # of a forward that an error ended
        if given.get("kv_cache") is None or given.get("clean_hidden_states") is not None:
            raise UnsupportedError(
                "a forward without a cache is FAR's training, which reads all blocks at once: call the pipeline with "
                "use_kv_cache=True"
            )
        latents, sizes, finished = given["hidden_states"], given["chunk_partition"], len(given["chunk_partition"]) - 1
        full, far = (
            Grid(1, latents.shape[3] // patch[1], latents.shape[4] // patch[2])
            for patch in (self.patch, module.config.compressed_patch_size)
        )
        self._begin(given, module, full, far)
        if given["kv_cache_flag"]["num_cached_chunks"] != finished:
            raise UnsupportedError(
                f"blocks are finished one after the other, and {given['kv_cache_flag']['num_cached_chunks']} of "
                f"{finished} before this one were: run the pass with is_cache_step=True after each"
            )
        self.full, self.far, self.skipped = (), False, 0
        self.at_work = replace(full, frames=sizes[finished])
        self.tokens = self.at_work.tokens
        if given["kv_cache_flag"]["is_cache_step"]:
            where = self._finish(given, full, far, module.config.full_chunk_limit - 1)
        else:
            where = {"block": finished, "start": sum(sizes[:finished]), **self._step()}
        self.stack.enter_context(self.run.at(**where))
        return super().pre_forward(module, **given)

    def _finish(self, given: dict[str, Any], full: Grid, far: Grid, limit: int) -> dict[str, Any]:
        """Cut a pass over all blocks to those whose keys change: one that becomes far, and the `limit` newest ones."""
        sizes = given["chunk_partition"]
        starts, becomes = [0, *accumulate(sizes)], len(sizes) - 1 - limit
        self.full = tuple(
            Site(0, "self", self.steps, self.steps, block, starts[block], "clean", "cond", replace(full, frames=frames))
            for block, frames in enumerate(sizes)
            if block > becomes
        )
        self.tokens = sum(site.grid.tokens for site in self.full)
        given["attention_mask"] = _no_mask()
        where = {"block": len(sizes) - 1, "start": starts[-2], "step": self.steps, "steps": self.steps, "noise": 0.0}
        if becomes < 0:  # nothing is finished for the cache
            return where
        self.far, self.skipped = True, starts[becomes]
        self.at_work = replace(far, frames=sizes[becomes])
        self.tokens += self.at_work.tokens
        given |= {name: given[name][:, self.skipped :] for name in ("hidden_states", "timestep", "r_timestep")}
        given["chunk_partition"] = sizes[becomes:]
        return where | {"block": becomes, "start": self.skipped, "phase": "clean"}

    def _begin(self, given: dict[str, Any], module: Any, full: Grid, far: Grid) -> None:
        """A generation starts, if this is its first forward: the pipeline makes a new cache for each."""
        caches, config = given["kv_cache"], module.config
        if self.stock_cache is not None and self.stock_cache() is caches[0]["full_cache"]:
            return
        if given["kv_cache_flag"]["num_cached_chunks"]:
            raise UnsupportedError(
                "this generation began before the pipeline was accelerated, and its first blocks lie in the stock "
                "cache: enter the `with` before the pipeline is called"
            )
        longest = caches[0]["full_cache"].shape[3] // (config.full_chunk_limit * full.tokens)
        frames = caches[0]["compressed_cache"].shape[3] // far.tokens  # at most
        geometry = AnyFlowFAR().geometry(module)
        block, latents = replace(far, frames=longest), given["hidden_states"]
        self.run.begin(
            frames,
            Extent(frames, block, geometry.layers, geometry.heads, geometry.head_dim, len(latents), 1, latents.dtype),
        )
        for layer in range(geometry.layers):
            self.run.memory(Site(layer, "self", 0, 1, 0, 0, "denoise", "cond", block))  # which has room for far blocks
            held = caches[layer]  # nobody reads or writes it
            held.update({name: tensor.new_empty(0) for name, tensor in held.items()})
        self.stock_cache = weakref.ref(caches[0]["full_cache"])

    def _step(self) -> dict[str, Any]:
        """Which denoising step this is."""
        scheduler = self.run.pipe.scheduler
        if scheduler.sigmas is not self.noise[0]:
            self.noise = scheduler.sigmas, scheduler.sigmas.tolist()  # once a block: it may lie on the device
            self.steps = len(scheduler.timesteps)
        step = scheduler.step_index or 0
        return {"step": step, "steps": self.steps, "noise": self.noise[1][step]}

    def tables(self, rope: Any, args: Any, kwargs: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of this forward's own tokens, which are the last ones, at their places in the whole video."""
        layout = kwargs["far_cfg"]
        if self.skipped:
            moved = {name: layout[name] + self.skipped for name in ("total_frames", "num_compressed_frames")}
            found = rope.forward(**kwargs | {"far_cfg": layout | moved})
        return super().tables(rope, args, kwargs, {"query": found["query"][:, :, -self.tokens :]})

    def post_forward(self, module: Any, output: Any) -> Any:
        output = super().post_forward(module, output)
        self.stack.close()
        return output


class _Port(Port):
    """Self-attention of FAR, which in a pass over finished blocks is one of several blocks at once."""

    def __init__(self, run: Run, layer: int, part: Part, hook: _Hook) -> None:
        super().__init__(run, layer, part)
        self.hook = hook

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.hook.full:
            return super().attend(q, k, v)
        with self.run.timed(q.device, self.layer, self.part):
            return self._finished(q, k, v)

    def _finished(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each block reads the far ones and those before it; the full ones are what the next block reads of them."""
        run, out, first = self.run, [], 0
        site = run.site(self.layer, self.part)
        memory = run.memory(site)
        memory.renewed = []
        if self.hook.far:
            first = site.grid.tokens
            out.append(attend(q[:, :first], k[:, :first], v[:, :first], site, run))
        past = memory.past_and_block() if self.hook.far else []  # else none was far before
        k_full, v_full = k[:, first:].clone(), v[:, first:].clone()  # compiled code writes over what it passes on
        frames = torch.cat([site.grid.frame_of_token(site.start) for site in self.hook.full])
        start = 0
        for block in self.hook.full:
            stop = start + block.grid.tokens
            own = Fixed(Entries(k_full[:, :stop], v_full[:, :stop], frames[:stop], at_work=True))
            call = run.open(replace(block, layer=self.layer), q)
            q_block = q[:, first + start : first + stop]
            out.append(merge([tier.partial(q_block, call.read) for tier in [*past, own] if tier.count]).out)
            run.close(call, keys=first + stop)
            start = stop
        memory.renewed, memory.version = [Fixed(Entries(k_full, v_full, frames))], memory.version + 1
        return torch.cat(out, 1)


def _later(rope: AnyFlowCausalRotaryPosEmbed, k_BNHD: Tensor, frames: int) -> Tensor:
    """Rotated keys as they would be `frames` latent frames later."""
    size = rope.attention_head_dim // 2 - 2 * (rope.attention_head_dim // 6)
    angles = rope._build_freqs(k_BNHD.device)[frames, :size]
    tables = [k_BNHD.new_full((1, 1, 1, k_BNHD.shape[3]), still, dtype=torch.float32) for still in (1.0, 0.0)]
    for table, values in zip(tables, (angles.real, angles.imag), strict=True):
        table[..., : 2 * size] = values.repeat_interleave(2)
    return rotate(k_BNHD, *tables)
