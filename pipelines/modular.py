"""Block-by-block generation as a block of modular diffusers, between its stock blocks for text and for decoding.

    from diffaccel import Accel, FlashBlock
    from diffaccel.pipelines.modular import CausalWanBlocks

    pipe = CausalWanBlocks().init_pipeline("FOLDER OR HUB NAME")  # of a Wan that was trained for it
    pipe.load_components(dtype=torch.bfloat16)
    videos = pipe(prompt="a red balloon", accel=Accel(reuse=FlashBlock()), output="videos")

`with accel(pipe) as run:` works as well. To publish, save both into one folder:

    pipe.save_pretrained(FOLDER, overwrite_modular_index=True)
    pipe.blocks.save_pretrained(FOLDER)

`ModularPipeline.from_pretrained(FOLDER, trust_remote_code=True)` opens it where diffaccel is installed; of the folder's
own code it runs `modular.py`, which imports this module.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from diffusers.modular_pipelines.wan.encoders import WanTextEncoderStep

from diffaccel.accel import Accel, active_run
from diffaccel.errors import KnobError, UnsupportedError
from diffaccel.preset_file import given_preset
from diffaccel.run import Run
from diffaccel.settings import build_accel
from diffaccel.version import __version__

from .causal_wan import CausalWanPipeline
from .inputs import DEFAULT_GUIDANCE

_PASSED_ON = (
    "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "num_videos_per_prompt", "generator",
    "image", "video", "latents", "negative_prompt_embeds", "frames_per_block", "sampler", "sigmas", "timesteps",
    "attention_kwargs", "callback_on_chunk_end", "graphs",
)  # fmt: skip
_CODE = '''"""Block-by-block Wan, as the package diffaccel has it."""

from diffaccel.pipelines.modular import CausalWanBlocks, CausalWanDenoiseStep

__all__ = ["CausalWanBlocks", "CausalWanDenoiseStep"]
'''


class _Published(ModularPipelineBlocks):
    _requirements: ClassVar[dict[str, str]] = {"diffaccel": f">={__version__}"}

    def save_config(self, save_directory: Any, **kwargs: Any) -> None:
        """What `save_pretrained` calls: the configuration, and beside it the module that this names."""
        super().save_config(save_directory, **kwargs)
        (Path(save_directory) / "modular.py").write_text(_CODE, "utf-8")


class CausalWanDenoiseStep(_Published):
    """From embeddings of prompts to denoised latents (B, C, L, h, w), as `CausalWanPipeline` makes them."""

    model_name = "wan"
    block_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.progress: dict[str, Any] = {}

    @property
    def description(self) -> str:
        return "Step that denoises the video block by block, each block reading the keys of those before it"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        guidance = FrozenDict({"guidance_scale": 5.0})  # as the stock block for text has it
        return [
            ComponentSpec("transformer", WanTransformer3DModel),
            ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler),
            ComponentSpec("guider", ClassifierFreeGuidance, config=guidance, default_creation_method="from_config"),
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [
            ConfigSpec("frames_per_block", 3, "latent frames of a block"),
            ConfigSpec("sampler", "multistep", "multistep, few_step or rolling, as the transformer was trained for"),
            ConfigSpec("preset", None, "a preset's name or file, where a call brings no accel"),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        known = inspect.signature(CausalWanPipeline.__call__).parameters
        passed = [InputParam(name, known[name].annotation, known[name].default) for name in _PASSED_ON]
        return [
            InputParam("prompt_embeds", torch.Tensor, required=True, description="from the block for text"),
            InputParam("accel", Accel, description="what to accelerate with, an Accel or a preset's name or file"),
            *passed,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", torch.Tensor, "denoised latents (B, C, L, h, w), normalised"),
            OutputParam("report", dict, "what was accelerated, None without an accel"),
        ]

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        self.progress = kwargs

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block = self.get_block_state(state)
        config = components.config
        pipe = CausalWanPipeline(
            None,
            None,
            getattr(components, "vae", None),  # encodes a condition, and says how much latents are smaller
            components.scheduler,
            components.transformer,
            frames_per_block=config.frames_per_block,
            sampler=config.sampler,
        )
        pipe.set_progress_bar_config(**self.progress)
        call = {name: block[name] for name in _PASSED_ON}
        call["guidance_scale"] = scale = _guidance(components.guider, call, config.sampler)
        if scale <= 1:
            call["negative_prompt_embeds"] = None
        elif call["negative_prompt_embeds"] is None:
            raise KnobError(
                f"guidance_scale={scale:g} needs negative_prompt_embeds: take the stock block for text, which makes "
                "them, or pass guidance_scale=1"
            )
        with _accelerated(pipe, block.accel, config.preset) as run:
            made = pipe(prompt_embeds=block.prompt_embeds, **call, output_type="latent", return_dict=False)
        block.latents = made[0]
        block.report = None if run is None else run.report().to_dict()
        self.set_block_state(state, block)
        return components, state


class CausalWanBlocks(_Published, SequentialPipelineBlocks):
    """Text to video: the stock block for text, block-by-block denoising, the stock block for decoding."""

    model_name = "wan"
    block_classes: ClassVar[list[type]] = [WanTextEncoderStep, CausalWanDenoiseStep, WanVaeDecoderStep]
    block_names: ClassVar[list[str]] = ["text_encoder", "denoise", "decode"]

    @property
    def description(self) -> str:
        return "Text to video with a causal Wan, block by block"

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam.template("videos")]


def _guidance(guider: Any, call: dict[str, Any], sampler: str) -> float:
    """The scale of a call, else of the guider where the sampler is used with guidance."""
    plain = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
    if type(guider) is not ClassifierFreeGuidance or any(guider.config[name] != value for name, value in plain.items()):
        raise UnsupportedError(
            f"block by block, guidance is a plain ClassifierFreeGuidance(guidance_scale=...), got {guider}: "
            "pipe.update_components(guider=...) takes another"
        )
    if call["guidance_scale"] is not None:
        return float(call["guidance_scale"])
    usual = DEFAULT_GUIDANCE[call["sampler"] or sampler]
    return float(guider.guidance_scale) if usual > 1 and guider.num_conditions > 1 else 1.0


def _accelerated(pipe: Any, accel: "Accel | str | None", preset: str | None) -> AbstractContextManager[Run | None]:
    """What the call brings, else the run that is in the model already, else the preset of the pipeline."""
    run = active_run(pipe)
    if accel is None and run is None:
        accel = preset
    if accel is None:
        return nullcontext(run)
    return (build_accel(given_preset(accel)) if isinstance(accel, str) else accel)(pipe)
