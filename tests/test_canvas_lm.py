"""FlashBlock over the decoder of DiffusionGemma: exact where it computes, counted, and refused where it cannot be."""

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
)

from diffaccel import FlashBlock, NotEngagedError, UnsupportedError
from diffaccel.pipelines.canvas_lm import CanvasLM

# diffusers' pipeline touches torch.compiler, whose import uses what torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

CANVAS, LAYERS, STEPS, PROMPT = 8, 2, 4, 20


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text = DiffusionGemmaTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        global_head_dim=16,
        sliding_window=16,  # shorter than the prompt
        layer_types=["sliding_attention", "full_attention"],
        num_experts=2,
        top_k_experts=1,
        moe_intermediate_size=16,
        initializer_range=0.3,
        **heads,
    )
    sight = Gemma4VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, **heads)
    return DiffusionGemmaForBlockDiffusion(
        DiffusionGemmaConfig(text_config=text, vision_config=sight, canvas_length=CANVAS)
    ).eval()


class Processor:
    """A prompt of 20 tokens whatever is said, the first `padding` of them padding."""

    tokenizer = None

    def __init__(self, padding):
        self.padding = padding

    def apply_chat_template(self, *_, **__):
        mask = torch.ones(1, PROMPT, dtype=torch.long)
        mask[:, : self.padding] = 0
        return {"input_ids": torch.arange(5, 5 + PROMPT)[None], "attention_mask": mask}


def generate(model, canvases=2, padding=0, **arguments):
    scheduler = BlockRefinementScheduler(block_length=CANVAS, num_inference_steps=STEPS)
    pipe = DiffusionGemmaPipeline(model=model, scheduler=scheduler, processor=Processor(padding))
    pipe.set_progress_bar_config(disable=True)
    arguments = {"gen_length": canvases * CANVAS, "num_inference_steps": STEPS, "output_type": "seq", **arguments}
    return pipe("", generator=torch.Generator().manual_seed(0), eos_token_id=63, **arguments).sequences


@pytest.mark.parametrize("padding", [0, 9])
def test_computing_at_every_step_is_the_model_itself(lm, padding):
    with CanvasLM(lm, FlashBlock(refresh=1)) as model:
        text = generate(model, padding=padding)
    assert torch.equal(text, generate(lm, padding=padding))
    assert model.report()["external_share"] == 1
    assert model.report()["approximate"] == []


@pytest.mark.parametrize("padding", [0, 9])
def test_a_step_that_computes_has_the_logits_of_the_model(lm, padding, monkeypatch):
    """Apart and merged, GQA, two head sizes, a sliding layer and a full one."""
    seen, inner = [], lm.forward

    def forward(**given):
        seen.append((given, inner(**given)))
        return seen[-1][1]

    monkeypatch.setattr(lm, "forward", forward)
    with CanvasLM(lm, FlashBlock(refresh=(0,), min_past=0)) as model:
        generate(model, canvases=1, padding=padding)
    monkeypatch.undo()
    given, merged = seen[0]
    torch.testing.assert_close(merged.logits, lm(**given).logits, atol=1e-4, rtol=1e-4)
    given, reused = seen[-1]
    assert (reused.logits - lm(**given).logits).abs().max() > 1e-3


def test_reuse_is_counted_exactly(lm):
    before = lm.config._attn_implementation, lm.config.text_config._attn_implementation
    with CanvasLM(lm, FlashBlock(refresh=2)) as model:
        generate(model, canvases=3)
    report = model.report()
    assert report["passes"] == 3 * STEPS
    assert report["external_computed"] == report["external_reused"] == 3 * LAYERS * STEPS // 2
    assert report["external_share"] == 0.5
    kept = [min(PROMPT + n * CANVAS, 15) + PROMPT + n * CANVAS for n in range(3)]  # of the sliding layer and the full
    assert report["pairs_total"] == STEPS * CANVAS * sum(kept)
    assert report["approximate"] == ["attention to the context is reused"]
    assert (lm.config._attn_implementation, lm.config.text_config._attn_implementation) == before


def test_the_same_text_again_reuses_nothing_of_the_last(lm):
    model = CanvasLM(lm, FlashBlock(refresh=(0,)))
    assert torch.equal(generate(model, canvases=1), generate(model, canvases=1))
    assert torch.equal(generate(model), generate(model))
    assert model.report()["external_computed"] == (1 + 1 + 2 + 2) * LAYERS


def test_what_cannot_be_reused_is_refused(lm):
    with pytest.raises(UnsupportedError, match=r"has refresh and min_past, got extrapolate=0\.5"):
        CanvasLM(lm, FlashBlock(extrapolate=0.5))
    with pytest.raises(UnsupportedError, match="static cache"):
        generate(CanvasLM(lm, FlashBlock()), cache_implementation="static")
    with (
        pytest.raises(NotEngagedError, match=r"min_past=9 times its length"),
        CanvasLM(lm, FlashBlock(min_past=9)) as m,
    ):
        generate(m)
    with pytest.raises(NotEngagedError, match="nothing was generated"), CanvasLM(lm, FlashBlock()):
        pass
