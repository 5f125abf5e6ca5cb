"""What is said where diffusers is another version than tested, or a pipeline is of no known family."""

import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
from diffusers import DDPMScheduler, UNet2DConditionModel
from tiny import tiny_components, tiny_pipeline, tiny_transformer

from diffaccel import Accel, UnsupportedError
from diffaccel.backbone import find
from diffaccel.peer import TESTED, building_on_diffusers
from diffaccel.pipelines import CausalWanPipeline

ROOT = Path(__file__).resolve().parent.parent


def test_the_tested_range_is_what_is_required():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"diffusers{TESTED}" in required


def fresh(version, *, lacks=None):
    """What `Accel()(pipe)` says twice in a new process under a diffusers of that version."""
    code = f"""
import sys, warnings
import diffusers
diffusers.__version__ = {version!r}
if {lacks!r}:
    from diffusers.models.transformers import transformer_wan
    delattr(transformer_wan, {lacks!r})
sys.path.insert(0, "tests")
from types import SimpleNamespace
from diffusers import WanTransformer3DModel
from diffaccel import Accel
pipe = SimpleNamespace(transformer=WanTransformer3DModel(
    num_attention_heads=1, attention_head_dim=12, ffn_dim=12, num_layers=1, text_dim=4, freq_dim=4))
for _ in range(2):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            Accel().apply(pipe).remove(check=False)
            print("accelerated")
        except Exception as error:
            print(type(error).__name__, error)
    print(*[f"warning: {{one.message}}" for one in said if "diffaccel" in str(one.message)], sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split("\n")


def test_a_version_that_was_not_tested_is_said_once():
    first, warned, second, nothing, *_ = fresh("0.43.0.dev0")
    assert first == second == "accelerated"
    assert "was tested with diffusers>=0.42,<0.43, and 0.43.0.dev0 is installed" in warned
    assert warned.endswith('pip install "diffusers>=0.42,<0.43"')
    assert nothing == ""


@pytest.mark.parametrize("version", ["0.50.1", "0.35.2"])
def test_what_such_a_version_lacks_is_an_error_with_the_remedy(version):
    first, nothing, second, *_ = fresh(version, lacks="_get_qkv_projections")
    assert first == second
    assert first.startswith(f"UnsupportedError diffaccel 0.1.0 builds on diffusers>=0.42,<0.43, and {version} is insta")
    assert "cannot import name '_get_qkv_projections'" in first
    assert first.endswith('pip install "diffusers>=0.42,<0.43"')
    assert nothing == ""


def test_a_fault_of_the_tested_version_keeps_its_own_error(monkeypatch):
    with pytest.raises(ImportError, match="its own"), building_on_diffusers():
        raise ImportError("its own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with building_on_diffusers():
            pass
    monkeypatch.setattr(diffusers, "__version__", "1.0.0")
    with pytest.warns(UserWarning, match=r"and 1\.0\.0 is installed"), building_on_diffusers():
        pass


class Unknown(SimpleNamespace):
    pass


def unet():
    small = {"block_out_channels": (4,), "norm_num_groups": 1, "layers_per_block": 1, "cross_attention_dim": 4}
    types = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    return UNet2DConditionModel(**small, **types, attention_head_dim=1)


@pytest.mark.parametrize(
    ("pipe", "said"),
    [
        (
            lambda: Unknown(unet=unet()),
            "Unknown denoises with UNet2DConditionModel (unet), which is of no known family",
        ),
        (lambda: Unknown(transformer=unet(), transformer_2=None), "with UNet2DConditionModel (transformer), which is"),
        (lambda: Unknown(transformer=None), "Unknown has no transformer loaded: load its weights first"),
        (
            lambda: CausalWanPipeline(**(tiny_components() | {"transformer": None})),
            "has no transformer and no transform",
        ),
        (lambda: Unknown(scheduler=DDPMScheduler()), "Unknown has no model that denoises (transformer, "),
        (tiny_transformer, "WanTransformer3DModel is a model: pass the pipeline that holds it"),
    ],
)
def test_what_is_of_no_family_is_told_with_what_is_missing(pipe, said):
    for ask in (find, Accel().apply):
        with pytest.raises(UnsupportedError) as raised:
            ask(pipe())
        assert said in str(raised.value)
        assert "; diffaccel knows pipelines of these families: Wan, " in str(raised.value)


def test_a_pipeline_of_a_family_is_found():
    assert find(tiny_pipeline())[0].name == "Wan"
