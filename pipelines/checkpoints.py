"""Causal Wan weights in the files their authors publish, as a stock `WanTransformer3DModel`.

Self-Forcing, CausVid and LongLive save the generator with the names of the original Wan code, inside one or two
dictionaries and under the prefixes of the trainer (`model.`, FSDP). The tensors are those of Wan 2.1.
"""

import pickle
import zipfile
from collections.abc import Mapping
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffaccel.errors import DiffaccelError

logger = logging.get_logger(__name__)

HEAD_DIM = 128  # of every published Wan; no tensor's shape tells it
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}
SHOWN = 8  # names an error lists before it only counts


class CheckpointError(DiffaccelError, ValueError):
    """A checkpoint file cannot be read, or does not hold what was asked for."""


def load_self_forcing(
    path: str | PathLike,
    *,
    config: Mapping[str, Any] | None = None,
    use_ema: bool = True,
    dtype: torch.dtype = torch.float32,
) -> WanTransformer3DModel:
    """Loads causal Wan weights from a `.pt` or `.safetensors` file. Code inside a `.pt` is never run.

    Args:
        path: the file. A `.pt` may hold `generator_ema` and `generator`, a `model` or `state_dict`, or bare tensors;
            names may be the original Wan's or diffusers'.
        config: arguments of `WanTransformer3DModel`. None reads them off the tensors' shapes, with heads of 128
            channels as in Wan2.1 1.3B and 14B.
        use_ema: take the averaged weights. A file without them gives its plain weights and a logged warning.
        dtype: of the weights; the parts `WanTransformer3DModel` keeps in fp32 stay so.

    Returns:
        The transformer on the CPU, in eval mode. Weights already in `dtype` stay mapped to the file until used.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds something other than tensors, or does not fit the config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    weights = _plain_names(_unwrap(_read(path), use_ema, path), path)
    if not any(name.startswith("condition_embedder.") for name in weights):
        weights = convert_wan_transformer_to_diffusers(weights)
    try:
        config = infer_config(weights) if config is None else dict(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    _check_fit(model, weights, path)
    kept = model._keep_in_fp32_modules
    for name, tensor in weights.items():
        full = any(part in kept for part in name.split("."))
        weights[name] = tensor.to(torch.float32 if full else dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    c = model.config
    model.rope = WanRotaryPosEmbed(c.attention_head_dim, c.patch_size, c.rope_max_seq_len)  # tables are in no file
    return model.eval()


def infer_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `WanTransformer3DModel` from the shapes of its tensors (diffusers' names)."""
    try:
        inner, in_channels, *patch = weights["patch_embedding.weight"].shape
        text_dim = weights["condition_embedder.text_embedder.linear_1.weight"].shape[1]
        freq_dim = weights["condition_embedder.time_embedder.linear_1.weight"].shape[1]
        ffn_dim = weights["blocks.0.ffn.net.0.proj.weight"].shape[0]
        out_channels = weights["proj_out.weight"].shape[0] // prod(patch)
    except KeyError as error:
        raise CheckpointError(
            f"these are no Wan transformer's weights, {error} is missing among {_some(weights)}; name the file of a"
            " causal Wan"
        ) from None
    if inner % HEAD_DIM:
        raise CheckpointError(
            f"the heads of a Wan have {HEAD_DIM} channels, which does not divide the width {inner} of these weights;"
            " pass config= with num_attention_heads and attention_head_dim"
        )
    config = {
        "patch_size": tuple(patch),
        "num_attention_heads": inner // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": text_dim,
        "freq_dim": freq_dim,
        "ffn_dim": ffn_dim,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in weights,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in weights else None,
    }
    image = weights.get("condition_embedder.image_embedder.norm1.weight")
    if image is not None:
        config |= {"image_dim": image.shape[0], "added_kv_proj_dim": inner}
    return config


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # mapping needs the zip format; a file cut short has lost the table at its end and is none either
        return torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is cut short, and was not loaded because unpickling it could run code"
            f" ({_first_line(error)}); save its tensors alone, best as .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint, {path.stat().st_size} bytes were found"
            f" ({_first_line(error)}); download it again"
        ) from error


def _unwrap(content: Any, use_ema: bool, path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors inside the trainer's dictionaries."""
    while isinstance(content, Mapping):
        inside = [name for name, value in content.items() if isinstance(value, Mapping)]
        if not inside:
            break
        if use_ema and "generator" in inside and "generator_ema" not in inside:
            logger.warning(f"{path} holds no averaged weights (generator_ema); its plain ones (generator) are loaded")
        wanted = ["generator_ema", "generator"] if use_ema else ["generator"]
        chosen = [name for name in (*wanted, "model", "state_dict") if name in inside]
        if not chosen:
            raise CheckpointError(
                f"use_ema={use_ema} looks in {path} for {', '.join(wanted)}, model or state_dict, found"
                f" {', '.join(map(str, inside))}" + ("; pass use_ema=True" if "generator_ema" in inside else "")
            )
        content = content[chosen[0]]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no dictionary of tensors but {type(content).__name__}")
    if other := [name for name, value in content.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path} holds things that are no tensors: {_some(other)}")
    return dict(content)


def _plain_names(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what trainers put around a model."""
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        short = short.removeprefix("model.").removeprefix("diffusion_model.")
        if short in plain:
            raise CheckpointError(f"two tensors of {path} become {short} once the trainer's prefixes are off")
        plain[short] = tensor
    return plain


def _check_fit(model: WanTransformer3DModel, weights: Mapping[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    held, asked = _size(weights), _size(wanted)
    if held is not None and held != asked:
        raise CheckpointError(
            f"{path} holds a Wan of {held}, and config= is of {asked}; leave config out to load it as it is, or name"
            " another file"
        )
    faults = []
    if missing := wanted.keys() - weights.keys():
        faults.append(f"missing: {_some(missing)}")
    if unexpected := weights.keys() - wanted.keys():
        faults.append(f"unexpected: {_some(unexpected)}")
    if differ := [n for n in wanted.keys() & weights.keys() if wanted[n].shape != weights[n].shape]:
        first = min(differ)
        example = f"{first} is {tuple(weights[first].shape)}, the config makes it {tuple(wanted[first].shape)}"
        faults.append(f"of another shape: {_some(differ)} ({example})")
    if faults:
        raise CheckpointError(f"the weights of {path} do not fit the transformer; {'; '.join(faults)}")


def _size(weights: Mapping[str, Tensor]) -> str | None:
    patch = weights.get("patch_embedding.weight")
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    return None if patch is None else f"{len(layers)} layers of {patch.shape[0]} channels"


def _some(names: Any) -> str:
    names = sorted(map(str, names))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
