"""Stage three: write the checkpoint in the library's own format."""

import json
from pathlib import Path

import torch
from diffusers import __version__ as diffusers_version

from .checkpoint import load_parts, strip
from .models import FULL, TOY, build_scheduler, build_text_encoder, build_transformer, build_vae
from .prompts import save_tokenizer


def export(parts: Path, folder: Path, toy: bool) -> None:
    """Assemble `vae.part*` and `flow.part*` of `parts` into a pipeline folder with fp16 weights."""
    sizes = TOY if toy else FULL
    held_vae, held = load_parts(parts, "vae"), load_parts(parts, "flow")
    if held_vae is None or held is None:
        raise FileNotFoundError(f"{parts} lacks vae.part* or flow.part*: train both stages first")
    vae, transformer, encoder = build_vae(sizes), build_transformer(sizes), build_text_encoder(sizes)
    vae.load_state_dict(strip("vae", held_vae))
    vae.register_to_config(
        latents_mean=[round(float(v), 5) for v in held_vae["latents_mean"]],
        latents_std=[round(float(v), 5) for v in held_vae["latents_std"]],
    )
    transformer.load_state_dict(strip("transformer", held))
    encoder.load_state_dict(strip("text_encoder", held), strict=False)
    for model, name in ((vae, "vae"), (transformer, "transformer"), (encoder, "text_encoder")):
        for parameter in model.parameters():
            if float(parameter.detach().abs().max()) > 6e4:
                raise ValueError(f"a weight of {name} does not fit fp16")
        # transformers loads weights in the dtype they are stored in, diffusers in fp32: a stock pipeline gets one
        # dtype throughout only if the (small) text encoder is stored in fp32.
        model.to(torch.float32 if name == "text_encoder" else torch.float16).save_pretrained(folder / name)
    build_scheduler().save_pretrained(folder / "scheduler")
    save_tokenizer(folder / "tokenizer")
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
    # what the command line generates where nothing is said; `pipeline` because the weights are causal as well
    usual = {"pipeline": "causal", "width": 128, "height": 128, "num_frames": 49}
    usual |= {"num_inference_steps": 8, "guidance_scale": 2.5, "fps": 16}
    (folder / "generation.json").write_text(json.dumps(usual, indent=2) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    print(f"exported to {folder}: {size:.1f} MiB, vae step {int(held_vae['step'])}, flow step {int(held['step'])}")
