"""SinkRecent's summaries: means of what is dropped, counted, exact where it is alike, and of bounded size."""

from collections import Counter

import pytest
import torch
from oracle import assert_within, attention64
from test_tempcache import DIM, F32, HEADS, T, fill, read, site
from tiny import tiny_pipeline

from diffaccel import Accel, FlashBlock, FrameWindow, KnobError, NotEngagedError, RollingRebased, SinkRecent
from diffaccel.cache import Entries, Memory
from diffaccel.cache.summary import MOST, CellSummary, FrameSummary

BOTH = pytest.mark.parametrize("summaries", ["frame", "cell"])


def dropping(summaries, recent=2, sink=1):
    return SinkRecent(recent_frames=recent, sink_frames=sink, summaries=summaries)


def per_entry(entries):
    return [tokens for count, tokens in entries.multiplicity for _ in range(count)]


def check(memory, frames_BTHD, batch=1):
    """Reading the memory is dense attention over these frames (values: keys + 1), in fp64."""
    q, k = torch.randn(batch, 9, HEADS, DIM), torch.cat(frames_BTHD, 1)
    found, (out, lse) = read(memory, q), attention64(q, k, k + 1, scale=0.3)
    assert_within(found.out, out, F32, inputs=4)
    assert_within(found.lse, lse, F32, inputs=4)


def test_cells_of_identical_frames_are_dense_attention_over_all_of_them():
    sink, still, recent = (torch.randn(1, T, HEADS, DIM) for _ in range(3))
    frames = [sink, *[still] * 9, recent, recent + 1]
    memory = fill(dropping("cell"), frames)
    assert [tier.count for tier in memory.past()] == [T, 3 * T]
    assert memory.older[0].entries.multiplicity == ((T, 9),)
    check(memory, frames)


def test_frames_of_identical_tokens_are_dense_attention_over_all_of_them():
    frames = [torch.randn(1, 1, HEADS, DIM).expand(1, T, -1, -1) for _ in range(12)]
    memory = fill(dropping("frame"), frames)
    assert memory.older[0].entries.multiplicity == ((9, T),)
    check(memory, frames)


def test_pooled_frames_are_exact_where_neighbours_are_identical():
    """70 frames in 64 entries: six pairs, which are equal frames here."""
    frames = [torch.randn(1, 1, HEADS, DIM).expand(1, T, -1, -1) for _ in range(73)]
    frames[2:13:2] = frames[1:12:2]
    memory = fill(dropping("frame", recent=3, sink=1), [*frames, frames[-1]])
    assert memory.older[0].entries.multiplicity == ((MOST - 6, T), (6, 2 * T))
    check(memory, [*frames, frames[-1]])


@BOTH
def test_rows_of_a_batch_have_means_of_their_own(summaries):
    """Means, counts and frames by hand, two videos that differ; the sink and the newest frames stay as they are."""
    frames = [torch.randn(2, T, HEADS, DIM) for _ in range(10)]
    memory = fill(dropping(summaries, recent=3, sink=2), frames)
    kept, gone = memory.exact.past().entries, torch.stack(frames[2:7], 1)  # (B, F, T, H, D)
    assert kept.frames.unique().tolist() == [0, 1, 7, 8, 9]
    assert torch.equal(kept.k, torch.cat([*frames[:2], *frames[7:]], 1))
    held = memory.older[0].entries
    mean = gone.mean(1) if summaries == "cell" else gone.mean(2).flip(1)
    torch.testing.assert_close(held.k, mean)
    torch.testing.assert_close(held.v, mean + 1)
    assert held.multiplicity == (((T, 5),) if summaries == "cell" else ((5, T),))
    assert held.frames.dtype == torch.int64
    assert held.frames.tolist() == ([6] * T if summaries == "cell" else [6, 5, 4, 3, 2])
    assert torch.equal(memory.older[0].frames()[0], held.frames)
    torch.testing.assert_close(held.log_weight(), torch.tensor([float(m) for m in per_entry(held)]).log())
    for row in range(2):
        alone = fill(dropping(summaries, recent=3, sink=2), [frame[row : row + 1] for frame in frames])
        torch.testing.assert_close(alone.older[0].entries.k[0], held.k[row])


@BOTH
def test_keys_and_values_of_unlike_frames_are_approximated_and_still_counted(summaries):
    """What a summary reads is attention over its entries with log(tokens) added: written out in fp64."""
    frames = [torch.randn(2, T, HEADS, DIM) for _ in range(12)]
    memory = fill(dropping(summaries), frames)
    held, kept = memory.older[0].entries, memory.exact.past().entries
    q = torch.randn(2, 9, HEADS, DIM)
    weight = torch.tensor([float(m) for m in per_entry(held)] + [1.0] * kept.count).log()
    out, lse = attention64(
        q, torch.cat([held.k, kept.k], 1), torch.cat([held.v, kept.v], 1), scale=0.3, log_weight=weight
    )
    assert_within(read(memory, q).out, out, F32, inputs=4)
    assert_within(read(memory, q).lse, lse, F32, inputs=4)
    k = torch.cat(frames, 1)
    assert (attention64(q, k, k + 1, scale=0.3)[0] - out).abs().max() > 1e-2
    forgetful = fill(dropping(None), frames)
    assert forgetful.count == 3 * T
    assert not forgetful.older


@BOTH
def test_tokens_add_up_and_neither_entries_nor_bytes_grow(summaries):
    policy, bytes_at = dropping(summaries), {}
    for stop in (4, 40, 66, 68, 70, 150, 400):
        memory = fill(policy, [torch.randn(1, T, HEADS, DIM) for _ in range(stop)])
        tier = memory.older[0]
        dropped = memory.seen - memory.exact.count
        assert sum(per_entry(tier.entries)) == tier.tokens == dropped == (stop - 3) * T
        assert tier.count == tier.entries.count == len(tier.frames()[0]) <= (MOST if summaries == "frame" else T)
        assert memory.count == 3 * T + tier.count
        assert memory.bytes == memory.exact.bytes + tier.bytes
        bytes_at[stop] = tier.bytes
    assert tier.bytes == 2 * tier.count * HEADS * DIM * 4
    assert bytes_at[70] == bytes_at[150] == bytes_at[400]


def drop_all(tier, frames, dtype, start=0):
    """Give a tier these frames [(T, H, D)] one by one, values: keys + 1."""
    for number, frame in enumerate(frames, start):
        k = frame.to(dtype)[None]
        tier.take(Entries(k, (k + 1).to(dtype), torch.full((T,), number)), T)


def test_pooled_entries_are_means_of_the_frames_they_cover():
    """Every number of frames up to 400: powers of two, grouped and ascending, older ones for no fewer, none lost."""
    frames, tier = torch.randn(400, T, HEADS, DIM), FrameSummary()
    for number, frame in enumerate(frames):
        drop_all(tier, [frame], F32, start=number)
        counts, newest = [m // T for m in per_entry(tier.entries)], tier.entries.frames.tolist()
        assert tier.count == min(number + 1, MOST)
        assert counts == sorted(counts)
        assert len(tier.entries.multiplicity) == len(set(counts)) <= 8
        assert all(m & (m - 1) == 0 for m in counts)
        assert newest[0] == number
        assert [n - m for n, m in zip(newest, counts, strict=True)] == [*newest[1:], -1]
    for key, value, last, count in zip(tier.entries.k[0], tier.entries.v[0], newest, counts, strict=True):
        covered = frames[last - count + 1 : last + 1].mean((0, 1))
        torch.testing.assert_close(key, covered, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(value, covered + 1, atol=1e-6, rtol=1e-5)
    assert max(counts) <= 4 * 400 / MOST  # all of about the same length


@pytest.mark.parametrize("tier", [CellSummary, FrameSummary])
def test_means_do_not_drift_over_ten_thousand_frames(tier):
    """In bf16, whose own sums would stop growing after a few hundred frames."""
    some = torch.randn(50, T, HEADS, DIM).bfloat16().float() + 3
    tier, wanted = tier(), some.bfloat16().double()
    drop_all(tier, list(some) * 200, torch.bfloat16)
    counts = torch.tensor(per_entry(tier.entries)).double() / 10_000
    assert tier.entries.k.dtype == torch.bfloat16
    assert tier.bytes == 2 * tier.count * HEADS * DIM * (2 + 4)
    if isinstance(tier, CellSummary):
        assert_within(tier.entries.k[0], wanted.mean(0), torch.bfloat16)
        assert_within(tier._means[0, 0], wanted.mean(0), F32)
    else:  # the mean of all entries, as their tokens weigh, is the mean of all tokens
        mean = torch.einsum("n,nhd->hd", counts / T, tier._means[0, 0].double())
        assert_within(mean, wanted.mean((0, 1)), F32)
    assert_within(tier.entries.k, tier._means[0], torch.bfloat16)


def test_the_mean_of_one_frame_many_times_is_that_frame_bit_for_bit():
    frame, tier = torch.randn(T, HEADS, DIM), CellSummary()
    drop_all(tier, [frame] * 1000, F32)
    assert torch.equal(tier.entries.k[0], frame)
    assert torch.equal(tier.entries.v[0], frame + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@BOTH
def test_entries_keep_the_models_dtype(summaries, dtype):
    memory = fill(dropping(summaries), [torch.randn(1, T, HEADS, DIM, dtype=dtype) for _ in range(8)])
    held = memory.older[0]
    assert held.entries.k.dtype == held.entries.v.dtype == dtype
    assert held._means.dtype == (torch.float64 if dtype == torch.float64 else F32)


@BOTH
def test_layers_and_generations_share_nothing(summaries):
    """Two layers committed at once, and dropped tokens copied: what is placed later does not change a summary."""
    policy, memories = dropping(summaries, recent=1, sink=0), [Memory(), Memory()]
    frames = torch.randn(2, 6, T, HEADS, DIM)
    fired = []
    run = type("Run", (), {"fired": lambda self, *a: fired.append(a)})()
    for block in range(3):
        for memory, own in zip(memories, frames, strict=True):
            k = own[2 * block : 2 * block + 2].flatten(0, 1)[None]
            memory.place(k, k + 1, site(block, 2))
            memory.finish_block(2 * T)
        policy.commit(memories, site(block, 2), run)
    assert [memory.version for memory in memories] == [3, 3]
    for memory, own in zip(memories, frames, strict=True):
        mean = own[:5].mean(0) if summaries == "cell" else own[:5].mean(1).flip(0)
        torch.testing.assert_close(memory.older[0].entries.k[0], mean)
    # after the first block one frame was summed up cell by cell: nothing was lost yet
    assert [bool(a[1]) for a in fired] == [summaries == "frame", True, True]


@BOTH
def test_a_commit_never_asks_the_device_for_a_value(summaries):
    """On the meta device there is none: whatever would wait for a GPU fails."""
    frames = [torch.randn(1, T, HEADS, DIM, device="meta") for _ in range(80)]
    memory = fill(dropping(summaries), frames)
    assert memory.older[0].entries.k.is_meta
    assert memory.older[0].tokens == 77 * T
    assert memory.older[0].entries.frames.device.type == "cpu"


def test_a_bad_value_is_refused_and_a_sink_that_moves_has_no_such_knob():
    with pytest.raises(
        KnobError, match=r"unknown SinkRecent.summaries 'cels': choose one of frame, cell; did you mean"
    ):
        SinkRecent(summaries="cels")
    assert "summaries" not in RollingRebased.knobs()
    assert SinkRecent().summaries is None


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def generate(pipe, accel, num_frames, frames_per_block=6, **changes):
    with accel(pipe) as run:
        settings = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 1.0}
        latents = pipe(
            "a red circle moves left",
            num_frames=num_frames,
            frames_per_block=frames_per_block,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **(settings | changes),
        ).frames
    return latents, run.report()


@BOTH
def test_a_rollout_of_five_hundred_frames_stays_at_its_size(pipe, summaries):
    """500 latent frames, reuse beside it: counts add up in the report, bytes and entries stop growing."""
    cache = SinkRecent(recent_frames=6, summaries=summaries)
    latents, report = generate(pipe, Accel(cache=cache, reuse=FlashBlock(refresh=2)), 4 * 503 + 1)
    frames, per_frame = latents.shape[2], report.cache["tokens_per_frame"]
    assert frames == 504
    assert torch.isfinite(latents).all()
    assert latents[:, :, -6:].std() > 0.1
    layers = len(pipe.transformer.blocks)
    entries = MOST if summaries == "frame" else per_frame
    assert report.cache["summary_entries"] == layers * entries
    assert report.cache["summarised_tokens"] == layers * (frames - 6 - 7) * per_frame  # the last block is not committed
    assert report.cache["max_tokens"] == 7 * per_frame + entries
    assert {line["bytes"] for line in report.blocks[20:]} == {report.blocks[-1]["bytes"]}
    assert report.slots["cache"].bytes == report.blocks[-1]["bytes"]
    assert Counter(line["tokens"] for line in report.blocks[20:]) == {7 * per_frame + entries: len(report.blocks) - 20}
    assert report.slots["cache"].keys_kept < report.slots["cache"].keys_total


def test_a_summary_is_read_and_a_window_may_leave_it_out(pipe):
    """The window reads the newest three frames and the sink: what is older, summed up or not, changes nothing."""
    window = FrameWindow(frames=3, sink_frames=1)
    forgetful, summed = (SinkRecent(recent_frames=3, sink_frames=1, summaries=s) for s in (None, "frame"))
    plain, with_means, without = (
        generate(pipe, accel, 97, 3)[0]
        for accel in (Accel(cache=forgetful), Accel(cache=summed), Accel(cache=summed, window=window))
    )
    assert (plain - with_means).abs().max() > 1e-4
    torch.testing.assert_close(plain, without, atol=1e-4, rtol=0)


def test_a_single_frame_summed_up_cell_by_cell_is_not_called_an_engagement(pipe):
    cache = SinkRecent(recent_frames=4, sink_frames=1, summaries="cell")
    with pytest.raises(NotEngagedError, match=r"never outgrew recent_frames=4 .*one frame summed up cell by cell"):
        generate(pipe, Accel(cache=cache), 4 * 11 + 1)  # one block of six is committed, and one frame of it dropped
