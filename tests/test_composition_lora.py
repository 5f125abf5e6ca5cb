"""Adapters beside diffaccel: whatever is loaded, scaled, fused or taken away, and when, is what attention sees."""

import copy

import pytest
import torch
from composition import KINDS, LOSSY, opened, video

from diffaccel import Accel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(scope="module")
def adapters():
    """Two random adapters of the tiny transformer, as a LoRA file holds them."""
    model = copy.deepcopy(opened("stock").transformer)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    shapes = {name: weight.shape for name, weight in peft.get_peft_model_state_dict(model).items()}
    generator = torch.Generator().manual_seed(7)
    return [
        {f"transformer.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(2)
    ]


def load(pipe, adapters):
    for name, adapter in zip("ab", adapters, strict=True):
        pipe.load_lora_weights(dict(adapter), adapter_name=name)
    pipe.set_adapters("a")


def fuse_for_good(pipe, adapters):
    load(pipe, adapters)
    pipe.fuse_lora(adapter_names=["a"])
    pipe.unload_lora_weights()


# what is done to a pipeline, one after the other; each changes its video
CHAIN = {
    "load": load,
    "scale": lambda pipe, _: pipe.set_adapters("a", 0.3),
    "both": lambda pipe, _: pipe.set_adapters(["a", "b"], [1.0, 0.5]),
    "fuse": lambda pipe, _: (pipe.set_adapters("a"), pipe.fuse_lora(adapter_names=["a"])),
    "unfuse": lambda pipe, _: (pipe.unfuse_lora(), pipe.set_adapters("b")),
    "delete": lambda pipe, _: (pipe.delete_adapters("b"), pipe.set_adapters("a", 0.5)),
    "disable": lambda pipe, _: pipe.disable_lora(),
    "enable": lambda pipe, _: pipe.enable_lora(),
    "unload": lambda pipe, _: pipe.unload_lora_weights(),
    "fuse for good": fuse_for_good,
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_before_and_inside(kind, adapters):
    """One pipeline goes through all steps inside of one `with`; another is accelerated anew after each."""
    alone, around, anew = (opened(kind) for _ in range(3))
    few = {"num_frames": 21, "num_inference_steps": 2}
    before = video(alone, **few)
    with Accel()(around):
        for name, do in CHAIN.items():
            for pipe in (alone, around, anew):
                do(pipe, adapters)
            expected = video(alone, **few)
            assert (expected - before).abs().max() > 1e-3, name
            before = expected
            torch.testing.assert_close(video(around, **few), expected, atol=1e-5, rtol=0, msg=name)
            with Accel()(anew):
                torch.testing.assert_close(video(anew, **few), expected, atol=1e-5, rtol=0, msg=name)
            assert torch.equal(video(anew, **few), expected), name
    assert torch.equal(video(around, **few), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_loaded_inside_stays(kind, adapters):
    pipe = opened(kind)
    with LOSSY[kind](pipe):
        load(pipe, adapters)
        video(pipe)
    assert pipe.get_active_adapters() == ["a"]
    found = video(pipe)
    pipe.unload_lora_weights()
    assert (video(pipe) - found).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_a_call(kind, adapters):
    pipe = opened(kind)
    load(pipe, adapters)
    full, half = video(pipe), video(pipe, attention_kwargs={"scale": 0.5})
    assert (full - half).abs().max() > 1e-3
    with Accel()(pipe):
        torch.testing.assert_close(video(pipe, attention_kwargs={"scale": 0.5}), half, atol=1e-5, rtol=0)


MIDDLE = {
    "scale": (load, lambda pipe, _: pipe.set_adapters("a", 0.2)),
    "load": (lambda *_: None, load),
    "fuse": (load, lambda pipe, _: pipe.fuse_lora(adapter_names=["a"], lora_scale=0.2)),
    "unload": (load, lambda pipe, _: pipe.unload_lora_weights()),
    "fuse for good": (lambda *_: None, fuse_for_good),
    "fuse for good, again": (fuse_for_good, fuse_for_good),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "then"), MIDDLE.values(), ids=MIDDLE)
def test_a_callback_changes_it_in_the_middle(kind, first, then, adapters):
    """Keys of the prompt are kept from step to step, and must not be of other weights; peft writes past versions."""

    def made(accel):
        pipe = opened(kind)
        first(pipe, adapters)
        whole = video(pipe)

        def change(pipe, step, t, tensors):
            if step == 1:
                then(pipe, adapters)
            return {}

        if accel is None:
            return whole, video(pipe, callback_on_step_end=change)
        with accel(pipe):
            return whole, video(pipe, callback_on_step_end=change)

    whole, expected = made(None)
    assert (whole - expected).abs().max() > 1e-3
    torch.testing.assert_close(made(Accel())[1], expected, atol=1e-5, rtol=0)
