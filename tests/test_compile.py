"""Under torch.compile all layers share one graph, whatever the policies do and however long the cache is."""

import pytest
import torch
from test_policies import generate
from tiny import tiny_components, tiny_pipeline
from torch._dynamo.testing import CompileCounter

from diffaccel import Accel, FlashBlock, KnobError, PadCollapse, TempCache, UnsupportedError
from diffaccel.pipelines.compiling import compile_blocks, compile_if, to_come, unfit

ACCELS = [
    Accel(),
    Accel(cache=TempCache(threshold=0.3), reuse=FlashBlock(refresh=2), prompt=PadCollapse()),
]


@pytest.mark.parametrize("accel", ACCELS, ids=lambda a: "+".join(a.policies()) or "exact")
def test_one_graph_for_all_layers_and_the_same_numbers(accel):
    pipe = tiny_pipeline(layers=6)
    expected, _ = generate(pipe, accel)
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    found, _ = generate(pipe, accel)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # prompts are trimmed to different lengths for the two branches: one more graph, then lengths are dynamic
    assert counter.frame_count <= (1 if accel.prompt is None else 2)
    compiled = counter.frame_count
    generate(pipe, accel, num_frames=45)
    assert counter.frame_count == compiled


def test_blocks_are_compiled_where_asked_and_given_back():
    pipe = tiny_pipeline(layers=3)
    blocks = list(pipe.transformer.blocks)
    assert compile_if("off", pipe, 1, 1) is None
    assert all(block._compiled_call_impl is None for block in blocks)
    undo = compile_blocks(pipe)
    assert all(block._compiled_call_impl is not None for block in blocks)
    undo()
    assert all(block._compiled_call_impl is None for block in blocks)
    assert compile_if("on", pipe, 1, 1) is None
    assert all(block._compiled_call_impl is not None for block in blocks)
    with pytest.raises(KnobError, match="unknown --compile 'always': choose one of auto, on, off"):
        compile_if("always", pipe, 1, 1)


@pytest.mark.parametrize(("frames", "compiled"), [(9, False), (4_000_001, True)])
def test_auto_compiles_where_it_pays(frames, compiled, monkeypatch):
    pipe = tiny_pipeline()
    given = {"num_frames": frames, "height": 480, "width": 832, "num_inference_steps": 4, "guidance_scale": 1.0}
    forwards, tokens = to_come(pipe, given, 1)
    assert compile_if("auto", pipe, forwards, tokens) is None  # on the CPU never
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda"))
    monkeypatch.setattr(pipe.transformer, "compile_repeated_blocks", lambda **given: None)
    sentence = compile_if("auto", pipe, forwards, tokens)
    assert (sentence is not None) == compiled
    assert forwards == -(-(1 + (frames - 1) // 4) // 3) * 5
    assert tokens == 3 * 30 * 52
    if compiled:
        assert f"since {forwards} forwards will save about" in sentence


def test_what_cannot_be_compiled_says_why():
    from accelerate import cpu_offload

    pipe = tiny_pipeline()
    cpu_offload(pipe.transformer.blocks[1], execution_device="cpu")
    with pytest.raises(UnsupportedError, match="hooks sit inside of them"):
        compile_blocks(pipe)
    assert unfit(torch.nn.Linear(2, 2)) == "diffusers names none that repeat"


@pytest.mark.parametrize(("frames", "guidance", "expected"), [(81, 5.0, (100, 21 * 24)), (81, 1.0, (50, 21 * 24))])
def test_a_pipeline_that_makes_all_at_once_has_one_forward_a_step(frames, guidance, expected):
    from diffusers import WanPipeline

    given = {"num_frames": frames, "height": 64, "width": 96, "num_inference_steps": 50, "guidance_scale": guidance}
    assert to_come(WanPipeline(**tiny_components()), given, 1) == expected
