"""Under torch.compile all layers share one graph, whatever the policies do and however long the cache is."""

import pytest
import torch
from test_policies import generate
from tiny import tiny_pipeline
from torch._dynamo.testing import CompileCounter

from diffaccel import Accel, FlashBlock, PadCollapse, TempCache

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
