"""Open a pipeline by folder or hub name, with every usual mistake said in one sentence before anything is computed."""

import inspect
import json
import re
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import diffaccel
from diffaccel.errors import DiffaccelError, UnsupportedError
from diffaccel.preset_file import CONFIG_FILE
from diffaccel.suggest import choose

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BUNDLED_MODELS = ("tiny-world", "tiny-world-few-step")
"""The small video models that come with the toolkit, opened by these names; the first where none is named."""

BUNDLED_TEXT_MODEL = "tiny-lm"
"""The small language model that comes with it, for `diffaccel text`."""

PIPELINES = ("causal", "stock")
"""Block by block with a cache, or the pipeline class of the checkpoint as diffusers has it."""

DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "sequential")

_LANGUAGE_MODEL = ("config.json", "tokenizer_config.json")
_CAUSAL = "CausalWanPipeline"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


DEFAULTS_FILE = "generation.json"
"""Beside a checkpoint's model_index.json: what to generate where nothing is said ({"width": 128, "height": 128}), and
how. "pipeline": "causal" is for weights that were trained for it, whatever class they were saved by, and with it
"sampler" names the one they were trained for. "base" is a folder, relative to the checkpoint, that has the components
the checkpoint itself lacks."""


class LoadError(DiffaccelError):
    """No pipeline can be opened from what was named."""


def bundled_model(name: str = BUNDLED_MODELS[0]) -> Path:
    """Folder of a bundled video model: `samples/NAME` beside the package in a checkout, inside it in a wheel.

    Raises `LoadError` where neither is there, `KnobError` for a name that is none of `BUNDLED_MODELS`.
    """
    choose(name, BUNDLED_MODELS, "bundled model")
    return _sample(name, "model_index.json", "a folder or hub name of a diffusers video pipeline")


def bundled_text_model() -> Path:
    """Folder of the bundled language model, found as `bundled_model` finds its own."""
    return _sample(BUNDLED_TEXT_MODEL, "config.json", "the folder of a block-diffusion language model")


def _sample(name: str, file: str, instead: str) -> Path:
    """The folder of samples that has that file in it."""
    package = Path(diffaccel.__file__).resolve().parent
    places = (package / "samples" / name, package.parent / "samples" / name)
    for place in places:
        if (place / file).is_file():
            return place
    looked = " nor ".join(f"'{place}'" for place in places)
    raise LoadError(
        f"the bundled model '{name}' is not part of this installation (neither {looked} holds it); "
        f"pass --model with {instead}"
    )


def check_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The `model_index.json` of a diffusers checkpoint, after a look at every component and weight file in it.

    Only headers are read, so it takes milliseconds at any size. Components may lie in the base that `generation.json`
    names, which is looked at in the same way. Raises `LoadError` for a folder that is no checkpoint, a component that
    is missing, a safetensors file that is corrupt or shorter than its header says, and a base that cannot be used.
    """
    root = Path(folder)
    index_file = root / "model_index.json"
    named = str(folder) == BUNDLED_TEXT_MODEL and not root.is_dir()
    if named or (not index_file.is_file() and all((root / name).is_file() for name in _LANGUAGE_MODEL)):
        raise LoadError(
            f"'{root}' is a language model, and this makes videos; use diffaccel text \"PROMPT\" --model {root}, "
            f"or a video model (bundled: {', '.join(BUNDLED_MODELS)})"
        )
    if not root.is_dir():
        raise LoadError(
            f"there is no folder '{root}'; pass the folder of a diffusers checkpoint, a hub name 'owner/name', "
            f"or a bundled model ({', '.join(BUNDLED_MODELS)})"
        )
    if not index_file.is_file():
        raise LoadError(
            f"'{root}' is not a diffusers checkpoint: it has no model_index.json (pass the folder that has it)"
        )
    index = _read_json(index_file)
    if not isinstance(index.get("_class_name"), str):
        raise LoadError(f"'{index_file}' names no pipeline class (_class_name), so it cannot be opened; save it anew")
    lacking = _lacking(root, index)
    base = _base(root)
    if base is not None:
        _check_base(root, base, lacking)
    elif lacking:
        raise LoadError(
            f"the checkpoint '{root}' lacks its component folder '{next(iter(lacking))}'; download or save it again"
        )
    for file in sorted(root.glob("*/*.safetensors")):
        _check_safetensors(file)
    for file in sorted(root.glob("*/*.safetensors.index.json")):
        shards = set(_read_json(file).get("weight_map", {}).values())
        absent = sorted(shard for shard in shards if not (file.parent / shard).is_file())
        if absent:
            raise LoadError(
                f"'{file.parent}' lacks {len(absent)} weight file(s), first '{absent[0]}'; download it again"
            )
    return index


def _lacking(root: Path, index: dict[str, Any]) -> dict[str, list[str]]:
    """The components of a checkpoint that have no folder in it, with the library and class of each."""
    return {name: source for name, source in components(index).items() if not (root / name).is_dir()}


def components(index: dict[str, Any]) -> dict[str, list[str]]:
    """Library and class of every component in a `model_index.json` that is not left empty."""
    return {
        name: source
        for name, source in index.items()
        if not name.startswith("_") and isinstance(source, list) and all(source)
    }


def _base(root: Path) -> Path | None:
    """The folder that the `generation.json` of a checkpoint names as its base."""
    base = _read_generation(root).get("base")
    return None if base is None else (root / base).resolve()


def _check_base(root: Path, base: Path, lacking: dict[str, list[str]]) -> None:
    """Refuse a base that is damaged, has a base itself, or does not have the components that are lacking."""
    file = root / DEFAULTS_FILE
    if not base.is_dir():
        raise LoadError(
            f"'{file}' names the base '{base}', and there is no such folder; put the checkpoint there or correct 'base'"
        )
    if _base(base) is not None:
        # also what ends the search where a checkpoint names itself
        raise LoadError(f"the base '{base}' of '{root}' has a base itself; name one in '{file}' that is complete")
    try:
        known = components(check_checkpoint(base))
    except LoadError as error:
        raise LoadError(f"the base of '{root}' cannot be used: {error}") from error
    for name, source in lacking.items():
        if name not in known:
            raise LoadError(f"'{root}' and its base '{base}' both lack the component '{name}'; name another base")
        if known[name] != source:
            have, need = ".".join(known[name]), ".".join(source)
            raise LoadError(
                f"the '{name}' of the base '{base}' is a {have}, and '{root}' needs a {need}; name another base"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"'{file}' cannot be read as JSON ({error}); download or save the checkpoint again") from error
    if not isinstance(content, dict):
        raise LoadError(f"'{file}' must hold a JSON object; download or save the checkpoint again")
    return content


def _check_safetensors(file: Path) -> None:
    """Compare a weight file with its own header: 8 bytes of length, that much JSON, then the tensors."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (OSError, struct.error, ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise LoadError(f"the weight file '{file}' is corrupt ({error}); download or save it again") from error
    if size != whole:
        raise LoadError(f"the weight file '{file}' has {size} bytes where its header says {whole}; download it again")


@dataclass(frozen=True)
class Defaults:
    """What to generate where nothing is said: pixels, pixel frames, steps a block, guidance scale, frames a second.
    None leaves it to the pipeline."""

    width: int
    height: int
    num_frames: int
    num_inference_steps: int | None
    guidance_scale: float | None
    fps: float = 16.0


def defaults(pipe: Any, model: str | Path | None = None) -> Defaults:
    """Those of the checkpoint's `generation.json` if it has one, else those of the pipeline's call.

    Raises `LoadError` for a `generation.json` with a name or a value that it may not hold.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    names = [item.name for item in fields(Defaults)]
    found = {name: parameters[name].default for name in names if name in parameters}
    given = _read_generation(Path(_find(model)))
    return Defaults(**(found | {name: given[name] for name in names if name in given}))


def _read_generation(folder: Path) -> dict[str, Any]:
    """What the `generation.json` of a checkpoint says, checked; nothing where there is none."""
    file = folder / DEFAULTS_FILE
    if not file.is_file():
        return {}
    given = _read_json(file)
    names = ["pipeline", *(item.name for item in fields(Defaults)), "sampler", "base"]
    for name, value in given.items():
        if name not in names:
            raise LoadError(f"'{file}' may hold {', '.join(names)}, not {name!r}")
        if name in ("pipeline", "sampler", "base") and not (isinstance(value, str) and value):
            raise LoadError(f"'{file}' must hold a name as {name!r}, got {value!r}")
        if name == "pipeline":
            choose(value, PIPELINES, f"pipeline in '{file}'")
        elif name == "sampler":
            from .inputs import SAMPLERS  # not above: it imports diffusers, and help is to be quick

            choose(value, SAMPLERS, f"sampler in '{file}'")
            if given.get("pipeline") != "causal":
                raise LoadError(f'\'{file}\' names a sampler, which is for "pipeline": "causal"; add that or drop it')
        elif name != "base" and (isinstance(value, bool) or not isinstance(value, (int, float, type(None)))):
            raise LoadError(f"'{file}' must hold numbers, got {value!r} for {name!r}")
    return given


def saved_setting(model: str | Path | None = None) -> Path | None:
    """The file of the setting that `Accel.save_pretrained` left in the folder of a model, or None."""
    file = Path(_find(model)) / CONFIG_FILE
    return file if file.is_file() else None


def resolve_device(device: str | None = None) -> torch.device:
    """The device to run on; by default CUDA where there is one, else the CPU. `LoadError` for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise LoadError(f"unknown device '{device}': use cpu, cuda or cuda:N") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise LoadError(f"device '{device}' was asked for and this machine has no CUDA device; use --device cpu")
        if resolved.index is not None and resolved.index >= count:
            raise LoadError(f"device '{device}' was asked for and this machine has {count}: cuda:0 to cuda:{count - 1}")
    elif resolved.type == "mps" and not torch.backends.mps.is_available():
        raise LoadError(f"device '{device}' was asked for and this machine has none; use --device cpu")
    return resolved


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The torch dtype of that name; by default bfloat16 on CUDA and float32 elsewhere."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, choose(dtype, DTYPES, "dtype"))


def load(
    model: str | Path | None = None,
    *,
    pipeline: Literal["causal", "stock"] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    offload: Literal["none", "model", "sequential"] = "none",
) -> "DiffusionPipeline":
    """A diffusers pipeline, on its device, with its progress bar off.

    Args:
        model: a folder saved by diffusers, a hub name `owner/name`, or one of `BUNDLED_MODELS` where no folder has
            that name; None opens the first of those.
        pipeline: "causal" generates block by block (the transformer must have been trained for that), "stock" takes the
            checkpoint's own diffusers class. By default what the checkpoint says of itself, in `generation.json` or by
            the class it was saved by. A sampler it names becomes the causal pipeline's; a call may take another.
        dtype: "float32", "bfloat16" or "float16"; by default bfloat16 on CUDA and float32 elsewhere. The video
            autoencoder stays in float32, whose rounding would show.
        device: "cpu", "cuda", "cuda:1"; by default CUDA where there is one.
        offload: "model" or "sequential" keep the weights in host memory until they are needed; for CUDA only.

    Raises:
        LoadError: nothing can be opened there; the sentence says what is wrong and what to do.
        KnobError: an unknown name for `pipeline`, `dtype` or `offload`, here or in the `generation.json`.
    """
    choose(offload, OFFLOADS, "offload")
    if pipeline is not None:
        choose(pipeline, PIPELINES, "pipeline")
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    if offload != "none" and where.type == "cpu":
        raise LoadError(
            f"--offload {offload} moves weights to a GPU when they are needed, and the device is the CPU; drop it"
        )
    source = locate(model, pipeline)
    given: dict[str, Any] = {}
    if "sampler" in source.generation and source.pipeline == "causal":
        given["sampler"] = source.generation["sampler"]
    with opening(source):
        if source.base is not None and source.lacking:
            given |= _load_from_base(source.base, list(source.lacking), kind)
        pipe = source.cls.from_pretrained(source.name, dtype=_component_dtypes(source.index, kind), **given)
    pipe.set_progress_bar_config(disable=True)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=where)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=where)
    else:
        pipe.to(where)
    return pipe


@dataclass(frozen=True)
class Source:
    """A checkpoint: where it lies, and what it says of itself."""

    name: str  # a folder or a hub name
    index: dict[str, Any]
    pipeline: str | None  # one of `PIPELINES`, as asked for or as it says itself
    cls: Any  # of the pipeline that opens it
    generation: dict[str, Any]  # of its `generation.json`
    base: Path | None  # which has the components that it lacks
    lacking: Collection[str]


def locate(model: str | Path | None, pipeline: str | None) -> Source:
    """The checkpoint of that name, and the class that opens it. Raises as `load`."""
    source = _find(model)
    local = Path(source)
    generation: dict[str, Any] = {}
    base: Path | None = None
    lacking: Collection[str] = ()
    if local.exists() or isinstance(source, Path) or not _HUB_NAME.fullmatch(str(source)):
        index = check_checkpoint(local)
        generation, base, lacking = _read_generation(local), _base(local), _lacking(local, index)
        pipeline = pipeline or generation.get("pipeline")
    else:
        index = _hub_index(str(source))
    cls = _pipeline_class(index["_class_name"], pipeline, str(source))
    return Source(str(source), index, pipeline, cls, generation, base, lacking)


@contextmanager
def opening(source: Source) -> Iterator[None]:
    """What the libraries raise while a checkpoint is opened becomes a `LoadError` of one sentence."""
    try:
        yield
    except DiffaccelError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        name = source.cls.__name__
        raise LoadError(f"'{source.name}' cannot be opened as {name}: {_first_line(error)}") from error


def _find(model: str | Path | None) -> str | Path:
    """The folder of a bundled model that is named, or of the first where none is; any other name as it is."""
    if model is None:
        return bundled_model()
    named = isinstance(model, str) and model in BUNDLED_MODELS and not Path(model).is_dir()
    return bundled_model(str(model)) if named else model


def _component_dtypes(index: dict[str, Any], kind: torch.dtype) -> Any:
    return {"default": kind, "vae": torch.float32} if "vae" in index else kind


def _load_from_base(base: Path, names: list[str], kind: torch.dtype) -> dict[str, Any]:
    """Those components of a checked checkpoint; the others are not read."""
    index = _read_json(base / "model_index.json")
    cls = _pipeline_class(index["_class_name"], "stock", str(base))
    others = {name: None for name in components(index) if name not in names}
    pipe = cls.from_pretrained(str(base), dtype=_component_dtypes(index, kind), **others)
    return {name: getattr(pipe, name) for name in names}


def _hub_index(name: str) -> dict[str, Any]:
    """The `model_index.json` of a hub repository, from the local cache if it is there."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # the hub's client has changed its HTTP library before; the base of its own error is the one in use
    http_error = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    refusals: tuple[Any, ...] = (OSError, HFValidationError, http_error)
    try:
        file = huggingface_hub.try_to_load_from_cache(name, "model_index.json")
        if not isinstance(file, str):
            huggingface_hub.model_info(name, timeout=10)  # answers at once where the network does not
            file = huggingface_hub.hf_hub_download(name, "model_index.json")
    except refusals as error:
        raise LoadError(
            f"there is no folder '{name}', and it cannot be had from the hub: {_first_line(error)}; "
            "check the name and the connection, or pass a folder"
        ) from error
    index = _read_json(Path(file))
    if not isinstance(index.get("_class_name"), str):
        raise LoadError(f"'{name}' names no pipeline class in its model_index.json; pass a diffusers pipeline")
    return index


def _pipeline_class(saved: str, asked: str | None, source: str) -> Any:
    import diffusers

    if asked == "causal" or (asked is None and saved == _CAUSAL):
        if saved not in (_CAUSAL, "WanPipeline"):
            raise UnsupportedError(
                f"--pipeline causal needs a Wan checkpoint, and '{source}' is a {saved}; use --pipeline stock"
            )
        from diffaccel.pipelines import CausalWanPipeline

        return CausalWanPipeline
    if saved == _CAUSAL:
        saved = "WanPipeline"  # the same components, denoised all at once
    cls = getattr(diffusers, saved, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise UnsupportedError(
            f"'{source}' is a {saved}, which diffusers {diffusers.__version__} does not have; "
            "open it in Python and pass it to Accel"
        )
    return cls


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
