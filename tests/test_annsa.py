"""AnnSA reads as many keys as asked, the right ones, and means of the rest; AnnCA drops prompt tokens."""

from types import SimpleNamespace

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel import (
    Accel,
    AnnCA,
    AnnSA,
    FrameWindow,
    Grid,
    HostCache,
    KernelError,
    KnobError,
    PadCollapse,
    Site,
    TempCache,
)
from diffaccel.cache import Entries
from diffaccel.kernel import KERNELS
from diffaccel.kernel.weighted import over_entries
from diffaccel.run import Run
from diffaccel.selection.blocks import KeyBlocks, block_for, over_blocks, sort
from diffaccel.selection.prompt_buckets import PromptBuckets

T, HEADS, DIM, SCALE = 24, 2, 16, 0.25
F32 = torch.float32


def site(start=30, step=3, phase="denoise", layer=0):
    return Site(layer, "self", step, 4, start // 2, start, phase, "cond", Grid(2, 4, 6))


def past(frames=30, clusters=None, multiplicity=None):
    """Keys of `frames` frames, around so many centres if given; values tell keys apart."""
    n = frames * T
    k = torch.randn(2, n, HEADS, DIM)
    if clusters:
        centres = 4 * torch.randn(clusters, HEADS, DIM)
        k = centres[torch.randint(clusters, (2, n))] + 0.1 * k
    return Entries(k, torch.randn(2, n, HEADS, DIM), torch.arange(frames).repeat_interleave(T), multiplicity)


def queries_near(entries, count=96):
    picks = torch.randint(entries.count, (count,))
    return entries.k[:, picks] + 0.1 * torch.randn(2, count, HEADS, DIM)


def choose(policy, q, entries, where=None):
    return policy.plan(q, entries, where or site())


@pytest.mark.parametrize("groups", ["kmeans", "hash", "place"])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("frames", [30, 61])
def test_density_is_met_and_every_key_is_there_once(groups, density, frames):
    entries, q = past(frames), torch.randn(2, 45, HEADS, DIM)
    chosen = choose(AnnSA(density, groups=groups, summaries=False), q, entries, site(start=frames))
    assert chosen.keys_read == pytest.approx(density * entries.count, rel=0.1)
    listed = chosen.blocks.listed(-(-entries.count // chosen.blocks.key_block))
    sizes = torch.full((listed.shape[-1],), float(chosen.blocks.key_block))
    sizes[-1] = entries.count - chosen.blocks.key_block * (len(sizes) - 1)
    assert ((listed * sizes).sum(-1) == chosen.keys_read).all()
    for found, given in ((chosen.k, entries.k), (chosen.v, entries.v)):
        order = [x.transpose(1, 2).double().sum(-1).sort(-1).values for x in (found, given)]
        assert torch.equal(*order)
    if groups != "place":
        assert torch.equal(chosen.order.sort(-1).values, torch.arange(45).expand(2, HEADS, -1))


@pytest.mark.parametrize("groups", ["kmeans", "hash", "place"])
@pytest.mark.parametrize("multiplicity", [None, ((300, 1), (120, 3), (300, 9))])
def test_what_is_chosen_is_attention_over_the_listed_keys_with_their_weights(groups, multiplicity):
    entries, q = past(multiplicity=multiplicity), torch.randn(2, 45, HEADS, DIM)
    chosen = choose(AnnSA(0.4, groups=groups, summaries=False), q, entries)
    found = over_blocks(KERNELS["sdpa"], False, q, chosen, SCALE)
    listed = chosen.blocks.listed(-(-entries.count // chosen.blocks.key_block))
    order = torch.arange(45).expand(2, HEADS, -1) if chosen.order is None else chosen.order
    for b in range(2):
        for h in range(HEADS):
            for place in range(45):
                rows = listed[b, h, place // chosen.blocks.query_block].repeat_interleave(chosen.blocks.key_block)[
                    : entries.count
                ]
                k, v = (x[b : b + 1, rows, h : h + 1] for x in (chosen.k, chosen.v))
                weight = None if chosen.log_weight is None else chosen.log_weight[b, h, rows]
                at = int(order[b, h, place])
                out, lse = attention64(q[b : b + 1, at : at + 1, h : h + 1], k, v, scale=SCALE, log_weight=weight)
                assert_within(found.out[b, at, h], out[0, 0, 0], F32, inputs=4)
                assert_within(found.lse[b, at, h], lse[0, 0, 0], F32)


def recall(chosen, q, entries):
    """Share of the attention mass of all entries that the chosen ones hold, each head and query."""
    part = over_blocks(KERNELS["sdpa"], False, q, chosen, SCALE)
    return (part.lse - over_entries(KERNELS["reference"], q, entries, SCALE, None).lse).exp()


@pytest.mark.parametrize("groups", ["kmeans", "hash"])
def test_near_keys_are_found_wherever_they_lie(groups):
    entries = past(clusters=12)
    q = queries_near(entries)
    found = recall(choose(AnnSA(0.3, groups=groups, summaries=False), q, entries), q, entries)
    scattered = recall(choose(AnnSA(0.3, groups="place", summaries=False), q, entries), q, entries)
    assert found.mean() > 0.95
    assert scattered.mean() < 0.7  # keys of one cluster lie everywhere


def test_blocks_are_chosen_nearly_as_well_as_by_their_true_mass():
    entries, q = past(clusters=40), torch.randn(2, 64, HEADS, DIM) * 2
    chosen = choose(AnnSA(0.3, summaries=False, sink_frames=0), q, entries)
    rows = q.transpose(1, 2).gather(2, chosen.order[..., None].expand(-1, -1, -1, DIM))
    mass = (rows @ chosen.k.transpose(1, 2).mT * SCALE).softmax(-1)
    mass = mass.unflatten(-1, (-1, chosen.blocks.key_block)).sum(-1)
    mass = mass.unflatten(2, (-1, chosen.blocks.query_block)).mean(3)
    best = mass.topk(chosen.blocks.lists.shape[-1], -1).values.sum(-1).mean()
    assert recall(chosen, q, entries).mean() > best - 0.05


def test_a_block_of_identical_keys_is_read_exactly_by_its_mean():
    base = torch.randn(2, 30, HEADS, DIM)
    k = base.repeat_interleave(T, 1)  # a frame of one key each
    entries = Entries(k, torch.randn(2, 30, HEADS, DIM).repeat_interleave(T, 1), torch.arange(30).repeat_interleave(T))
    q = torch.randn(2, 40, HEADS, DIM)
    policy = AnnSA(0.2, groups="place", sink_frames=0)
    chosen = choose(policy, q, entries)
    assert T % chosen.blocks.key_block == 0
    found = over_blocks(KERNELS["sdpa"], False, q, chosen, SCALE)
    out, lse = attention64(q, entries.k, entries.v, scale=SCALE)
    assert_within(found.out, out, F32, inputs=8)
    assert_within(found.lse, lse, F32)
    without = over_blocks(
        KERNELS["sdpa"], False, q, choose(AnnSA(0.2, groups="place", summaries=False), q, entries), SCALE
    )
    assert (without.lse - lse).abs().max() > 0.1


def test_the_report_says_what_the_sorted_copies_take():
    from test_policies import generate
    from tiny import tiny_pipeline

    pipe = tiny_pipeline()
    _, run = generate(pipe, Accel(selection=AnnSA(0.3, dense_steps=0, min_past=0, summaries=False)), num_frames=49)
    report = run.report()
    held = report.slots["selection"].bytes
    assert 0 < held <= report.blocks[-1]["bytes"]  # less than the buffers of the cache, of which it copies the past
    assert held > report.blocks[-2]["bytes"] / 4


def test_means_weigh_entries_by_the_tokens_they_stand_for():
    blocks, entries = KeyBlocks("place", 48), past(2, multiplicity=((24, 1), (24, 5)))
    blocks.take(entries, torch.zeros(48, dtype=torch.bool))
    k = entries.k.transpose(1, 2).double()
    expected = (k[:, :, :24].sum(2) + 5 * k[:, :, 24:].sum(2)) / (24 * 6)
    torch.testing.assert_close(blocks.about.k[:, :, 0].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(blocks.about.log_count.exp(), torch.full((2, HEADS, 1), 24.0 * 6))


def test_sink_and_recent_frames_are_in_every_list():
    entries, q = past(), torch.randn(2, 40, HEADS, DIM)
    chosen = choose(AnnSA(0.3, sink_frames=1, recent_frames=2), q, entries)
    whole, behind = chosen.k[:, -3 * T :], torch.cat([entries.k[:, :T], entries.k[:, -2 * T :]], 1)
    assert torch.equal(whole, behind)
    first = (entries.count - 3 * T) // chosen.blocks.key_block
    last = -(-entries.count // chosen.blocks.key_block)
    assert chosen.blocks.listed(last)[..., first:].all()


@pytest.mark.parametrize(("refresh", "same"), [("block", True), ("step", False)])
def test_lists_are_chosen_once_a_block_or_at_every_step(refresh, same):
    entries, policy = past(clusters=12), AnnSA(0.2, refresh=refresh)
    first, second = (choose(policy, queries_near(entries), entries) for _ in range(2))
    assert torch.equal(first.blocks.lists, second.blocks.lists) == same
    assert (
        choose(policy, queries_near(entries, 50), entries).order.shape[2] == 50
    )  # another number of queries chooses anew


def test_where_it_does_not_choose():
    policy, q = AnnSA(0.3, layers=(1,)), torch.randn(2, 40, HEADS, DIM)
    assert policy.plan(q, past(), site(layer=0)) is None
    assert policy.plan(q, past(), site(layer=1)) is not None
    assert policy.plan(q, past(), site(layer=1, step=1)) is None  # of 4 steps the first 2 read everything
    assert policy.plan(q, past(), site(layer=1, step=4, phase="clean")) is None
    assert policy.plan(q, past(frames=1), site(layer=1)) is None
    assert AnnSA(0.3, min_past=18.1).plan(q, past(), site()) is None  # 720 keys, 40 queries
    assert AnnSA(0.3, min_past=18).plan(q, past(), site()) is not None
    at_work = Entries(*(torch.randn(2, 720, HEADS, DIM) for _ in range(2)), at_work=True)
    assert policy.plan(q, at_work, site(layer=1)) is None


def test_a_whole_video_at_once_chooses_from_itself():
    """A bidirectional model has no past, and as many keys as queries."""
    entries = past()
    chosen = AnnSA(0.3).plan(entries.k, entries, site(start=0))
    assert chosen.keys_read < 0.4 * entries.count


def grown(policy, blocks, first=15, tokens=2 * T):
    """What a policy chooses from a past that grows by a block at a time, with the entries it chose from."""
    from diffaccel.cache import Memory

    memory = Memory()
    for block in range(blocks):
        k, v = (torch.randn(1, tokens, HEADS, DIM) for _ in range(2))
        memory.place(k, v, site(start=2 * block))
        memory.finish_block(tokens)
        if block >= first:
            entries = memory.past()[0].entries
            yield entries, policy.plan(torch.randn(1, 40, HEADS, DIM), entries, site(start=2 * block + 2))


@pytest.mark.parametrize("groups", ["kmeans", "hash", "place"])
@pytest.mark.parametrize("recent", [0, 1, 3])
def test_what_is_added_to_the_past_is_sorted_in_behind_the_rest(groups, recent, monkeypatch):
    sorted_in = []
    monkeypatch.setattr(
        "diffaccel.selection.blocks.sort", lambda x, *rest: (sorted_in.append(x.shape[2]), sort(x, *rest))[1]
    )
    policy = AnnSA(0.4, groups=groups, summaries=False, recent_frames=recent, min_past=0, resort=1e9)
    before, sizes = None, set()
    for entries, chosen in grown(policy, 24):
        block = chosen.blocks.key_block
        for found, given in ((chosen.k, entries.k), (chosen.v, entries.v)):
            assert found.shape == given.shape
            places = [x.transpose(1, 2).double().sum(-1).sort(-1) for x in (found, given)]
            assert torch.equal(places[0].values, places[1].values)
        recently = entries.k[:, entries.count - recent * T :] if recent else entries.k[:, :0]
        assert torch.equal(chosen.k[:, entries.count - (1 + recent) * T :], torch.cat([entries.k[:, :T], recently], 1))
        assert chosen.keys_read == pytest.approx(0.4 * entries.count, rel=0.1)
        if before is not None and before.blocks.key_block == block:
            stays = (before.k.shape[1] - (1 + recent) * T) // block * block
            assert torch.equal(chosen.k[:, :stays], before.k[:, :stays])
        before = chosen
        sizes.add(block)
    whole = [size for size in sorted_in if size >= 2 * T + 16]  # the rest: a block, and what filled no block before
    assert len(sizes) == 2
    assert len(whole) == (0 if groups == "place" else 2)  # once for each size of blocks


@pytest.mark.parametrize(("resort", "times"), [(1, 9), (1.25, 3), (1e9, 2)])
def test_the_whole_past_is_sorted_anew_as_it_grows(resort, times, monkeypatch):
    whole = []
    monkeypatch.setattr(
        "diffaccel.selection.blocks.sort", lambda x, *rest: (whole.append(x.shape[2] > 20 * T), sort(x, *rest))[1]
    )
    list(grown(AnnSA(0.4, min_past=0, resort=resort), 24))  # 9 times, from 32 frames to 48
    assert sum(whole) == times  # as blocks are larger from 41 frames on, once for that at least


def test_what_leaves_the_past_is_left():
    from diffaccel.cache import Memory

    memory, policy = Memory(), AnnSA(0.3, min_past=0)
    for block in range(20):
        k = torch.randn(1, 2 * T, HEADS, DIM)
        memory.place(k, k, site(start=2 * block))
        memory.finish_block(2 * T)
    q = torch.randn(1, 40, HEADS, DIM)
    assert policy.plan(q, memory.past()[0].entries, site(start=40)).k.shape[1] == 40 * T
    memory.exact.drop(T, 9 * T)
    entries = memory.past()[0].entries
    chosen = policy.plan(q, entries, site(start=40))
    places = [x.transpose(1, 2).double().sum(-1).sort(-1).values for x in (chosen.k, entries.k)]
    assert torch.equal(*places)


@pytest.mark.parametrize("padding", ["none", "collapsed", "token by token"])
def test_buckets_are_the_prompt_tokens_that_queries_are_nearest_to(padding):
    k = torch.randn(2, 9, HEADS, DIM)
    if padding != "none":
        k[:, 8 if padding == "collapsed" else 5 :] = 100.0  # nearest to half of the queries, and no word
    words = {"none": 9, "collapsed": 8, "token by token": 5}[padding]
    buckets, q = PromptBuckets(), torch.randn(2, 30, HEADS, DIM)
    prompt = Entries(k, k, multiplicity=((8, 1), (1, 50)) if padding == "collapsed" else None)
    buckets.see(q, prompt, site())
    expected = torch.einsum("bshd,bnhd->bhsn", q, k[:, :words]).argmax(-1)
    assert torch.equal(buckets.of_queries(site().block).long(), expected)
    assert buckets.of_queries(site().block + 1) is None


def test_tokens_of_one_bucket_lie_side_by_side():
    from diffaccel.cache import Memory

    memory, policy = Memory(), AnnSA(0.3, groups="prompt", min_past=0, sink_frames=0)
    prompt = Entries(*(torch.randn(1, 5, HEADS, DIM) for _ in range(2)))

    def nearest(q):
        return torch.einsum("bshd,bnhd->bhsn", q, prompt.k).argmax(-1)

    for block in range(16):
        where, q = site(start=2 * block, step=4, phase="clean"), torch.randn(1, 2 * T, HEADS, DIM)
        k = nearest(q).transpose(1, 2)[..., None].expand_as(q).float()  # each key holds the number of its bucket
        memory.place(k, q, where)
        policy.see_prompt(q, prompt, where, memory.exact.lasting)
        memory.finish_block(2 * T)
    q = torch.randn(1, 2 * T, HEADS, DIM)
    policy.see_prompt(q, prompt, site(start=32, step=2), memory.exact.lasting)
    chosen = policy.plan(q, memory.past()[0].entries, site(start=32))
    assert (chosen.k[0, :, :, 0].diff(dim=0) >= 0).all()
    assert (nearest(q).gather(2, chosen.order).diff(dim=2) >= 0).all()


@pytest.mark.parametrize("refresh", ["step", "block"])
def test_a_whole_video_is_sorted_once_and_read_anew_at_every_step(refresh):
    """In a bidirectional model keys and values change from step to step."""
    run, policy, lists = Run(Accel(), causal=False), AnnSA(0.3, refresh=refresh), []
    k = past(clusters=12).k
    for step in (3, 4, 5):
        where = Site(0, "self", step, 6, 0, 0, "denoise", "cond", Grid(30, 4, 6))
        k, v = k + 0.5 * torch.randn_like(k), torch.randn_like(k)
        entries = run.whole(k, v, where).entries
        chosen = policy.plan(k, entries, where)
        lists.append(chosen.blocks.lists)
        found = over_blocks(KERNELS["sdpa"], False, k, chosen, SCALE)
        places = [x.transpose(1, 2).double().sum(-1).sort(-1).values for x in (chosen.v, v)]
        assert torch.equal(*places)
        rest = chosen.k[:, : 29 * T // chosen.blocks.key_block * chosen.blocks.key_block]
        means = rest.unflatten(1, (-1, chosen.blocks.key_block)).mean(2)
        torch.testing.assert_close(chosen.summary.k[:, : means.shape[1]], means)
        dense = over_entries(KERNELS["reference"], k, entries, SCALE, None)
        assert (found.out - dense.out).norm() < 0.2 * dense.out.norm()
    assert torch.equal(lists[0], lists[2]) == (refresh == "block")


@pytest.mark.parametrize(("tokens", "least", "block"), [(4680, 12, 128), (192, 12, 16), (39, 24, 8), (1, 24, 8)])
def test_blocks_grow_with_what_they_divide(tokens, least, block):
    assert block_for(tokens, least) == block


def test_a_kernel_that_was_asked_for_reads_copies_or_refuses():
    entries, q = past(), torch.randn(2, 48, HEADS, DIM)
    plain = choose(AnnSA(0.3, summaries=False), q, entries)
    parts = [
        over_blocks(KERNELS[name], asked, q, plain, SCALE)
        for name, asked in (("sdpa", True), ("reference", True), ("sdpa", False))
    ]
    for part in parts[1:]:
        assert_within(part.out, parts[0].out.double(), F32, inputs=4)
        assert_within(part.lse, parts[0].lse.double(), F32)
    with pytest.raises(KernelError, match="summaries=False"):
        over_blocks(KERNELS["sdpa"], True, q, choose(AnnSA(0.3), q, entries), SCALE)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"window": FrameWindow(3)}, "leave the window out"),
        ({"cache": HostCache()}, "sorted copy"),
        ({"cache": TempCache(0.9, hold="host")}, "sorted copy"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(others, message):
    with pytest.raises(KnobError, match="leave the cache out"):
        Accel(selection=AnnSA(groups="prompt"), cache=TempCache(0.9))
    with pytest.raises(KnobError, match=f"AnnSA.*{message}"):
        Accel(selection=AnnSA(), **others)


# -- AnnCA -----------------------------------------------------------------------------------------------------------


def prompt_run(causal=True):
    scratch, fired = {}, []
    given = {"scratch": lambda *_: scratch, "fired": fired.append, "causal": causal, "prompt_number": 1}
    return SimpleNamespace(**given), fired


def test_prompt_tokens_stay_that_share_a_bucket_with_a_query_and_the_padding_does():
    k, v = torch.randn(2, 16, HEADS, DIM), torch.randn(2, 16, HEADS, DIM)
    k[1, 12:] = k[1, -1]  # the shorter prompt of the batch has padding of its own
    q = torch.randn(2, 30, HEADS, DIM) + 3
    run, fired = prompt_run()
    prompt = Entries(k, v, multiplicity=((15, 1), (1, 500)))
    tables, bits = 2, 6
    rows = AnnCA(bits=bits, tables=tables).near(q, prompt, site(), run).rows
    assert fired == ["prompt"]
    planes = torch.randn(DIM, tables * bits, generator=torch.Generator().manual_seed(0))
    for b, (row, padding) in enumerate(zip(rows, ({15}, {12, 13, 14, 15}), strict=True)):
        mean = k[b, sorted(set(range(16)) - padding)].mean(0)
        shares = set(padding)
        for h in range(HEADS):
            asked, there = (
                (x @ planes > 0).int().tolist() for x in (q[b, :, h] - q[b, :, h].mean(0), k[b, :, h] - mean[h])
            )
            for t in range(tables):
                part = slice(t * bits, (t + 1) * bits)
                buckets = {tuple(code[part]) for code in asked}
                shares |= {n for n, code in enumerate(there) if tuple(code[part]) in buckets}
        assert {15} < shares < set(range(16))
        assert torch.equal(row.k[0], k[b, sorted(shares)])
        assert torch.equal(row.v[0], v[b, sorted(shares)])
        assert row.multiplicity == tuple((1, 500 if n == 15 else 1) for n in sorted(shares))


def test_what_is_near_is_worked_out_once_a_block():
    run, _ = prompt_run()
    prompt, policy = Entries(*(torch.randn(1, 20, HEADS, DIM) for _ in range(2))), AnnCA(bits=10, tables=1)
    reads = [policy.near(torch.randn(1, 9, HEADS, DIM), prompt, site(start=start), run) for start in (2, 2, 4)]
    same = [
        torch.equal(reads[0].rows[0].k, other.rows[0].k) if other.count == reads[0].count else False
        for other in reads[1:]
    ]
    assert same == [True, False]


def test_no_bits_drop_nothing():
    prompt = Entries(*(torch.randn(1, 20, HEADS, DIM) for _ in range(2)))
    tier = AnnCA(bits=0).near(torch.randn(1, 9, HEADS, DIM), prompt, site(), prompt_run()[0])
    assert tier.entries is prompt
    assert isinstance(AnnCA(), PadCollapse)
