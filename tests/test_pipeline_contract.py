"""What users of diffusers count on in any pipeline holds while it is accelerated, at settings that are dense attention.

Whole tiny pipelines, text encoder and VAE included; what holds for models alone is in `test_families.py`.
"""

import filecmp
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    BlockRefinementScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    LLaDA2Pipeline,
    LTXPipeline,
    WanPipeline,
)
from families import GRID, WORDS, cogvideox
from test_block_lm import MASK, make, prompt_of
from test_ltx_video import SIZE as LTX_SIZE
from test_ltx_video import pipeline as ltx_pipeline
from tiny import CHANNELS, tiny_components, tiny_hunyuan_pipeline, tiny_pipeline, tiny_text_encoder, tiny_tokenizer

from diffaccel import Accel, AnnSA, FlashBlock, InwardWindow, TempCache
from diffaccel.pipelines.block_lm import BlockLM, TokenCount

PROMPTS = ["a red circle moves left", "the blue square moves up"]
STEPS = 2
AT_ONCE = [Accel(), Accel(window=InwardWindow(size=None)), Accel(selection=AnnSA(density=1))]
BY_BLOCK = [Accel(), Accel(TempCache(threshold=None), AnnSA(density=1), reuse=FlashBlock(refresh=1))]


def wan():
    return WanPipeline(**tiny_components())


def ltx():
    parts = ltx_pipeline().components | {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    return LTXPipeline(**parts)


def cog():
    torch.manual_seed(2)
    small = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    vae = AutoencoderKLCogVideoX(latent_channels=CHANNELS, **small).eval()
    parts = tiny_tokenizer(), tiny_text_encoder(), vae, cogvideox(), CogVideoXDDIMScheduler()
    return CogVideoXPipeline(*parts)


@dataclass(frozen=True)
class Kind:
    name: str
    build: Callable[[], Any]
    call: dict[str, Any]
    accels: list[Accel] = field(default_factory=lambda: AT_ONCE)
    scale: str = "guidance_scale"  # which argument is guidance between two branches
    turned: str | None = "_guidance_scale"  # what of it a callback may set; None where guidance is read once
    several: bool = True  # whether it makes several videos of a prompt

    def pipe(self):
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def __call__(self, pipe, prompt=PROMPTS[0], **more):
        given = {"num_inference_steps": STEPS, "output_type": "latent", self.scale: 3.0} | self.call | more
        rows = len(prompt) if isinstance(prompt, list) else 1
        given.setdefault("generator", [torch.Generator().manual_seed(row) for row in range(rows)])
        if prompt is not None:
            given |= {"prompt": prompt, "negative_prompt": "blue" if isinstance(prompt, str) else ["blue"] * rows}
        found = pipe(**given)
        return found.frames if given.get("return_dict", True) else found


SMALL = {"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": WORDS}
WHOLE = {"prompt_template": {"template": "{}", "crop_start": 0}}  # no words around the prompt
COG = {"height": 16 * GRID.height, "width": 16 * GRID.width}
KINDS = [
    Kind("Wan", wan, SMALL, turned=None),
    Kind("Wan, causal", tiny_pipeline, SMALL | {"num_frames": 33}, BY_BLOCK),
    Kind("HunyuanVideo", tiny_hunyuan_pipeline, SMALL | WHOLE, scale="true_cfg_scale", turned=None),
    Kind("LTX-Video", ltx, SMALL | LTX_SIZE),
    Kind("CogVideoX", cog, SMALL | COG, several=False),
]
ARMS = {
    f"{kind.name}: {'+'.join(type(policy).__name__ for policy in accel.policies().values())}": (kind, accel)
    for kind in KINDS
    for accel in kind.accels
}


@pytest.fixture(params=ARMS.values(), ids=ARMS, scope="module")
def arm(request):
    """A kind of pipeline, one of it, and a setting."""
    kind, accel = request.param
    return kind, kind.pipe(), accel


def close(found, expected, most=5e-5):
    torch.testing.assert_close(found, expected, atol=most, rtol=0)


def test_rows_of_a_batch_are_what_they_are_alone(arm):
    generate, pipe, accel = arm
    seeds = [torch.Generator().manual_seed(row) for row in range(2)]
    with accel(pipe):
        both = generate(pipe, PROMPTS)
        alone = [generate(pipe, [text], generator=[seed]) for text, seed in zip(PROMPTS, seeds, strict=True)]
    close(both, torch.cat(alone), 2e-4)
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_several_videos_of_a_prompt_are_rows_of_it(arm):
    generate, pipe, accel = arm
    if not generate.several:
        pytest.skip(f"{type(pipe).__name__} makes one video of a prompt, whatever is asked")
    seeds = [torch.Generator().manual_seed(row) for row in range(2)]
    with accel(pipe):
        rows = generate(pipe, PROMPTS[0], num_videos_per_prompt=2, generator=seeds)
        close(rows, generate(pipe, [PROMPTS[0]] * 2))
    assert len(rows) == 2


def test_a_tuple_holds_what_the_output_holds(arm):
    generate, pipe, accel = arm
    with accel(pipe):
        assert torch.equal(generate(pipe, return_dict=False)[0], generate(pipe))
        frames = generate(pipe, output_type="pt")
    assert frames.shape[:1] == (1,)
    assert frames.shape[2:] == (3, generate.call["height"], generate.call["width"])
    assert torch.isfinite(frames).all()


def test_callbacks_are_given_and_give_back_tensors(arm):
    generate, pipe, accel = arm
    names, met = pipe._callback_tensor_inputs, []

    def look(pipe, step, timestep, tensors):
        met.append((step, set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if (step + 1) % STEPS == 0 else {}

    with accel(pipe):
        latents = generate(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=list(names))
        assert latents.abs().max() == latents.abs().min()  # zeros, as the pipeline scales them
        with pytest.raises(ValueError, match="no_tensor"):
            generate(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["no_tensor"])
    assert [step for step, _ in met] == list(range(pipe.num_timesteps))
    assert all(found == set(names) for _, found in met)


def test_guidance_that_a_callback_turns_holds_from_the_next_step_on(arm):
    generate, pipe, accel = arm
    if generate.turned is None:
        pytest.skip(f"{type(pipe).__name__} reads its guidance once")

    def turn(pipe, step, timestep, tensors):
        setattr(pipe, generate.turned, getattr(pipe, generate.turned) * 10)
        return {}

    stock, plain = generate(pipe, callback_on_step_end=turn), generate(pipe)
    with accel(pipe):
        close(generate(pipe, callback_on_step_end=turn), stock)
    assert (stock - plain).abs().max() > 1e-3


def test_the_text_may_be_encoded_elsewhere(arm):
    generate, pipe, accel = arm
    kept = {
        name: part for name, part in pipe.components.items() if name.startswith(("text_", "tokenizer", "scheduler"))
    }
    text = type(pipe)(**dict.fromkeys(pipe.components) | kept)
    options = {
        name: generate.call[name] for name in ("max_sequence_length", "prompt_template") if name in generate.call
    }
    if generate.name == "HunyuanVideo":
        names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
        encoded = dict(zip(names, text.encode_prompt(PROMPTS[0], **options), strict=True))
        encoded |= {
            f"negative_{name}": part for name, part in zip(names, text.encode_prompt("blue", **options), strict=True)
        }
    else:
        found = text.encode_prompt(PROMPTS[0], "blue", True, device="cpu", **options)
        order = ("prompt_embeds", "negative_prompt_embeds")
        if generate.name == "LTX-Video":
            order = (
                "prompt_embeds",
                "prompt_attention_mask",
                "negative_prompt_embeds",
                "negative_prompt_attention_mask",
            )
        encoded = dict(zip(order, found, strict=True))
    with accel(pipe):
        close(generate(pipe, None, **encoded), generate(pipe))


def test_what_is_saved_while_accelerated_is_the_pipeline(arm, tmp_path):
    generate, pipe, accel = arm
    before, within = tmp_path / "before", tmp_path / "within"
    pipe.save_pretrained(before)
    with accel(pipe):
        frames = generate(pipe)
        pipe.save_pretrained(within)
    files = [str(path.relative_to(before)) for path in before.rglob("*") if path.is_file()]
    same, differ, missing = filecmp.cmpfiles(before, within, files, shallow=False)
    assert (len(same), differ, missing) == (len(files), [], [])
    loaded = type(pipe).from_pretrained(within)
    loaded.set_progress_bar_config(disable=True)
    with accel(loaded):
        assert torch.equal(generate(loaded), frames)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(arm, dtype):
    generate, _, accel = arm
    pipe = generate.pipe().to(dtype)
    stock = generate(pipe)
    with accel(pipe):
        found = generate(pipe)
    assert found.dtype == stock.dtype
    assert torch.isfinite(found).all()
    scale = stock.float().std()
    assert (found.float() - stock.float()).square().mean().sqrt() < 0.05 * scale


def test_moves_and_memory_options_reach_the_model_as_ever(arm):
    generate, _, accel = arm
    pipe = generate.pipe()
    with accel(pipe):
        plain = generate(pipe)
        pipe.enable_attention_slicing()
        pipe.vae.enable_slicing()
        close(generate(pipe), plain)
        pipe.to(torch.float64)
        assert {weight.dtype for weight in pipe.transformer.parameters()} == {torch.float64}
        pipe.to("meta")
        assert pipe.device.type == "meta"
        assert all(weight.is_meta for weight in pipe.transformer.parameters())


# -- text ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[{}, {"reuse": TokenCount(tau=1)}], ids=["cache", "TokenCount"])
def write(request):
    """Calls `LLaDA2Pipeline` with the wrapped model, or forwards the whole text at every step."""
    lm = make()

    def call(ids, dense=False, **more):
        model = BlockLM(lm, 8, cache=False) if dense else BlockLM(lm, 8, **request.param)
        pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(block_length=8))
        pipe.set_progress_bar_config(disable=True)
        given = {"editing_threshold": None, "eos_early_stop": False, "mask_token_id": MASK, "output_type": "seq"}
        given |= {"gen_length": 16, "block_length": 8, "num_inference_steps": 4, "threshold": 1.1} | more
        return pipe(input_ids=ids, **given)

    return call


def test_texts_of_a_batch_are_what_they_are_alone(write):
    ids = prompt_of(2, 8)
    both = write(ids).sequences
    for row in range(2):
        assert torch.equal(write(ids[row : row + 1]).sequences[0], both[row])
    assert torch.equal(both, write(ids, dense=True).sequences)
    assert torch.equal(write(ids, return_dict=False)[0], both)


def test_callbacks_of_a_text_see_what_they_see_without_the_cache(write):
    ids, met = prompt_of(1, 8), {True: [], False: []}
    for dense in met:

        def look(pipe, step, timestep, tensors, dense=dense):
            met[dense].append((step, tensors["block_x"].clone()))
            return {}

        write(ids, dense, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["block_x"])
    assert len(met[True]) == len(met[False]) > STEPS
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(met[True], met[False], strict=True))
