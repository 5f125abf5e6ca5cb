"""One tiny random model for every family of backbones, and a generation with it: the one list that tests and
`scripts/support_matrix.py` go through. A new family adds one entry."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    CogVideoXTransformer3DModel,
    CosmosTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HeliosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    QwenImageTransformer2DModel,
    SanaVideoTransformer3DModel,
    SanaWMLTX2Refiner,
    SanaWMLTX2RefinerTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.cache_utils import CacheMixin
from tiny import (
    CHANNELS,
    HEIGHT,
    TEXT_DIM,
    WIDTH,
    text_of,
    tiny_components,
    tiny_hunyuan_video,
    tiny_pipeline,
    tiny_transformer,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from diffaccel import Grid

STEPS, WORDS = 4, 12
GRID, IMAGE = Grid(3, 6, 8), Grid(1, 12, 12)


@dataclass(frozen=True)
class Family:
    """A model of a family and what its forward takes beside latents and timestep, by batch rows and branch."""

    name: str
    model: Callable[[], nn.Module]
    given: Callable[[int, int], dict[str, Any]]
    shape: tuple[int, ...]  # of latents, without the batch
    grid: Grid = GRID
    axes: tuple[int, ...] = (1, 2, 3)  # of frames, rows and columns in that shape; of packed tokens: their own
    per_thousand: bool = True  # timesteps as the scheduler has them, not divided by a thousand
    per_frame: bool = False  # a timestep for each frame
    causal: Callable[[], Any] | None = None  # makes a whole pipeline, where that generates block by block
    size: tuple[int, int] = (HEIGHT, WIDTH)  # of what that generates, in pixels
    takes_prompt: bool = False
    takes_guide: bool = False
    rounding: float = 2e-4  # what a row of a batch differs from the row alone

    def pipe(self) -> Any:
        """As much of a pipeline as acceleration looks at; a real one where it generates block by block."""
        if self.causal is not None:
            return self.causal()
        return SimpleNamespace(transformer=self.model(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))

    def timestep(self, t: Tensor | float, rows: int) -> Tensor:
        """As the model takes it."""
        return torch.as_tensor(t).expand(rows, self.grid.frames) if self.per_frame else torch.as_tensor(t).expand(rows)

    def on(self, device: str) -> Any:
        """As `pipe`, with the denoiser or the whole pipeline there."""
        pipe = self.pipe()
        (pipe if self.causal is not None else pipe.transformer).to(device)
        return pipe

    @torch.no_grad()
    def generate(
        self, pipe: Any, rows: int = 1, only: int | None = None, guided: bool = True, steps: int = STEPS
    ) -> Tensor:
        """Latents after a few steps, under guidance or not; `only` one row of the batch. On the model's device."""
        warnings.filterwarnings("ignore", "flex_attention called without")  # FAR's own, which diffaccel replaces
        if self.causal is not None:
            video = {"height": self.size[0], "width": self.size[1], "num_frames": 33, "num_inference_steps": steps}
            video["guidance_scale"] = 3.0 if guided else 1.0
            generator = torch.Generator().manual_seed(0)
            return pipe("a red circle moves left", **video, generator=generator, output_type="latent").frames
        branches = [self.given(rows, branch) for branch in range(2 if guided else 1)]
        x = noise(rows, *self.shape, seed=3)
        if only is not None:
            branches = [{name: row(value, only, rows) for name, value in given.items()} for given in branches]
            x = row(x, only, rows)
        device = next(pipe.transformer.parameters()).device
        x, branches = tree_map_only(Tensor, lambda value: value.to(device), (x, branches))
        pipe.scheduler.set_timesteps(steps, device=device)
        warnings.filterwarnings("ignore", "In CPU autocast")  # Mochi's rotary angles, in fp32 under no autocast at all
        for t in pipe.scheduler.timesteps:
            timestep = self.timestep(t if self.per_thousand else t / 1000, len(x))
            found = [
                pipe.transformer(hidden_states=x, timestep=timestep, **given, return_dict=False) for given in branches
            ]
            found = [value if isinstance(value, Tensor) else value[0] for value in found]
            x = pipe.scheduler.step(found[-1] + 2 * (found[0] - found[-1]), t, x, return_dict=False)[0]
        if isinstance(pipe.transformer, CacheMixin):  # as pipelines do when a generation ends
            pipe.transformer._reset_stateful_cache()
        return x


def row(value: Any, number: int, rows: int) -> Any:
    """One row of what has so many of them."""
    if isinstance(value, Tensor | list) and len(value) == rows:
        return value[number : number + 1]
    return value


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sharper(model: nn.Module, *names: str, by: float = 3.0) -> nn.Module:
    """Attention that tells keys apart and is felt: weights whose name ends like that, scaled up."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(names):
                weight.mul_(by)
    return model.eval()


def prompt(rows: int, branch: int) -> dict[str, Any]:
    """A prompt whose padding is read, and alike."""
    text = noise(rows, WORDS, TEXT_DIM, seed=10 + branch)
    text[:, 7 - branch :] = 0
    return {"encoder_hidden_states": text}


def padded(rows: int, branch: int) -> dict[str, Any]:
    """A prompt and its mask, of another length in each row."""
    text = text_of(tuple(7 + i - 2 * branch for i in range(rows)), seed=10 + branch, tokens=WORDS)
    return {"encoder_hidden_states": text["prompt_embeds"], "encoder_attention_mask": text["prompt_attention_mask"]}


def hunyuan(rows: int, branch: int) -> dict[str, Any]:
    return padded(rows, branch) | {
        "pooled_projections": noise(rows, 16, seed=20 + branch), "guidance": torch.full((rows,), 6000.0)
    }  # fmt: skip


HISTORY = {"1": 1, "2": 3, "4": 5}  # latent frames by how coarse their tokens are


def history(rows: int, names: dict[str, str]) -> dict[str, Any]:
    """Latents of what came before a section, and their places, under the `names` of arguments."""
    given: dict[str, Any] = {}
    start = 0
    for coarse, frames in reversed(HISTORY.items()):
        given[names[coarse]] = noise(rows, CHANNELS, frames, *VIDEO[2:], seed=70 + frames)
        given[f"indices_{names[coarse]}"] = torch.arange(start, start + frames)
        start += frames
    return given


def framepack(**changes: Any) -> nn.Module:
    torch.manual_seed(13)
    settings = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_attention_heads": 2, "attention_head_dim": 24,
        "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": 16, "rope_axes_dim": (8, 8, 8), "has_image_proj": True, "image_proj_dim": 16,
        "has_clean_x_embedder": True,
    }  # fmt: skip
    model = HunyuanVideoFramepackTransformer3DModel(**(settings | changes))
    return sharper(model, "attn.norm_q.weight", "proj_in.weight")


def framepack_given(rows: int, branch: int) -> dict[str, Any]:
    names = {"1": "latents_clean", "2": "latents_history_2x", "4": "latents_history_4x"}
    return hunyuan(rows, branch) | history(rows, names) | {
        "image_embeds": noise(rows, 4, 16, seed=71), "indices_latents": torch.arange(9, 9 + GRID.frames)
    }  # fmt: skip


def helios(**changes: Any) -> nn.Module:
    torch.manual_seed(14)
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "rope_dim": (8, 8, 8),
    }  # fmt: skip
    model = HeliosTransformer3DModel(**(settings | changes))
    return sharper(model, "to_q.weight", "to_v.weight", "time_proj.weight")


def helios_given(rows: int, branch: int) -> dict[str, Any]:
    names = {"1": "latents_history_short", "2": "latents_history_mid", "4": "latents_history_long"}
    past = history(rows, names) | {"indices_hidden_states": torch.arange(9, 9 + GRID.frames)}
    return prompt(rows, branch) | {
        name: value[None] if name.startswith("indices") else value for name, value in past.items()
    }


def ltx_video() -> nn.Module:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=TEXT_DIM,
    )  # fmt: skip
    return sharper(model, "attn1.norm_q.weight")


def ltx(rows: int, branch: int) -> dict[str, Any]:
    return padded(rows, branch) | {"num_frames": GRID.frames, "height": GRID.height, "width": GRID.width}


SMALL_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": CHANNELS, "out_channels": CHANNELS,
    "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 96, "rope_max_seq_len": 128,
}  # fmt: skip


def wan_vace(**changes: Any) -> nn.Module:
    torch.manual_seed(6)
    settings = SMALL_WAN | {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 2 * CHANNELS}
    return sharper(WanVACETransformer3DModel(**(settings | changes)), "to_q.weight", "to_v.weight", "time_proj.weight")


def vace(rows: int, branch: int) -> dict[str, Any]:
    return prompt(rows, branch) | {"control_hidden_states": noise(rows, 2 * CHANNELS, *VIDEO[1:], seed=30)}


def skyreels_v2(**changes: Any) -> nn.Module:
    torch.manual_seed(7)
    model = SkyReelsV2Transformer3DModel(**(SMALL_WAN | {"num_layers": 2} | changes))
    return sharper(model, "to_q.weight", "to_v.weight", "time_proj.weight")


def anyflow(kind: Any = AnyFlowTransformer3DModel, **changes: Any) -> nn.Module:
    torch.manual_seed(12)
    model = kind(**(SMALL_WAN | {"num_layers": 2} | changes))
    return sharper(model, "to_q.weight", "to_v.weight", "time_proj.weight")


def anyflow_given(rows: int, branch: int) -> dict[str, Any]:
    return prompt(rows, branch) | {"r_timestep": torch.full((rows, GRID.frames), 250.0)}


def anyflow_far(**changes: Any) -> Any:
    """A stock `AnyFlowFARPipeline` for nine latent frames, of which the first six become far."""
    model = anyflow(AnyFlowFARTransformer3DModel, **{"chunk_partition": (1, 2, 1, 1, 1, 1, 1, 1)} | changes)
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    pipe = AnyFlowFARPipeline(**tiny_components() | {"transformer": model, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cogvideox(**changes: Any) -> nn.Module:
    torch.manual_seed(8)
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "text_embed_dim": TEXT_DIM, "time_embed_dim": 8, "num_layers": 2, "max_text_seq_length": WORDS,
        "sample_width": 2 * GRID.width, "sample_height": 2 * GRID.height, "sample_frames": 9,
        "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    model = CogVideoXTransformer3DModel(**(settings | changes))
    return sharper(model, "norm_q.weight", "text_proj.weight", "norm1.linear.weight")


def cog(rows: int, branch: int) -> dict[str, Any]:
    angles = noise(GRID.tokens, 8, seed=40).repeat_interleave(2, 1)
    return prompt(rows, branch) | {"image_rotary_emb": (angles.cos(), angles.sin())}


def mochi(**changes: Any) -> nn.Module:
    torch.manual_seed(9)
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": CHANNELS, "num_layers": 2,
        "pooled_projection_dim": 16, "text_embed_dim": TEXT_DIM, "time_embed_dim": 16, "max_sequence_length": WORDS,
    }  # fmt: skip
    model = MochiTransformer3DModel(**(settings | changes))
    torch.nn.init.normal_(model.pos_frequencies, std=0.3)  # zeros until it is trained
    return sharper(model, "norm_q.weight", "caption_proj.weight", "norm1.linear.weight")


def hunyuan_video15(**changes: Any) -> nn.Module:
    torch.manual_seed(10)
    settings = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_attention_heads": 2, "attention_head_dim": 24,
        "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": TEXT_DIM,
        "text_embed_2_dim": 16, "image_embed_dim": 16, "rope_axes_dim": (8, 8, 8),
    }  # fmt: skip
    model = HunyuanVideo15Transformer3DModel(**(settings | changes))
    return sharper(model, "norm_q.weight", "proj_in.weight", "norm1.linear.weight")


def hunyuan15(rows: int, branch: int) -> dict[str, Any]:
    return padded(rows, branch) | {
        "encoder_hidden_states_2": noise(rows, 6, 16, seed=50 + branch),
        "encoder_attention_mask_2": (torch.arange(6) < torch.arange(rows)[:, None] + 1 + branch).long(),
        "image_embeds": torch.zeros(rows, 3, 16),
    }


def ltx2_video(**changes: Any) -> nn.Module:
    torch.manual_seed(11)
    settings = {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": TEXT_DIM,
    }  # fmt: skip
    model = LTX2VideoTransformer3DModel(**(settings | {"norm_elementwise_affine": True} | changes))
    return sharper(model, "attn1.norm_q.weight")


def ltx2(rows: int, branch: int) -> dict[str, Any]:
    given = ltx(rows, branch)
    return given | {
        "audio_hidden_states": noise(rows, 5, 4, seed=60), "audio_num_frames": 5,
        "audio_encoder_hidden_states": given["encoder_hidden_states"],
        "audio_encoder_attention_mask": given["encoder_attention_mask"],
    }  # fmt: skip


def cosmos(**changes: Any) -> nn.Module:
    torch.manual_seed(8)
    settings = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_attention_heads": 2, "attention_head_dim": 24,
        "num_layers": 2, "text_embed_dim": TEXT_DIM, "adaln_lora_dim": 8, "max_size": (8, 32, 32),
        "concat_padding_mask": False,
    }  # fmt: skip
    model = CosmosTransformer3DModel(**(settings | changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "pos_emb_" in name:
                weight.normal_()  # which is zero in a fresh one
    return sharper(model, "norm_q.weight", "to_v.weight")


def kandinsky5(**changes: Any) -> nn.Module:
    torch.manual_seed(9)
    settings = {
        "in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS, "in_text_dim": TEXT_DIM, "in_text_dim2": 16,
        "time_dim": 16, "model_dim": 48, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2,
        "axes_dims": (8, 8, 8),
    }  # fmt: skip
    model = Kandinsky5Transformer3DModel(**(settings | changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modulation" in name:
                weight.normal_(std=0.3)  # gates that are zero in a fresh one
    return sharper(model, "query_norm.weight")


def kandinsky(rows: int, branch: int) -> dict[str, Any]:
    return prompt(rows, branch) | {
        "pooled_projections": noise(rows, 16, seed=20 + branch),
        "visual_rope_pos": [torch.arange(side) for side in (GRID.frames, GRID.height, GRID.width)],
        "text_rope_pos": torch.arange(WORDS),
    }


SMALL_IMAGE = {"num_attention_heads": 2, "attention_head_dim": 24, "axes_dims_rope": (8, 8, 8), "in_channels": 8}


def flux(**changes: Any) -> nn.Module:
    torch.manual_seed(10)
    settings = {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": TEXT_DIM, "pooled_projection_dim": 16}
    return sharper(FluxTransformer2DModel(**(SMALL_IMAGE | settings | changes)), "norm_q.weight")


def flux_given(rows: int, branch: int) -> dict[str, Any]:
    return prompt(rows, branch) | {
        "pooled_projections": noise(rows, 16, seed=20 + branch),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(12.0), torch.arange(12.0)),
        "txt_ids": torch.zeros(WORDS, 3),
    }


def qwen_image(**changes: Any) -> nn.Module:
    torch.manual_seed(11)
    settings = {"num_layers": 2, "out_channels": 2, "joint_attention_dim": TEXT_DIM}
    return sharper(QwenImageTransformer2DModel(**(SMALL_IMAGE | settings | changes)), "norm_q.weight")


def qwen(rows: int, branch: int) -> dict[str, Any]:
    given = padded(rows, branch)
    given["encoder_hidden_states_mask"] = given.pop("encoder_attention_mask")
    return given | {"img_shapes": [[(IMAGE.frames, IMAGE.height, IMAGE.width)]] * rows}


class Refiner(SanaWMLTX2Refiner):
    """The stock pipeline of nine latent frames in blocks of two, four of them kept, without what reads the prompt."""

    def __call__(self, prompt: str, height: int, width: int, **given: Any) -> Any:
        video = noise(1, 8, 9, height // 2, width // 2, seed=80)
        sigmas = (*torch.linspace(0.9, 0.2, given.get("num_inference_steps", STEPS)).tolist(), 0.0)
        found = super().__call__(
            video, prompt, fps=16.0, block_size=2, kv_max_frames=5, sigmas=sigmas, generator=given.get("generator"),
            output_type="latent",
        )  # fmt: skip
        return SimpleNamespace(frames=found)

    def _encode_prompt(self, prompt: str, **_: Any) -> tuple[Tensor, Tensor]:
        text, seen = noise(1, WORDS, TEXT_DIM, seed=81), torch.arange(WORDS)[None] >= 5
        return text.to(self.transformer.device), seen.to(self.transformer.device)


def sana_wm_refiner(**changes: Any) -> Any:
    torch.manual_seed(16)
    settings = {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": TEXT_DIM,
    }  # fmt: skip
    model = SanaWMLTX2RefinerTransformer3DModel(**(settings | {"norm_elementwise_affine": True} | changes))
    pipe = Refiner(sharper(model, "attn1.norm_q.weight"), None, None, None, FlowMatchEulerDiscreteScheduler(shift=1.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sana_video(**changes: Any) -> nn.Module:
    torch.manual_seed(15)
    settings = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_attention_heads": 2, "attention_head_dim": 24,
        "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 24, "cross_attention_dim": 48,
        "caption_channels": TEXT_DIM,
    }  # fmt: skip
    return SanaVideoTransformer3DModel(**(settings | changes)).eval()


VIDEO = (CHANNELS, GRID.frames, 2 * GRID.height, 2 * GRID.width)
FAMILIES = [
    Family("Wan", tiny_transformer, prompt, VIDEO, takes_prompt=True, takes_guide=True),
    Family("Wan VACE", wan_vace, vace, VIDEO, takes_prompt=True, takes_guide=True),
    Family("Wan, causal", tiny_transformer, prompt, VIDEO, causal=tiny_pipeline, takes_prompt=True, takes_guide=True),
    Family("SkyReels-V2", skyreels_v2, prompt, VIDEO, takes_prompt=True, takes_guide=True),
    Family(
        "AnyFlow",
        anyflow,
        anyflow_given,
        (GRID.frames, CHANNELS, *VIDEO[2:]),
        axes=(0, 2, 3),
        per_frame=True,
        takes_prompt=True,
        takes_guide=True,
    ),
    Family(  # 128 tokens a frame, below and between whose multiples the stock model reads padding
        "AnyFlow-FAR", anyflow, anyflow_given, VIDEO, causal=anyflow_far, size=(128, 256), takes_prompt=True
    ),
    Family("HunyuanVideo", tiny_hunyuan_video, hunyuan, VIDEO),
    Family("FramePack", framepack, framepack_given, VIDEO),
    Family("Helios", helios, helios_given, VIDEO, takes_prompt=True, takes_guide=True),
    Family("LTX-Video", ltx_video, ltx, (GRID.tokens, 8), axes=(0,)),
    Family("CogVideoX", cogvideox, cog, (GRID.frames, CHANNELS, *VIDEO[2:]), axes=(0, 2, 3)),
    Family("Mochi", mochi, padded, VIDEO),
    Family("HunyuanVideo-1.5", hunyuan_video15, hunyuan15, (CHANNELS, GRID.frames, GRID.height, GRID.width)),
    Family("LTX-2", ltx2_video, ltx2, (GRID.tokens, 8), axes=(0,)),
    Family("Cosmos", cosmos, prompt, VIDEO, takes_prompt=True, takes_guide=True),
    Family(  # which rounds to bf16 inside
        "Kandinsky 5", kandinsky5, kandinsky, (*VIDEO[1:], CHANNELS), axes=(0, 1, 2), takes_guide=True, rounding=4e-3
    ),
    Family("Flux", flux, flux_given, (IMAGE.tokens, 8), grid=IMAGE, axes=(0,), per_thousand=False),
    Family("Qwen-Image", qwen_image, qwen, (IMAGE.tokens, 8), grid=IMAGE, axes=(0,), per_thousand=False),
    Family("SANA-WM refiner", lambda: sana_wm_refiner().transformer, ltx, VIDEO, causal=sana_wm_refiner, size=(12, 16)),
]
REFUSED = [Family("SANA", sana_video, prompt, VIDEO)]
"""Known, whatever is asked of them refused."""
