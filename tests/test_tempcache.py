"""TempCache merges what is alike, counts it, and stays exact where members are identical (FAST-AR, section 5.2)."""

from types import SimpleNamespace

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel import Grid, Site, TempCache
from diffaccel.cache import Memory
from diffaccel.kernel import KERNELS, merge
from diffaccel.kernel.weighted import over_entries

T, HEADS, DIM = 6, 2, 16  # tokens a frame, heads, channels


def site(block, frames):
    return Site(0, "self", 4, 4, block, block * frames, "clean", "cond", Grid(frames, 2, 3))


def fill(policy, frames_THD, block_frames=2):
    """Feed frames [(T, H, D) or (B, T, H, D)] of keys (also used as values) to one layer, block by block."""
    memory, scratch = Memory(), {}
    run = SimpleNamespace(scratch=lambda *_: scratch, fired=lambda *_: None)
    frames = [f if f.ndim == 4 else f[None] for f in frames_THD]
    for block in range(len(frames) // block_frames):
        k = torch.cat(frames[block * block_frames : (block + 1) * block_frames], dim=1)
        memory.place(k, k + 1, site(block, block_frames))
        memory.finish_block(k.shape[1])
        policy.commit([memory], site(block, block_frames), run)
    return memory


def read(memory, q):
    parts = [tier.partial(q, lambda q, e: over_entries(KERNELS["sdpa"], q, e, 0.3, None)) for tier in memory.past()]
    return merge([part for part, tier in zip(parts, memory.past(), strict=True) if tier.count])


@pytest.mark.parametrize("match", ["cell", "key"])
@pytest.mark.parametrize("representative", ["mean", "last"])
def test_identical_frames_keep_the_cache_at_one_frame_and_attention_exact(match, representative):
    frame = torch.randn(T, HEADS, DIM)
    policy = TempCache(threshold=1.0, match=match, representative=representative, recent_frames=0)
    memory = fill(policy, [frame] * 10)
    assert memory.count == T
    assert memory.seen == 10 * T
    assert memory.older[0].rows[0].multiplicity == ((T, 10),)
    q, k = torch.randn(1, 9, HEADS, DIM), frame.repeat(10, 1, 1)[None]
    out, lse = attention64(q, k, k + 1, scale=0.3)
    assert_within(read(memory, q).out, out, torch.float32, inputs=4)
    assert_within(read(memory, q).lse, lse, torch.float32)


def test_unlike_frames_all_stay_and_attention_is_exact():
    frames = [torch.randn(T, HEADS, DIM) for _ in range(8)]
    memory = fill(TempCache(threshold=0.95), frames)
    assert memory.count == memory.seen == 8 * T
    q, k = torch.randn(1, 9, HEADS, DIM), torch.cat(frames)[None]
    assert_within(read(memory, q).out, attention64(q, k, k + 1, scale=0.3)[0], torch.float32, inputs=4)


def test_only_what_stays_alike_merges_and_the_mean_is_over_members():
    still, moving = torch.randn(HEADS, DIM), [torch.randn(T - 1, HEADS, DIM) for _ in range(4)]
    drift = [still + 0.01 * i for i in range(4)]
    frames = [torch.cat([drift[i][None], moving[i]]) for i in range(4)]
    memory = fill(TempCache(threshold=0.9, recent_frames=0), frames)
    [row] = memory.older[0].rows
    assert row.multiplicity == ((4 * (T - 1), 1), (1, 4))
    torch.testing.assert_close(row.k[0, -1], torch.stack(drift).mean(0))
    torch.testing.assert_close(row.v[0, -1], torch.stack(drift).mean(0) + 1)
    assert row.frames[-1] == 3
    last = fill(TempCache(threshold=0.9, recent_frames=0, representative="last"), frames)
    torch.testing.assert_close(last.older[0].rows[0].k[0, -1], drift[3])


def test_several_tokens_may_join_one_entry():
    first = torch.randn(T, HEADS, DIM)
    second = first[2].expand(T, -1, -1)  # every token of the second frame is a copy of token 2
    memory = fill(TempCache(threshold=1.0, match="key", recent_frames=0), [first, second])
    assert memory.older[0].rows[0].multiplicity == ((T - 1, 1), (1, 1 + T))
    cell = fill(TempCache(threshold=1.0, match="cell", recent_frames=0), [first, second])
    assert cell.older[0].rows[0].multiplicity == ((2 * T - 2, 1), (1, 2))


def test_sink_and_recent_frames_do_not_merge():
    frame = torch.randn(T, HEADS, DIM)
    memory = fill(TempCache(threshold=0.9, sink_frames=2, recent_frames=3), [frame] * 10)
    assert memory.exact.count == 3 * T
    # 10 frames - 3 recent: frames 0, 1 alone, frame 2 starts an entry that 3..6 join
    assert memory.older[0].rows[0].multiplicity == ((2 * T, 1), (T, 5))
    assert memory.exact.past().entries.frames.unique().tolist() == [7, 8, 9]


def test_batch_rows_merge_on_their_own():
    still, moving = torch.randn(T, HEADS, DIM), [torch.randn(T, HEADS, DIM) for _ in range(4)]
    memory = fill(TempCache(threshold=0.9, recent_frames=0), [torch.stack([still, frame]) for frame in moving])
    assert [row.count for row in memory.older[0].rows] == [T, 4 * T]
    assert memory.count == 4 * T


def test_one_scale_for_all_layers():
    """A layer with keys twice as long sees twice the score difference, so it merges less at one threshold."""
    base = [torch.randn(T, HEADS, DIM)]
    base += [base[0] + 0.25]
    memories, scratch = [Memory(), Memory()], {}
    run = SimpleNamespace(scratch=lambda *_: scratch, fired=lambda *_: None)
    for memory, length in zip(memories, (1, 2), strict=True):
        k = length * torch.cat(base)[None]
        memory.place(k, k, site(0, 2))
        memory.finish_block(2 * T)
    TempCache(threshold=0.96, recent_frames=0).commit(memories, site(0, 2), run)
    assert memories[0].count == T
    assert memories[1].count == 2 * T


def test_version_rises_with_every_finished_block():
    memory = fill(TempCache(threshold=0.9), [torch.randn(T, HEADS, DIM)] * 8)
    assert memory.version == 4


def test_exact_tier_keeps_order_while_it_grows_and_is_drained():
    memory = Memory()
    frames = [torch.randn(1, T, HEADS, DIM) for _ in range(7)]
    for index, frame in enumerate(frames):
        memory.place(torch.randn_like(frame), frame, site(index, 1))  # a denoising step, overwritten
        memory.place(frame, frame, site(index, 1))
        memory.finish_block(T)
    taken = memory.exact.take_oldest(2 * T)
    assert torch.equal(taken.k, torch.cat(frames[:2], 1))
    assert torch.equal(memory.exact.past().entries.k, torch.cat(frames[2:], 1))
    assert memory.exact.past().entries.frames.tolist() == [f for f in range(2, 7) for _ in range(T)]
