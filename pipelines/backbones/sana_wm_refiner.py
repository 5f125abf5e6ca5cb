"""SANA-WM's refiner: `SanaWMLTX2RefinerTransformer3DModel`, block by block over a cache of the pipeline's own.

The pipeline keeps keys of a sink, turned to stand right before the rest, and of the newest finished frames. With every
block these are others, but while it is denoised they stay. So they are copied from there once a block, where the stock
processor joins them to the block's at every step, and they are the past that policies act on.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import SanaWMLTX2RefinerTransformer3DModel
from torch import Tensor

from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.port import Port
from diffaccel.run import Run

from ._diffusers import SanaWMLTX2RefinerAttnProcessor, apply_interleaved_rotary_emb, apply_split_rotary_emb
from .common import Family, RootHook, ToSeam, exchange


class SanaWMRefiner(Family):
    """The family of `SanaWMLTX2Refiner`: self-attention."""

    name = "SANA-WM refiner"
    model = SanaWMLTX2RefinerTransformer3DModel
    parts = ("self",)
    block_causal = True

    def refuses(self, denoiser: Any, slot: str) -> str | None:
        if slot == "prompt":
            return "its prompt is read under a mask, so that attention stays as it is"
        if slot in ("cache", "window"):
            return (
                "it keeps a sink and the newest frames itself, at places that move: pass kv_max_frames to the pipeline"
            )
        return None

    def install(self, denoiser: Any, run: Run, first_layer: int) -> Callable[[], None]:
        hook = _RootHook(run, self.geometry(denoiser).patch)
        blocks = enumerate(denoiser.transformer_blocks, first_layer)
        ports = [(block.attn1, Port(run, layer, "self")) for layer, block in blocks]
        give_back = exchange(denoiser, ports, SanaWMLTX2RefinerAttnProcessor, _Processor, hook)
        hook.first_layer, hook.tables = first_layer, denoiser.build_rotary_emb_for_absolute_positions
        denoiser.build_rotary_emb_for_absolute_positions = hook.see_places

        def undo() -> None:
            hook.stack.close()
            del denoiser.build_rotary_emb_for_absolute_positions
            give_back()

        return undo


class _RootHook(RootHook):
    arguments = (
        *("hidden_states", "encoder_hidden_states", "timestep", "video_rotary_emb", "encoder_attention_mask"),
        *("kv_cache", "kv_cache_mode"),
    )
    first_layer = block = 0
    tables: Any = None  # the model's own method
    frames: tuple[int, ...] = ()  # of the forward to come: their places in the video
    past: tuple[int, ...] | None = None  # of the block whose past was copied last
    at_work = Grid(1, 1, 1)

    def __init__(self, run: Run, patch: tuple[int, int, int]) -> None:
        super().__init__(run, patch)
        self.stack = ExitStack()  # where the run is told to be, from before a forward until after it

    def see_places(
        self, batch_size: int, frame_positions: list[int], height: int, width: int, device: Any, fps: float
    ) -> Any:
        """As the model's method, which a pipeline asks for the tables of each forward: its tokens come packed."""
        frames, rows, columns = self.patch
        self.frames = tuple(frame_positions[::frames])
        self.at_work = Grid(len(self.frames), height // rows, width // columns)
        return self.tables(batch_size, frame_positions, height, width, device, fps)

    def grid(self, given: dict[str, Any]) -> Grid:
        return self.at_work

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        self.stack.close()  # of a forward that an error ended
        if given.get("kv_cache_mode") is None or self.at_work.tokens != given["hidden_states"].shape[1]:
            raise UnsupportedError(
                "a forward is one of a block over the pipeline's cache, at places that the model was asked to build "
                "tables for since it was accelerated: call the pipeline"
            )
        scheduler = self.run.pipe.scheduler
        steps = len(scheduler.timesteps)
        step = scheduler.step_index or 0
        denoises = given["kv_cache_mode"] == "inject"
        if given["kv_cache_mode"] == "capture_pre_rope":  # the sink, before the first block
            self.run.begin(0)
            self.block, self.past = -1, None
        elif self.frames != self.past:
            self.past, self.block = self.frames, self.block + 1
            self._copy_past(module, given["kv_cache"])
        where = self.run.at(
            block=max(self.block, 0),
            start=self.frames[0],
            step=step if denoises else steps,
            steps=steps,
            phase="denoise" if denoises else "clean",
            noise=float(scheduler.sigmas[step]) if denoises else 0.0,
        )
        self.stack.enter_context(where)
        return super().pre_forward(module, *args, **kwargs)

    def _copy_past(self, module: Any, cache: Any) -> None:
        """Sink and newest frames are the past of the block that begins, in place of those of the last."""
        self.run.flush()
        grid = self.at_work
        for number, block in enumerate(module.transformer_blocks):
            kept, attn = cache.get(number), block.attn1
            sink, history = kept.get_sink(), kept.get_history()
            parts = [] if sink is None else [(_turned(attn, sink[0], cache.sink_pe), sink[1])]
            if history is not None:
                parts.append(history)
            if not parts:
                continue
            k, v = (torch.cat(same, 1).unflatten(2, (attn.heads, -1)) for same in zip(*parts, strict=True))
            first, newest = (
                0 if part is None else part[0].shape[1] // grid.tokens_per_frame for part in (sink, history)
            )
            frames = [*range(first), *range(self.frames[0] - newest, self.frames[0])]
            with self.run.at(block=self.block, start=self.frames[0], step=0, steps=1):
                memory = self.run.memory(self.run.site(self.first_layer + number, "self"))
            memory.exact.place(k, v, torch.tensor(frames).repeat_interleave(grid.tokens_per_frame))
            memory.finish_block(k.shape[1])

    def post_forward(self, module: Any, output: Any) -> Any:
        output = super().post_forward(module, output)
        self.stack.close()
        return output


class _Processor(ToSeam, SanaWMLTX2RefinerAttnProcessor):
    """The stock processor with its kernel call replaced by the seam, which has the past."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        sink_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
    ) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        if kv_cache_mode == "capture_pre_rope":
            kv_cache.store_captured_pre_rope(k, v)
        q, k = _turned(attn, q, query_rotary_emb), _turned(attn, k, query_rotary_emb)
        if kv_cache_mode == "inject_and_capture_post_rope":
            kv_cache.store_captured_post_rope(k, v)
        out = self.attend(*(x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))).type_as(q)
        if attn.to_gate_logits is not None:  # a gate a head
            out = out * (2.0 * attn.to_gate_logits(hidden_states).sigmoid())[..., None]
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))


def _turned(attn: Any, x: Tensor, tables: Any) -> Tensor:
    turned: Tensor = (apply_split_rotary_emb if attn.rope_type == "split" else apply_interleaved_rotary_emb)(x, tables)
    return turned
