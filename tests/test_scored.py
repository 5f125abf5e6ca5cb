"""What holds for every cache that keeps what scores best, and for the parts they are made of."""

from dataclasses import dataclass, replace
from math import log
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import made
from tiny import tiny_pipeline

from diffaccel import CAKE, Accel, FlashBlock, FrameWindow, Grid, KnobError, NotEngagedError, SinkRecent, SnapKV
from diffaccel.cache.entries import Entries
from diffaccel.cache.look import Look, probes
from diffaccel.cache.ragged import ByHead, Ragged
from diffaccel.cache.remainder import MeanKey
from diffaccel.cache.scored import Scored
from diffaccel.cache.share_out import share_out
from diffaccel.kernel import KERNELS
from diffaccel.kernel.weighted import over_entries
from diffaccel.techniques import TECHNIQUES

SCORED = [technique for technique in TECHNIQUES if issubclass(technique, Scored)]
every = pytest.mark.parametrize("technique", SCORED, ids=lambda technique: technique.__name__)


def read(q, entries):
    return over_entries(KERNELS["reference"], q, entries, q.shape[-1] ** -0.5, None)


def ragged(counts, dim=4, seed=0):
    rows, heads, most = len(counts), len(counts[0]), max(map(max, counts))
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(rows, most, heads, dim, generator=generator) for _ in range(2))
    there = torch.arange(most) < torch.tensor(counts)[..., None]
    return Ragged(k, v, {"token": torch.arange(most).expand(rows, heads, -1)}, there, counts)


def multiset(held):
    """Every entry as (row, head, its column, its key), sorted."""
    found = []
    for row, head, at in held.there.nonzero().tolist():
        found.append((row, head, int(held.columns["token"][row, head, at]), held.k[row, at, head].tolist()))
    return sorted(found)


counts_of = st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3).map(tuple), min_size=2, max_size=2).map(tuple)


@settings(max_examples=50, deadline=None)
@given(counts_of.filter(lambda counts: max(map(max, counts)) > 0), st.integers(0, 10**6), st.data())
def test_split_parts_every_heads_entries_by_score(counts, seed, data):
    held = ragged(counts, seed=seed)
    keep = tuple(tuple(data.draw(st.integers(0, n)) for n in row) for row in counts)
    score = torch.randn(held.there.shape, generator=torch.Generator().manual_seed(seed))
    stays, gone = held.split(score, keep)
    assert stays.counts == keep == tuple(tuple(row) for row in stays.there.sum(-1).tolist())
    assert gone.counts == tuple(tuple(row) for row in gone.there.sum(-1).tolist())
    assert sorted(multiset(stays) + multiset(gone)) == multiset(held)
    for row, head in ((row, head) for row in range(2) for head in range(3)):
        kept = score[row, head, stays.columns["token"][row, head, stays.there[row, head]]]
        lost = score[row, head, gone.columns["token"][row, head, gone.there[row, head]]]
        assert not len(kept) or not len(lost) or kept.min() >= lost.max()
        tokens = stays.columns["token"][row, head, stays.there[row, head]]
        assert (tokens.diff() > 0).all(), "what stays is in its order"


@settings(max_examples=50, deadline=None)
@given(counts_of.filter(lambda counts: max(map(max, counts)) > 0), st.integers(0, 10**6))
def test_heads_of_other_numbers_are_each_read_whole(counts, seed):
    held, tier = ragged(counts, seed=seed), ByHead()
    tier.hold(held, tokens_per_frame=2)
    q = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(seed + 1))
    scores = torch.einsum("bshd,bnhd->bshn", q, held.k) / 2
    scores = scores.masked_fill(~held.there[:, None], -torch.inf)
    found = tier.partial(q, read)
    torch.testing.assert_close(found.lse, scores.logsumexp(-1))
    expected = torch.einsum("bshn,bnhd->bshd", scores.softmax(-1).nan_to_num(0), held.v)
    torch.testing.assert_close(found.out, expected)
    back = tier.held
    assert back is not None
    assert multiset(back) == multiset(held)
    assert tier.bytes == 2 * sum(map(sum, counts)) * 4 * 4


def test_mean_key_is_exact_for_identical_tokens_and_takes_them_in_any_portions():
    k, v = torch.randn(2, 2, 1, 3, 4)
    counts = ((5, 0, 2), (1, 1, 3))
    held = replace(ragged(counts), k=k.expand(-1, 5, -1, -1).clone(), v=v.expand(-1, 5, -1, -1).clone())
    tier, q = MeanKey(), torch.randn(2, 3, 3, 4)
    some, rest = held.split(torch.rand(2, 3, 5), ((2, 0, 1), (0, 1, 2)))
    tier.take(some, 2)
    tier.take(rest, 2)
    expected = ByHead()
    expected.hold(held, 2)
    for found, wanted in zip(tier.partial(q, read), expected.partial(q, read), strict=True):
        torch.testing.assert_close(found, wanted)
    assert tier.count == 1


def test_mean_key_weighs_each_token_alike_over_takes():
    tier, held = MeanKey(), ragged(((6, 6, 6),))
    some, rest = held.split(torch.rand(1, 3, 6), ((1, 4, 2),))
    tier.take(some, 2)
    tier.take(rest, 2)
    assert tier.held is not None
    torch.testing.assert_close(tier.held.k, held.k.mean(1, keepdim=True))
    torch.testing.assert_close(tier.held.v, held.v.mean(1, keepdim=True))


def test_probabilities_are_those_of_attention_over_everything_held():
    kept, mean = ragged(((3, 5),), seed=1), MeanKey()
    mean.take(ragged(((2, 4),), seed=2), 2)
    tier = ByHead()
    tier.hold(kept, 2)
    q = torch.randn(1, 7, 2, 4)
    parts = [tier.partial(q, read), mean.partial(q, read)]
    look = Look(0, q, kept.k, kept.v, kept.columns, kept.there, parts[1].lse, Grid(1, 1, 2), 0)
    outside = (parts[1].lse - torch.logaddexp(parts[0].lse, parts[1].lse)).exp()
    torch.testing.assert_close(look.p.sum(-1) + outside.transpose(1, 2), torch.ones(1, 2, 7))
    from_p = torch.einsum("bhsn,bnhd->bshd", look.p, kept.v)
    torch.testing.assert_close(from_p, parts[0].out * (1 - outside)[..., None])


@pytest.mark.parametrize("width", [1, 3, 5])
def test_pooling_is_over_neighbours_in_time_and_frame(width):
    grid, held = Grid(2, 3, 4), ragged(((20, 24),))
    score = torch.rand(1, 2, 24)
    look = Look(0, held.k, held.k, held.v, held.columns, held.there, None, grid, 0)
    found = look.pooled(score, width)
    places = [(t, y, x) for t in range(2) for y in range(3) for x in range(4)]
    for head, count in enumerate(held.counts[0]):
        for at in range(count):
            near = [
                score[0, head, other]
                for other in range(count)
                if all(abs(a - b) <= width // 2 for a, b in zip(places[at], places[other], strict=True))
            ]
            torch.testing.assert_close(found[0, head, at], torch.stack(near).mean())


@pytest.mark.parametrize("grid", [Grid(3, 30, 52), Grid(1, 16, 16), Grid(3, 2, 3), Grid(4, 1, 7)])
def test_probes_are_spread_over_frames_rows_and_columns(grid):
    places = probes(grid, 32)
    assert places.unique().numel() == len(places) <= 32
    assert 0 <= int(places.min()) <= int(places.max()) < grid.tokens
    if grid.tokens > 500:
        t, y, x = places // grid.tokens_per_frame, places // grid.width % grid.height, places % grid.width
        assert len(places) == 32
        assert t.unique().numel() == grid.frames
        for along, size in ((y, grid.height), (x, grid.width)):
            quarters = torch.bincount(along * 4 // size, minlength=4)
            assert quarters.min() >= 7, quarters


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4).map(tuple), min_size=3, max_size=3),
    st.lists(st.floats(0, 5), min_size=12, max_size=12),
    st.integers(1, 40),
)
def test_shares_are_within_budget_and_waste_nothing(available, shares, capacity):
    available = [(row,) for row in available]
    found = share_out(torch.tensor(shares).view(3, 1, 4), available, capacity)
    kept, there = torch.tensor(found), torch.tensor(available)
    assert (kept <= there).all()
    assert (kept >= 0).all()
    total, most = int(kept.sum()), min(capacity * 12, int(there.sum()))
    assert most - 12 < total <= most  # less than one an own share is lost to rounding


def test_shares_are_in_proportion():
    shares = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])
    plenty = [((100, 100),), ((100, 100),)]
    assert share_out(shares, plenty, 30) == [((10, 20),), ((30, 60),)]
    assert share_out(shares, [((100, 100),), ((100, 45),)], 30) == [((12, 25),), ((37, 45),)]


@dataclass(frozen=True)
class Newest(Scored):
    """A window, written as a score."""

    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "none"
    columns: ClassVar[tuple[str, ...]] = ("commits",)

    def observe(self, look):
        return {"commits": look.columns["commits"] + 1}

    def score(self, look):
        return look.token.double()


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def generate(pipe, accel, frames=49, rows=1, **given):
    settings = {"height": 32, "width": 48, "num_frames": frames, "num_inference_steps": 2, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in range(rows)]
    with accel(pipe) as run:
        video = pipe(["a red circle moves left"] * rows, generator=generators, guidance_scale=1.0, **settings | given)
    return video.frames, run


def held_at_the_end(pipe, accel, monkeypatch, **given):
    """Of each layer, at the last commit: the tiers of chosen entries, and the frames in the exact tier."""
    found = []
    commit = Scored.commit

    def noting(self, memories, site, run):
        commit(self, memories, site, run)
        found[:] = [(memory.older, memory.exact.past().entries.frames.clone()) for memory in memories]

    monkeypatch.setattr(Scored, "commit", noting)
    generate(pipe, accel, **given)
    return found


def test_keeping_the_newest_is_a_window(pipe, monkeypatch):
    """Which ties all of it together: order, protection, columns and budget."""
    policy = Newest("6 frames", recent_frames=2, sink_frames=1)
    for older, exact in held_at_the_end(pipe, Accel(cache=policy), monkeypatch):
        held = older[0].held
        assert exact.unique().tolist() == [0, 8, 9]  # the last block, from frame 10 on, is not committed
        assert (held.columns["token"] // 6).unique().tolist() == [5, 6, 7]
        seen = {int(frame): commits.unique().tolist() for frame, commits in by_frame(held)}
        assert seen == {5: [2], 6: [2], 7: [1]}  # of blocks of 1, 3, 3 and 3 frames
    window, _ = generate(pipe, Accel(cache=SinkRecent(recent_frames=5, sink_frames=1)))
    torch.testing.assert_close(generate(pipe, Accel(cache=policy))[0], window, atol=1e-5, rtol=0)


def by_frame(held):
    frames = held.columns["token"] // 6
    return [(frame, held.columns["commits"][frames == frame]) for frame in frames.unique()]


@every
def test_budget_is_met_and_the_protected_stay(pipe, monkeypatch, technique):
    policy = made(technique, budget="6 frames", recent_frames=2, sink_frames=1)
    layers = held_at_the_end(pipe, Accel(cache=policy), monkeypatch, rows=2)
    for row in range(2):
        kept = [older[0].counts[row] for older, _ in layers]
        assert sum(map(sum, kept)) <= 3 * 6 * len(kept) * len(kept[0])
        assert sum(map(sum, kept)) > 3 * 6 * len(kept) * len(kept[0]) - len(kept) * len(kept[0])
    for older, exact in layers:
        assert exact.unique().tolist() == [0, 8, 9]
        tokens = older[0].held.columns["token"]
        middle = tokens[older[0].held.there] // 6
        assert ((middle >= 1) & (middle <= 7)).all(), "neither of the sink nor of the newest frames"


@every
def test_a_budget_that_holds_all_is_dense_within_rounding(pipe, technique):
    last = []
    keep = {"callback_on_chunk_end": lambda pipe, index, blocks, tensors: last.append(tensors["latents"].clone())}
    generate(pipe, Accel(), **keep)
    dense = last.pop()
    with pytest.raises(NotEngagedError, match="never outgrew"):
        generate(pipe, Accel(cache=made(technique, "40 frames")), **keep)
    torch.testing.assert_close(last.pop(), dense, atol=1e-4, rtol=0)


@every
def test_bad_input_says_the_rule_and_the_values(pipe, technique):
    with pytest.raises(KnobError, match="a budget is a number of tokens"):
        technique(budget="many")
    with pytest.raises(KnobError, match=r"must hold sink_frames .* = 24 tokens"):
        generate(pipe, Accel(cache=made(technique, budget=20)))
    with pytest.raises(KnobError, match="number of latent frames >= 0"):
        technique(recent_frames=-1)
    with pytest.raises(KnobError, match="FrameWindow asks for places"):
        Accel(cache=technique("9 frames"), window=FrameWindow(frames=3))
    Accel(cache=technique(**technique.exact), window=FrameWindow(frames=3))


def test_flashblock_by_heads_is_refused(tmp_path):
    refusal = SnapKV().conflict([replace_profile(FlashBlock(refresh=2))])
    assert refusal is not None
    assert "head by head" in refusal


def replace_profile(policy):
    changed = FlashBlock(refresh=policy.refresh)
    object.__setattr__(changed, "profile", "some.json")
    return changed


def test_snapkv_scores_are_summed_probabilities_averaged_over_neighbours():
    q, k = torch.randn(1, 3, 2, 4), torch.randn(1, 6, 2, 4)
    there = torch.ones(1, 2, 6, dtype=torch.bool)
    look = Look(0, q, k, k, {"token": torch.arange(6).expand(1, 2, -1)}, there, None, Grid(1, 1, 6), 0)
    p = (torch.einsum("bshd,bnhd->bhsn", q, k) / 2).softmax(-1).sum(2)
    torch.testing.assert_close(SnapKV(pool=1).score(look), p)
    padded = torch.nn.functional.pad(p, [1, 1])
    inner = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
    torch.testing.assert_close(SnapKV(pool=3).score(look)[..., 1:-1], inner[..., 1:-1])


def test_cake_scores_and_preferences_are_the_papers():
    q, k = torch.randn(1, 5, 2, 4), torch.randn(1, 6, 2, 4)
    there = torch.ones(1, 2, 6, dtype=torch.bool)
    look = Look(0, q, k, k, {"token": torch.arange(6).expand(1, 2, -1)}, there, None, Grid(1, 1, 6), 0)
    a = (torch.einsum("bshd,bnhd->bhsn", q, k) / 2).softmax(-1)[0]
    policy = CAKE(tau1=2.0, tau2=0.5, gamma=3.0)
    for head in range(2):
        columns = list(a[head].T)  # of each key, its probabilities over the probes
        worth = torch.stack([column.mean() + 3 * ((column - column.mean()) ** 2).sum() / 4 for column in columns])
        torch.testing.assert_close(policy.score(look)[0, head], worth)
    entropy = sum(-float(p) * log(float(p)) for p in a.mean(1).flatten()) / 2
    shift = float(a.var(1).sum()) / 2
    torch.testing.assert_close(policy.shares(look), torch.full((1, 2), entropy**0.5 * shift**2.0))


def test_entries_of_no_head_are_nothing():
    tier = ByHead()
    tier.hold(ragged(((0, 2),)), 2)
    found = tier.partial(torch.randn(1, 3, 2, 4), read)
    assert torch.equal(found.out[:, :, 0], torch.zeros(1, 3, 4))
    assert (found.lse[:, :, 0] == -torch.inf).all()
    assert isinstance(tier._groups[0][2], Entries)
