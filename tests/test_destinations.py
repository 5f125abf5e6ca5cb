"""What becomes of entries that a cache moves: every destination, and the caches made of them."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import attention64
from test_scored import counts_of, generate, multiset, ragged, read
from tiny import tiny_pipeline

from diffaccel import Accel, Grid, KnobError, NotEngagedError, RemoteCache, SnapKV, ThinK, ZipCache
from diffaccel.cache.centroids import Centroids
from diffaccel.cache.look import Look
from diffaccel.cache.memory import Memory
from diffaccel.cache.ragged import ByHead, Ragged
from diffaccel.cache.remainder import REMAINDERS
from diffaccel.cache.remote import RemoteTier
from diffaccel.cache.store import Quantised
from diffaccel.cache.stored import PIECE_FRAMES, Stored, in_bits, plain
from diffaccel.cache.think import Narrow, best_pairs
from diffaccel.cache.tiers import ExactTier
from diffaccel.kernel import merge

STORED = {
    "plain": lambda: Stored(plain),
    "host": lambda: Stored.on_host(1)[0],
    "8 bits": lambda: Stored(in_bits(8)),
    "4 bits": lambda: Stored(in_bits(4)),
    "2 bits": lambda: Stored(in_bits(2)),
}
EXACT = {"by head": ByHead, "plain": STORED["plain"], "host": STORED["host"]}
every_store = pytest.mark.parametrize("name", STORED)
examples = partial(settings, derandomize=True, deadline=None, database=None)
some = counts_of.filter(lambda counts: max(map(max, counts)) > 0)


def put(tier, held):
    """All of `held` into an empty tier; in several steps where it takes them one after another."""
    if type(tier) is ByHead:
        tier.hold(held, 2)
        return tier
    score = torch.arange(held.there.shape[-1], 0, -1.0, device=held.there.device).expand(held.there.shape)
    while any(map(any, held.counts)):
        step = tuple(
            tuple(min(n, 1 + (row + head) % 3) for head, n in enumerate(c)) for row, c in enumerate(held.counts)
        )
        first, held = held.split(score[..., : held.there.shape[-1]], step)
        tier.take(first, 1)
    return tier


def dense(q, held):
    """Attention of each head to what it has, written out."""
    scores = torch.einsum("bshd,bnhd->bshn", q.double(), held.k.double()) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~held.there[:, None], -torch.inf)
    return torch.einsum("bshn,bnhd->bshd", scores.softmax(-1).nan_to_num(0), held.v.double()), scores.logsumexp(-1)


def close(found, wanted, atol=1e-5):
    assert not torch.isnan(found.out).any()
    torch.testing.assert_close(found.out.double(), wanted[0], atol=atol, rtol=0)
    torch.testing.assert_close(found.lse.double(), wanted[1], atol=atol, rtol=1e-5)


def queries(heads=3, dim=4, rows=2, seed=9):
    return torch.randn(rows, 5, heads, dim, generator=torch.Generator().manual_seed(seed))


@examples(max_examples=40)
@given(some, st.integers(0, 10**6), st.data())
def test_a_partition_over_tiers_is_dense_in_any_order(counts, seed, data):
    held, tiers, whole = ragged(counts, seed=seed), [], ragged(counts, seed=seed)
    for name in data.draw(st.permutations(list(EXACT))):
        keep = tuple(tuple(data.draw(st.integers(0, n)) for n in row) for row in held.counts)
        score = torch.randn(held.there.shape, generator=torch.Generator().manual_seed(seed))
        mine, held = held.split(score, keep)
        if any(map(any, mine.counts)):
            tiers.append(put(EXACT[name](), mine))
    if any(map(any, held.counts)):
        tiers.append(put(Stored(plain), held))
    q = queries()
    parts = [tier.partial(q, read) for tier in data.draw(st.permutations(tiers))]
    close(merge(parts), dense(q, whole))


@every_store
@examples(max_examples=25)
@given(some, st.integers(0, 10**6))
def test_a_store_answers_for_what_it_holds(name, counts, seed):
    given = ragged(counts, dim=8, seed=seed)
    tier = STORED[name]()
    tier.hold(given, 1)
    held, q = tier.held, queries(dim=8)
    assert held.counts == tier.counts == counts
    close(tier.partial(q, read), dense(q, held))
    if name in EXACT:
        assert multiset(held) == multiset(given)
    bits = {"8 bits": 8, "4 bits": 4, "2 bits": 2}.get(name)
    if bits is not None:  # half a step of a range that the channels' sizes stretch
        there = given.there.transpose(1, 2)
        for found, wanted, power in ((held.k, given.k, 1), (held.v, given.v, 0.5)):
            size = (wanted * there[..., None]).abs().amax(1, keepdim=True)
            size = torch.maximum(size, size.mean(-1, keepdim=True) / 2).clamp(min=1e-6) ** power
            scaled = wanted / size
            step = (scaled.amax(-1, keepdim=True) - scaled.amin(-1, keepdim=True)) / (2**bits - 1)
            assert ((found - wanted).abs() / size / step)[there].max() < 0.51


@every_store
def test_entries_added_over_many_pieces_are_all_there(name):
    counts = ((40, 0, 17), (3, 29, PIECE_FRAMES))
    given, q = ragged(counts, dim=8), queries(dim=8)
    tier, at_once = put(STORED[name](), given), STORED[name]()
    at_once.hold(given, 1)
    assert tier.counts == counts
    assert len(tier._pieces) == 5
    assert tier.frames()[0].tolist() == list(range(40))
    if name in EXACT:
        close(tier.partial(q, read), dense(q, given))
    assert tier.bytes + tier.host_bytes == at_once.bytes + at_once.host_bytes
    assert (tier.bytes == 0) == (name == "host")


def test_what_is_written_back_keeps_its_code():
    """So that what stays in a quantised tier from block to block does not wear off."""
    tier = Stored(in_bits(4))
    tier.hold(ragged(((9, 4, 7),), dim=8), 1)
    first = tier.held
    for _ in range(3):
        tier.hold(tier.held, 1)
    assert torch.equal(tier.held.k, first.k)
    assert torch.equal(tier.held.v, first.v)
    stays, _ = tier.held.split(torch.rand(1, 3, 9), ((5, 4, 2),))
    tier.hold(stays, 1)
    assert torch.equal(tier.held.k[stays.there.transpose(1, 2)], stays.k[stays.there.transpose(1, 2)])


def test_reading_one_host_tier_fetches_the_next():
    first, second = Stored.on_host(2)
    for tier in (first, second):
        put(tier, ragged(((3, 3, 3), (3, 3, 3))))
    first.partial(queries(), read)
    assert first._shuttle is second._shuttle
    owner, number = first._shuttle._coming[0]
    assert (owner(), number) == (second, 0)


def test_few_tokens_shown_first_do_not_spoil_those_that_come_later():
    """Two tokens may be small in a channel by chance."""
    given, tier = ragged(((2, 2, 2),), dim=16), Stored(in_bits(4))
    given.k[..., 3] = 1e-3
    tier.take(given, 32)
    later = ragged(((60, 60, 60),), dim=16, seed=1)
    tier.take(later, 32)
    k = tier._open(0, torch.device("cpu"))[0][:, 2:]
    assert (k - later.k).norm() < 0.15 * later.k.norm()


def test_a_channel_unseen_at_first_stays_finite():
    """In the first entries a channel may be 0 throughout; dividing by next to nothing would overflow 16 bits."""
    k = torch.zeros(1, 3, 1, 8)
    store = Quantised(k, 4, 4, channels=1)
    store.write(torch.arange(3), 5 * torch.randn(3, 8))
    assert torch.isfinite(store.read(torch.arange(3))).all()


def test_the_exact_tier_is_an_arena():
    """Over 100 blocks of a known length nothing moves; of an unknown one the buffer moves seven times."""
    k, frames = torch.randn(1, 6, 2, 4), torch.zeros(6, dtype=torch.int64)
    for expected, most in ((600, 1), (0, 8)):
        tier, places = ExactTier(expected), set()
        for block in range(100):
            tier.place(k + block, k, frames)
            tier.keep_placed()
            places.add(tier.past().entries.k.data_ptr())
        assert len(places) <= most
        assert torch.equal(tier.past().entries.k, torch.cat([k + block for block in range(100)], 1))


# -- centroids ---------------------------------------------------------------------------------------------------------


@examples(max_examples=25)
@given(st.lists(some, min_size=1, max_size=4), st.integers(0, 10**6))
def test_centroids_of_identical_tokens_are_exact(takes, seed):
    """What is taken at once is one token many times, so that its mean is that token."""
    tier, whole, q = Centroids(), None, queries()
    for counts in takes:
        held = ragged(tuple(tuple(7 * n for n in row) for row in counts), seed=seed)
        alike = replace(held, k=held.k[:, :1].expand_as(held.k), v=held.v[:, :1].expand_as(held.v))
        tier.take(alike, 16)
        whole = alike if whole is None else whole.then(alike)
    close(tier.partial(q, read), dense(q, whole), atol=1e-4)


def test_centroids_weigh_every_token_and_stay_bounded():
    tier, taken = Centroids(), []
    for seed in range(12):
        given = ragged(((90, 20, 0), (1, 47, 90)), seed=seed)
        tier.take(given, 16)
        taken.append(given)
        assert tier.count <= 16
        assert [int(n) for n in tier._tokens.sum(1)] == [n * (seed + 1) for n in (90, 20, 0, 1, 47, 90)]
    weight = tier._tokens / tier._tokens.sum(1, keepdim=True).clamp(min=1)
    for found, name in ((tier._k, "k"), (tier._v, "v")):
        total = sum((getattr(g, name) * g.there.transpose(1, 2)[..., None]).sum(1) for g in taken).flatten(0, 1)
        mean = total / tier._tokens.sum(1, keepdim=True).clamp(min=1)
        torch.testing.assert_close((found * weight[..., None]).sum(1), mean, atol=1e-5, rtol=1e-4)
    part = tier.partial(queries(), read)
    assert (part.lse[0, :, 2] == -torch.inf).all(), "a head that lost nothing has nothing"
    assert torch.isfinite(part.lse[0, :, :2]).all()
    assert tier.count * 4 * 4 < tier.bytes


def test_centroids_are_nearer_than_one_mean():
    """On tokens that fall into groups, keys and values alike."""
    generator = torch.Generator().manual_seed(0)
    groups = 3 * torch.randn(2, 6, 3, 4, generator=generator)
    held = ragged(((96, 96, 96), (96, 96, 96)))
    near = groups.repeat_interleave(16, 1) + 0.1 * held.k
    held, q = replace(held, k=near, v=near), queries()
    error = {}
    for name in ("mean", "centroids"):
        [tier] = REMAINDERS[name](1)
        tier.take(held, 64)
        error[name] = float((tier.partial(q, read).out - dense(q, held)[0]).norm() / dense(q, held)[0].norm())
    assert error["centroids"] < 0.1 < 0.5 < error["mean"], error


def test_a_heads_centroids_do_not_depend_on_the_other_rows():
    counts = ((90, 20, 5), (1, 47, 90))
    both, alone = Centroids(), Centroids()
    for seed in range(4):
        held = ragged(counts, seed=seed)
        first, _ = held.split(torch.arange(90, 0, -1.0).expand(2, 3, 90), counts)
        one = Ragged(first.k[:1], first.v[:1], {"token": first.columns["token"][:1]}, first.there[:1], counts[:1])
        both.take(first, 16)
        alone.take(one, 16)
    q = queries()
    for found, wanted in zip(both.partial(q, read), alone.partial(q[:1], read), strict=True):
        torch.testing.assert_close(found[:1], wanted)


# -- whole generations -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def exact_video(pipe):
    return generate(pipe, Accel())[0]


def watched(monkeypatch, technique):
    """The memories of every commit, after it, with their versions."""
    found, commit = [], technique.commit

    def noting(self, memories, site, run):
        commit(self, memories, site, run)
        found.append([(memory, memory.version) for memory in memories])

    monkeypatch.setattr(technique, "commit", noting)
    return found


@pytest.mark.parametrize("dropped", REMAINDERS)
def test_every_destination_in_a_video(pipe, exact_video, monkeypatch, dropped):
    seen = watched(monkeypatch, SnapKV)
    video, run = generate(pipe, Accel(cache=SnapKV("6 frames", recent_frames=2, dropped=dropped)))
    versions = [[version for _, version in commit] for commit in seen]
    assert len(versions) == 4
    assert all(max(before) < min(after) for before, after in pairwise(versions))
    plain_video, _ = generate(pipe, Accel(cache=SnapKV("6 frames", recent_frames=2)))
    apart = float((video - exact_video).norm() / exact_video.norm())
    assert apart < float((plain_video - exact_video).norm() / exact_video.norm())
    assert (apart < 1e-5) == (dropped == "host")
    assert run.report().slots["cache"].engaged


@pytest.mark.parametrize("dropped", REMAINDERS)
def test_scores_know_the_mass_of_what_was_dropped(pipe, monkeypatch, dropped):
    """A look counts it as attention does."""
    counted, look = [], SnapKV.look

    def looking(self, layer, memory, *rest):
        found = look(self, layer, memory, *rest)
        if found.beside is not None:
            torch.testing.assert_close(found.beside, memory.older[1].partial(memory.queries, read).lse)
            counted.append(layer)
        return found

    monkeypatch.setattr(SnapKV, "look", looking)
    generate(pipe, Accel(cache=SnapKV("6 frames", recent_frames=2, dropped=dropped)))
    assert counted == [0, 1]


def test_host_says_what_lies_there(pipe):
    _, run = generate(pipe, Accel(cache=SnapKV("6 frames", recent_frames=2, dropped="host")))
    assert run.report().cache["host_bytes"] > 0


def test_zipcache_salience_is_mass_by_who_could_see_it():
    q, k = queries(2, 4, 1), torch.randn(1, 6, 2, 4)
    there = torch.ones(1, 2, 6, dtype=torch.bool)
    mass, seen = torch.rand(1, 2, 6), torch.tensor([3.0, 2, 2, 1, 0, 0]).expand(1, 2, 6)
    look = Look(0, q, k, k, {"mass": mass, "seen": seen}, there, None, Grid(1, 1, 6), 0)
    p = (torch.einsum("bshd,bnhd->bhsn", q, k) / 2).softmax(-1)
    for normalised in (True, False):
        policy = ZipCache(normalised=normalised)
        look.columns.update({"mass": mass, "seen": seen})
        look.columns.update(policy.observe(look))
        total = mass + p.mean(2)
        torch.testing.assert_close(policy.score(look), total / (seen + 1) if normalised else total)


def test_zipcache_holds_everything_in_two_tiers(pipe, exact_video, monkeypatch):
    seen = watched(monkeypatch, ZipCache)
    errors = []
    for policy in (ZipCache(1.0, bits=8), ZipCache(1.0), ZipCache(0.6), ZipCache(1.0, bits=2)):
        video, run = generate(pipe, Accel(cache=replace(policy, recent_frames=2)), rows=1)
        errors.append(float((video - exact_video).norm()))
        assert run.report().slots["cache"].engaged
        for memory, _ in seen[-1]:
            middle = memory.seen - memory.exact.count
            held, other = memory.older
            assert held.counts == ((round(policy.salient * middle),) * 2,)
            left = middle - round(policy.salient * middle)
            assert other.counts == (((left,) * 2,) if left else ())
    assert errors == sorted(errors), errors


def test_nothing_to_quantise_is_an_error(pipe):
    for cache in (ZipCache(recent_frames=20), ThinK(recent_frames=20)):
        with pytest.raises(NotEngagedError, match="no frame ever left the first and the newest ones"):
            generate(pipe, Accel(cache=cache))


# -- ThinK -------------------------------------------------------------------------------------------------------------


def test_think_pairs_are_the_papers_energy():
    """|q_c k_c^T|_F is |q_c| |k_c|, summed in squares over the channels that turn together."""
    q, k = torch.randn(3, 9, 8), torch.randn(3, 21, 8)
    outer = torch.stack([torch.einsum("rs,rn->rsn", q[..., c], k[..., c]).flatten(1).norm(dim=1) for c in range(8)], 1)
    pairs = outer.square().unflatten(1, (4, 2)).sum(2)
    for keep, count in ((1.0, 4), (0.6, 2), (0.3, 1), (0.01, 1)):
        found = best_pairs(q.square().sum(1), k, keep)
        best = pairs.topk(count, 1).indices.sort(1).values
        assert torch.equal(found, torch.stack([2 * best, 2 * best + 1], 2).flatten(1))


def test_think_reads_dropped_channels_as_zero_at_the_whole_scale():
    held, q = ragged(((6, 6, 6), (6, 6, 6)), dim=8), queries(dim=8)
    channels = torch.tensor([[0, 1, 4, 5]]).expand(6, -1)
    tier = Stored(lambda k, v, places: (Narrow(k, places, channels), plain(k, v, places)[1]))
    put(tier, held)
    mask = torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])
    close(tier.partial(q, read), attention64(q, held.k * mask, held.v, scale=8**-0.5))
    whole = put(Stored(plain), held)
    assert tier.bytes == whole.bytes * 3 // 4


def test_think_by_energy_beats_other_channels():
    """On keys whose channels differ in size, against the largest keys alone and a choice by lot."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(16, generator=generator).repeat_interleave(2) * 3
    k, v = torch.randn(2, 1, 200, 1, 32, generator=generator)
    q = torch.randn(1, 50, 1, 32, generator=generator) * size.flip(0) * (torch.arange(32) % 7 < 4)
    held = Ragged.whole(k * size, v, {"token": torch.arange(200).expand(1, 1, -1)})
    error = {}
    for name, energy in (
        ("query", q.square().sum(1).flatten(0, 1)),
        ("keys", torch.ones(1, 32)),
        ("lot", torch.rand(1, 32, generator=generator) / held.k.square().sum(1)[:, 0]),
    ):
        channels = best_pairs(energy, held.k[:, :, 0], 0.5)
        tier = Stored(lambda k, v, n, channels=channels: (Narrow(k, n, channels), plain(k, v, n)[1]))
        tier.take(held, 16)
        wanted = dense(q, held)[0]
        error[name] = float((tier.partial(q, read).out - wanted).norm() / wanted.norm())
    assert error["query"] < 0.7 * min(error["keys"], error["lot"]), error


def test_think_refuses_a_window(pipe):
    from diffaccel import FrameWindow

    with pytest.raises(KnobError, match="older keys are read whole, and FrameWindow leaves some out"):
        Accel(cache=ThinK(), window=FrameWindow(frames=3))
    Accel(cache=ThinK(keep=1.0), window=FrameWindow(frames=3))


# -- RemoteCache -------------------------------------------------------------------------------------------------------


def test_remote_partials_are_dense_and_the_link_is_counted():
    k, v = torch.randn(2, 1, 12, 2, 4)
    tier, q, near = RemoteTier(torch.device("cpu")), torch.randn(1, 5, 2, 4), Memory()
    frames = torch.arange(12) // 2
    for some in (slice(0, 3), slice(3, 4), slice(4, 12)):
        tier.add(k[:, some], v[:, some], frames[some])
    assert tier.count == 12
    assert torch.equal(tier.frames()[0], frames)
    close(tier.partial(q, read), attention64(q, k, v))
    assert tier.link_bytes == 2 * (1 * 5 * 2 * 4) * 4 + 5 * 2 * 4
    assert tier.link_bytes_of_keys == 2 * 12 * 2 * 4 * 4
    assert tier.bytes == near.bytes == 0
    assert tier.remote_bytes >= tier.link_bytes_of_keys


def test_a_remote_video_is_dense(pipe, exact_video):
    video, run = generate(pipe, Accel(cache=RemoteCache("cpu", recent_frames=1)))
    torch.testing.assert_close(video, exact_video, atol=1e-4, rtol=0)
    cache = run.report().cache
    assert cache["remote_bytes"] > 0
    assert cache["link_bytes"] > 0
    assert cache["link_bytes_of_keys"] > 0


def test_a_device_that_is_not_there_is_refused_before_anything_is_computed(pipe):
    with pytest.raises(KnobError, match=r"which has \d+ CUDA devices.*HostCache, got device='cuda:97'"):
        generate(pipe, Accel(cache=RemoteCache("cuda:97")))


@pytest.mark.gpu
@pytest.mark.parametrize("name", STORED)
def test_stores_on_a_gpu(name):
    held = ragged(((40, 0, 17), (3, 29, PIECE_FRAMES)), dim=64)
    on_gpu = replace(
        held, k=held.k.cuda(), v=held.v.cuda(), there=held.there.cuda(), columns={"token": held.columns["token"].cuda()}
    )
    here, there, q = put(STORED[name](), held), put(STORED[name](), on_gpu), queries(dim=64)
    for found, wanted in zip(there.partial(q.cuda(), read), here.partial(q, read), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, atol=2e-3, rtol=0)
    assert there._pieces[0][0].parts[0].is_pinned() == (name == "host")


@pytest.mark.gpu
def test_a_second_gpu_answers_as_the_first_would():
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs")
    k, v = torch.randn(2, 1, 1200, 2, 64, device="cuda:0", dtype=torch.bfloat16)
    tier, q = RemoteTier(torch.device("cuda:1")), torch.randn(1, 500, 2, 64, device="cuda:0", dtype=torch.bfloat16)
    tier.add(k, v, torch.arange(1200))
    found, wanted = tier.partial(q, read), attention64(q, k, v)
    assert found.out.device == q.device
    torch.testing.assert_close(found.out.double(), wanted[0], atol=2e-2, rtol=0)
