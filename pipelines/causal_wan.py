"""Block-by-block video generation with an unchanged Wan transformer.

The latent video is cut along time into blocks. A block is denoised while its queries also read the keys and values of
the blocks before it; once finished it is run through the transformer once more at t = 0, and that clean pass writes
its keys and values for the blocks to come (CausVid, arXiv 2412.07772; Self-Forcing, arXiv 2506.08009 section 3).
The pipeline says where it is; which keys are kept and read is decided by the `Accel` it runs under.
"""

import copy
import inspect
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.utils import logging
from torch import Tensor

from diffaccel.accel import Accel, active_run
from diffaccel.cache import Extent
from diffaccel.errors import UnsupportedError
from diffaccel.grid import Grid
from diffaccel.run import Run
from diffaccel.site import Phase
from diffaccel.spread import devices_of

from . import callbacks, conditions, few_step, inputs, rolling, streaming
from .graphed import GraphedForwards, forward
from .inputs import Rollout, Sampler, block_ranges

logger = logging.get_logger(__name__)


class CausalWanPipeline(WanPipeline):
    """Text, image or video to video, one block of latent frames after the other.

    Components are those of `WanPipeline`, so `CausalWanPipeline(**pipe.components)` works, and a folder saved by one
    loads with the other. The transformer is a stock `WanTransformer3DModel` whose weights were trained for causal
    generation (`load_self_forcing` reads such checkpoints).

    Args:
        frames_per_block: latent frames of a block, 1 or more; a latent frame is 4 pixel frames (1 for the first).
        sampler: "multistep" takes the pipeline's own scheduler, started afresh for every block, and classifier-free
            guidance. "few_step" predicts the clean block and adds fresh noise at the next level (Self-Forcing,
            Algorithm 2): the pipeline's scheduler if it is a `FlowMatchEulerDiscreteScheduler` with
            `stochastic_sampling=True`, else one of those with shift 5. "rolling" takes such steps in as many blocks at
            once as there are steps, each a level noisier than the one before it (`rolling.py`).

    `prompt_warnings` holds, after a call, one sentence for each thing in the prompts the model did not get to read.

    Raises:
        UnsupportedError: a second transformer or a `boundary_ratio` is given: two transformers would need two caches.
    """

    block_causal = True  # read by `Accel`: there are earlier blocks whose keys can be kept

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        frames_per_block: int = 3,
        sampler: str = "multistep",
    ) -> None:
        if transformer_2 is not None or boundary_ratio is not None:
            raise UnsupportedError(
                "CausalWanPipeline denoises with one transformer, got "
                + ("transformer_2" if transformer_2 is not None else f"boundary_ratio={boundary_ratio}")
                + "; pass transformer_2=None and boundary_ratio=None"
            )
        super().__init__(
            tokenizer, text_encoder, vae, scheduler, transformer, None, None, expand_timesteps=expand_timesteps
        )
        self.register_to_config(frames_per_block=frames_per_block, sampler=sampler)
        self.prompt_warnings: list[str] = []
        self._generating = False

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image: Any = None,
        video: Any = None,
        latents: Tensor | None = None,
        history: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        frames_per_block: int | None = None,
        sampler: Sampler | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        callback_on_chunk_end: Callable[..., dict | None] | None = None,
        condition: conditions.Condition | None = None,
        on_prompt_change: inputs.PromptChange = "keep",
        max_sequence_length: int = 512,
        graphs: bool = False,
        decoder: Callable[[Tensor], Tensor] | None = None,
    ) -> WanPipelineOutput | tuple:
        """Generates a video. Arguments not listed are `WanPipeline`'s.

        Args:
            height, width: pixels; multiples of 16.
            num_frames: pixel frames of the whole video, condition included; 1 + 4k.
            num_inference_steps: steps per block; 50 for "multistep", 4 for "few_step", 5 for "rolling" unless given.
            guidance_scale: 5 for "multistep", 1 (no guidance, one branch) for the others unless given.
            generator: the noise of the whole video is drawn from it before the first step, then the fresh noise of
                the few-step sampler, in an order that no cache policy changes. A list gives each row its own.
            image: first frame (PIL, (H, W, 3) or (3, H, W), [0, 1] or uint8), or one per prompt.
            video: first frames, 1 + 4k of them and fewer than `num_frames` (list of PIL, (F, H, W, 3), (F, 3, H, W),
                or with a batch axis). What is given is encoded, kept as it is, and continued. The continuation is
                cut into blocks anew, so its first block takes the remainder.
            latents: the noise to start from, (B, C, L, H/8, W/8), in place of the generator's.
            history: normalised latents (B, C, L, H/8, W/8) of another run. Every block is denoised as usual, but the
                history's block is committed to the cache, so that two arms can be compared block by block without
                their differences growing along the video. The denoised latents are returned.
            frames_per_block, sampler: in place of the pipeline's config.
            sigmas: noise levels in (0, 1], decreasing, before the scheduler's shift; 1, .75, .5, .25 for "few_step",
                1, .8, .6, .4, .2 for "rolling".
            timesteps: noise levels times 1000 after the shift, as published (CausVid: 1000, 757, 522).
            output_type: "np" (B, F, H, W, 3) in [0, 1], "pt" (B, F, 3, H, W), "pil" lists, "latent" (B, C, L, h, w).
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`; `step` counts through all blocks,
                `tensors["latents"]` is the block. Setting `pipe._interrupt = True` ends the video with this block.
                Under "rolling" a step is one of all blocks in the window, and `timestep` that of the oldest.
            callback_on_chunk_end: `callback(pipe, block, num_blocks, tensors) -> dict | None` after each generated
                block, before it is committed; `tensors` has "latents" (the block), "prompt_embeds" and, under
                guidance, "negative_prompt_embeds". Returned latents replace the block, embeddings hold from the
                next forward on.
            condition: what each block is made under: `condition(block, start, pipe) -> dict | None`, asked right before
                the first forward of the block whose first latent frame is `start`, when all frames before it have been
                given out; or an iterable with an entry for each block. Blocks of a given image or video count. A dict
                holds "prompt", "prompt_embeds", "negative_prompt", "negative_prompt_embeds" or further arguments of
                the transformer's forward by their names ("attention_kwargs", "encoder_hidden_states_image", actions of
                a model of your own), tensors on its device. It holds for the block, its clean pass included, and what
                it leaves out stays as it was. Under "rolling" a block begins with the window that it enters, all of
                which is under its prompt from then on; further arguments are refused.
            on_prompt_change: what becomes of the cache when the prompt changes between two blocks: "keep" it, as it
                was computed under the earlier prompt; "recompute" it, by running the blocks it still holds something
                of under the new one (LongLive's KV-recache, arXiv 2509.22622, section 3.2); "flush" it, so that the
                next block remembers the last one only.
            graphs: capture forwards that repeat from block to block as CUDA graphs and replay them: those that reuse
                (`FlashBlock`), and those over a past of one size that is read whole (`SinkRecent`). The rest runs as
                ever. While `timing` is on nothing is captured.
            decoder: in place of the VAE's, such as a small one: called with the normalised latents (B, C, n, h, w) of
                each block in order, it gives pixels (B, 3, F, H, W) in [-1, 1], 4n - 3 frames for the first block and
                4n for the others.

        Returns:
            `WanPipelineOutput` whose `frames` are the video, or a tuple of it if not `return_dict`.

        Raises:
            ValueError: an argument breaks its rule; the message has the rule and the nearest valid values.
        """
        call = SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"})
        try:
            rollout = self._prepare(call)
            with self._accelerated() as run:
                made: list[Tensor] = []

                def blocks() -> Iterator[Tensor]:
                    for block in self._blocks(rollout, run):
                        made.append(block)
                        yield block

                if output_type == "latent":
                    result = torch.cat(list(blocks()), dim=2)
                else:
                    frames = streaming.decode(self.vae, blocks(), run.clock, self._given_decoder(decoder))
                    result = self.video_processor.postprocess_video(frames, output_type=output_type)
                frames_made = self._pixel_frames(sum(block.shape[2] for block in made))
                run.produced(made[0].shape[0] * frames_made, wait=True)
        finally:
            self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=result) if return_dict else (result,)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, output_type: str = "np") -> Any:
        """The frames of latents (B, C, L, h, w) that a call with `output_type="latent"` returned."""
        blocks = [
            latents[:, :, r.start : r.stop] for r in block_ranges(0, latents.shape[2], self.config.frames_per_block)
        ]
        return self.video_processor.postprocess_video(streaming.decode(self.vae, blocks), output_type=output_type)

    def stream(self, *args: Any, overlap: bool = False, **kwargs: Any) -> streaming.Stream:
        """Generates as `__call__` with the same arguments does, and yields every block's frames as soon as they exist.

            stream = pipe.stream("a red ball rolls left", num_frames=241)
            for frames in stream:
                show(frames)
                if impatient:
                    stream.change_prompt("the red ball turns blue")  # from the next block on

        Put together along time the chunks are the frames of `__call__`; the first has 4n - 3 frames for n latent ones,
        the others 4n. Bad arguments raise here, not at the first chunk. Between two chunks the pipeline stays
        prepared; exhausting or closing the iterator, or an exception in it, restores everything. One stream at a time.
        Under `enable_model_cpu_offload` each chunk moves the transformer out and in again.

        With `overlap` a chunk is decoded on a GPU while the next block is denoised (with the VAE on a GPU of its own,
        beside it): more frames a second, each chunk a block later, and a changed prompt holds a block later too.

        Raises:
            UnsupportedError: the VAE has tiling switched on.
        """
        bound = inspect.signature(self.__call__).bind(*args, **kwargs)
        bound.apply_defaults()
        decoder: streaming.Decoder | None = None
        if bound.arguments["output_type"] != "latent":
            given = self._given_decoder(bound.arguments["decoder"])
            decoder = streaming.StreamingDecoder(self.vae) if given is None else given
        try:
            with torch.no_grad():
                rollout = self._prepare(SimpleNamespace(**bound.arguments))
        except BaseException:
            self.maybe_free_model_hooks()
            raise
        return streaming.Stream(self._stream(rollout, decoder, overlap), partial(conditions.change, self, rollout))

    @torch.no_grad()
    def _stream(self, rollout: Rollout, decoder: streaming.Decoder | None, overlap: bool) -> Generator[Any, None, None]:
        output_type = rollout.call.output_type
        waiting: deque[Callable[[], Any]] = deque()
        start = 0
        try:
            with self._accelerated() as run:
                decodes = None if decoder is None else streaming.Decodes(decoder, run.clock)

                def chunk(pixels: Callable[[], Tensor], frames: int) -> Any:
                    made = pixels()
                    if decodes is not None:
                        made = self.video_processor.postprocess_video(made, output_type=output_type)
                    run.produced(frames)
                    return made

                for latents in self._blocks(rollout, run):
                    pixels = latents.clone if decodes is None else decodes.submit(latents)
                    stop = start + latents.shape[2]
                    frames = latents.shape[0] * (self._pixel_frames(stop) - self._pixel_frames(start))
                    waiting.append(partial(chunk, pixels, frames))
                    start = stop
                    if len(waiting) > overlap:
                        yield waiting.popleft()()
                while waiting:
                    yield waiting.popleft()()
        finally:
            self.maybe_free_model_hooks()

    def _blocks(self, rollout: Rollout, run: Run) -> Iterator[Tensor]:
        """Denoises and commits block after block; yields the latents of each, those of the condition included."""
        if self._generating:
            raise UnsupportedError(
                "this pipeline is in the middle of a stream and has one cache; exhaust or close it before the next call"
            )
        self._generating = True
        total = rollout.latents.shape[2]
        try:
            call, rows = rollout.call, rollout.latents.shape[0]
            size = (call.num_frames, call.height, call.width)
            if rollout.rolling:
                rolling.refuse(run.accel)
            window = rollout.steps if rollout.rolling else 1
            run.begin(total, self.extent(*size, len(rollout.embeds), rows, call.frames_per_block, window))
            rollout.cached = rollout.embeds["cond"]
            rollout.forward = (
                GraphedForwards(self.transformer, run) if call.graphs else partial(forward, self.transformer)
            )
            with self.progress_bar(total=self._num_timesteps) as bar:
                for index, frames in enumerate(rollout.blocks):
                    if active_run(self) is not run:
                        raise UnsupportedError(
                            "the Accel this stream began under was left and its cache is gone; exhaust streams inside"
                        )
                    block = rollout.latents[:, :, frames.start : frames.stop]
                    conditions.ask(self, rollout, run, index, finished=index)
                    if index >= rollout.given:
                        with run.clock("denoise", rollout.latents.device):
                            denoised = self._denoise_block(rollout, run, index, block, bar)
                        block.copy_(callbacks.end_chunk(self, rollout, index, denoised))
                    yield block
                    if self.interrupt:
                        return
                    if frames.stop < total:
                        with run.clock("denoise", rollout.latents.device):
                            if rollout.embeds["cond"] is not rollout.cached:
                                conditions.renew(self, rollout, run, index)
                            self._commit_block(rollout, run, index)
        finally:
            self._generating, run.still = False, False

    def extent(
        self,
        num_frames: int,
        height: int,
        width: int,
        branches: int,
        rows: int = 1,
        frames_per_block: int | None = None,
        window: int = 1,
    ) -> Extent:
        """What a call with these arguments holds in its cache; `branches` is 2 under guidance, `window` the blocks that
        are denoised together."""
        config, scale = self.transformer.config, self.vae_scale_factor_spatial
        p_t, p_h, p_w = config.patch_size
        frames = (1 + (num_frames - 1) // self.vae_scale_factor_temporal) // p_t
        block = self.config["frames_per_block"] if frames_per_block is None else frames_per_block
        return Extent(
            frames=frames,
            block=Grid(max(1, min(window * block, frames) // p_t), height // scale // p_h, width // scale // p_w),
            layers=config.num_layers,
            heads=config.num_attention_heads // devices_of(self.transformer),
            head_dim=config.attention_head_dim,
            rows=rows,
            branches=branches,
            dtype=self.transformer.dtype,
        )

    def _denoise_block(self, rollout: Rollout, run: Run, index: int, latents: Tensor, bar: Any) -> Tensor:
        """Takes one block from noise to a clean block, (B, C, n, h, w)."""
        if rollout.rolling:
            return rolling.finish_block(self, rollout, run, index, bar)
        call, scheduler = rollout.call, copy.deepcopy(rollout.scheduler)
        extra = {"generator": call.generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        fresh = few_step.fits(scheduler)
        for step, t in enumerate(scheduler.timesteps):
            if self.interrupt:
                break
            self._current_timestep = t
            velocity = self._predict(rollout, run, index, latents, t, step, "denoise")
            if fresh:
                latents = few_step.step(scheduler, velocity, t, latents, call.generator)
            else:
                latents = scheduler.step(velocity, t, latents, return_dict=False, **extra)[0]
            count = (index - rollout.given) * rollout.steps + step
            latents = callbacks.end_step(self, rollout, count, t, latents)
            bar.update()
        self._current_timestep = None
        return latents

    def _commit_block(self, rollout: Rollout, run: Run, index: int) -> None:
        """Runs a finished block through the transformer at t = 0, which writes its keys and values to the cache."""
        frames = rollout.blocks[index]
        context = rollout.latents if rollout.history is None else rollout.history
        context = context[:, :, frames.start : frames.stop]
        self._predict(rollout, run, index, context, context.new_zeros(()), rollout.steps, "clean")

    def _predict(
        self,
        rollout: Rollout,
        run: Run,
        index: int,
        latents: Tensor,
        t: Tensor,
        step: int,
        phase: Phase,
        newest: int | None = None,
    ) -> Tensor:
        """The velocity (B, C, n, h, w) in fp32, guided if there is guidance; one forward a branch.

        `t` is the time of all, or of each latent frame (n,). `latents` begin with block `index` and end with `newest`.
        """
        rows, patch = latents.shape[0], self.transformer.config.patch_size
        if t.ndim or self.config["expand_timesteps"]:  # each token its own
            per_frame = prod(size // p for size, p in zip(latents.shape[3:], patch[1:], strict=True))
            timestep = t.expand(latents.shape[2])[:: patch[0]].repeat_interleave(per_frame).expand(rows, -1)
        else:
            timestep = t.expand(rows)
        velocity = {}
        for branch in ("cond", "uncond") if self.do_classifier_free_guidance else ("cond",):
            where = run.at(
                block=index if newest is None else newest,
                start=rollout.blocks[index].start,
                step=step,
                steps=rollout.steps,
                phase=phase,
                branch=branch,
                noise=rollout.noise[step],
            )
            with where, self.transformer.cache_context(branch):
                assert rollout.forward is not None
                velocity[branch] = rollout.forward(
                    latents.to(self.transformer.dtype),
                    timestep,
                    rollout.embeds[branch],
                    **rollout.extra_of(index),
                ).float()
        if "uncond" not in velocity:
            return velocity["cond"]
        return velocity["uncond"] + self.guidance_scale * (velocity["cond"] - velocity["uncond"])

    def _prepare(self, call: SimpleNamespace) -> Rollout:
        """Checks the arguments, encodes prompts and condition, draws the noise and cuts the blocks."""
        sampler = self.config["sampler"] if call.sampler is None else call.sampler
        size = self.config["frames_per_block"] if call.frames_per_block is None else call.frames_per_block
        inputs.check(self, call, sampler, size)
        self._attention_kwargs, self._interrupt, self._current_timestep = call.attention_kwargs, False, None
        self._guidance_scale = call.guidance_scale
        if call.guidance_scale is None:
            self._guidance_scale = inputs.DEFAULT_GUIDANCE[sampler]
        device = self._execution_device

        # all that can be refused comes first, because the text encoder is by far the slowest part of this
        scheduler = inputs.block_schedule(
            self.scheduler, sampler, call.num_inference_steps, call.sigmas, call.timesteps, device
        )
        pixels = inputs.condition_pixels(self, call)
        latents = inputs.draw_noise(self, call, device)
        embeds = self._encode_prompts(call)
        given = 0
        if pixels is not None:
            condition = streaming.encode(self.vae, pixels).to(latents)
            given = condition.shape[2]
            latents[:, :, :given] = condition.repeat_interleave(latents.shape[0] // condition.shape[0], dim=0)
        past, new = inputs.block_ranges(0, given, size), inputs.block_ranges(given, latents.shape[2], size)
        rollout = Rollout(
            embeds=embeds,
            latents=latents,
            history=None if call.history is None else call.history.to(latents),
            blocks=past + new,
            given=len(past),
            scheduler=scheduler,
            call=call,
            rolling=sampler == "rolling",
            condition=conditions.asked(call.condition, len(past + new)),
        )
        self._num_timesteps = len(new) - 1 + rollout.steps if rollout.rolling else len(new) * rollout.steps
        return rollout

    def _encode_prompts(self, call: SimpleNamespace) -> dict[str, Tensor]:
        """Text to embeddings, (B, T, C) a branch; fills `prompt_warnings` and logs what it holds."""
        self.prompt_warnings = []
        if call.prompt is not None:
            texts = [*inputs.as_list(call.prompt), *inputs.as_list(call.negative_prompt)]
            self.prompt_warnings = inputs.unread(self.tokenizer, texts, call.max_sequence_length)
            for sentence in self.prompt_warnings:
                logger.warning(sentence)
        cond, uncond = self.encode_prompt(
            call.prompt,
            call.negative_prompt,
            self.do_classifier_free_guidance,
            1,
            call.prompt_embeds,
            call.negative_prompt_embeds,
            call.max_sequence_length,
            self._execution_device,
        )
        embeds = {"cond": cond, "uncond": uncond} if self.do_classifier_free_guidance else {"cond": cond}
        return {
            branch: rows.repeat_interleave(call.num_videos_per_prompt, dim=0).to(self.transformer.dtype)
            for branch, rows in embeds.items()
        }

    def _given_decoder(self, function: Callable[[Tensor], Tensor] | None) -> streaming.Decoder | None:
        if function is None:
            return None
        return streaming.GivenDecoder(function, self._execution_device, self.vae_scale_factor_temporal)

    def _pixel_frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.vae_scale_factor_temporal if latent_frames else 0

    @contextmanager
    def _accelerated(self) -> Iterator[Run]:
        """The run of the `Accel` applied to the transformer now; without one, of a plain `Accel()` for this call."""
        run = active_run(self)
        if run is not None:
            yield run
        else:
            with Accel()(self) as run:
                yield run

    def maybe_free_model_hooks(self) -> None:
        # the stock method leaves an empty hook registry on a transformer that had none
        had_registry = "_diffusers_hook" in vars(self.transformer)
        super().maybe_free_model_hooks()
        if not had_registry:
            self.transformer.__dict__.pop("_diffusers_hook", None)
