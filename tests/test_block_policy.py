"""Caches that keep a part, on a language model: exact where nothing is dropped, what is kept is what is read."""

import pytest
import torch
from test_block_lm import MASK, generate, make, prompt_of

from diffaccel import CAKE, H2O, KnobError, LazyEviction, NotEngagedError, SnapKV, TaskKV, UnsupportedError, ZipCache
from diffaccel.pipelines.block_lm import BlockLM, TokenCount
from diffaccel.techniques import HostCache, SinkRecent, TCAStyle, TriAttention

KEPT = {"recent_frames": 6, "sink_frames": 2}
SCORED = (SnapKV, H2O, CAKE, TaskKV, LazyEviction)
BLOCK = 4


def logits(model, ids):
    """Of a block of masks behind the tokens."""
    masks = torch.full((len(ids), BLOCK), MASK)
    return model(torch.cat([ids, masks], 1)).logits


@pytest.mark.parametrize("policy", [SnapKV(budget=None), SinkRecent(recent_frames=None), ZipCache(salient=None)])
def test_the_exact_setting_is_the_cache_of_all_blocks(policy):
    lm, ids = make(), prompt_of(2, 18)
    whole, asked = BlockLM(lm, BLOCK), BlockLM(lm, BLOCK, cache=policy)
    assert torch.equal(logits(whole, ids[:, :16]), logits(asked, ids[:, :16]))
    assert torch.equal(generate(whole, ids, BLOCK), generate(asked, ids, BLOCK))
    asked.require_engaged()
    assert asked.report()["approximate"] == []


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("policy", SCORED)
def test_a_budget_that_nothing_outgrows_is_dense_attention(name, policy):
    """Two rows, heads that share keys, a second turn, and a prompt that goes back and on with other tokens."""
    lm, ids = make(name), prompt_of(2, 48)
    asked, dense = BlockLM(lm, BLOCK, cache=policy(budget=100, **KEPT)), BlockLM(lm, BLOCK, cache=False)
    other = torch.cat([ids[:, :12], prompt_of(2, 40)[:, :20]], 1)
    for tokens in (ids[:, :24], ids[:, :28], ids, other, other[:, :4], ids):
        torch.testing.assert_close(logits(asked, tokens), logits(dense, tokens), atol=2e-4, rtol=1e-3)
    assert asked.report()["most_kept"] == 48
    with pytest.raises(NotEngagedError, match="up to 48 tokens in finished blocks; write longer ones"):
        asked.require_engaged()


@pytest.mark.parametrize("policy", [policy(budget=20, **KEPT) for policy in SCORED] + [SinkRecent(18, 2)])
def test_the_budget_is_met_and_the_text_is_another(policy):
    lm, ids = make(), prompt_of(1, 48)
    model, dense = BlockLM(lm, BLOCK, cache=policy), BlockLM(lm, BLOCK)
    generate(model, ids, BLOCK)
    report = model.report()
    assert report["most_kept"] == 20
    assert report["most_seen"] == 68
    assert report["pairs_computed"] < 0.4 * report["pairs_total"]
    assert report["approximate"] == ["finished blocks are kept in part"]
    assert report["policy"]["method"] == type(policy).__name__
    model.require_engaged()
    assert not torch.allclose(logits(model, ids), logits(dense, ids), atol=1e-2)


def written_out(lm, ids, *kept):
    """Logits of a block of masks behind the tokens, where the last blocks see the tokens at `kept` and themselves."""
    length = ids.shape[1] + BLOCK
    index = torch.arange(length)
    sees = index[None] // BLOCK <= index[:, None] // BLOCK
    for start, places in zip(range(length - BLOCK * len(kept), length, BLOCK), kept, strict=True):
        rows = slice(start, start + BLOCK)
        sees[rows] = torch.isin(index, torch.tensor(places)) | (index // BLOCK == start // BLOCK)
    mask = torch.zeros(1, 1, length, length).masked_fill(~sees, torch.finfo(torch.float32).min)
    whole = torch.cat([ids, torch.full((1, BLOCK), MASK)], 1)
    return lm(input_ids=whole, attention_mask=mask, position_ids=index[None]).logits[:, -BLOCK:]


def test_what_is_read_is_what_is_kept():
    lm, ids = make(), prompt_of(1, 48)
    model = BlockLM(lm, BLOCK, cache=SinkRecent(recent_frames=6, sink_frames=2))
    found, expected = logits(model, ids), written_out(lm, ids, [0, 1, *range(42, 48)])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_a_question_may_be_exchanged():
    """Tokens before it stay as they were kept, those of the first question are forgotten."""
    lm, ids = make(), prompt_of(1, 48)
    model = BlockLM(lm, BLOCK, cache=SinkRecent(recent_frames=14, sink_frames=2))
    logits(model, ids)
    other = torch.cat([ids[:, :40], prompt_of(1, 9)[:, :BLOCK]], 1)
    forwarded = model.report()["tokens_forwarded"]
    found = logits(model, other)
    assert model.report()["tokens_forwarded"] == forwarded + 2 * BLOCK
    left = [0, 1, *range(34, 40)]
    expected = written_out(lm, other, left, [*left, *range(40, 44)])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("policy", SCORED)
def test_each_head_keeps_what_it_kept_before_the_exchanged_question(policy):
    lm, ids = make(), prompt_of(1, 48)
    model = BlockLM(lm, BLOCK, cache=policy(budget=24, **KEPT))
    logits(model, ids)
    memories = model._progress.cache.run.all_memories()
    before = [memory.older[0].held.columns["token"].clone() for memory in memories]
    stood = [memory.older[0].held.there.clone() for memory in memories]
    model._progress.cache.crop(-24)
    for memory, token, there in zip(memories, before, stood, strict=True):
        held = memory.older[0].held
        for head in range(2):
            was, now = (
                columns[0, head][some[0, head]]
                for columns, some in ((token, there), (held.columns["token"], held.there))
            )
            assert now.tolist() == [place for place in was.tolist() if place < 24]
        assert memory.seen == 24
        assert int(memory.exact.past().entries.frames.max()) < 24
    assert torch.isfinite(logits(model, torch.cat([ids[:, :24], prompt_of(1, 8)], 1))).all()


def test_masks_of_the_block_at_work_decide_nothing():
    lm, ids = make(), prompt_of(1, 48)
    kept = []
    for other in (MASK, 7):
        model = BlockLM(lm, BLOCK, cache=SnapKV(budget=20, **KEPT))
        logits(model, ids)
        model(torch.cat([ids, torch.full((1, BLOCK), other)], 1))
        logits(model, torch.cat([ids, prompt_of(1, 7)[:, :BLOCK]], 1))
        kept.append([memory.older[0].held.columns["token"] for memory in model._progress.cache.run.all_memories()])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_the_last_finished_block_chooses():
    """Another last block, other tokens kept; the probes are its queries, folded over heads that share a key."""
    lm, ids = make(), prompt_of(1, 48)
    kept = []
    for last in (ids[:, 44:], prompt_of(1, 9)[:, :BLOCK]):
        model = BlockLM(lm, BLOCK, cache=SnapKV(budget=20, **KEPT))
        logits(model, torch.cat([ids[:, :44], last], 1))
        memory = model._progress.cache.run.all_memories()[1]
        assert memory.queries.shape == (1, 2 * BLOCK, 2, 8)
        kept.append(memory.older[0].held.columns["token"])
    assert not torch.equal(*kept)


@pytest.mark.parametrize("dropped", ["mean", "centroids", "bits4"])
def test_what_leaves_may_stay_in_another_form(dropped):
    lm, ids = make(), prompt_of(1, 48)
    dense = logits(BlockLM(lm, BLOCK), ids)
    gone, stays = (BlockLM(lm, BLOCK, cache=SnapKV(budget=20, dropped=form, **KEPT)) for form in (None, dropped))
    error = [(logits(model, ids) - dense).square().mean() for model in (gone, stays)]
    assert error[1] < error[0]
    other = torch.cat([ids[:, :8], prompt_of(1, 16)], 1)  # a mean cannot be taken back: all is forwarded again
    before = stays.report()["tokens_forwarded"]
    logits(stays, other)
    assert stays.report()["tokens_forwarded"] == before + 24 + BLOCK


def test_fewer_bits_for_what_is_not_salient():
    lm, ids = make(), prompt_of(1, 48)
    model = BlockLM(lm, BLOCK, cache=ZipCache(**KEPT, bits=8, other_bits=8))
    torch.testing.assert_close(logits(model, ids), logits(BlockLM(lm, BLOCK), ids), atol=0.1, rtol=0.05)
    model.require_engaged()


def test_reuse_between_steps_reads_what_is_kept():
    lm, ids = make(), prompt_of(1, 48)
    policy = SnapKV(budget=20, **KEPT)
    model = BlockLM(lm, BLOCK, cache=policy, reuse=TokenCount(tau=1))
    alone = BlockLM(lm, BLOCK, cache=policy)
    assert torch.equal(generate(model, ids, BLOCK), generate(alone, ids, BLOCK))
    reused = BlockLM(lm, BLOCK, cache=policy, reuse=TokenCount(tau=2))
    generate(reused, ids, BLOCK)
    assert reused.report()["external_reused"] > 0


@pytest.mark.parametrize("policy", [HostCache(), TCAStyle(), TriAttention()])
def test_caches_that_go_by_frames_are_refused(policy):
    with pytest.raises(UnsupportedError, match=f"got {type(policy).__name__}, which goes by frames or by a profile"):
        BlockLM(make(), BLOCK, cache=policy)


def test_a_budget_below_what_is_protected_is_refused():
    with pytest.raises(KnobError, match=r"sink_frames \+ recent_frames = 8 tokens and more, got budget=8"):
        BlockLM(make(), BLOCK, cache=SnapKV(budget=8, **KEPT))


def test_padding_is_refused():
    model, ids = BlockLM(make(), BLOCK, cache=SnapKV(budget=20, **KEPT)), prompt_of(2, 48)
    valid = torch.ones_like(ids)
    valid[0, :3] = 0
    with pytest.raises(UnsupportedError, match="finished blocks hold padding here"):
        model(ids, valid)


def test_graphs_are_refused():
    model = BlockLM(make(), BLOCK, cache=SnapKV(budget=20, **KEPT), graphs=True)
    with pytest.raises(UnsupportedError, match="SnapKV keeps another number of tokens after every block"):
        logits(model, prompt_of(1, 48))
