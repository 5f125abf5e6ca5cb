"""What lies between a layer's projections and its attention: norm and rotary embedding, and the prompt's keys, kept."""

import pytest
import torch
from oracle import assert_within
from test_policies import PROMPTS
from tiny import tiny_pipeline
from torch import nn

from diffaccel import Accel, SinkRecent
from diffaccel.kernel.merge import HAS_TRITON
from diffaccel.pipelines.backbones.common import plain

if HAS_TRITON:
    from diffaccel.kernel.fused_rotary import norm_rotate

SETTINGS = {"height": 64, "width": 64, "num_frames": 33, "num_inference_steps": 3, "output_type": "latent"}


def normed_and_turned(x, weight, eps, cos, sin):
    """fp64, from the definitions."""
    x = x.double().flatten(2)
    x = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).unflatten(2, (-1, cos.shape[-1]))
    out = torch.empty_like(x)
    for i in range(0, x.shape[-1], 2):
        c, s = cos[..., i].double(), sin[..., i + 1].double()
        out[..., i] = x[..., i] * c - x[..., i + 1] * s
        out[..., i + 1] = x[..., i] * s + x[..., i + 1] * c
    return out


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 7, 3, 16), (1, 33, 5, 48), (1, 5, 12, 128)], ids=str)
@pytest.mark.parametrize("placed", [False, True], ids=["new", "in a cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_pass_is_norm_rotation_and_copy(shape, placed, dtype):
    """By Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("gpu: Triton's interpreter reads bfloat16 as integers")
    batch, tokens, heads, dim = shape
    qkv = torch.randn(batch, tokens, 3 * heads * dim, device=device, dtype=dtype)  # as fused projections give them
    q, k, v = (x.unflatten(2, (heads, dim)) for x in qkv.chunk(3, 2))
    q_norm, k_norm = (1 + 0.1 * torch.randn(heads * dim, device=device, dtype=dtype) for _ in range(2))
    cos, sin = (torch.randn(1, tokens, 1, dim // 2, device=device).repeat_interleave(2, 3) for _ in range(2))
    buffers = [torch.full((batch, tokens + 9, heads, dim), 7.0, device=device, dtype=dtype) for _ in range(2)]
    place = tuple(buffer[:, 4 : 4 + tokens] for buffer in buffers) if placed else None
    found = norm_rotate(q, k, v, q_norm, k_norm, 1e-6, cos, sin, place)
    for x, source, norm in ((found[0], q, q_norm), (found[1], k, k_norm)):
        exact = normed_and_turned(source, norm, 1e-6, cos, sin)
        assert_within(x, exact, dtype, inputs=float(exact.abs().max()))
    assert torch.equal(found[2], v)
    if placed:
        for x, given, buffer in zip(found[1:], place, buffers, strict=True):
            assert x is given
            assert (buffer[:, :4] == 7).all()
            assert (buffer[:, 4 + tokens :] == 7).all()


@pytest.fixture
def projected(monkeypatch):
    """Weights that the prompt was projected by, call by call."""
    found = []
    linear = nn.functional.linear
    monkeypatch.setattr(
        "diffaccel.port.linear", lambda x, weight, bias: found.append(weight) or linear(x, weight, bias)
    )
    return found


def made(pipe, accel, **given):
    with accel(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPTS[0], generator=generator, **{**SETTINGS, "guidance_scale": 3.0, **given}).frames


def layers(pipe):
    return len(pipe.transformer.blocks)


def test_the_prompt_is_projected_once_a_layer_and_branch(projected):
    pipe = tiny_pipeline()
    made(pipe, Accel(cache=SinkRecent(3, 1)))
    assert len(projected) == 2 * 2 * layers(pipe)  # keys and values, with and without the prompt
    made(pipe, Accel())
    assert len(projected) == 2 * (2 * 2 * layers(pipe))  # nothing outlives a generation


def test_beside_many_tokens_it_is_projected_at_every_forward(projected, monkeypatch):
    pipe = tiny_pipeline()
    expected = made(pipe, Accel())
    once = len(projected)
    monkeypatch.setattr("diffaccel.run.WORTH_KEEPING", 0)
    assert torch.equal(made(pipe, Accel()), expected)
    assert len(projected) > 5 * once


@pytest.mark.parametrize("what", ["weights", "prompt"])
def test_what_changes_on_the_way_is_seen(what, projected):
    """A callback fuses an adapter into a weight, or writes another prompt over this one."""
    pipe = tiny_pipeline()
    before = pipe.transformer.blocks[0].attn2.to_k.weight.clone()

    def change(pipe, number, t, tensors):
        if number == 4:
            if what == "weights":
                with torch.no_grad():
                    pipe.transformer.blocks[0].attn2.to_k.weight.mul_(1.5)
            else:
                tensors["prompt_embeds"].mul_(0.5)
        return {}

    def run(stock):
        projected.clear()
        pipe.transformer.blocks[0].attn2.to_k.weight.data.copy_(before)
        if stock:  # an adapter's hook: nothing is kept beside it
            handles = [block.attn2.to_k.register_forward_hook(lambda *_: None) for block in pipe.transformer.blocks]
        found = made(
            pipe,
            Accel(),
            guidance_scale=1.0,
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
        if stock:
            assert not projected
            for handle in handles:
                handle.remove()
        return found

    torch.testing.assert_close(run(stock=False), run(stock=True), atol=0, rtol=0)


def test_only_what_is_its_weights_is_plain():
    linear = nn.Linear(4, 4)
    assert plain(linear, nn.RMSNorm(4))
    hooked = nn.Linear(4, 4)
    hooked.register_forward_pre_hook(lambda *_: None)
    offloaded = nn.Linear(4, 4)
    offloaded._hf_hook = object()
    quantised = nn.Linear(4, 4)
    quantised.weight = type("Packed", (nn.Parameter,), {})(quantised.weight.data)

    class Adapted(nn.Linear):
        pass

    for module in (hooked, offloaded, quantised, Adapted(4, 4)):
        assert not plain(linear, module)
