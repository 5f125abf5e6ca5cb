"""What is installed, whether it loads and fits together, and what this machine has."""

import importlib.metadata as metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

from ..kernel.xformers import built_for
from ..version import __version__

PACKAGE = "diffaccel"

EXTRAS = {
    "xformers": "one more dense attention to choose from, on NVIDIA GPUs",
    "faiss": "any index of Faiss on the CPU, as ann.Faiss (in place of faiss-gpu)",
    "faiss-gpu": "any index of Faiss on an NVIDIA GPU, as ann.Faiss (in place of faiss)",
    "hopper": "FlashAttention-3: the fastest dense attention in bfloat16, on Hopper GPUs only",
    "fa4": "FlashAttention-4: AnnSA faster at large shapes, on Hopper GPUs only",
    "demo": "models, presets and knobs in the browser: diffaccel demo",
    "eval": "MS-SSIM and LPIPS: diffaccel eval quality",
    "plots": "pictures of the cache and of frontiers: diffaccel generate --plots, diffaccel eval frontier",
    "tune": "the setting that serves a target best: diffaccel tune",
    "dev": "what tests, style and type checks need",
}
"""What each extra brings."""

PACKAGES = (
    *("triton", "diffusers", "transformers", "accelerate", "numpy", "opencv-python-headless", "imageio"),
    *("imageio-ffmpeg", "faiss-cpu", "faiss-gpu-cu12", "xformers", "fa3-fwd", "flash-attn-4", "sageattention"),
)
"""Distributions beside torch whose versions matter."""

_MODULES = {  # where a distribution's name is not what one imports
    "faiss-cpu": "faiss",
    "faiss-gpu-cu12": "faiss",
    "fa3-fwd": "fa3_fwd_interface",
    "flash-attn-4": "flash_attn.cute.interface",
    "imageio": "imageio_ffmpeg",
    "opencv-python-headless": "cv2",
}
_TOOLS = "dev"  # of this extra nothing is imported by the package

# stdout is kept for the answers, whatever an import prints. xFormers imports without its kernels and only warns.
_IMPORTER = """
import importlib, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for name in sys.argv[1:]:
    print(json.dumps([name, "starts"]), file=answers, flush=True)
    try:
        importlib.import_module(name)
        if name == "xformers":
            from xformers import _cpp_lib
            if getattr(_cpp_lib, "_cpp_library_load_exception", None) is not None:
                raise _cpp_lib._cpp_library_load_exception
        said = None
    except BaseException as error:
        said = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    print(json.dumps([name, said]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the command or option that mends it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Extra:
    """An optional extra: its `requirements`, those that are `missing`, and the pip command that gives it."""

    name: str
    requirements: tuple[str, ...]
    missing: tuple[str, ...]
    brings: str
    command: str

    @property
    def installed(self) -> bool:
        return not self.missing


@dataclass(frozen=True)
class Gpu:
    """A CUDA device; memory in bytes."""

    name: str
    capability: str
    memory: int
    free: int


@dataclass(frozen=True)
class Machine:
    """Versions by name (None: not installed), devices, extras, and what is wrong with them."""

    versions: dict[str, str | None]
    torch_built_for: str
    cuda: str | None
    cudnn: int | None
    platform: str
    threads: int
    gpus: tuple[Gpu, ...]
    extras: tuple[Extra, ...]
    problems: tuple[Problem, ...]


def look() -> Machine:
    """Everything here that is no kernel. Libraries are imported in a process of their own, which may die of it."""
    extras = installed_extras()
    problems = [
        *unmet_requirements(extras),
        *broken_imports(modules(extras)),
        *torch_problems(),
        *video_problems(),
        *cache_problems(cache_folders(cuda=torch.cuda.is_available())),
    ]
    return Machine(
        versions={
            PACKAGE: __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in PACKAGES},
        },
        torch_built_for=_built_for(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        platform=f"{platform.system()} {platform.machine()}",
        threads=torch.get_num_threads(),
        gpus=gpus(),
        extras=extras,
        problems=tuple(problems),
    )


def version(distribution: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# -- what is installed ---------------------------------------------------------------------------------------------


def requirements(extra: str = "") -> list[Requirement]:
    """What diffaccel asks for on this platform, or what an extra adds; nothing where diffaccel is not installed."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []

    def asked(one: Requirement, extra: str) -> bool:
        return one.marker is None or one.marker.evaluate({"extra": extra})

    found = [Requirement(line) for line in lines]
    return [one for one in found if asked(one, extra) and not (extra and asked(one, ""))]


def installed_extras() -> tuple[Extra, ...]:
    """Every extra in the metadata of diffaccel."""
    try:
        names = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return ()
    extras = []
    for name in names:
        asked = requirements(name)
        missing = tuple(one.name for one in asked if version(one.name) is None)
        everything = tuple(one.name for one in asked)
        extras.append(Extra(name, everything, missing, EXTRAS.get(name, ""), f'pip install "{PACKAGE}[{name}]"'))
    return tuple(extras)


def unmet_requirements(extras: Sequence[Extra]) -> list[Problem]:
    """Distributions of another version than diffaccel, or an extra of it, asks for."""
    problems = []
    if version(PACKAGE) is None:
        folder = Path(__file__).resolve().parents[2]
        problems.append(
            Problem(
                f"{PACKAGE} is imported from '{folder}' and not installed, so what it asks for is not known",
                f"pip install -e {folder}",
            )
        )
    for one in [*requirements(), *(one for extra in extras for one in requirements(extra.name))]:
        found = version(one.name)
        if found is not None and not one.specifier.contains(found, prereleases=True):
            problems.append(
                Problem(
                    f"{one.name} {found} is installed, and diffaccel was made for {one.name}{one.specifier}",
                    f'pip install "{one.name}{one.specifier}"',
                )
            )
    return problems


# -- does it load --------------------------------------------------------------------------------------------------


def modules(extras: Sequence[Extra]) -> dict[str, str]:
    """What to import, with the distribution it comes from: all that diffaccel needs and what is there of its extras."""
    optional = [name for extra in extras if extra.name != _TOOLS for name in extra.requirements]
    wanted = [*(one.name for one in requirements()), *(name for name in optional if version(name) is not None)]
    return {_MODULES.get(name, name.replace("-", "_")): name for name in wanted}


def broken_imports(wanted: dict[str, str], seconds: float = 90.0) -> list[Problem]:
    """Import modules (with the distribution of each) in another process; a problem for each that does not load."""
    problems, left = [], list(wanted)
    while left:
        answers, ended = _import(left, seconds)
        for name, said in answers.items():
            if said is not None:
                problems.append(_broken(wanted[name], name, ended if said == "starts" else said))
        rest = [name for name in left if name not in answers]
        if len(rest) == len(left):  # not even the first was begun
            problems.append(
                Problem(f"libraries could not be tried out: {ended}", f"{sys.executable} -c 'import torch'")
            )
            break
        left = rest
    return problems


def _import(names: list[str], seconds: float) -> tuple[dict[str, str | None], str]:
    """What was said of each module, "starts" of one that ended the process, and how that ended."""
    command = [sys.executable, "-P", "-c", _IMPORTER, *names]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=seconds, check=False)
        output, ended = done.stdout, f"it ended the process with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"it took more than {seconds:g} s"
    return dict(json.loads(line) for line in output.decode().splitlines()), ended


def _broken(distribution: str, module: str, said: str) -> Problem:
    found = version(distribution)
    if found is None:
        return Problem(f"{distribution} is missing: {said}", f'pip install "{distribution}"')
    if distribution == "xformers":
        built, asked = built_for()
        said = said.partition(" xFormers was built for")[0].rstrip(".")  # what for is said here
        what = f"xformers {found} is installed and does not load: {said}; it was built for torch "
        what += f"{built or 'of another version'} and asks for {asked}, and this is torch {torch.__version__}"
        public = "" if built is None else f"=={built.partition('+')[0]}"
        return Problem(what, f'pip uninstall xformers, or pip install "torch{public}"')
    what = f"{distribution} {found} is installed and {module} cannot be imported: {said}"
    return Problem(what, f'pip install --force-reinstall --no-deps "{distribution}"')


# -- torch and the GPU ---------------------------------------------------------------------------------------------


def gpus() -> tuple[Gpu, ...]:
    """All CUDA devices that torch can use."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, memory = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        found.append(Gpu(torch.cuda.get_device_name(index), f"{major}.{minor}", memory, free))
    return tuple(found)


def nvidia_gpus() -> list[str]:
    """The GPUs that the driver's own tool lists, whatever torch says; none without the tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.startswith("GPU")] if not done.returncode else []


def torch_problems() -> list[Problem]:
    """A GPU that torch cannot use: built without CUDA, a driver it does not get on with, or for other GPUs."""
    if not torch.cuda.is_available():
        present = nvidia_gpus()
        if not present:
            return []
        has = (
            f"this machine has {len(present)} NVIDIA GPU{'s' if len(present) > 1 else ''} ({present[0].split(' (')[0]})"
        )
        if torch.version.cuda is None:
            return [Problem(f"{has}, and torch {torch.__version__} is built without CUDA", _torch_command())]
        return [
            Problem(
                f"{has}, and torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use it: "
                f"{_cuda_error()}",
                f"nvidia-smi (its CUDA version must be {torch.version.cuda} or newer), else update the driver",
            )
        ]
    built = torch.cuda.get_arch_list()
    problems = []
    for index, gpu in enumerate(gpus()):
        if built and not runs_on(gpu.capability, built):
            what = f"torch {torch.__version__} is built for {', '.join(built)}, and cuda:{index} ({gpu.name}) is of "
            problems.append(Problem(f"{what}compute capability {gpu.capability}", _torch_command()))
    return problems


def runs_on(capability: str, built: Sequence[str]) -> bool:
    """Whether code for `built` (sm_90, compute_90) runs on a GPU of that compute capability (9.0).

    Machine code runs on the same major version from its minor version on, portable code on any later one.
    """
    major, minor = map(int, capability.split("."))
    for name in built:
        kind, _, digits = name.partition("_")
        number = int("".join(filter(str.isdigit, digits)))
        if kind == "compute" and number <= 10 * major + minor:
            return True
        if kind == "sm" and number // 10 == major and number % 10 <= minor:
            return True
    return False


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "it finds no device (is CUDA_VISIBLE_DEVICES set to none?)"


def _torch_command() -> str:
    if platform.system() == "Linux":  # where PyPI's own build is the one for CUDA
        return "pip install --upgrade --force-reinstall torch --index-url https://pypi.org/simple"
    return "the command that https://pytorch.org/get-started/locally gives for CUDA"


def _built_for() -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    hip = getattr(torch.version, "hip", None)
    return f"ROCm {hip}" if hip else "the CPU"


# -- files ---------------------------------------------------------------------------------------------------------


def video_problems(write: Callable[..., object] | None = None) -> list[Problem]:
    """Write two frames as mp4."""
    from ..video import VideoError, write_video

    with tempfile.TemporaryDirectory() as folder:
        try:
            (write or write_video)(Path(folder) / "two.mp4", np.zeros((2, 16, 16, 3), np.uint8))
        except (VideoError, OSError, ImportError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            fix = "pip install --force-reinstall --no-deps imageio-ffmpeg, or write a folder: -o frames/"
            return [Problem(f"no mp4 can be written: {said}", fix)]
    return []


def cache_folders(*, cuda: bool) -> dict[str, Path]:
    """Folders that libraries keep things in, by the variable that moves them: models from the hub, compiled kernels."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = {"HF_HUB_CACHE": Path(HF_HUB_CACHE)}
    if cuda and version("triton") is not None:
        home = Path(os.environ.get("TRITON_HOME", Path.home()))
        folders["TRITON_CACHE_DIR"] = Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))
    return folders


def cache_problems(folders: dict[str, Path]) -> list[Problem]:
    """Folders that can neither be written to nor created."""
    return [
        Problem(f"the cache folder '{folder}' is not writable", f"export {variable}=/a/writable/folder")
        for variable, folder in folders.items()
        if not _writable(folder)
    ]


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
