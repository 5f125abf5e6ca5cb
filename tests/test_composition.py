"""What a user does to a diffusers pipeline beside diffaccel: it works, before `accel(pipe)` and inside, or is refused.

LoRA, step caches and threads have files of their own. torchao is looked for, not required: `pip install torchao`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from composition import KINDS, LOSSY, calls, opened, video

from diffaccel import Accel, UnsupportedError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """`changes`: whether it changes the numbers of the model itself. `refused`: by which sentence, if it is."""

    name: str
    do: Callable[[Any], None]
    changes: bool = False
    refused: str | None = None

    def __str__(self) -> str:
        return self.name


def group_offload(level):
    """Hooks are the same on every device."""
    return lambda pipe: pipe.transformer.enable_group_offload(CPU, offload_type=level, num_blocks_per_group=1)


def cast(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def quantise(pipe):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


def compile_module(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


TABLE = [
    Row("model offload", lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    Row("sequential offload", lambda pipe: cpu_offload(pipe.transformer, execution_device="cpu")),
    Row("group offload, blocks", group_offload("block_level")),
    Row("group offload, leaves", group_offload("leaf_level")),
    Row("layerwise casting", cast, changes=True),
    Row("int8 weights of torchao", quantise, changes=True),
    Row("fused projections", lambda pipe: pipe.transformer.fuse_qkv_projections()),
    Row("channels last", lambda pipe: pipe.transformer.to(memory_format=torch.channels_last_3d)),
    Row("blocks compiled", lambda pipe: pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")),
    Row(
        "compiled whole, in place",
        lambda pipe: pipe.transformer.compile(backend="eager"),
        refused=r"WanTransformer3DModel is compiled as a whole, .* take compile_repeated_blocks\(fullgraph=True\)",
    ),
    Row(
        "compiled whole, wrapped",
        compile_module,
        refused=r"torch.compile wrapped as a whole: set pipe.transformer = pipe.transformer._orig_mod",
    ),
]
WORKS = [row for row in TABLE if row.refused is None]
REFUSED = [row for row in TABLE if row.refused]


@pytest.fixture(scope="module")
def plain():
    """Of each kind of pipeline: its video, that of the technique, and the calls of attention."""
    found = {}
    for kind, accel in LOSSY.items():
        pipe = opened(kind)
        dense = video(pipe)
        with accel(pipe) as run:
            found[kind] = dense, video(pipe), calls(run)
        assert not torch.equal(*found[kind][:2])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", WORKS, ids=str)
def test_before(plain, kind, row):
    """Two generations in one `with`, exact and not, and one after it."""
    dense, lossy, met = plain[kind]
    pipe = opened(kind)
    row.do(pipe)
    expected = video(pipe)
    torch.testing.assert_close(expected, dense, atol=0.5 if row.changes else 1e-5, rtol=0)
    assert torch.equal(expected, dense) != row.changes
    with Accel()(pipe) as run:
        for count in (1, 2):
            torch.testing.assert_close(video(pipe), expected, atol=1e-5, rtol=0)
            assert calls(run) == [count * number for number in met]
    with LOSSY[kind](pipe) as run:
        found = [video(pipe), video(pipe)]
    assert torch.equal(*found)
    assert (found[0] - expected).abs().max() > 1e-3
    if not row.changes:
        torch.testing.assert_close(found[0], lossy, atol=1e-5, rtol=0)
    assert torch.equal(video(pipe), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", WORKS, ids=str)
def test_inside(plain, kind, row):
    """It stays after leaving, as it would without diffaccel."""
    _, lossy, met = plain[kind]
    pipe = opened(kind)
    with LOSSY[kind](pipe) as run:
        torch.testing.assert_close(video(pipe), lossy, atol=0, rtol=0)
        row.do(pipe)
        found = video(pipe)
        assert calls(run) == [2 * number for number in met]
    torch.testing.assert_close(found, lossy, atol=0.5 if row.changes else 1e-5, rtol=0)
    assert torch.equal(found, lossy) != row.changes
    other = opened(kind)
    row.do(other)
    assert torch.equal(video(pipe), video(other))
    assert set(vars(pipe.transformer)) == set(vars(other.transformer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", REFUSED, ids=str)
def test_refused(kind, row):
    pipe = opened(kind)
    row.do(pipe)
    with pytest.raises(UnsupportedError, match=row.refused):
        Accel().apply(pipe)


def test_compiling_the_whole_inside_is_refused_at_the_next_forward():
    pipe = opened("stock")
    with Accel()(pipe):
        pipe.transformer.compile(backend="eager")
        with pytest.raises(UnsupportedError, match="compiled as a whole"):
            video(pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_model_offload_that_ends_inside_has_ended(plain, kind):
    pipe = opened(kind)
    pipe.enable_model_cpu_offload(device="cpu")
    with LOSSY[kind](pipe):
        video(pipe)
        pipe.remove_all_hooks()
        pipe._all_hooks = []
        torch.testing.assert_close(video(pipe), plain[kind][1], atol=0, rtol=0)
    assert not hasattr(pipe.transformer, "_hf_hook")
    assert torch.equal(video(pipe), plain[kind][0])


def test_model_offload_that_began_inside_ends_with_the_forward_of_the_class():
    pipe = opened("stock")
    with Accel()(pipe):
        pipe.enable_model_cpu_offload(device="cpu")
    pipe.remove_all_hooks()
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


@pytest.mark.parametrize("kind", KINDS)
def test_weights_quantised_by_the_config_of_diffusers(kind, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from diffusers import TorchAoConfig

    pipe = opened(kind)
    pipe.transformer.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path, quantization_config=config)
    assert type(pipe.transformer.blocks[0].attn2.to_k.weight).__module__.startswith("torchao")
    expected = video(pipe)
    with Accel()(pipe):
        torch.testing.assert_close(video(pipe), expected, atol=1e-5, rtol=0)


# -- what a call is given -------------------------------------------------------------------------------------------


def halve(pipe, step, t, tensors):
    return {"latents": tensors["latents"] * 0.5}


def stop(pipe, step, t, tensors):
    pipe._interrupt = step == 1
    return {}


CALLS = {
    "no guidance": {"guidance_scale": 1.0},
    "a batch, a generator each": {
        "prompt": ["a red circle", "a blue square moves"],
        "generator": lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2)],
    },
    "two videos a prompt": {"num_videos_per_prompt": 2},
    "a callback that changes latents": {"callback_on_step_end": halve},
    "interrupted": {"callback_on_step_end": stop},
    "a negative prompt": {"negative_prompt": "the green square"},
}


@pytest.mark.parametrize("given", CALLS.values(), ids=CALLS)
def test_arguments_of_a_stock_call(plain, given):
    """Exactly what the pipeline makes of them alone; the causal pipeline's have tests of their own."""
    pipe = opened("stock")

    def made():
        return video(pipe, **{name: value() if name == "generator" else value for name, value in given.items()})

    expected = made()
    assert not torch.equal(expected[:1], plain["stock"][0])
    with Accel()(pipe):
        for _ in range(2):
            torch.testing.assert_close(made(), expected, atol=1e-5, rtol=0)
    with LOSSY["stock"](pipe):
        assert not torch.equal(made(), expected)
        torch.testing.assert_close(video(pipe), plain["stock"][1], atol=0, rtol=0)  # nothing is left of that call


@pytest.mark.filterwarnings("ignore")
def test_a_guider_of_a_modular_pipeline():
    """It tells no context and ends no generation: the branches are known by their prompts."""
    from diffusers import ClassifierFreeGuidance
    from diffusers.modular_pipelines import WanBlocks
    from tiny import tiny_components

    pipe = WanBlocks().init_pipeline()
    pipe.update_components(**tiny_components(), guider=ClassifierFreeGuidance(guidance_scale=2.0))
    pipe.set_progress_bar_config(disable=True)

    def made():
        settings = {"height": 32, "width": 48, "num_frames": 33, "num_inference_steps": 4, "output": "latents"}
        generator = torch.Generator().manual_seed(1)
        return pipe(prompt="a red circle", negative_prompt="", generator=generator, **settings)

    expected = made()
    with Accel()(pipe) as run:
        torch.testing.assert_close(made(), expected, atol=1e-5, rtol=0)
    assert calls(run) == [4 * 2] * 4
    with LOSSY["stock"](pipe):
        found = [made(), made()]
    assert torch.equal(*found)
    assert (found[0] - expected).abs().max() > 1e-3
    assert torch.equal(made(), expected)
