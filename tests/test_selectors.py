"""Selectors that rank blocks of keys: what they choose, what that holds, and that counters and inverses are true."""

from dataclasses import replace
from itertools import pairwise
from math import ceil, log2
from types import SimpleNamespace

import pytest
import torch
from oracle import assert_within, attention64

from diffaccel import (
    Accel,
    AnnSA,
    FlashBlock,
    FrameWindow,
    Grid,
    HeadShard,
    HiP,
    HostCache,
    KernelError,
    KnobError,
    MassRouter,
    RetrievalAttention,
    Routed,
    SinkRecent,
    Site,
    SpAttenCascade,
    Sticky,
    TempCache,
    TokenSelect,
)
from diffaccel.ann import KMeans
from diffaccel.cache import Entries, Memory
from diffaccel.cache.look import probes
from diffaccel.kernel import KERNELS, merge
from diffaccel.kernel.block_sparse import BlockLists
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.loading import bundled_model
from diffaccel.selection.asked import Asked
from diffaccel.selection.blocks import KeyBlocks, over_blocks
from diffaccel.selection.hip import search
from diffaccel.selection.places import nearby
from diffaccel.selection.recall import mass_read

GRID, HEADS, DIM = Grid(3, 8, 8), 4, 16
SCALE, FRAMES = DIM**-0.5, 21
F32, SDPA = torch.float32, KERNELS["sdpa"]
RANKED = [TokenSelect, HiP, RetrievalAttention, HeadShard, Routed, Sticky, SpAttenCascade]
EVERY = [*RANKED, MassRouter]
each = pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)


def make(kind, **knobs):
    """One that reads 0.3 of the keys, or as little of them as it has a say in, without means of the rest."""
    own = {MassRouter: {"outside": 0.3, "recent_frames": 3}, SpAttenCascade: {"density": 0.3, "drop": 0.6}}
    usual = {"density": 0.3, "recent_frames": 0}
    return kind(**own.get(kind, usual) | {"summaries": False} | knobs)


def site(start=FRAMES, step=3, layer=0, block=None):
    return Site(layer, "self", step, 4, start // 3 if block is None else block, start, "denoise", "cond", GRID)


def field(frames, seed, rows=2, strength=2.0):
    """Vectors (B, N, H, D) of whole frames that change slowly over place and time."""
    generator = torch.Generator().manual_seed(seed)
    t, y, x = torch.meshgrid(
        torch.arange(frames) / 12, *(torch.arange(n) / n for n in (GRID.height, GRID.width)), indexing="ij"
    )
    waves = torch.randn(3, rows * HEADS * DIM, generator=generator) * 3
    phase = torch.rand(rows * HEADS * DIM, generator=generator) * 6.28
    found = torch.sin(torch.stack([t, y, x], -1).reshape(-1, 3) @ waves + phase)
    return strength * found.view(-1, rows, HEADS, DIM).transpose(0, 1)


def smooth(shuffled=False):
    """A past, and queries much like the keys of its last frames; `shuffled`: its keys lie anywhere."""
    k = field(FRAMES + 3, 1)
    q, k = k[:, -GRID.tokens :], k[:, : -GRID.tokens]
    if shuffled:
        k = k[:, torch.randperm(k.shape[1], generator=torch.Generator().manual_seed(5))]
    return q, Entries(k, torch.randn(k.shape), torch.arange(FRAMES).repeat_interleave(GRID.tokens_per_frame))


def weighted(entries):
    """The same, of which the older half stand for three tokens each."""
    half = entries.count // 2
    return replace(entries, multiplicity=((half, 3), (entries.count - half, 1)))


def inverse(blocks: BlockLists, keys: int) -> BlockLists:
    """Lists of what the lists leave out."""
    listed = blocks.listed(-(-keys // blocks.key_block))
    return BlockLists(
        listed.int().argsort(dim=-1, stable=True).int(),
        (~listed).sum(-1).int(),
        blocks.query_block,
        blocks.key_block,
    )


@each
@pytest.mark.parametrize("weights", [False, True], ids=["plain", "weighted"])
def test_what_is_chosen_and_its_inverse_are_dense_together(kind, weights):
    q, entries = smooth()
    if weights:
        entries = weighted(entries)
    chosen = make(kind).plan(q, entries, site())
    rest = replace(chosen, blocks=inverse(chosen.blocks, entries.count), even=False)
    assert (rest.blocks.counts > 0).any()
    found = merge([over_blocks(SDPA, False, q, part, SCALE) for part in (chosen, rest)])
    weight = entries.log_weight()
    out, lse = attention64(q, entries.k, entries.v, scale=SCALE, log_weight=weight)
    assert_within(found.out, out, F32, inputs=8)
    assert_within(found.lse, lse, F32)


@each
@pytest.mark.parametrize("summaries", [False, True])
def test_keys_read_are_those_of_the_lists(kind, summaries):
    q, entries = smooth()
    chosen = make(kind, summaries=summaries).plan(q, entries, site())
    blocks = -(-entries.count // chosen.blocks.key_block)
    listed = chosen.blocks.listed(blocks)
    sizes = torch.full((blocks,), float(chosen.blocks.key_block))
    sizes[-1] -= sizes.sum() - entries.count
    read = (listed * sizes).sum(-1) + (summaries * (~listed).sum(-1))
    assert chosen.keys_read == pytest.approx(float(read.mean()))
    if kind not in (MassRouter, SpAttenCascade):
        assert chosen.keys_read == pytest.approx(0.3 * entries.count + summaries * 0.7 * blocks, rel=0.1)


@each
def test_what_is_chosen_is_attention_over_the_keys_of_the_lists(kind):
    q, entries = smooth()
    entries = weighted(entries)
    chosen = make(kind).plan(q, entries, site())
    found = over_blocks(SDPA, False, q, chosen, SCALE)
    size = chosen.blocks.key_block
    listed = chosen.blocks.listed(-(-entries.count // size)).repeat_interleave(size, -1)[..., : entries.count]
    order = torch.arange(q.shape[1]).expand(2, HEADS, -1) if chosen.order is None else chosen.order
    for b, h, place in ((0, 0, 3), (1, 3, 150), (1, 2, 64)):
        rows, at = listed[b, h, place // chosen.blocks.query_block], int(order[b, h, place])
        k, v = (x[b : b + 1, rows, h : h + 1] for x in (chosen.k, chosen.v))
        weight = chosen.log_weight[b, h, rows]
        out, lse = attention64(q[b : b + 1, at : at + 1, h : h + 1], k, v, scale=SCALE, log_weight=weight)
        assert_within(found.out[b, at, h], out[0, 0, 0], F32, inputs=4)
        assert_within(found.lse[b, at, h], lse[0, 0, 0], F32)


def recall(policy, q, entries, where=None):
    chosen = policy.plan(q, entries, where or site())
    return float(mass_read(SDPA, q, entries, chosen, SCALE).mean())


def best(policy, q, entries):
    """The recall of those blocks that hold most attention of each block of queries, in this policy's order."""
    kind = type(policy)
    oracle = type("Oracle", (kind,), {"rank": lambda self, asked: exact_mass(asked)})
    return recall(oracle(**policy.values()), q, entries)


def exact_mass(asked):
    q = asked.q.flatten(2, 3).float() * SCALE
    mass = asked.scores(q).flatten(3).softmax(-1).unflatten(-1, (asked.keys.choices, -1)).sum(-1)
    return mass.unflatten(2, (asked.q.shape[2], -1)).mean(3)


# kind, recall over that of the exact best blocks: at least where neighbours are alike, and where keys lie anywhere
NEAR_BEST = [
    (TokenSelect, 0.9, 0.9),
    (HiP, 0.85, 0.4),
    (RetrievalAttention, 0.95, 0.9),
    (Routed, 0.85, 0.85),
    (Sticky, 0.95, 0.75),
]


@pytest.mark.parametrize(("kind", "alike", "anywhere"), NEAR_BEST, ids=lambda x: getattr(x, "__name__", x))
def test_recall_against_the_exact_best_blocks(kind, alike, anywhere):
    for shuffled, least in ((False, alike), (True, anywhere)):
        q, entries = smooth(shuffled)
        policy = make(kind, sink_frames=0)
        share, most = recall(policy, q, entries), best(policy, q, entries)
        assert least * most < share <= most + 1e-6


def test_a_tree_search_is_no_better_than_chance_where_neighbours_are_not_alike():
    q, entries = smooth(shuffled=True)
    assert recall(make(HiP, sink_frames=0), q, entries) < 0.35  # of 0.3 of the keys; the exact best blocks hold 0.64
    assert recall(make(HiP, sink_frames=0, order="raster"), *smooth()) < recall(make(HiP, sink_frames=0), *smooth())


# -- TokenSelect ----------------------------------------------------------------------------------------------------


def asked_of(policy, q, entries, where=None):
    """What `rank` sees, at the first choice."""
    seen = []
    kind = type(policy)
    spy = type("Spy", (kind,), {"choose": lambda self, asked: (seen.append(asked), kind.choose(self, asked))[1]})
    spy(**policy.values()).plan(q, entries, where or site())
    return seen[0]


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_votes_are_softmaxed_before_heads_are_summed(pool):
    q, entries = smooth()
    asked = asked_of(make(TokenSelect, pool=pool), q, entries)
    rank = make(TokenSelect, pool=pool).rank(asked)
    parts = 1 if pool == "mean" else 4
    for b, tile in ((0, 0), (1, 5)):
        own = asked.q[b, :, tile].double().unflatten(1, (parts, -1)).mean(2) * SCALE  # (H, parts, D)
        votes = (own @ asked.keys.k[b].flatten(1, 2).double().mT).softmax(-1).sum(0).amax(0)
        torch.testing.assert_close(
            rank[b, 0, tile].double(), votes.view(-1, asked.keys.block).sum(-1), rtol=1e-4, atol=1e-6
        )
    lists = asked.keys.lists.lists
    assert torch.equal(lists, lists[:, :1].expand_as(lists))  # all heads read the same


def test_a_loud_head_does_not_decide_alone():
    q, entries = smooth()
    loud = q.clone()
    loud[:, :, 0] *= 50
    quiet, shouting = (make(TokenSelect, sink_frames=0).plan(x, entries, site()).blocks.listed(84) for x in (q, loud))
    assert (quiet & shouting).sum() > 0.7 * quiet.sum()


@pytest.mark.parametrize("kind", [TokenSelect, AnnSA, HiP, Routed], ids=lambda kind: kind.__name__)
def test_a_choice_stands_while_queries_are_similar_video_by_video(kind):
    q, entries = smooth()
    policy = make(kind, similarity=0.9)
    first = policy.plan(q, entries, site()).blocks.lists.clone()
    near = policy.plan(q + 0.05 * torch.randn_like(q), entries, site())
    assert torch.equal(near.blocks.lists, first)
    moved = q.clone()
    moved[0] += 0.3 * torch.randn_like(moved[0])  # alike on average, and a choice of its own would be another
    moved[1] = -moved[1]
    after = policy.plan(moved, entries, site()).blocks.lists
    assert torch.equal(after[0], first[0])
    assert not torch.equal(after[1], first[1])
    if kind is TokenSelect:  # which does not sort queries by what they are
        stepping = make(kind, refresh="step").plan(moved, smooth()[1], site())
        assert torch.equal(after[1], stepping.blocks.lists[1])
        assert not torch.equal(after[0], stepping.blocks.lists[0])


@each
def test_a_choice_stands_for_so_many_steps_and_no_other_past(kind):
    q, entries = smooth()
    moved = [q + 0.5 * step * torch.randn_like(q) for step in range(4)]

    def lists(policy, entries, step, block=7):
        return policy.plan(moved[step], entries, site(step=step, block=block)).blocks.listed(99)

    seldom, often = make(kind, refresh="step", every=2, dense_steps=0), make(kind, refresh="step", dense_steps=0)
    found, fresh = (
        [lists(one, entries, step) for step in range(4)] for one, entries in ((seldom, smooth()[1]), (often, entries))
    )
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    if kind not in (HeadShard, Sticky, MassRouter):  # which are alike for all queries, remember, or hardly differ
        assert not torch.equal(found[1], found[2])
        assert torch.equal(found[2], fresh[2])
    more = {name: torch.cat([getattr(entries, name), getattr(entries, name)[:, -64:]], 1) for name in ("k", "v")}
    grown = replace(entries, **more, frames=torch.arange(FRAMES + 1).repeat_interleave(64))
    by_block = make(kind, dense_steps=0)
    lists(by_block, entries, 0)
    after = by_block.plan(q, grown, site(step=1, block=7))
    if kind is not MassRouter:  # which may read everything now
        size = after.blocks.key_block
        assert after.blocks.listed(-(-grown.count // size))[..., -64 // size :].all()  # the first frame


# -- HiP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "groups"), [(84, 25), (1024, 16), (7, 3), (64, 63), (5, 1)])
def test_a_search_ends_at_leaves_of_their_own_and_looks_at_a_logarithm_of_them(blocks, groups):
    worth, looked = torch.randn(2, 3, 4, blocks), []

    def score(starts, stops):
        looked.append(starts.shape[-1])
        assert (starts <= stops).all()
        return worth.gather(-1, starts.clamp(max=blocks - 1))

    found = search(score, (2, 3, 4), blocks, groups, worth.device).sort(-1).values
    assert found.shape == (2, 3, 4, groups)
    assert (found.diff(dim=-1) > 0).all()
    assert found.min() >= 0
    assert found.max() < blocks
    assert len(looked) == ceil(log2(ceil(blocks / groups)))
    assert all(count == 2 * groups for count in looked)


def test_a_search_finds_the_best_leaves_where_a_group_is_as_good_as_its_first():
    worth = -(torch.arange(256.0) - 100).abs().expand(1, 1, 1, -1)
    found = search(lambda starts, stops: worth.gather(-1, starts), (1, 1, 1), 256, 8, worth.device)
    assert (found - 100).abs().max() <= 8


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 4, 4), (2, 5, 7)])
def test_near_places_are_near_on_the_curve(size):
    grid = Grid(*size)
    place = nearby(grid, torch.zeros(1, grid.tokens, 2, 4))[0, 0]
    assert place.unique().numel() == grid.tokens
    order = place.argsort()
    where = torch.stack(torch.unravel_index(order, size), -1).double()

    def apart(places):
        return torch.cdist(places[None], places[None]).mean()

    stretches = [apart(where[start : start + 8]) for start in range(0, grid.tokens - 7, 8)]
    raster = torch.stack(torch.unravel_index(torch.arange(grid.tokens), size), -1).double()
    rows = [apart(raster[start : start + 8]) for start in range(0, grid.tokens - 7, 8)]
    assert sum(stretches) < sum(rows)


# -- RetrievalAttention -----------------------------------------------------------------------------------------------


def test_an_index_that_knows_the_queries_finds_more_of_their_keys():
    """Queries vary where keys hardly do, as far as products go."""
    k, q = torch.randn(1, 2, 4000, DIM), torch.randn(1, 2, 64, DIM)
    k[..., :4] *= 0.2
    q[..., :4] *= 20
    truth = set_of(RetrievalAttention(index="flat", nearest=20).look_up(q, k)[0])
    found = {
        calibrated: set_of(RetrievalAttention(nearest=20, scanned=0.05, calibrated=calibrated).look_up(q, k)[0])
        for calibrated in (True, False)
    }
    recalls = {
        calibrated: sum(len(a & b) for a, b in zip(truth, sets, strict=True)) / (20 * len(truth))
        for calibrated, sets in found.items()
    }
    assert recalls[True] > recalls[False] + 0.1


def set_of(ids):
    return [set(row) for row in ids.flatten(0, 2).tolist()]


@pytest.mark.parametrize("index", ["flat", "ivf"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_products_are_those_of_the_keys_found_up_to_a_shift(index, calibrated):
    q, k = torch.randn(2, 3, 10, DIM), torch.randn(2, 3, 200, DIM) + 1
    ids, scores = RetrievalAttention(index=index, nearest=7, scanned=0.5, calibrated=calibrated).look_up(q, k)
    true = (q @ k.mT).gather(-1, ids)
    torch.testing.assert_close(scores.softmax(-1), true.softmax(-1), atol=1e-4, rtol=1e-3)
    assert (scores.diff(dim=-1) <= 1e-5).all()


def test_merged_entries_are_looked_up_with_their_weights():
    q, entries = smooth()
    heavy = replace(entries, multiplicity=((400, 1000), (entries.count - 400, 1)))
    chosen = make(RetrievalAttention, sink_frames=0).plan(q, heavy, site())
    assert chosen.blocks.listed(84)[..., : 400 // 16].float().mean() > 0.75
    plain = make(RetrievalAttention, sink_frames=0).plan(*smooth(), site())
    assert plain.blocks.listed(84)[..., : 400 // 16].float().mean() < 0.4


def test_without_faiss_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr("diffaccel.selection.retrieval.find_spec", lambda name: None)
    with pytest.raises(KnobError, match=r"pip install 'diffaccel\[faiss\]', or take index='ivf'"):
        RetrievalAttention(index="faiss")


def test_faiss_finds_what_inverted_lists_find():
    pytest.importorskip("faiss")
    q, entries = smooth()
    ours, theirs = (
        recall(make(RetrievalAttention, index=index, scanned=0.5, sink_frames=0), q, entries)
        for index in ("ivf", "faiss")
    )
    assert abs(ours - theirs) < 0.02


# -- HeadShard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["frame", "block"])
@pytest.mark.parametrize("density", [0.3, 0.5])
def test_heads_read_shares_that_are_everything_together(unit, density):
    q, entries = smooth()
    chosen = make(HeadShard, density=density, unit=unit, sink_frames=0).plan(q, entries, site())
    listed = chosen.blocks.listed(-(-entries.count // chosen.blocks.key_block))[0, :, 0]  # (H, KB)
    assert listed.any(0).all()
    assert not torch.equal(listed[0], listed[1])
    if unit == "frame":
        each = GRID.tokens_per_frame // chosen.blocks.key_block
        stride = ceil(FRAMES / (int(chosen.blocks.lists.shape[-1]) // each))
        for head in range(HEADS):
            mine = (torch.arange(FRAMES) + head) % stride == 0
            assert listed[head].view(FRAMES, each)[mine].all()


# -- Routed -----------------------------------------------------------------------------------------------------------


def test_clusters_start_from_those_of_the_past_before(monkeypatch):
    began, fit = [], KMeans.fit
    monkeypatch.setattr(KMeans, "fit", lambda self, k, c=None: (began.append((self.iterations, c)), fit(self, k, c))[1])
    memory, policy = Memory(), make(Routed, min_past=0, sink_frames=0)
    for block in range(3):
        k = field(3, block, rows=1)
        memory.place(k, k, site(start=3 * block))
        memory.finish_block(GRID.tokens)
        policy.plan(field(3, 9, rows=1), memory.past()[0].entries, site(start=3 * block + 3))
    assert [iterations for iterations, _ in began] == [10, 1, 1]
    assert began[0][1] is None
    assert all(centroids is not None for _, centroids in began[1:])


def test_queries_read_the_keys_of_their_own_cluster():
    centres = torch.nn.functional.normalize(torch.randn(8, DIM), dim=-1) * 6
    which = torch.randint(8, (FRAMES * 64,))
    k = (centres[which] + 0.1 * torch.randn(len(which), DIM))[None, :, None].expand(2, -1, HEADS, -1)
    entries = Entries(k, k, torch.arange(FRAMES).repeat_interleave(64))
    q = (centres[torch.arange(192) // 24] + 0.1 * torch.randn(192, DIM))[None, :, None].expand(2, -1, HEADS, -1)
    assert recall(make(Routed, density=0.25, clusters=8, sink_frames=0), q, entries) > 0.9


# -- Sticky -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [0.1, 0.5])
def test_few_blocks_are_new_at_a_choice(fresh):
    policy = make(Sticky, refresh="step", fresh=fresh, resident=1.5, sink_frames=0)
    _, entries = smooth()
    blocks = entries.count // 16
    there, taken = torch.zeros(2, HEADS, blocks, dtype=torch.bool), 0
    for turn in range(6):
        q = field(3, 20 + turn)
        chosen = policy.plan(q, entries, site())
        assert chosen.blocks.key_block == 16
        taken = chosen.blocks.lists.shape[-1]
        resident = entries.lasting.notes[policy].kept["resident"]
        assert (chosen.blocks.listed(blocks).any(2) & ~resident.there).sum() == 0
        assert (resident.there.sum(-1) == resident.held).all()
        assert resident.held == round(1.5 * taken)
        new = (resident.there & ~there).sum(-1)
        assert (new == (round(1.5 * taken) if turn == 0 else max(1, round(fresh * taken)))).all()
        there = resident.there
    assert taken == round(0.3 * blocks)


def test_blocks_at_hand_stay_when_the_past_grows():
    memory, policy = Memory(), make(Sticky, min_past=0, sink_frames=0, resident=1.0, fresh=0.5)
    before, counts = None, []
    for block in range(12):
        k = field(3, block, rows=1)
        memory.place(k, k, site(start=3 * block))
        memory.finish_block(GRID.tokens)
        entries = memory.past()[0].entries
        chosen = policy.plan(field(3, 50 + block, rows=1), entries, site(start=3 * block + 3))
        if chosen is None:
            continue
        keys = entries.lasting.notes[policy]
        resident = keys.kept["resident"]
        take = chosen.blocks.lists.shape[-1]
        assert resident.there.shape[-1] == keys.choices
        assert resident.held >= take
        if before is not None and before.of is keys:
            new = resident.there & ~torch.nn.functional.pad(before.there, (0, keys.choices - before.there.shape[-1]))
            counts.append((int(new.sum(-1).max()), max(1, round(0.5 * take), take - before.held)))
        before = resident
    assert counts
    assert all(new <= most for new, most in counts)


# -- SpAttenCascade ---------------------------------------------------------------------------------------------------


def cascade(policy, layers, q, where=site, shared=None):
    """What each layer of a forward reads, bool (B, KB)."""
    shared = {} if shared is None else shared
    found = []
    for layer in range(layers):
        k = field(FRAMES, 30 + layer)
        entries = Entries(k, k, torch.arange(FRAMES).repeat_interleave(64))
        entries.lasting.shared = shared
        chosen = policy.plan(q, entries, where(layer=layer))
        listed = chosen.blocks.listed(entries.count // chosen.blocks.key_block)
        found.append(listed[:, 0, 0])
        assert (listed == found[-1][:, None, None]).all()  # all heads and queries the same
    return found


def test_what_a_layer_drops_stays_dropped_and_ever_fewer_are_read():
    q, policy = field(3, 2), make(SpAttenCascade, drop=0.3, sink_frames=0)
    found = cascade(policy, 5, q)
    for layer, (before, after) in enumerate(pairwise(found)):
        assert (after & ~before).sum() == 0
        assert (before.sum(-1) == max(round(84 * 0.7 ** (layer + 1)), round(0.3 * 84))).all()
    apart = [one[-1] for one in (cascade(policy, 1, q), found)]
    assert not torch.equal(*apart)
    again = cascade(policy, 2, q, lambda layer: site(layer=layer, block=9), shared={})
    assert torch.equal(again[0], found[0])


def test_probabilities_are_summed_over_layers():
    q, policy = field(3, 2), make(SpAttenCascade, drop=0.05, sink_frames=0)
    found, total = cascade(policy, 3, q), 0
    for layer in range(3):
        k = field(FRAMES, 30 + layer)
        asked = Asked(q.transpose(1, 2).unflatten(2, (-1, 16)), q, None, 0, site(), None)
        own = asked.samples(2).flatten(2, 3)
        total = total + (own @ k.transpose(1, 2).mT).softmax(-1).mean((1, 2)).view(2, 84, 16).sum(-1)
        if layer:
            total = total.masked_fill(~found[layer - 1], -torch.inf)
        kept = torch.zeros(2, 84, dtype=torch.bool)
        kept.scatter_(1, total.topk(int(found[layer][0].sum()), dim=-1).indices, True)
        assert torch.equal(kept, found[layer])


def test_another_forward_begins_with_all_tokens():
    q, policy, shared = field(3, 2), make(SpAttenCascade, drop=0.3, sink_frames=0, refresh="step"), {}
    first = cascade(policy, 3, q, shared=shared)
    for step in (4, 4):  # the second time it is asked again, as by a solver that takes two forwards a step
        again = cascade(policy, 3, q, lambda layer, step=step: site(layer=layer, step=step), shared=shared)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# -- MassRouter -------------------------------------------------------------------------------------------------------


def test_the_mass_outside_is_exact_and_heads_go_by_it():
    q, entries = smooth()
    policy = make(MassRouter)
    asked = asked_of(policy, q, entries)
    outside = policy.mass_outside(asked)
    frames = entries.frames
    window = (frames < 1) | (frames >= FRAMES - 3)
    p = (q.transpose(1, 2).double() @ entries.k.transpose(1, 2).double().mT * SCALE).softmax(-1)
    true = p[..., ~window].sum(-1)
    torch.testing.assert_close(outside.double(), true[..., probes(GRID, 32)].mean(2), atol=1e-5, rtol=0)
    wide = outside >= policy.outside
    assert 0 < wide.sum() < wide.numel()
    chosen = policy.plan(q, entries, site())
    listed = chosen.blocks.listed(-(-entries.count // chosen.blocks.key_block))
    assert torch.equal(listed.all(-1).all(-1), wide)
    share = mass_read(SDPA, q, entries, chosen, SCALE).mean(1)
    torch.testing.assert_close(share, torch.where(wide, 1.0, 1 - true.mean(2).float()), atol=1e-4, rtol=0)


def test_a_router_that_lets_all_heads_read_everything_changes_nothing():
    q, entries = smooth()
    assert make(MassRouter, outside=0.01).plan(q, entries, site()) is None
    assert make(MassRouter).why_idle(SimpleNamespace(steps=4)).endswith("raise outside")
    narrow = make(MassRouter, outside=1.0).plan(q, entries, site())
    assert narrow.keys_read == 4 * GRID.tokens_per_frame


def test_a_kernel_that_was_asked_for_refuses_lists_of_several_lengths():
    q, entries = smooth()
    chosen = make(MassRouter).plan(q, entries, site())
    with pytest.raises(KernelError, match="equally many for every head"):
        over_blocks(SDPA, True, q, chosen, SCALE)
    assert over_blocks(KERNELS["reference"], True, q, chosen, SCALE).out.isfinite().all()


# -- what they refuse -------------------------------------------------------------------------------------------------


@each
def test_no_window_and_no_cache_elsewhere_beside_a_choice(kind):
    for others, message in (
        ({"window": FrameWindow(3)}, "leave the window out"),
        ({"cache": HostCache()}, "sorted copy"),
    ):
        with pytest.raises(KnobError, match=f"{kind.__name__}.*{message}"):
            Accel(selection=make(kind), **others)


@pytest.mark.parametrize(
    ("policy", "others", "message"),
    [
        (HiP(), {"cache": TempCache(0.9)}, "order='raster' does not.*TempCache keeps parts of frames: use SinkRecent"),
        (HiP(), {"cache": SinkRecent(3, summaries="cell")}, "SinkRecent keeps parts"),
        (SpAttenCascade(), {"cache": TempCache(0.9)}, "the same tokens, and TempCache keeps parts of frames"),
    ],
    ids=str,
)
def test_what_a_selector_cannot_read_is_refused(policy, others, message):
    with pytest.raises(KnobError, match=message):
        Accel(selection=policy, **others)
    Accel(selection=replace(policy, order="raster") if isinstance(policy, HiP) else policy, cache=SinkRecent(3))


@pytest.mark.parametrize("kind", EVERY)
def test_older_frames_of_fewer_tokens_are_refused_where_places_count(kind):
    refused = kind().refuses_model([(SimpleNamespace(coarse_past=True), None)])
    assert (refused is not None) == (kind in (HiP, SpAttenCascade))
    assert kind().refuses_model([(SimpleNamespace(coarse_past=False), None)]) is None


@pytest.mark.parametrize("kind", [HeadShard, SpAttenCascade, TokenSelect])
def test_heads_that_go_together_are_not_read_apart(kind):
    assert "give refresh" in kind().conflict([SimpleNamespace(slot="reuse", profile="fb.json")])
    assert kind().conflict([FlashBlock(refresh=2)]) is None


def test_a_selector_refines_what_annsa_is_made_of():
    q, entries = smooth()
    annsa = AnnSA(0.3, groups="place", summaries=False, sink_frames=0).plan(q, entries, site())
    sticky = make(Sticky, resident=4.0, sink_frames=0).plan(q, entries, site())  # all blocks are at hand
    assert torch.equal(annsa.blocks.lists, sticky.blocks.lists)


def test_blocks_keep_what_is_kept_when_they_are_made_anew():
    first = KeyBlocks("place", 8)
    first.kept["what"] = 1
    assert KeyBlocks("place", 16, first).kept is first.kept


# -- on the bundled model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    pipe = CausalWanPipeline.from_pretrained(bundled_model())
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 128, "width": 128, "num_frames": 37, "num_inference_steps": 2, "output_type": "latent"}

    def generate(**accel):
        with Accel(**accel)(pipe) as run:
            seed = torch.Generator().manual_seed(1)
            latents = pipe("a small green square moves up over gray", generator=seed, guidance_scale=1.0, **size).frames
        return latents, run.report()

    return generate, generate()[0]


@each
def test_on_a_trained_model_they_choose_and_stay_near_dense(bundled, kind):
    generate, dense = bundled
    knobs = {HeadShard: {"recent_frames": 1}, SpAttenCascade: {"drop": 0.15}}.get(kind, {})
    found, report = generate(selection=make(kind, summaries=True, dense_steps=0, min_past=1, **knobs))
    slot = report.slots["selection"]
    assert slot.engaged
    assert slot.keys_read < 0.97 * slot.keys_total
    assert 1e-4 < (found - dense).norm() / dense.norm() < 0.3
