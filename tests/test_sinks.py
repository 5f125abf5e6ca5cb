"""The probe of sinks: masses are those of the model's own attention, and looking changes nothing."""

import pytest
import torch
from test_block_lm import MASK, make, prompt_of
from tiny import tiny_pipeline

from diffaccel import Accel, NotEngagedError
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.block_lm import BlockLM
from diffaccel.pipelines.loading import bundled_model
from diffaccel.sinks import Sink, SinkProbe

BLOCK = 4


def attention(lm, ids):
    """Probabilities (layers, H, N, N) under the block-causal mask, by transformers."""
    index = torch.arange(ids.shape[1])
    sees = index[None] // BLOCK <= index[:, None] // BLOCK
    mask = torch.zeros(1, 1, *sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    lm.set_attn_implementation("eager")
    return torch.stack(lm(input_ids=ids, attention_mask=mask, output_attentions=True).attentions)[:, 0]


@torch.no_grad()
def test_masses_are_those_of_the_models_attention():
    lm, ids, probe = make(), prompt_of(1, 24), SinkProbe()
    model, masks = BlockLM(lm, BLOCK, cache=probe), torch.full((1, BLOCK), MASK)
    for length in (12, 16, 24):  # a prompt, a block, two at once
        found = model(torch.cat([ids[:, :length], masks], 1)).logits
    assert torch.allclose(found, BlockLM(lm, BLOCK)(torch.cat([ids, masks], 1)).logits, atol=1e-4)
    p = attention(lm, ids).unflatten(1, (2, 2))  # heads of keys, and those that share one
    expected, count = torch.zeros(2, 2, 20), torch.zeros(20)
    for length in (12, 16, 24):
        past = length - BLOCK
        expected[..., :past] += p[..., past:length, :past].mean((2, 3))
        count[:past] += 1
    masses = probe.masses("token")
    torch.testing.assert_close(masses, expected / count, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(probe.masses("frame"), masses)  # of a text the same
    assert len(list(probe.lines())) == 1
    eps = float(masses.flatten().sort().values[-3])  # two are above
    sinks = probe.sinks("token", eps)
    assert len(sinks) == 2
    assert all(masses[sink.layer, sink.head, sink.at] == pytest.approx(sink.mass) for sink in sinks)
    assert float(probe.share("token", eps).sum()) == pytest.approx(2 / 4)


def generate(cache=None):
    pipe = tiny_pipeline()
    size = {"height": 32, "width": 48, "num_frames": 45}
    with Accel(cache=cache)(pipe) if cache else Accel()(pipe):
        return pipe("a cat", **size, num_inference_steps=2, guidance_scale=1.0, output_type="latent",
                    generator=torch.Generator().manual_seed(0)).frames  # fmt: skip


def test_a_video_is_looked_at_by_frames_and_places():
    probe = SinkProbe()
    assert torch.equal(generate(probe), generate())
    token, frame, place = (probe.masses(unit) for unit in ("token", "frame", "place"))
    assert (token.shape, frame.shape, place.shape) == (
        (2, 2, 36),
        (2, 2, 6),
        (2, 2, 6),
    )  # the last of four blocks is not read
    torch.testing.assert_close(token.unflatten(-1, (6, 6)).sum(-1), frame)
    assert bool((frame.sum(-1) > 0.1).all())
    lines = list(probe.lines(eps=0.01))
    assert lines[1].startswith("frames with more than 0.01 of the attention: 0 (100.0% of heads)")
    assert next(iter(probe.lines(eps=0.99))).endswith("none")


def test_a_sink_that_was_put_there_is_found():
    """Keys of one frame that all queries like: that frame, and no other, is the sink of every head."""
    from diffaccel.cache.look import Look
    from diffaccel.grid import Grid

    q, k = torch.ones(1, 8, 2, 16), torch.zeros(1, 12, 2, 16)
    k[:, 2:4] = 1  # two tokens a frame
    look = Look(0, q, k, k, {"token": torch.arange(12).expand(1, 2, 12)}, torch.ones(1, 2, 12).bool(), None,
                Grid(2, 1, 2), 4)  # fmt: skip
    probe = SinkProbe()
    probe.add(look, 4)
    assert [(sink.head, sink.at) for sink in probe.sinks("frame")] == [(0, 1), (1, 1)]
    assert isinstance(probe.sinks("frame")[0], Sink)
    assert probe.share("frame").tolist() == [0, 1, 0, 0]


def test_the_bundled_model_is_looked_at():
    pipe, probe = CausalWanPipeline.from_pretrained(bundled_model()), SinkProbe()
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 128, "width": 128, "num_frames": 37, "num_inference_steps": 1, "output_type": "latent"}
    with Accel(cache=probe)(pipe):
        pipe("a small green square moves up over gray", **size, guidance_scale=1.0)
    masses = probe.masses("frame")
    assert masses.shape[2] >= 3
    assert bool((masses > 0).all() & (masses.sum(-1) < 1.5).all())  # each frame's mean is over other blocks
    assert probe.share("frame", eps=0.01).max() == 1


def test_nothing_seen_is_an_error():
    with pytest.raises(NotEngagedError, match="no block with others before it"):
        SinkProbe().masses()
