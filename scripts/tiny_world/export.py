"""Last stage: write the two checkpoints in the library's own format."""

import json
from pathlib import Path

import torch
from diffusers import __version__ as diffusers_version

from .checkpoint import TrainingError, load_stage, need_stage, strip
from .config import Config
from .models import build_scheduler, build_text_encoder, build_transformer, build_vae
from .prompts import save_tokenizer

FEW_STEP = "-few-step"
"""What the second folder's name has beyond the first's; it takes all but its transformer from there."""


def export(config: Config, out: Path, folder: Path) -> None:
    """Write `folder` from `vae` and `flow` of `out`, and the few-step model beside it where that stage has run."""
    sizes = config.sizes
    held_vae, held = need_stage(out, "vae", config.describe()), need_stage(out, "flow", config.describe())
    distilled = load_stage(out, "few_step", config.describe())
    vae, encoder = build_vae(sizes), build_text_encoder(sizes)
    vae.load_state_dict(strip("vae", held_vae))
    vae.register_to_config(
        latents_mean=[round(float(v), 5) for v in held_vae["latents_mean"]],
        latents_std=[round(float(v), 5) for v in held_vae["latents_std"]],
    )
    encoder.load_state_dict(strip("text_encoder", held), strict=False)
    _save(vae, folder / "vae", torch.float16)
    # transformers loads weights in the dtype they are stored in, diffusers in fp32: a stock pipeline gets one dtype
    # throughout only if the (small) text encoder is stored in fp32.
    _save(encoder, folder / "text_encoder", torch.float32)
    save_tokenizer(folder / "tokenizer")
    usual = {"pipeline": "causal", "width": 128, "height": 128, "num_frames": 49, "fps": 16}
    _write(folder, config, held, {**usual, "num_inference_steps": 8, "guidance_scale": 2.5}, few_step=False)
    lines = [f"vae step {int(held_vae['step'])}", f"flow step {int(held['step'])}"]
    folders = [folder]
    if distilled is not None:
        beside = folder.with_name(folder.name + FEW_STEP)
        four = {"sampler": "few_step", "base": f"../{folder.name}", "num_inference_steps": 4, "guidance_scale": 1.0}
        _write(beside, config, distilled, {**usual, **four}, few_step=True)
        lines.append(f"few_step step {int(distilled['step'])}")
        folders.append(beside)
    size = sum(path.stat().st_size for root in folders for path in root.rglob("*") if path.is_file()) / 2**20
    print(f"exported to {', '.join(map(str, folders))}: {size:.1f} MiB, {', '.join(lines)}")


def _write(folder: Path, config: Config, held: dict[str, torch.Tensor], usual: dict, few_step: bool) -> None:
    """The parts that the two models do not share."""
    transformer = build_transformer(config.sizes)
    transformer.load_state_dict(strip("transformer", held))
    _save(transformer, folder / "transformer", torch.float16)
    build_scheduler(few_step).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers_version,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    # What the command line generates where nothing is said; "causal" because the weights are that as well.
    (folder / "generation.json").write_text(json.dumps(usual, indent=2) + "\n")


def _save(model: torch.nn.Module, folder: Path, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if float(parameter.detach().abs().max()) > 6e4:
            raise TrainingError(f"{name} of {folder.name} does not fit fp16")
    model.to(dtype).save_pretrained(folder)  # type: ignore[operator]
