"""Steps of fixed shapes compute what the others do; on a GPU they are replayed as CUDA graphs."""

import pytest
import torch
from test_block_lm import generate, make, prompt_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from diffaccel import KnobError, UnsupportedError
from diffaccel.kernel import fa3
from diffaccel.pipelines import block_lm
from diffaccel.pipelines.block_lm import BlockLM, TokenCount

REUSE = [None, TokenCount(tau=2, dirty="drop"), TokenCount(tau=4), TokenCount(tau=3, dirty="recompute")]


@pytest.fixture
def fixed(monkeypatch):
    """On a CPU the steps of fixed shapes run as they are, without a graph."""
    monkeypatch.setattr(BlockLM, "_find_no_graphs", lambda self: None)


@pytest.mark.parametrize("reuse", REUSE)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("prompt", [5, 16, 37])
@pytest.mark.parametrize("batch", [1, 2])
def test_they_write_the_same_text_and_count_the_same(fixed, monkeypatch, name, reuse, prompt, batch):
    monkeypatch.setattr(block_lm, "_CHUNK", 8)  # a long prompt comes in parts
    lm, ids = make(name), prompt_of(batch, prompt)
    tokens = 24 - (prompt + 24) % 4  # the last block is whole: one with padding takes the other way
    model = BlockLM(lm, 4, reuse=reuse)
    text = generate(model, ids, 4, tokens=tokens, steps=4)
    found = model.report()
    monkeypatch.undo()
    other = BlockLM(lm, 4, reuse=reuse)
    assert torch.equal(text, generate(other, ids, 4, tokens=tokens, steps=4))
    usual = other.report()
    blocks = usual["passes"] // 4
    first = prompt < 4  # nothing lies before it
    assert found["graphs_replayed"] == 4 * (blocks - first) > 0
    assert usual["graphs_replayed"] == 0
    assert "CUDA" in usual["no_graphs"]
    assert found["no_graphs"] is None
    same = ("passes", "tokens_forwarded", "calls", "external_computed", "external_reused", "pairs_total")
    assert {name: found[name] for name in same} == {name: usual[name] for name in same}
    if reuse is None or reuse.dirty != "recompute":  # else all rows are computed, whichever are dirty
        assert found["pairs_computed"] == usual["pairs_computed"]
    else:
        assert usual["pairs_computed"] < found["pairs_computed"] == usual["pairs_total"]


@pytest.mark.parametrize("reuse", REUSE)
def test_logits_follow_edits_shorter_texts_and_a_cache_that_grows(fixed, monkeypatch, reuse):
    from diffaccel.pipelines import block_attention

    monkeypatch.setattr(block_attention, "_LEAST", 4)
    lm, ids = make("qwen3"), prompt_of(2, 48)
    model = BlockLM(lm, 4, reuse=reuse)
    model.check()
    steps = [(stop, edit) for stop in (12, 16, 20, 24, 48, 8, 12) for edit in (0, 0, 1, 2)]

    def run(model):
        out, text = [], ids.clone()
        for stop, edit in steps:
            text[:, stop - 4 : stop - 4 + edit] = (text[:, stop - 4 : stop - 4 + edit] + 1) % 60
            out.append(model(text[:, :stop]).logits)
        return out

    found = run(model)
    assert model.report()["graphs_replayed"] == len(steps)
    monkeypatch.undo()
    for got, expected in zip(found, run(BlockLM(lm, 4, reuse=reuse)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_text_with_padding_takes_the_other_way(fixed):
    lm, ids = make(), prompt_of(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    model = BlockLM(lm, 4)
    text = generate(model, ids, 4, tokens=19, attention_mask=mask)
    assert torch.equal(text, generate(BlockLM(lm, 4, cache=False), ids, 4, tokens=19, attention_mask=mask))
    assert model.report()["graphs_replayed"] == 0


def test_a_long_prompt_comes_in_parts(monkeypatch):
    lm, ids = make(), prompt_of(2, 45)
    whole = BlockLM(lm, 4)
    text = generate(whole, ids, 4, tokens=11)
    monkeypatch.setattr(block_lm, "_CHUNK", 8)
    longest = 0

    def watch(module, args, kwargs):
        nonlocal longest
        longest = max(longest, kwargs["input_ids"].shape[1])

    hook = lm.register_forward_pre_hook(watch, with_kwargs=True)
    model = BlockLM(lm, 4)
    assert torch.equal(generate(model, ids, 4, tokens=11), text)
    hook.remove()
    assert longest == 12
    assert model.report()["tokens_forwarded"] == whole.report()["tokens_forwarded"]


@pytest.mark.parametrize("graphs", ["on", 2, None])
def test_what_graphs_takes(graphs):
    with pytest.raises(KnobError, match="graphs is True, False or 'auto'"):
        BlockLM(make(), 4, graphs=graphs)


def test_graphs_that_cannot_be_are_refused_where_they_were_asked_for():
    with pytest.raises(UnsupportedError, match="graphs=True, and CUDA graphs are for CUDA, and the model is on cpu"):
        generate(BlockLM(make(), 4, graphs=True), prompt_of(1, 5), 4)
    with pytest.raises(UnsupportedError, match="cache=False"):
        generate(BlockLM(make(), 4, graphs=True, cache=False), prompt_of(1, 5), 4)
    model = BlockLM(make(), 4, graphs=False)
    generate(model, prompt_of(1, 5), 4)
    assert model.report()["no_graphs"] == "graphs=False"


# -- on a GPU ------------------------------------------------------------------------------------------------------


def wide(layers=3):
    """A model in bfloat16 whose heads FlashAttention-3 takes."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)


@pytest.fixture
def needs_fa3():
    why = fa3.unusable(torch.device("cuda"), torch.bfloat16, 64)
    if why:
        pytest.skip(f"fa3: {why}")


@pytest.mark.gpu
@pytest.mark.parametrize("reuse", REUSE)
@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_logits_are_those_of_launched_steps(needs_fa3, reuse, batch):
    lm, ids = wide(), prompt_of(batch, 1600).cuda()
    model, other = BlockLM(lm, 8, reuse=reuse, graphs=True), BlockLM(lm, 8, reuse=reuse, graphs=False)
    text = ids.clone()
    for stop in (40, 48, 48, 1592, 1600, 64, 72):
        for edit in (0, 0, 1, 2):
            text[:, stop - 8 : stop - 8 + edit] = (text[:, stop - 8 : stop - 8 + edit] + 1) % 60
            got, expected = model(text[:, :stop]).logits.float(), other(text[:, :stop]).logits.float()
            error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            assert error < 2e-2, (stop, edit)
    report = model.report()
    assert report["graphs_replayed"] == 28
    assert report["no_graphs"] is None
    assert report["graphs_captured"] < 12


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_is_launched_as_before_and_the_report_says_why(needs_fa3):
    lm = wide()

    class Waits(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            assert float(x.abs().max()) >= 0  # a value on the host
            return self.inner(x)

    lm.model.layers[1].mlp = Waits(lm.model.layers[1].mlp)
    model = BlockLM(lm, 8)
    ids = prompt_of(1, 64).cuda()
    expected = BlockLM(lm, 8, graphs=False)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    assert "cannot be captured" in model.report()["no_graphs"]
    with pytest.raises(UnsupportedError, match="cannot be captured"):
        BlockLM(lm, 8, graphs=True)(ids)


@pytest.mark.gpu
def test_weights_that_moved_are_not_replayed(needs_fa3):
    lm, ids = wide(), prompt_of(1, 64).cuda()
    model = BlockLM(lm, 8, graphs=True)
    model(ids[:, :56])
    other = wide()
    for parameter, fresh in zip(lm.parameters(), other.parameters(), strict=True):
        parameter.data = torch.roll(fresh.data, 1, 0)
    model.reset()
    got, expected = model(ids).logits.float(), BlockLM(lm, 8, graphs=False)(ids).logits.float()
    assert (got - expected).square().mean().sqrt() / expected.square().mean().sqrt() < 2e-2
