"""What holds for every shape: examples drawn by hypothesis, the same ones each time."""

import importlib.util
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_within, attention64
from test_ann import EXHAUSTIVE, distances
from test_block_sparse import Case
from test_tempcache import DIM, HEADS, T, fill, read

from diffaccel import AnnSA, Grid, Site, TempCache
from diffaccel.ann import Faiss, inverse, order
from diffaccel.cache import Entries, Memory
from diffaccel.cache.tiers import ExactTier
from diffaccel.kernel import KERNELS, merge
from diffaccel.kernel.block_sparse import BlockLists, gathered, written_out
from diffaccel.kernel.weighted import grouped, over_entries
from diffaccel.selection.blocks import over_blocks

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")  # Faiss's
examples = partial(settings, derandomize=True, deadline=None, database=None)
EXACT = EXHAUSTIVE | (
    {"Faiss": lambda metric, count: Faiss("Flat", metric)} if importlib.util.find_spec("faiss") is not None else {}
)
LEADS = st.sampled_from([(), (1,), (3,), (2, 2)])
SEEDS = st.integers(0, 2**20)
F32 = torch.float32


def vectors(kind, shape, seed):
    """Random ones, ones among which many are equal, or all the same."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(-1, 2, shape, generator=generator).float()
    return torch.randn(shape, generator=generator) if kind == "random" else torch.full(shape, 0.5)


KINDS = st.sampled_from(["random", "random", "ties", "equal"])


# -- diffaccel.ann -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("name", EXACT)
@examples(max_examples=25)
@given(LEADS, st.integers(1, 40), st.integers(0, 9), st.integers(1, 21), KINDS, SEEDS, st.booleans(), st.data())
def test_exact_indexes_are_brute_force(name, metric, lead, count, asked, dims, kind, seed, half, data):
    k = data.draw(st.integers(1, count), "k")
    dtype = torch.bfloat16 if half else F32
    points, queries = (vectors(kind, (*lead, n, dims), seed + n).to(dtype) for n in (count, asked))
    ids, found = EXACT[name](metric, count).fit(points).search(queries, k)
    exact = distances(metric, queries, points)
    expected = exact.topk(k, largest=False).values
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-5)
    close(found.double(), expected)
    close(exact.gather(-1, ids), expected)
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()  # no point twice


@examples(max_examples=50)
@given(
    LEADS, st.integers(1, 150), st.integers(1, 20), st.sampled_from(["kmeans", "lsh"]), st.integers(1, 70),
    st.integers(0, 3), st.integers(1, 16), KINDS, SEEDS,
)  # fmt: skip
def test_an_order_is_a_permutation(lead, count, dims, method, clusters, iterations, n_bits, kind, seed):
    points = vectors(kind, (*lead, count, dims), seed)
    found = order(points, method, n_bits=n_bits, clusters=clusters, iterations=iterations, seed=seed)
    places = torch.arange(count).expand(*lead, count)
    assert torch.equal(found.sort(-1).values, places)
    assert torch.equal(found.gather(-1, inverse(found)), places)
    assert torch.equal(inverse(found).gather(-1, found), places)


# -- kernels -----------------------------------------------------------------------------------------------------------

SIZES = {
    "b": st.integers(1, 2), "s": st.integers(1, 40), "n": st.integers(1, 70), "h": st.integers(1, 3),
    "d": st.sampled_from([8, 24, 33]), "query_block": st.integers(1, 24), "key_block": st.integers(1, 24),
}  # fmt: skip
DTYPES = st.sampled_from([F32, torch.bfloat16])
DENSE = st.sampled_from([("reference", F32), ("reference", torch.bfloat16), ("sdpa", F32)])
"""Not sdpa in bfloat16: with PyTorch's approximate exponential for it, log-sum-exps on a CPU are off by 6e-5."""


@examples(max_examples=50)
@given(
    SEEDS, st.fixed_dictionaries(SIZES), st.sampled_from(["random", "equal", "full"]),
    st.sets(st.sampled_from(["order", "weight", "summary"])), DTYPES,
)  # fmt: skip
def test_lists_of_blocks_are_attention_over_what_they_name(seed, sizes, lists, parts, dtype):
    torch.manual_seed(seed)
    Case(lists=lists, parts=parts, dtype=dtype, **sizes).check(written_out)


@examples(max_examples=40)
@given(
    SEEDS, st.fixed_dictionaries(SIZES), st.sampled_from(["equal", "full"]), st.sets(st.just("order")),
    DENSE, st.integers(1, 9),
)  # fmt: skip
def test_copies_of_equally_long_lists_are_the_same(seed, sizes, lists, parts, dense, at_once):
    torch.manual_seed(seed)
    Case(lists=lists, parts=parts, dtype=dense[1], **sizes).check(partial(gathered, KERNELS[dense[0]], at_once=at_once))


@examples(max_examples=40)
@given(SEEDS, st.integers(0, 60), st.integers(1, 5), DENSE, st.booleans())
def test_any_partition_of_the_keys_merges_to_all_of_them(seed, count, parts, dense, weighted):
    """Parts may be empty, or all keys in one."""
    torch.manual_seed(seed)
    name, dtype = dense
    q, k, v = (3 * torch.randn(2, n, 2, 16).to(dtype) for n in (7, count, count))
    weight = torch.randint(1, 99, (count,)).float().log() if weighted else None
    owner = torch.randint(parts, (count,))
    found = merge(
        [
            KERNELS[name].partial(
                q, k[:, own], v[:, own], scale=0.3, log_weight=None if weight is None else weight[own]
            )
            for own in (owner == part for part in range(parts))
        ]
    )
    out, lse = attention64(q, k, v, scale=0.3, log_weight=weight)
    assert_within(found.out, out, dtype, inputs=2 * float(v.abs().max()) if count else 0)
    assert_within(found.lse, lse, F32)


GROUPS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 1000)), min_size=1, max_size=6)


@examples(max_examples=40)
@given(SEEDS, GROUPS, DENSE, st.booleans())
def test_an_entry_that_stands_for_m_tokens_is_m_identical_ones(seed, groups, dense, together):
    torch.manual_seed(seed)
    kernel, dtype = KERNELS[dense[0]], dense[1]
    q, k, v = (torch.randn(2, n, 2, 16).to(dtype) for n in (7, *[sum(count for count, _ in groups)] * 2))
    entries = Entries(k, v, multiplicity=tuple(groups))
    found = grouped(kernel, q, entries, 0.3) if together else over_entries(kernel, q, entries, 0.3, None)
    each = torch.tensor([tokens for count, tokens in groups for _ in range(count)])
    out, lse = attention64(q, *(x.repeat_interleave(each, 1) for x in (k, v)), scale=0.3)
    assert_within(found.out, out, dtype, inputs=2 * float(v.abs().max()))
    assert_within(found.lse, lse, F32)


# -- AnnSA -------------------------------------------------------------------------------------------------------------

POLICIES = st.builds(
    AnnSA,
    density=st.floats(0.05, 1.0),
    summaries=st.booleans(),
    min_past=st.just(0.0),
    sink_frames=st.integers(0, 2),
    recent_frames=st.integers(0, 2),
)


def where(start, frames=2):
    return Site(0, "self", 3, 4, start, start, "denoise", "cond", Grid(frames, 1, 1))


def numbered(batch, frames, tokens, heads, dims=8):
    """Keys, and values of which the first channel tells which token it is."""
    k, v = (torch.randn(batch, frames * tokens, heads, dims) for _ in range(2))
    v[..., 0] = torch.arange(frames * tokens)[:, None]
    return k, v


def check_chosen(policy, q, entries, start):
    """The sorted copy holds every key once, and what is read is what was asked for."""
    chosen, count = policy.plan(q, entries, where(start)), entries.count
    always = (entries.frames < policy.sink_frames) | (entries.frames >= start - policy.recent_frames)
    free, asked = int((~always).sum()), policy.density * count
    if chosen is None:  # there are not two blocks, or so dense that the nearest number of blocks is all of them
        assert free < 16 or count - asked <= max(4, count / 48)
        return
    assert policy.density < 1
    index = chosen.v[..., 0].long().transpose(1, 2)
    assert torch.equal(index.sort(-1).values, torch.arange(count).expand_as(index))
    places = index.transpose(1, 2)[..., None].expand_as(entries.k)
    assert torch.equal(chosen.k, entries.k.gather(1, places))
    assert torch.equal(chosen.v, entries.v.gather(1, places))
    weight = entries.log_weight()
    assert (chosen.log_weight is None) == (weight is None)
    if weight is not None:
        assert torch.equal(chosen.log_weight, weight[index])
    if chosen.order is not None:
        assert torch.equal(chosen.order.sort(-1).values, torch.arange(q.shape[1]).expand_as(chosen.order))

    blocks = chosen.blocks
    listed = blocks.listed(-(-count // blocks.key_block))
    keys = listed.repeat_interleave(blocks.key_block, -1)[..., :count]
    assert ((keys.sum(-1) + policy.summaries * (~listed).sum(-1)) == chosen.keys_read).all()
    if asked - int(always.sum()) >= 5 * blocks.key_block:
        assert (keys.sum(-1) - asked).abs().max() <= 0.1 * asked
    assert (keys | ~always[index][:, :, None]).all()

    lists = torch.arange(listed.shape[-1], dtype=torch.int32).expand_as(listed).contiguous()
    full = BlockLists(lists, torch.full_like(blocks.counts, listed.shape[-1]), blocks.query_block, blocks.key_block)
    found = over_blocks(KERNELS["sdpa"], False, q, replace(chosen, blocks=full, summary=None), 0.3)
    out, lse = attention64(q, entries.k, entries.v, scale=0.3, log_weight=weight)
    assert_within(found.out, out, F32, inputs=float(entries.v.abs().max()))
    assert_within(found.lse, lse, F32)


GROUPINGS = pytest.mark.parametrize("groups", ["kmeans", "hash", "place"])


@GROUPINGS
@examples(max_examples=30)
@given(
    SEEDS, POLICIES, st.integers(1, 2), st.integers(1, 60), st.integers(1, 40), st.integers(1, 3), st.integers(1, 250),
    st.lists(st.tuples(st.floats(0, 1), st.integers(2, 99)), max_size=3),
)  # fmt: skip
def test_annsa_reads_what_it_was_asked_to(groups, seed, policy, batch, frames, tokens, heads, queries, merged):
    policy = replace(policy, groups=groups)
    torch.manual_seed(seed)
    k, v = numbered(batch, frames, tokens, heads)
    rest, multiplicity = frames * tokens, []
    for share, each in merged:
        multiplicity.append((round(share * rest), each))
        rest -= multiplicity[-1][0]
    frame = torch.arange(frames).repeat_interleave(tokens)
    entries = Entries(k, v, frame, ((rest, 1), *multiplicity) if multiplicity else None)
    check_chosen(policy, torch.randn(batch, queries, heads, 8), entries, frames)


@GROUPINGS
@examples(max_examples=25)
@given(
    SEEDS, POLICIES, st.integers(4, 40), st.integers(1, 2), st.integers(1, 40),
    st.lists(st.integers(1, 12), min_size=2, max_size=6), st.booleans(),
)  # fmt: skip
def test_annsa_loses_nothing_of_a_past_that_grows(groups, seed, policy, tokens, heads, queries, blocks, weighted):
    policy = replace(policy, groups=groups)
    torch.manual_seed(seed)
    k, v = numbered(1, sum(blocks), tokens, heads)
    memory, start, multiplicity = Memory(), 0, ()
    for frames in blocks:
        new = slice(start * tokens, (start + frames) * tokens)
        memory.place(k[:, new], v[:, new], Site(0, "self", 4, 4, 0, start, "clean", "cond", Grid(frames, 1, tokens)))
        memory.finish_block(frames * tokens)
        start += frames
        multiplicity = (*multiplicity, (frames * tokens, 2 + start))
        entries = replace(memory.past()[0].entries, multiplicity=multiplicity if weighted else None)
        for _ in range(2):  # at two steps
            check_chosen(policy, torch.randn(1, queries, heads, 8), entries, start)


@GROUPINGS
@examples(max_examples=25)
@given(POLICIES, st.integers(1, 40), st.integers(1, 30))
def test_annsa_at_density_1_is_dense(groups, policy, frames, tokens):
    k, v = numbered(1, frames, tokens, 1)
    entries = Entries(k, v, torch.arange(frames).repeat_interleave(tokens))
    assert replace(policy, density=1.0, groups=groups).plan(k, entries, where(frames)) is None


@GROUPINGS
@examples(max_examples=25)
@given(POLICIES, st.integers(0, 2), st.integers(1, 12), st.integers(1, 40))
def test_annsa_reads_the_block_at_work_whole(groups, policy, past, frames, tokens):
    memory, policy = Memory(), replace(policy, groups=groups)
    for start in (*range(past), past):
        k, v = numbered(1, frames if start == past else 1, tokens, 1)
        site = Site(0, "self", 3, 4, start, start, "denoise", "cond", Grid(k.shape[1] // tokens, 1, tokens))
        memory.place(k, v, site)
        if start < past:
            memory.finish_block(tokens)
    for tier in (memory.block(), memory.past_and_block()[-1]):  # the latter is read where there is no past
        assert policy.plan(k, tier.entries, site) is None


# -- the exact tier ----------------------------------------------------------------------------------------------------


@examples(max_examples=50)
@given(SEEDS, st.integers(0, 30), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(0, 12))))
def test_the_exact_tier_is_what_was_placed_last_and_not_dropped(seed, room, blocks):
    """Blocks of `size` tokens, placed `steps` times, after each of which `gone` tokens of the past are dropped."""
    torch.manual_seed(seed)
    tier, past = ExactTier(room), torch.empty(1, 0, 2, 4)
    frames = torch.empty(0, dtype=torch.int64)
    for number, (size, steps, gone) in enumerate(blocks):
        at = torch.full((size,), number)
        for _ in range(steps):
            k = torch.randn(1, size, 2, 4)
            tier.place(k, -k, at)
            both = torch.cat([past, k], 1)
            for found, expected in ((tier.past(), past), (tier.block(), k), (tier.past_and_block(), both)):
                assert torch.equal(found.entries.k, expected)
                assert torch.equal(found.entries.v, -expected)
            assert torch.equal(tier.past_and_block().entries.frames, torch.cat([frames, at]))
            held = {found.entries.k.untyped_storage().data_ptr() for found in (tier.past(), tier.past_and_block())}
            assert len(held) == 1  # one buffer, and none that it outgrew
        tier.keep_placed()
        start = min(gone, tier.count) // 2
        end = min(gone, tier.count)
        tier.drop(start, end)
        past = torch.cat([both[:, :start], both[:, end:]], 1)
        frames = torch.cat([frames, at])
        frames = torch.cat([frames[:start], frames[end:]])
        assert torch.equal(tier.past().entries.k, past)


# -- TempCache ---------------------------------------------------------------------------------------------------------


@examples(max_examples=50)
@given(
    SEEDS, st.integers(1, 14), st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]),
    st.sampled_from([{}, {"heads": "per_head"}, {"match": "cell"}, {"variant": "paper", "match": "cell"}]),
)  # fmt: skip
def test_identical_keys_merge_exactly(seed, blocks, block, rate, knobs):
    """Each token stays as it is for any number of frames, then becomes another: an entry for each such run."""
    torch.manual_seed(seed)
    changes = torch.rand(blocks * block, T) < rate
    changes[0] = True
    frames = [torch.randn(T, HEADS, DIM)]
    for changed in changes[1:]:
        frames.append(torch.where(changed[:, None, None], torch.randn(T, HEADS, DIM), frames[-1]))
    policy = TempCache(0.9999 if "variant" in knobs else 1.0, recent_frames=0, **knobs)
    memory = fill(policy, frames, block_frames=block)
    runs = []
    for token in range(T):
        starts = changes[:, token].nonzero().flatten().tolist()
        runs += [end - begin for begin, end in zip(starts, [*starts[1:], len(frames)], strict=True)]
    for row in memory.older[0].rows:
        assert sorted(m for count, m in row.multiplicity for _ in range(count)) == sorted(runs)
    q, k = torch.randn(1, 9, HEADS, DIM), torch.cat(frames)[None]
    out, lse = attention64(q, k, k + 1, scale=0.3)
    found = read(memory, q)
    assert_within(found.out, out, F32, inputs=2 * float(k.abs().max()))
    assert_within(found.lse, lse, F32)
