"""What is installed, under which names, and which way imports point."""

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from diffaccel.pipelines.loading import BUNDLED_MODELS, BUNDLED_TEXT_MODEL

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ALLOWED = {
    "ann": {"diffaccel.ann"},
    "diffaccel": {"diffaccel", "diffaccel.ann"},
    "pipelines": {"diffaccel", "diffaccel.ann", "diffaccel.pipelines"},
}
# the command line sits on top
UPWARD = {f"diffaccel/{name}.py" for name in ("settings", "text", "upscale", "__main__")}
UPWARD |= {f"diffaccel/cli/{name}.py" for name in ("asked", "calibrating", "checks", "demo", "generating")}
UPWARD |= {f"diffaccel/cli/{name}.py" for name in ("job", "listing", "sharing", "show", "upscaling", "writing")}
UPWARD |= {f"diffaccel/demo/{name}.py" for name in ("enlarging", "knobs", "layout", "making", "models")}
UPWARD |= {"diffaccel/doctor/__init__.py", "diffaccel/doctor/shape.py"}


def python(code, cwd=None):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def packages_on_disk():
    found = set()
    for folder in ("diffaccel", "ann", "pipelines"):
        for init in (ROOT / folder).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            found.add(name if folder == "diffaccel" else f"diffaccel.{name}")
    return found


def test_listed_packages_are_those_on_disk():
    data = {"diffaccel.samples"}  # the bundled models travel in the wheel with the samples, which are no package
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk() | data


def test_top_level_holds_what_it_should():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.fail("the checkout's file list needs git: " + tracked.stderr)
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    folders = {"diffaccel", "pipelines", "ann", "tests", "samples", "scripts"}
    assert {name for name in top if not name.startswith(".")} == {"pyproject.toml", "README.md", "LICENSE", *folders}


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_point_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        relative = path.relative_to(ROOT)
        if str(relative) in UPWARD:
            continue
        module = list(relative.with_suffix("").parts)
        module = module if folder == "diffaccel" else ["diffaccel", *module]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = module[: len(module) - node.level] if node.level else []
                names = [".".join([*base, *([node.module] if node.module else [])])]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                assert name.split(".")[0] not in ("ann", "pipelines"), f"{relative}: import {name} as diffaccel.{name}"
                if name.split(".")[0] != "diffaccel":
                    continue
                home = ".".join(name.split(".")[:2])
                layer = home if home in ("diffaccel.ann", "diffaccel.pipelines") else "diffaccel"
                assert layer in ALLOWED[folder], f"{relative} imports {name}: imports point one way"


@pytest.mark.parametrize("name", ["ann", "pipelines"])
def test_the_folder_is_not_a_package_of_its_own(name):
    found = python(f"import {name}", cwd=ROOT)
    assert found.returncode
    assert f"this folder is the package diffaccel.{name}" in found.stderr


def test_importing_is_quick_and_brings_no_extra():
    extras = ("xformers", "faiss", "gradio", "fa3_fwd_interface", "torchmetrics", "lpips", "diffusers", "transformers")
    found = python(f"import sys, diffaccel; print([name for name in {extras!r} if name in sys.modules])")
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_importing_patches_nothing():
    code = (
        "import diffusers.hooks, diffusers.models.attention_dispatch as d, torch.nn.functional as F\n"
        "before = (F.scaled_dot_product_attention, dict(vars(d)))\n"
        "import diffaccel, diffaccel.pipelines.backbones\n"
        "assert before == (F.scaled_dot_product_attention, dict(vars(d)))\n"
    )
    found = python(code)
    assert found.returncode == 0, found.stderr


def test_every_public_name_exists():
    for name in ("diffaccel", "diffaccel.ann", "diffaccel.cache", "diffaccel.kernel", "diffaccel.pipelines"):
        module = importlib.import_module(name)
        for public in module.__all__:
            assert getattr(module, public) is not None


def test_the_wheel_is_told_of_every_bundled_model():
    data = PROJECT["tool"]["setuptools"]["package-data"]["diffaccel.samples"]
    assert data == [f"{name}/**/*" for name in (*BUNDLED_MODELS, BUNDLED_TEXT_MODEL)]


@pytest.mark.slow
def test_the_wheel_has_one_top_level_name_and_the_bundled_models(tmp_path):
    source = tmp_path / "source"  # building leaves a folder behind that a later build would take files from
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "scripts/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"diffaccel"}
    assert {"diffaccel/py.typed", "diffaccel/ann/flat.py", "diffaccel/pipelines/causal_wan.py"} <= set(names)
    for model, file in {**dict.fromkeys(BUNDLED_MODELS, "model_index.json"), BUNDLED_TEXT_MODEL: "config.json"}.items():
        folder = source / "samples" / model
        files = {f"diffaccel/{file.relative_to(source)}" for file in folder.rglob("*") if file.is_file()}
        assert f"diffaccel/samples/{model}/{file}" in files
        assert files == {name for name in names if name.startswith(f"diffaccel/samples/{model}/")}

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = (
        "from diffaccel.pipelines.loading import BUNDLED_MODELS, bundled_model, bundled_text_model, check_checkpoint\n"
        "for name in BUNDLED_MODELS: check_checkpoint(bundled_model(name)); print(bundled_model(name))\n"
        "print(bundled_text_model())"
    )
    found = python(code, cwd=installed)
    places = [str(installed / "diffaccel" / "samples" / name) for name in (*BUNDLED_MODELS, BUNDLED_TEXT_MODEL)]
    assert found.stdout.splitlines() == places, found.stdout + found.stderr
