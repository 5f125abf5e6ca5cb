"""TempCache merges what is alike, counts it, and stays exact where members are identical (FAST-AR, section 5.2)."""

from math import log
from types import SimpleNamespace

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel import Grid, HostCache, KnobError, RollingRebased, SinkRecent, Site, TempCache
from diffaccel.cache import Entries, Extent, Memory
from diffaccel.cache.budget import room_for
from diffaccel.cache.merged import MergedTokens
from diffaccel.cache.store import Quantised, row_of, size_of
from diffaccel.kernel import KERNELS, Partial, merge
from diffaccel.kernel.weighted import CHANNELS, over_entries
from diffaccel.rotary import rotate

T, HEADS, DIM = 6, 2, 16  # tokens a frame, heads, channels
F32 = torch.float32


def site(block, frames):
    return Site(0, "self", 4, 4, block, block * frames, "clean", "cond", Grid(frames, 2, 3))


def fake_run(scratch):
    return SimpleNamespace(scratch=lambda *_: scratch, fired=lambda *_: None, rotary=None, extent=extent(), spread=None)


def fill(policy, frames_THD, block_frames=2, scratch=None, run=None):
    """Feed frames [(T, H, D) or (B, T, H, D)] of keys (also used as values) to one layer, block by block."""
    scratch = {} if scratch is None else scratch
    run = run or fake_run(scratch)
    block = Grid(block_frames, 2, 3)
    memory = Memory(policy.expected_tokens(len(frames_THD) * T, block))
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
    [row] = [row.entries() for row in memory.older[0].rows]
    assert row.multiplicity == ((4 * (T - 1), 1), (1, 4))
    torch.testing.assert_close(row.k[0, -1], torch.stack(drift).mean(0))
    torch.testing.assert_close(row.v[0, -1], torch.stack(drift).mean(0) + 1)
    assert row.frames[-1] == 3
    last = fill(TempCache(threshold=0.9, recent_frames=0, representative="last"), frames)
    torch.testing.assert_close(last.older[0].rows[0].entries().k[0, -1], drift[3])


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
    run = fake_run(scratch)
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
    view = memory.exact.oldest(2 * T)
    taken = Entries(view.k.clone(), view.v.clone(), view.frames.clone())
    memory.exact.drop(0, 2 * T)
    assert torch.equal(taken.k, torch.cat(frames[:2], 1))
    assert torch.equal(memory.exact.past().entries.k, torch.cat(frames[2:], 1))
    assert memory.exact.past().entries.frames.tolist() == [f for f in range(2, 7) for _ in range(T)]


def extent(frames=40, block=2, branches=1):
    return Extent(frames, Grid(block, 2, 3), layers=1, heads=HEADS, head_dim=DIM, rows=1, branches=branches, dtype=F32)


@pytest.mark.parametrize("representative", ["mean", "last", "medoid"])
@pytest.mark.parametrize("seed", range(5))
def test_any_grouping_is_kept_as_its_members_say(seed, representative):
    """Random tokens stay, join or move to another token's entry; the entries are what grouping by hand gives."""
    rng = torch.Generator().manual_seed(seed)
    merged = MergedTokens(*[torch.zeros(1, T, HEADS, DIM)] * 2, 4, representative)
    groups, owner = [], None
    for frame in range(7):
        k = torch.randn(1, T, HEADS, DIM, generator=rng)
        match = torch.randint(T, (1, T), generator=rng)
        joins, similarity = torch.rand(1, T, generator=rng) < 0.6, torch.rand(1, T, generator=rng)
        merged.absorb(k, k + 1, frame, joins, match, similarity, None)
        following = []
        for token in range(T):
            if owner is not None and joins[0, token]:
                following.append(owner[match[0, token]])
            else:
                groups.append([])
                following.append(len(groups) - 1)
        for token in sorted(range(T), key=lambda t: float(similarity[0, t])):
            groups[following[token]].append(k[0, token])
        owner = following
        if frame % 3 == 2:
            merged.settle()
    [row] = merged.settle()
    entries = row.entries()
    order = sorted(range(len(groups)), key=lambda g: len(groups[g]))
    assert entries.count == len(groups)
    assert sum(n * m for n, m in entries.multiplicity) == 7 * T
    assert sorted(len(g) for g in groups) == [m for n, m in entries.multiplicity for _ in range(n)]
    want_v = torch.stack([torch.stack(groups[g]).mean(0) + 1 for g in order])
    found = entries.v[0].flatten(1)
    nearest = (want_v.flatten(1)[:, None] - found).norm(dim=2).min(dim=1)
    assert nearest.values.max() < 1e-4
    assert len(set(nearest.indices.tolist())) == len(groups)
    keys = entries.k[0][nearest.indices]
    for key, group in zip(keys, (groups[g] for g in order), strict=True):
        if representative == "mean":
            torch.testing.assert_close(key, torch.stack(group).mean(0))
        elif representative == "last":
            assert torch.equal(key, group[-1])
        else:
            assert any(torch.equal(key, member) for member in group)


def test_merged_attention_equals_dense_over_duplicates_and_a_base_two_lse_would_not():
    """Keys m times over, m in 1..8: grouped reads with log m, output and log-sum-exp (oracles 1 to 4)."""
    k, v = torch.randn(8, HEADS, DIM), torch.randn(8, HEADS, DIM)
    times = torch.arange(1, 9)
    entries = Entries(k[None], v[None], None, tuple((1, int(m)) for m in times))
    q = torch.randn(1, 5, HEADS, DIM)
    every = torch.repeat_interleave(torch.arange(8), times)
    out, lse = attention64(q, k[every][None], v[every][None], scale=0.3)
    parts = [KERNELS["reference"].partial(q, a, b, scale=0.3) for a, b, _ in entries.groups()]
    grouped = merge([Partial(p.out, p.lse + log(m)) for p, m in zip(parts, times.tolist(), strict=True)])
    wide_q = torch.cat([q, torch.ones(1, 5, HEADS, 1)], dim=-1)
    column = (times.log() / 0.3)[None, :, None, None].expand(1, 8, HEADS, 1)
    widened = KERNELS["reference"].partial(wide_q, torch.cat([k[None], column], dim=-1), v[None], scale=0.3)
    bias = over_entries(KERNELS["sdpa"], q, entries, 0.3, None)
    for found in (grouped, widened, bias):
        assert_within(found.out, out, F32, inputs=4)
        assert_within(found.lse, lse, F32)
    wrong = merge([Partial(p.out, p.lse / log(2) + log(m)) for p, m in zip(parts, times.tolist(), strict=True)])
    assert (wrong.out - out).abs().max() > 1e-2


@pytest.mark.parametrize("overflow", ["merge", "recency"])
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_a_budget_is_never_exceeded_and_protects_sink_and_recent(threshold, overflow):
    policy = TempCache(threshold=threshold, budget=f"{3 + 2 + 2 + 4} frames", sink_frames=3, overflow=overflow)
    frames = [torch.randn(T, HEADS, DIM) for _ in range(24)]
    for stop in range(2, 25, 2):
        memory = fill(policy, frames[:stop])
        assert memory.count + 2 * T <= 11 * T
        kept = torch.cat([tier.frames()[0] for tier in memory.past()])
        assert {f for f in (0, 1, 2, stop - 2, stop - 1) if f < stop} <= set(kept.tolist())
    [row] = memory.older[0].rows
    if overflow == "recency":
        assert kept.unique().tolist() == [0, 1, 2, *range(18, 24)]  # nothing merged, so the oldest went first
    else:
        assert row.count == (3 + 4) * T
        assert sum(n * m for n, m in row.multiplicity) == (24 - 2) * T  # nothing is forgotten
        assert row.multiplicity[0] == (3 * T, 1) or row.multiplicity[0][0] > 3 * T  # the sink is as it was


@pytest.mark.parametrize("knobs", [{}, {"bits": 8}, {"hold": "host"}, {"heads": "per_head"}], ids=str)
def test_the_room_of_entries_says_what_they_are_and_stays_where_it_is(knobs, monkeypatch):
    """Keys with their log-multiplicity in channels of their own are attention with multiplicities."""
    monkeypatch.setattr("diffaccel.cache.merged.can_in_place", lambda device, dtype, dim: True)
    policy = TempCache(0.9, budget=f"{2 + 2 + 4} frames", **knobs)
    still = [torch.randn(T, HEADS, DIM) for _ in range(2)]
    addresses, scratch, q = set(), {}, torch.randn(1, 5, HEADS, DIM)
    memory = Memory(policy.expected_tokens(24 * T, Grid(2, 2, 3)))
    for block in range(12):
        frames = [still[n % 2] if n % 3 else torch.randn(T, HEADS, DIM) for n in (2 * block, 2 * block + 1)]
        k = torch.cat(frames)[None]
        memory.place(k, k + 1, site(block, 2))
        memory.finish_block(k.shape[1])
        policy.commit([memory], site(block, 2), fake_run(scratch))
        for row in memory.older[0].rows if memory.older else ():
            entries, room = row.entries(), row.entries().room
            if policy.bits or policy.hold == "host":
                assert room is None
                continue
            assert int(room.used) == row.count
            assert room.scale == DIM**-0.5
            heads = entries.k.shape[2]
            wide_q = torch.cat([q[:, :, :heads], torch.ones(1, 5, heads, CHANNELS)], dim=-1)
            wide = KERNELS["reference"].partial(
                wide_q, room.k[:, : row.count], room.v[:, : row.count, :, :DIM], scale=room.scale
            )
            plain = over_entries(KERNELS["reference"], q[:, :, :heads], entries, room.scale, None)
            assert_within(wide.out, plain.out, F32, inputs=4)
            assert_within(wide.lse, plain.lse, F32)
            addresses.add((row.number, *(x.data_ptr() for x in room[:3])))
    assert any(m > 1 for row in memory.older[0].rows for _, m in row.multiplicity)
    assert len(addresses) == (0 if policy.bits or policy.hold == "host" else len(memory.older[0].rows))


def test_what_is_seen_often_outlives_what_was_seen_once():
    still = torch.randn(T // 2, HEADS, DIM)
    frames = [torch.cat([still, torch.randn(T // 2, HEADS, DIM)]) for _ in range(20)]
    scratch = {}
    memory = fill(TempCache(threshold=0.99, budget="6 frames", overflow="recency"), frames, scratch=scratch)
    [row] = [row.entries() for row in memory.older[0].rows]
    assert row.multiplicity[-1] == (T // 2, 18)
    merged = scratch["state"].merged[0]
    assert int(merged.evicted) == 18 * T - sum(n * m for n, m in row.multiplicity) > 0


def test_by_attention_mass_stays_what_the_queries_read():
    """One early token points where every query points; recency would drop it, mass keeps it."""
    frames = [0.1 * torch.randn(T, HEADS, DIM) for _ in range(20)]
    wanted = torch.full((HEADS, DIM), 2.0)
    frames[1][3] = wanted
    for overflow, kept in (("recency", False), ("mass", True)):
        memory = Memory(sample=lambda q, site: q)
        policy, run = TempCache(threshold=None, budget="8 frames", overflow=overflow), fake_run({})
        for block in range(10):
            k = torch.cat(frames[2 * block : 2 * block + 2])[None]
            memory.place(k, k, site(block, 2), queries=wanted.expand(1, 2 * T, HEADS, DIM))
            memory.finish_block(2 * T)
            policy.commit([memory], site(block, 2), run)
        held = memory.older[0].rows[0].entries()
        assert held.count == (8 - 2 - 2) * T
        assert bool((held.k[0] == wanted).all(dim=(1, 2)).any()) == kept


def folded(frames_RTHD, limit, threshold=None, sink=0, most=None, representative="mean", step=2):
    """Rows that took these frames [(R, T, H, D)] some at a time; each token's value says which token it is."""
    rows, tokens = frames_RTHD[0].shape[:2]
    names = torch.eye(len(frames_RTHD) * tokens)
    merged = MergedTokens(frames_RTHD[0], names[:tokens][None, :, None].expand(rows, -1, -1, -1), limit, representative)
    bar = None if threshold is None else torch.full((rows, 1), threshold)
    for start in range(0, len(frames_RTHD), step):
        for frame in range(start, start + step):
            v = names[frame * tokens : (frame + 1) * tokens][None, :, None].expand(rows, -1, -1, -1)
            merged.add(frames_RTHD[frame], v, frame)
        over = limit if merged.bound > limit else None
        merged.fold(bar, over, torch.ones(rows, 1), sink, most, step * tokens)
        found = merged.settle()
    return merged, [row.entries() for row in found]


@pytest.mark.parametrize("most", [None, 3])
@pytest.mark.parametrize("representative", ["mean", "last", "medoid"])
@pytest.mark.parametrize("at_once", [1, 2**26])
def test_a_folded_entry_is_what_its_members_say(monkeypatch, representative, at_once, most):
    """Members of an entry are consecutive frames of one place, none is lost or in two, and no row exceeds the limit."""
    monkeypatch.setattr("diffaccel.cache.store._AT_ONCE", at_once)
    tokens, frames, sink = 5, [torch.randn(3, 5, 1, 60) for _ in range(12)], 1
    merged, rows = folded(frames, 5 * 6, sink=sink, most=most, representative=representative)
    for number, entries in enumerate(rows):
        assert entries.count == 5 * 6
        counts = [m for n, m in entries.multiplicity for _ in range(n)]
        seen = []
        for k, v, count, newest in zip(entries.k[0], entries.v[0, :, 0], counts, entries.frames, strict=True):
            members = v.nonzero().flatten()
            torch.testing.assert_close(v[members], torch.full((count,), 1 / count))
            when, place = members // tokens, members % tokens
            assert len(members) == count <= (most or 99)
            assert len(place.unique()) == 1
            assert when.tolist() == list(range(int(when[0]), int(newest) + 1))
            assert count == 1 or int(when[0]) >= sink
            seen += members.tolist()
            keys = torch.stack([frames[f][number, place[0]] for f in when.tolist()])
            if representative == "mean":
                torch.testing.assert_close(k, keys.mean(0))
            elif representative == "last":
                assert torch.equal(k, keys[-1])
            else:
                assert any(torch.equal(k, key) for key in keys)
        assert sorted(seen) == list(range(len(frames) * tokens))
    assert int(merged.drift.joins) >= 3 * (12 - 6) * 5


def test_a_medoid_moves_to_the_member_nearest_the_mean():
    merged = MergedTokens(*[torch.zeros(1, 1, 1, 2)] * 2, 4, "medoid")
    for frame, k in enumerate((0.0, 1.0, 1.1)):
        merged.add(torch.full((1, 1, 1, 2), k), torch.full((1, 1, 1, 2), k), frame)
    for limit, key in ((2, 1.0), (1, 1.0)):  # of two the older one; of 0, 1 and 1.1 the one next to 0.7
        merged.fold(None, limit, torch.ones(1, 1), 0, None, 0)
        [row] = merged.settle()
        assert row.entries().k[0, -1, 0, 0] == key


@pytest.mark.parametrize("what", ["keys", "values"])
def test_the_pair_that_changes_attention_least_merges_first(what):
    """Equal values merge before equal-sized differences, and so do equal keys: the measure is their product."""
    k, v = torch.randn(8, T, HEADS, DIM), torch.randn(8, T, HEADS, DIM)
    {"keys": k, "values": v}[what][5, 2] = {"keys": k, "values": v}[what][4, 2] + 1e-4
    merged = MergedTokens(k[:1], v[:1], 8 * T)
    for frame in range(8):
        merged.add(k[frame : frame + 1], v[frame : frame + 1], frame)
    merged.fold(None, 8 * T - 1, torch.ones(1, 1), 0, None, 0)
    [row] = merged.settle()
    entries = row.entries()
    assert entries.multiplicity == ((8 * T - 2, 1), (1, 2))
    torch.testing.assert_close(entries.k[0, -1], (k[4, 2] + k[5, 2]) / 2)
    torch.testing.assert_close(entries.v[0, -1], (v[4, 2] + v[5, 2]) / 2)


def test_what_is_less_alike_than_the_bound_goes_instead_of_merging():
    """Half of each frame stays nearly as it is, half is new each time; only the still half is worth a merge."""
    still = torch.randn(T // 2, HEADS, DIM)
    near = [still + 0.05 * torch.randn_like(still) for _ in range(12)]
    frames = [torch.cat([n, torch.randn(T // 2, HEADS, DIM)]) for n in near]
    for bound, evicted in ((None, 0), (0.8, 1)):
        scratch = {}
        policy = TempCache(None, budget="7 frames", overflow_threshold=bound)
        memory = fill(policy, frames, scratch=scratch)
        merged = scratch["state"].merged[0]
        assert memory.count == 5 * T
        assert (int(merged.evicted) > 0) == (evicted > 0)
        assert bound is None or float(merged.least) >= bound
    with pytest.raises(KnobError, match='of overflow="merge"'):
        TempCache(budget="7 frames", overflow="mass", overflow_threshold=0.5)


def test_a_pair_once_merged_is_measured_anew_before_it_takes_a_third():
    """Of links .10, .11 and .14 the second joins a pair whose mean has moved away by then: the third goes first."""
    k = torch.tensor([0.0, 0.10, 0.21, 5.0, 5.14, 9.0]).view(6, 1, 1, 1, 1)
    v = torch.arange(6.0).view(6, 1, 1, 1, 1)
    merged = MergedTokens(k[0], v[0], 6)
    for frame in range(6):
        merged.add(k[frame], v[frame], frame)
    merged.fold(None, 4, torch.ones(1, 1), 0, None, 0)
    [row] = merged.settle()
    assert sorted(row.entries().v.flatten().tolist()) == [0.5, 2.0, 3.5, 5.0]


def test_a_token_whose_match_was_evicted_becomes_an_entry():
    frames = [torch.randn(T, HEADS, DIM)] * 2
    merged = MergedTokens(*[torch.zeros(1, T, HEADS, DIM)] * 2, 2 * T, "mean")
    cells, all_join = torch.arange(T)[None], torch.ones(1, T, dtype=torch.bool)
    merged.absorb(frames[0][None], frames[0][None], 0, all_join, cells, torch.ones(1, T), None)
    merged.evict(T - 2, torch.arange(float(2 * T + 1))[None], 0)
    merged.settle()
    merged.absorb(frames[1][None], frames[1][None], 1, all_join, cells, torch.ones(1, T), None)
    [row] = merged.settle()
    entries = row.entries()
    assert entries.multiplicity == ((2, 1), (T - 2, 2))


def test_max_multiplicity_starts_a_new_entry():
    memory = fill(TempCache(threshold=0.9, recent_frames=0, max_multiplicity=4), [torch.randn(T, HEADS, DIM)] * 10)
    assert memory.older[0].rows[0].multiplicity == ((T, 2), (2 * T, 4))


def test_thresholds_differ_between_layers():
    frame = torch.randn(T, HEADS, DIM)
    memories, scratch = [Memory(), Memory()], {}
    for memory in memories:
        k = torch.cat([frame, frame + 0.2])[None]
        memory.place(k, k, site(0, 2))
        memory.finish_block(2 * T)
    TempCache(threshold=(0.5, 1.0), recent_frames=0).commit(memories, site(0, 2), fake_run(scratch))
    assert [memory.count for memory in memories] == [T, 2 * T]


def test_heads_on_their_own_merge_what_stays_alike_in_one_of_them():
    """Head 0 never changes and head 1 always does: shared nothing merges, per head one of the two does."""
    still = torch.randn(1, T, 1, DIM)
    frames = [torch.cat([still, torch.randn(1, T, 1, DIM)], dim=2) for _ in range(8)]
    shared = fill(TempCache(0.95), frames)
    split = fill(TempCache(0.95, heads="per_head"), frames)
    assert shared.count == 8 * T
    assert [row.multiplicity for row in split.older[0].rows] == [((T, 6),), ((6 * T, 1),)]
    q, k = torch.randn(1, 9, HEADS, DIM), torch.cat(frames, 1)
    found, (out, lse) = read(split, q), attention64(q, k, k + 1, scale=0.3)
    assert_within(found.out, out, F32, inputs=4)
    assert_within(found.lse, lse, F32)
    two = fill(TempCache(0.95, heads="per_head"), [torch.cat([f, f + 0.01]) for f in frames])
    q = torch.randn(2, 9, HEADS, DIM)
    k = torch.cat([torch.cat(frames, 1), torch.cat(frames, 1) + 0.01])
    assert_within(read(two, q).out, attention64(q, k, k + 1, scale=0.3)[0], F32, inputs=4)


def test_the_papers_variant_compares_unrotated_keys_and_keeps_the_newest():
    """One patch at one place, rotated by its frame: far apart as read, the same once the rotation is undone."""
    still = torch.randn(T, HEADS, DIM)
    angles = torch.arange(4.0)[:, None] * torch.linspace(3.0, 0.5, DIM // 2)
    tables = [(f(angles).repeat_interleave(2, 1)[:, None, None], f) for f in (torch.cos, torch.sin)]
    cos, sin = (table.repeat_interleave(T, 0).view(2, 1, 2 * T, 1, DIM) for table, _ in tables)
    frames = [rotate(still.repeat(2, 1, 1)[None], cos[block], sin[block]).view(2, T, HEADS, DIM) for block in (0, 1)]
    policy = TempCache(threshold=0.999, variant="paper", match="cell", recent_frames=0)
    memory = Memory()
    run = fake_run({})
    for block in (0, 1):
        k = frames[block].flatten(0, 1)[None]
        run.rotary = cos[block], sin[block]
        memory.place(k, k, site(block, 2))
        memory.finish_block(2 * T)
        policy.commit([memory], site(block, 2), run)
    [row] = [row.entries() for row in memory.older[0].rows]
    assert row.multiplicity == ((T, 4),)
    torch.testing.assert_close(row.k[0], frames[1][1])
    phase = fill(TempCache(threshold=0.9, recent_frames=0), list(torch.cat(frames)))
    assert phase.count == 4 * T


def test_queries_propose_and_keys_decide():
    """The second frame is the first one shuffled; queries that read what is theirs find it, key by key."""
    first, order = (
        torch.nn.functional.normalize(torch.randn(T, HEADS * DIM), dim=1).view(T, HEADS, DIM),
        torch.randperm(T),
    )
    memory = Memory(sample=lambda q, site: q)
    k = torch.cat([first, first[order]])[None]
    memory.place(k, k, site(0, 2), queries=3 * k)
    memory.finish_block(2 * T)
    TempCache(0.99, variant="paper", recent_frames=0).commit([memory], site(0, 2), fake_run({}))
    assert memory.older[0].rows[0].multiplicity == ((T, 2),)


BUDGETS = [(40, 40), ("5 frames", 5 * T), ("1 frame", T), ("5kB", 5000 // 256 - 2 * T), ("8 KiB", 8192 // 256 - 2 * T)]


@pytest.mark.parametrize(("budget", "tokens"), BUDGETS)
def test_budgets_in_tokens_frames_and_bytes(budget, tokens):
    size = extent().bytes_per_token
    assert size == 2 * HEADS * DIM * 4 == 256
    assert room_for(budget, extent(), 0, size) == tokens
    assert room_for(budget, extent(), 1, size) == tokens - 1
    two = extent(branches=2)
    halved = (tokens + 2 * T) // 2 - 2 * T  # buffers have room for one block more
    assert room_for(budget, two, 0, two.bytes_per_token) == (halved if "B" in str(budget) else tokens)


def test_a_budget_in_bytes_holds_more_where_entries_are_quantised():
    frames = [torch.randn(T, HEADS, DIM) for _ in range(40)]
    counts = [fill(TempCache(None, budget="12kB", bits=bits), frames).count for bits in (None, 8, 4)]
    assert counts[0] < counts[1] < counts[2]
    for bits in (None, 8, 4):
        for representative in ("mean", "medoid"):
            policy = TempCache(None, budget="15kB", bits=bits, representative=representative)
            channels = 2 * HEADS * DIM * 4  # and sizes of the quantised keys' channels, once a layer
            assert 12_000 < fill(policy, frames).bytes <= 15_000 + (channels if bits else 0) + 8


def test_a_budget_too_small_is_refused_with_its_arithmetic():
    said = r"\(1 \+ 2 \+ 2\) x 6 = 30 tokens, or 12.5 kB of buffers in all layers, got budget='4 frames'"
    with pytest.raises(KnobError, match=said):
        TempCache(budget="4 frames", sink_frames=1).check(extent())
    TempCache(budget="5 frames", sink_frames=1).check(extent())
    with pytest.raises(KnobError, match="one value for each of the 1 layers"):
        TempCache(threshold=(0.9, 0.8)).check(extent())


def test_sink_recent_and_its_buffer_stay_at_their_size():
    frames = [torch.randn(T, HEADS, DIM) for _ in range(60)]
    policy = SinkRecent(recent_frames=4, sink_frames=1)
    memory = fill(policy, frames)
    assert memory.count == 5 * T
    assert memory.exact.past().entries.frames.unique().tolist() == [0, 56, 57, 58, 59]
    assert torch.equal(memory.exact.past().entries.k[0, :T], frames[0])
    assert memory.bytes == fill(policy, frames[:16]).bytes


def test_a_rebased_sink_stands_before_the_newest_frames():
    """`later` here adds the number of frames, so that the distance moved can be read off."""
    frames = [torch.randn(T, HEADS, DIM) for _ in range(12)]
    run = fake_run({})
    run.later = lambda k, n: k + n
    memory = fill(RollingRebased(recent_frames=4, sink_frames=2), frames, run=run)
    k = memory.exact.past().entries.k[0]
    torch.testing.assert_close(k[: 2 * T], torch.cat(frames[:2]) + 6)
    assert torch.equal(k[2 * T :], torch.cat(frames[8:]))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_quantised_store_is_as_close_as_its_steps_and_keeps_what_it_is_given_back(bits):
    x = torch.randn(3, 10, HEADS, DIM) * torch.tensor([1.0, 30.0]).repeat(DIM // 2)  # every other channel is large
    store = Quantised(x, 12, bits, channels=True)
    where = torch.arange(12).expand(3, 12)[:, :10] + 12 * torch.arange(3)[:, None]
    store.write(where.flatten(), x.flatten(2).flatten(0, 1))
    size = x.abs().amax(dim=1, keepdim=True)
    scaled = x / size
    step = (scaled.amax(-1) - scaled.amin(-1)) / (2**bits - 1)
    for row in range(3):
        error = (row_of(store, row, 10)[0] - x[row]).abs() / size[row]
        assert (error <= 0.5 * step[row][..., None] + 2e-3).all()
        assert error.max() > 0
    held = store.read(where.flatten())
    store.write(where.flatten(), held)
    torch.testing.assert_close(store.read(where.flatten()), held, atol=2e-3 * 90, rtol=0)
    assert torch.equal(row_of(store, 1, 10)[0].flatten(1), held[10:20])
    assert sum(map(size_of, store.parts)) < 4 * 3 * 12 * HEADS * DIM * (bits / 32 + 0.15)


def test_eight_bits_hardly_change_attention_and_two_do():
    frames = [torch.randn(T, HEADS, DIM) for _ in range(20)]
    q, k = torch.randn(1, 9, HEADS, DIM), torch.cat(frames)[None]
    out, _ = attention64(q, k, k + 1, scale=0.3)
    memories = [fill(TempCache(None, bits=bits), frames) for bits in (8, 4, 2)]
    errors = [float((read(memory, q).out - out).norm() / out.norm()) for memory in memories]
    assert errors[0] < 0.01 < errors[1] < 0.05 < errors[2] < 0.3


@pytest.mark.parametrize("piece", [1, 4, 50])
def test_a_past_on_the_host_is_read_piece_by_piece_and_exactly(piece):
    frames = [torch.randn(2, T, HEADS, DIM) for _ in range(14)]
    memory = fill(HostCache(recent_frames=3, piece_frames=piece), frames)
    [tier] = memory.older
    assert (memory.count, memory.exact.count, tier.count) == (14 * T, 3 * T, 11 * T)
    assert (tier.bytes, tier.host_bytes >= 11 * T * 2 * 2 * HEADS * DIM * 4) == (0, True)
    assert torch.cat([f for t in memory.past() for f in t.frames()]).tolist() == [
        f for f in range(14) for _ in range(T)
    ]
    q, k = torch.randn(2, 9, HEADS, DIM), torch.cat(frames, 1)
    for _ in range(2):  # the second read finds the first piece on its way already
        found, (out, lse) = read(memory, q), attention64(q, k, k + 1, scale=0.3)
        assert_within(found.out, out, F32, inputs=4)
        assert_within(found.lse, lse, F32)


@pytest.mark.parametrize("heads", ["shared", "per_head"])
@pytest.mark.parametrize(
    "knobs",
    # over a budget, how carefully a layer merges depends on the longest of those that merge at once
    [{}, {"bits": 4}, {"representative": "medoid"}, {"threshold": None, "budget": "9 frames"}],
    ids=str,
)
def test_entries_on_the_host_are_those_of_the_device(knobs, heads):
    """Two layers and two videos; where entries lie changes nothing of what is read."""
    policies = [TempCache(**{"threshold": 0.5, "heads": heads, "hold": hold} | knobs) for hold in ("device", "host")]
    frames = [torch.randn(2, T, HEADS, DIM) for _ in range(4)]
    frames = [frames[n % 4] + 0.3 * torch.randn(2, T, HEADS, DIM) for n in range(16)]
    held, found = [], []
    q = torch.randn(2, 9, HEADS, DIM)
    for policy in policies:
        memories, run = [Memory(), Memory()], fake_run({})
        for block in range(8):
            for layer, memory in enumerate(memories):
                k = torch.cat(frames[2 * block : 2 * block + 2], 1) * (1 + layer)
                memory.place(k, k + 1, site(block, 2))
                memory.finish_block(2 * T)
            policy.commit(memories, site(block, 2), run)
            # read twice in the order of the layers: the second time every row but the first was fetched ahead
            found.append([read(memory, q) for _ in range(2) for memory in memories])
        held.append(memories)
    half = len(found) // 2
    for device, host in zip(found[:half], found[half:], strict=True):
        assert all(torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse) for a, b in zip(device, host, strict=True))
    [device], [host] = (memories[1].older for memories in held)
    assert device.host_bytes == 0 < host.host_bytes
    assert host.bytes + host.host_bytes == device.bytes
