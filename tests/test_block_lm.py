"""Block-diffusion language models: the cache changes nothing but the work, reuse is counted, others are refused."""

import itertools
import json

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from diffaccel import KnobError, NotEngagedError, UnsupportedError
from diffaccel.cli import app
from diffaccel.kernel import KERNELS, Partial, merge
from diffaccel.pipelines import block_attention
from diffaccel.pipelines.block_attention import NAME, BlockCache, Counters, Pass, grouped, masked
from diffaccel.pipelines.block_lm import BlockLM, TokenCount
from diffaccel.text import WORTH, Comparison, Text, build_reuse

MASK = 63
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # wide enough that attention matters to what comes out
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


def make(name="llama"):
    torch.manual_seed(1)
    return MODELS[name]().eval()


def prompt_of(batch, length):
    return torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(length))


def generate(model, ids, block, tokens=24, steps=8, threshold=1.1, **arguments):
    """Through diffusers' pipeline; a threshold above 1 unmasks evenly, block / steps tokens a step."""
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(block_length=block))
    pipe.set_progress_bar_config(disable=True)
    usual = {"editing_threshold": None, "eos_early_stop": False, "mask_token_id": MASK, "output_type": "seq"}
    arguments = {**usual, "num_inference_steps": steps, "threshold": threshold, "gen_length": tokens, **arguments}
    return pipe(input_ids=ids, block_length=block, **arguments).sequences


# -- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block", [1, 4, 8, 16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prompt", [5, 16])  # ends inside a block, and at a border of one
def test_the_pipeline_writes_the_same_text_with_the_cache(name, block, batch, prompt):
    lm, ids = make(name), prompt_of(batch, prompt)
    dense, cached = BlockLM(lm, block, cache=False), BlockLM(lm, block)
    assert torch.equal(generate(cached, ids, block, threshold=0.4), generate(dense, ids, block, threshold=0.4))
    assert cached.report()["tokens_forwarded"] < dense.report()["tokens_forwarded"]
    assert cached.report()["tokens_uncached"] == dense.report()["tokens_forwarded"]
    assert cached.report()["approximate"] == []


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_of_a_batch_read_no_padding(block, left):
    """Left padding fills whole blocks of the first row; the tail behind the text is padding too."""
    lm, ids = make(), prompt_of(2, 13)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 9) if left else slice(9, None)] = 0
    texts = [
        generate(BlockLM(lm, block, **arm), ids, block, tokens=22, attention_mask=mask)
        for arm in ({"cache": False}, {}, {"reuse": TokenCount(tau=1)})
    ]
    assert torch.equal(texts[1], texts[0])
    assert torch.equal(texts[2], texts[0])
    other = ids.clone()
    other[0, mask[0] == 0] = 7
    assert torch.equal(generate(BlockLM(lm, block), other, block, tokens=22, attention_mask=mask), texts[0])


def test_edits_and_early_ends_are_the_same_with_the_cache():
    """Tokens of the block at work are edited until they settle; rows that ended stay as they are, masks included."""
    lm, ids = make(), prompt_of(2, 13)
    end = int(generate(BlockLM(lm, 4, cache=False), ids, 4)[0, 5])
    edits = {"editing_threshold": 0.2, "threshold": 0.3, "eos_early_stop": True, "eos_token_id": end}
    dense = generate(BlockLM(lm, 4, cache=False), ids, 4, **edits)
    assert torch.equal(generate(BlockLM(lm, 4), ids, 4, **edits), dense)


def test_logits_equal_those_of_the_whole_text_step_by_step():
    lm, ids = make("qwen3"), prompt_of(2, 20)
    dense, cached = BlockLM(lm, 4, cache=False), BlockLM(lm, 4)
    for stop in (12, 12, 16, 20, 8):  # a second step, new blocks, and back to an earlier one
        torch.testing.assert_close(cached(ids[:, :stop]).logits, dense(ids[:, :stop]).logits, atol=1e-4, rtol=1e-4)


def test_tokens_are_forwarded_once_and_then_a_block_at_a_time():
    ids, block, steps = prompt_of(1, 13), 4, 4
    model = BlockLM(make(), block)
    generate(model, ids, block, tokens=19, steps=steps)
    report = model.report()
    blocks = 5  # the first of them begins with the prompt's last token; the pipeline takes all 4 steps there as well
    assert report["passes"] == blocks * steps
    # the block at work at every step, and every block but the last once it is finished
    assert report["tokens_forwarded"] == blocks * steps * block + 12 + (blocks - 1) * block
    assert report["tokens_uncached"] == sum(steps * (16 + block * n) for n in range(blocks))


def test_what_changes_in_a_finished_block_is_forwarded_again():
    lm, ids = make(), prompt_of(1, 24)
    model, dense = BlockLM(lm, 4), BlockLM(lm, 4, cache=False)
    model(ids)
    before = model.report()["tokens_forwarded"]
    other = ids.clone()
    other[:, 9] = 5
    torch.testing.assert_close(model(other).logits, dense(other).logits, atol=1e-4, rtol=1e-4)
    assert model.report()["tokens_forwarded"] - before == 24 - 8  # the first two blocks are as they were


def test_an_interrupted_forward_leaves_no_half_written_cache(monkeypatch):
    lm, ids = make(), prompt_of(1, 16)
    model, calls = BlockLM(lm, 4), itertools.count()
    model(ids[:, :8])
    update = BlockCache.update

    def stop(self, *args, **kwargs):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    monkeypatch.setattr(BlockCache, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, :12])
    expected = BlockLM(lm, 4, cache=False)(ids[:, :12]).logits
    torch.testing.assert_close(model(ids[:, :12]).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_cache_copies_nothing_of_the_past_at_a_step():
    cache, step = BlockCache(), torch.zeros(1, 2, 4, 8)
    cache.update(torch.ones(1, 2, 30, 8), torch.ones(1, 2, 30, 8), 0)
    cache.update(step, step, 0)
    cache.crop(-4)
    first, _ = cache.update(step, step, 0)
    cache.crop(-4)
    again, _ = cache.update(step, step, 0)
    assert first.data_ptr() == again.data_ptr()
    assert again.shape[2] == cache.get_seq_length() == 34
    assert again[:, :, :30].eq(1).all()
    assert again[:, :, 30:].eq(0).all()


def test_the_model_is_left_as_it_was():
    lm = make()
    ids = prompt_of(1, 12)
    before = lm.config._attn_implementation, lm(ids).logits
    BlockLM(lm, 4)(ids)
    assert lm.config._attn_implementation == before[0] != NAME
    assert torch.equal(lm(ids).logits, before[1])


# -- is the model block-causal -------------------------------------------------------------------------------------


class Masking(nn.Module):
    """A Llama with a mind of its own about masks."""

    def __init__(self, mask):
        super().__init__()
        self.inner, self.mask = make(), mask
        self.config = self.inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, **given):
        return self.inner(input_ids, attention_mask=self.mask(attention_mask), **given)


def test_a_model_without_the_attention_interface_takes_the_cache_but_no_reuse():
    lm, ids = Masking(lambda mask: mask), prompt_of(2, 9)
    cached = BlockLM(lm, 4)
    assert torch.equal(generate(cached, ids, 4), generate(BlockLM(lm, 4, cache=False), ids, 4))
    assert not cached.report()["interface"]
    with pytest.raises(UnsupportedError, match="reuse needs a model that attends through transformers' attention"):
        generate(BlockLM(lm, 4, reuse=TokenCount()), ids, 4)


REFUSED = {
    "bidirectional": (torch.zeros_like, "other tokens in a later block change the logits of earlier ones"),
    "token-causal": (lambda mask: None, "a token does not see the later ones of its own block"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_is_not_block_causal_is_refused_by_running_it(kind):
    mask, sentence = REFUSED[kind]
    lm, ids = Masking(mask), prompt_of(1, 8)
    with pytest.raises(UnsupportedError, match=sentence):
        generate(BlockLM(lm, 4), ids, 4)
    generate(BlockLM(lm, 4, cache=False), ids, 4)
    model = BlockLM(lm, 4, approximate=True)
    generate(model, ids, 4)
    assert any(sentence in doubt for doubt in model.report()["approximate"])


def test_a_model_whose_cached_logits_differ_is_refused(monkeypatch):
    half = block_attention.grouped
    monkeypatch.setattr(block_attention, "grouped", lambda chosen, q, k, v, scale: half(chosen, q, k, v, scale / 2))
    with pytest.raises(UnsupportedError, match="logits with the cache differ from those without"):
        BlockLM(make(), 4)(prompt_of(1, 8))


def test_sliding_windows_are_refused_and_so_is_a_text_of_other_blocks():
    with pytest.raises(UnsupportedError, match="sliding window of 4 tokens"):
        BlockLM(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)), 4)
    config = Qwen3Config(**SIZES, head_dim=16, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(UnsupportedError, match="layer types full_attention, sliding_attention"):
        BlockLM(Qwen3ForCausalLM(config), 4)
    with pytest.raises(UnsupportedError, match="whole blocks of block_length=4 tokens, got 10"):
        BlockLM(make(), 4)(prompt_of(1, 10))
    with pytest.raises(KnobError, match="block_length is a number of tokens >= 1, got 0"):
        BlockLM(make(), 0)
    with pytest.raises(KnobError, match="reuse needs the cache"):
        BlockLM(make(), 4, reuse=TokenCount(), cache=False)


# -- splitting attention -------------------------------------------------------------------------------------------


def parts(scale=0.3):
    q, k, v = torch.randn(2, 8, 4, 16), torch.randn(2, 24, 2, 16), torch.randn(2, 24, 2, 16)
    sdpa = KERNELS["sdpa"]
    cut = [grouped(sdpa, q, k[:, keys], v[:, keys], scale) for keys in (slice(0, 16), slice(16, None))]
    wide = [x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v)]
    whole = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *wide, scale=scale).transpose(1, 2)
    return q, k, v, cut, whole


def test_outside_and_inside_merge_to_attention_of_grouped_heads():
    _, _, _, cut, whole = parts()
    torch.testing.assert_close(merge(cut).out, whole, atol=1e-6, rtol=1e-5)


def test_a_log_sum_exp_in_base_2_does_not_merge():
    _, _, _, cut, whole = parts()
    wrong = merge([Partial(part.out, part.lse / torch.log(torch.tensor(2.0))) for part in cut])
    assert (wrong.out - whole).abs().max() > 1e-2


def test_masked_attention_is_the_kernel_where_all_is_allowed_and_nothing_where_nothing_is():
    q, k, v, _, whole = parts()
    allowed = torch.ones(2, 8, 24, dtype=torch.bool)
    torch.testing.assert_close(masked(q, k, v, 0.3, allowed).out, whole, atol=1e-6, rtol=1e-5)
    allowed[0, 3] = False
    out, lse = masked(q, k, v, 0.3, allowed)
    assert out[0, 3].eq(0).all()
    assert lse[0, 3].eq(-torch.inf).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("asks", [{"sliding_window": 4}, {"softcap": 30.0}])
def test_attention_that_is_no_plain_softmax_is_refused(asks):
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(UnsupportedError, match=next(iter(asks))):
        block_attention.block_attention(nn.Identity(), x, x, x, None, **asks)
    with pytest.raises(UnsupportedError, match="equally wide, and Identity has 8 and 4"):
        block_attention.block_attention(nn.Identity(), x, x, x[..., :4], None)


# -- reuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "answers"),
    [
        (TokenCount(tau=1), ["together"] * 5),
        (TokenCount(tau=2), ["store", "reuse", "reuse", "store", "store"]),
        (TokenCount(tau=3, dirty="drop"), ["store", "reuse", "reuse", "reuse", "store"]),
    ],
)
def test_it_refreshes_at_the_first_step_and_from_tau_changed_tokens_on(policy, answers):
    assert [policy.answer(changed) for changed in (None, 0, 1, 2, 3)] == answers


@pytest.mark.parametrize("tau", [0, -1, 1.5, True, "2"])
def test_less_than_a_token_is_refused(tau):
    with pytest.raises(KnobError, match=r"TokenCount: tau is a number of tokens >= 1, got tau="):
        TokenCount(tau=tau)
    with pytest.raises(KnobError, match=r"unknown TokenCount\.dirty 'hold': choose one of keep, drop, recompute"):
        TokenCount(dirty="hold")


def test_tau_of_one_is_dense():
    lm, ids = make(), prompt_of(2, 9)
    with BlockLM(lm, 8, reuse=TokenCount(tau=1)) as model:
        text = generate(model, ids, 8)
    assert torch.equal(text, generate(BlockLM(lm, 8, cache=False), ids, 8))
    assert model.report()["external_reused"] == 0
    assert model.report()["external_share"] == 1
    assert model.report()["approximate"] == []


@pytest.mark.parametrize("dirty", ["keep", "drop", "recompute"])
@pytest.mark.parametrize("batch", [1, 2])
def test_reuse_is_counted_exactly(dirty, batch):
    """8 tokens in 8 steps, tau=3: computed with 0, 3 and 6 tokens done, reused with 1 and 2 changed since."""
    layers, block, steps = 2, 8, 8
    with BlockLM(make(), block, reuse=TokenCount(tau=3, dirty=dirty)) as model:
        generate(model, prompt_of(batch, 16), block, tokens=16, steps=steps)
    report = model.report()
    assert report["external_computed"] == 2 * layers * 3
    assert report["external_reused"] == 2 * layers * 5
    assert report["fewest_changed"] == 1
    past = 16 + 24
    assert report["pairs_total"] == batch * layers * block * steps * past
    if dirty != "recompute":
        assert report["pairs_computed"] == batch * layers * block * 3 * past
        assert report["external_share"] == 3 / 8
    elif batch == 1:  # 1, 2, 1, 2, 1 rows at the steps that reuse; in a batch, rows dirty in any of it
        assert report["pairs_computed"] == layers * (block * 3 + 7) * past


@pytest.mark.parametrize("dirty", ["keep", "drop", "recompute"])
def test_the_first_layer_of_a_reused_step(dirty):
    """Queries of the first layer are the tokens themselves: those that did not change are exact there, those that did
    are exact if recomputed, and see their block alone if dropped."""
    torch.manual_seed(1)
    lm = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    ids = prompt_of(2, 24)
    model, dense = BlockLM(lm, 8, reuse=TokenCount(tau=4, dirty=dirty)), BlockLM(lm, 8, cache=False)
    model(ids)
    ids[0, 17], ids[1, 20] = 3, 2
    reused, expected = model(ids).logits, dense(ids).logits
    assert model.report()["external_reused"] == 1
    changed = torch.zeros(2, 8, dtype=torch.bool)
    changed[0, 1] = changed[1, 4] = True
    torch.testing.assert_close(reused[~changed], expected[~changed], atol=1e-4, rtol=1e-4)
    if dirty == "recompute":
        torch.testing.assert_close(reused[changed], expected[changed], atol=1e-4, rtol=1e-4)
        return
    if dirty == "keep":  # what merges with the new token's own block is what was computed for the old one
        stored = model._progress.outside.stored[0]
        fresh = BlockLM(lm, 8, reuse=TokenCount(tau=4))
        fresh(prompt_of(2, 24))
        for kept, expected in zip(stored, fresh._progress.outside.stored[0], strict=True):
            assert torch.equal(kept, expected)
        return
    alone = BlockLM(lm, 8)
    alone.check()
    positions = torch.arange(16, 24).expand(2, -1)
    inside = alone(ids[:, 16:], position_ids=positions).logits
    torch.testing.assert_close(reused[changed], inside[changed], atol=1e-4, rtol=1e-4)


def test_a_step_that_reuses_merges_what_is_stored_with_its_own_block():
    q, k, v = (torch.randn(1, 12, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    stored = Partial(torch.randn(1, 4, 2, 16), torch.randn(1, 4, 2))
    now = Pass(0, None, None, None, "sdpa", Counters(), answer="reuse", stored={0: stored})
    found = now.attend(0, q[:, 8:], k, v, 0.25)
    inside = KERNELS["reference"].partial(q[:, 8:], k[:, 8:], v[:, 8:], scale=0.25)
    torch.testing.assert_close(found, merge([stored, inside]).out, atol=1e-5, rtol=1e-5)
    assert now.counters.pairs_computed == 0


def test_what_was_stored_is_forgotten_with_the_block_the_prefix_and_the_text():
    ids = prompt_of(1, 24)
    model = BlockLM(make(), 8, reuse=TokenCount(tau=3))

    def reused(window):
        before = model.report()["external_reused"]
        model(window)
        return model.report()["external_reused"] > before

    one = ids.clone()
    one[:, 17] = 3
    assert [reused(ids), reused(one)] == [False, True]
    edited = one.clone()
    edited[:, 2] = 3
    assert not reused(edited)  # another past
    assert reused(edited)
    assert [reused(one[:, :16]), reused(one)] == [False, False]  # another block, and back
    changed = one.clone()
    changed[:, 19] = 3
    assert [reused(changed), reused(one)] == [True, False]  # a token as it was before: another generation


def test_what_was_asked_for_and_never_reused_is_an_error_that_says_why():
    def run(tau, **arguments):
        with BlockLM(make(), 4, reuse=TokenCount(tau=tau)) as model:
            generate(model, prompt_of(1, 8), 4, **arguments)

    with pytest.raises(NotEngagedError, match=r"at least tau=2 tokens, the fewest were 2: raise tau"):
        run(2, steps=2)
    with pytest.raises(NotEngagedError, match="no block with finished ones before it took a second step"):
        run(2, steps=1)
    with pytest.raises(NotEngagedError, match="nothing was generated"), BlockLM(make(), 4, reuse=TokenCount()):
        pass
    with pytest.raises(ZeroDivisionError), BlockLM(make(), 4, reuse=TokenCount()):
        _ = 1 / 0  # what went wrong first is what is said


def test_half_precision_passes_the_check():
    lm, ids = make().to(torch.bfloat16), prompt_of(1, 16)
    model = BlockLM(lm, 8, reuse=TokenCount(tau=2))
    assert model(ids).logits.shape == (1, 8, 64)
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_model_that_moved_there_keeps_its_logits(dtype):
    lm, ids = make(), prompt_of(2, 24)
    model = BlockLM(lm, 8, reuse=TokenCount(tau=3))
    model(ids[:, :16])
    model.to("cuda", dtype)
    ids = ids.cuda()
    expected = BlockLM(lm, 8, cache=False)(ids).logits
    rounding = 1e-3 if dtype == torch.float32 else 0.1
    assert (model(ids).logits - expected).norm() < rounding * expected.norm()
    assert (model(ids).logits - expected).norm() < rounding * expected.norm()
    assert model.report()["external_reused"] == 2


def test_another_dtype_starts_another_cache():
    lm, ids = make(), prompt_of(1, 16)
    model = BlockLM(lm, 4)
    model(ids[:, :12])
    model.to(torch.float64)
    torch.testing.assert_close(model(ids).logits, BlockLM(lm, 4, cache=False)(ids).logits, atol=1e-9, rtol=1e-9)


# -- on the command line -------------------------------------------------------------------------------------------

WORDS = ("<pad>", "<bos>", "<eos>", "<mask>", *(f"w{number}" for number in range(60)))
PROMPT = "w1 w2 w3 w4 w5 w6 w7 w8 w9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a folder, whose blocks are 8 tokens of which a step unmasks one."""
    place = tmp_path_factory.mktemp("lm")
    save(place, make())
    (place / "generation.json").write_text(json.dumps({"block_length": 8, "threshold": 1.1, "max_tokens": 22}))
    return place


def save(place, lm, **special):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "mask_token": "<mask>", **special}
    lm.save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(place)


def command(*arguments):
    return CliRunner().invoke(app, ["text", *map(str, arguments)], catch_exceptions=False)


def test_the_command_writes_and_counts(folder, tmp_path):
    result = command(PROMPT, "--model", folder, "--report", tmp_path / "r.json")
    assert result.exit_code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert result.stdout.splitlines()[0] == report["text"]
    assert "22 tokens in" in result.stdout
    assert f"{report['report']['tokens_forwarded']} tokens forwarded" in result.stdout
    # 9 + 22 tokens are 4 blocks, 3 of them at work
    assert report["report"]["tokens_forwarded"] == 3 * 8 * 8 + 8 + 2 * 8
    assert report["report"]["approximate"] == []
    assert report["settings"]["num_inference_steps"] == 8
    assert report["comparison"] is None
    again = command(PROMPT, "--model", folder, "--set", "reuse.tau=1", "--set", "kernel=reference")
    assert again.stdout.splitlines()[0] == report["text"]


def test_the_command_compares(folder, tmp_path):
    result = command(PROMPT, "--model", folder, "--preset", "fast", "--compare", "--report", tmp_path / "r.json")
    assert result.exit_code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    arms = report["comparison"]["arms"]
    assert list(arms) == ["dense", "cached", "asked"]
    assert arms["dense"]["tokens"] == arms["cached"]["tokens"]
    assert arms["asked"]["tokens"] == report["tokens"]
    equal = [a == b for a, b in zip(arms["dense"]["tokens"], report["tokens"], strict=True)]
    assert report["comparison"]["equal_tokens"] == sum(equal) / 22
    assert f"tokens equal to dense: {sum(equal) / 22:.1%}" in result.stdout
    assert arms["asked"]["report"]["external_reused"] > 0
    exact = command(PROMPT, "--model", folder, "--compare")
    assert "tokens equal to dense: 100.0%" in exact.stdout.splitlines()[-1]
    assert "first difference" not in exact.stdout
    assert "cached:" not in exact.stdout


def test_agreement_counts_places_and_finds_the_first_difference():
    def of(tokens):
        return Text("", tokens, 1.0, {})

    assert Comparison({"dense": of([1, 2, 3]), "asked": of([1, 2, 3])}).agreement() == (1.0, None)
    assert Comparison({"dense": of([1, 2, 3, 4]), "asked": of([1, 9, 3])}).agreement() == (0.5, 1)


def test_the_text_ends_at_its_end_token_and_what_the_model_does_not_know_is_said(folder, tmp_path):
    dense = command(PROMPT, "--model", folder).stdout.splitlines()[0].split()
    save(tmp_path, make(), eos_token=dense[4])
    result = command(PROMPT + " unheard", "--model", tmp_path, "--block", "8", "--max-tokens", "2048")
    assert "1 of the prompt's 10 tokens are not in the model's vocabulary" in result.stderr
    assert "10 tokens of the prompt and 2048 to write are more than the 2048" in result.stderr
    short = command(PROMPT, "--model", tmp_path, "--block", "8", "--threshold", "1.1", "--max-tokens", "22")
    assert len(short.stdout.splitlines()[0].split()) == 4
    assert "5 tokens in" in short.stdout


def test_what_did_not_engage_keeps_the_text_and_exits_with_1(folder, tmp_path):
    arguments = ("--steps", "2", "--preset", "fast", "--report", tmp_path / "r.json")
    result = command(PROMPT, "--model", folder, *arguments)
    assert result.exit_code == 1
    assert "never reused anything: every step changed at least tau=2 tokens" in result.stderr
    assert result.stdout.splitlines()[0]
    assert "never reused" in json.loads((tmp_path / "r.json").read_text())["idle"]


MISTAKES = {
    "no folder": (["--model", "nowhere"], "there is no folder 'nowhere'"),
    "preset": (["--preset", "fats"], "unknown preset 'fats': choose one of exact, auto, fast; did you mean 'fast'?"),
    "tau": (["--set", "reuse.tau=0"], "TokenCount: tau is a number of tokens >= 1, got tau=0"),
    "knob": (["--set", "reuse.taus=2"], "unknown knob of TokenCount (slot reuse) 'taus'"),
    "slot": (["--set", "cache.threshold=0.9"], "unknown slot of a language model 'cache'"),
    "change": (["--set", "reuse"], "--set takes reuse=TokenCount, reuse.knob=value or kernel=name here, got 'reuse'"),
    "no knob": (["--set", "reuse.=2"], "--set takes reuse=TokenCount, reuse.knob=value"),
    "method": (["--set", "reuse=FlashBlock"], "unknown method for the slot reuse 'FlashBlock'"),
    "kernel": (["--set", "kernel=fast"], "unknown kernel 'fast'"),
    "steps": (["--steps", "0"], "num_inference_steps is at least 1, got 0"),
    "tokens": (["--max-tokens", "0"], "max_tokens is at least 1, got 0"),
    "block": (["--block", "0"], "block_length is at least 1, got 0"),
    "threshold": (["--threshold", "-1"], "threshold is 0 or more, got -1"),
    "dtype": (["--dtype", "float8"], "unknown dtype 'float8'"),
    "report": (["--report", "no/where/r.json"], "does not exist; create it first"),
}


def test_auto_reuses_where_it_is_sure_to_pay(folder, tmp_path):
    assert build_reuse("auto", tokens=WORTH) == (TokenCount(tau=2), "auto")
    assert build_reuse("auto", tokens=WORTH - 1) == (None, "auto")
    assert build_reuse("auto", ["reuse.tau=3"], tokens=9) == (TokenCount(tau=3), "auto")
    result = command(PROMPT, "--model", folder, "--preset", "auto", "--report", tmp_path / "r.json")
    assert result.exit_code == 0
    assert "too short for reuse" in result.output
    assert json.loads((tmp_path / "r.json").read_text())["report"]["reuse"] is None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(folder, mistake):
    arguments, sentence = MISTAKES[mistake]
    chosen = [] if "--model" in arguments else ["--model", folder]
    result = command(PROMPT, *chosen, *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_folder_that_is_no_block_diffusion_model_is_refused(folder, tmp_path):
    def fails(sentence, *arguments):
        result = command(PROMPT, "--model", tmp_path, *arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert sentence in result.stderr

    fails("cannot be opened as a language model")
    save(tmp_path, make())
    fails("does not say how long its blocks are; pass --block")
    (tmp_path / "generation.json").write_text('{"block_length": "8"}')
    fails("must hold a number as 'block_length', got '8'")
    (tmp_path / "generation.json").write_text("{")
    fails("cannot be read as JSON")
    (tmp_path / "generation.json").unlink()
    save(tmp_path, make(), mask_token=None)
    fails("has no mask token", "--block", "8")
    assert command(" ", "--model", folder).exit_code == 2
