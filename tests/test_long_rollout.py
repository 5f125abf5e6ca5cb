"""A video of 20 000 frames: what a bounded cache keeps, and everything else a run remembers, stays at its size."""

import resource

import pytest
import torch
from tiny import tiny_pipeline

from diffaccel import Accel, FlashBlock, PadCollapse, RollingRebased, SinkRecent, TempCache
from diffaccel.run import MOST_BLOCKS

FRAMES = 20_001

POLICIES = [
    TempCache(threshold=0.8, budget="16 frames", sink_frames=1),
    TempCache(threshold=0.8, variant="paper", budget="16 frames", sink_frames=1),
    SinkRecent(recent_frames=6),
    SinkRecent(recent_frames=6, summaries="cell"),
    RollingRebased(recent_frames=6, sink_frames=3),
]


def named(cache):
    changed = {name: value for name, value in cache.values().items() if value != cache.defaults()[name]}
    return f"{type(cache).__name__}({', '.join(f'{name}={value}' for name, value in changed.items())})"


@pytest.mark.parametrize("cache", POLICIES, ids=named)
def test_twenty_thousand_frames_neither_grow_nor_crash(cache):
    pipe = tiny_pipeline()
    seen = []

    def look(pipe, block, blocks, tensors):
        if block in (blocks // 10, blocks - 1):
            held = sum(len(v) for k, v in vars(run).items() if isinstance(v, (dict, list)) and k != "_blocks")
            assert len(run._blocks) <= MOST_BLOCKS
            caches = sum(memory.bytes for memory in run._memories.values())
            seen.append((held, caches, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))

    with Accel(cache=cache, reuse=FlashBlock(refresh=2), prompt=PadCollapse())(pipe) as run:
        latents = pipe(
            "a red circle moves left",
            height=32,
            width=48,
            num_frames=FRAMES,
            frames_per_block=6,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_chunk_end=look,
        ).frames
    assert latents.shape[2] == 1 + (FRAMES - 1) // 4
    assert torch.isfinite(latents).all()
    assert latents[:, :, -6:].std() > 0.1
    (early, early_bytes, early_rss), (late, late_bytes, late_rss) = seen
    assert late <= early
    assert late_bytes == early_bytes
    assert late_rss - early_rss < 64  # MiB
    assert run.report().cache["max_tokens"] <= 16 * run.report().cache["tokens_per_frame"]
