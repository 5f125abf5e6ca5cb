"""Block-by-block generation is one block-causal forward, whatever it starts from, and leaves no trace."""

import copy
import json
import logging

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny import CHANNELS, HEIGHT, TEXT_DIM, WIDTH, tiny_components, tiny_pipeline

from diffaccel import Accel, RollingRebased, SinkRecent
from diffaccel.errors import KnobError, UnsupportedError
from diffaccel.pipelines import CausalWanPipeline, block_ranges, few_step
from diffaccel.pipelines.inputs import block_schedule
from diffaccel.pipelines.streaming import encode

PROMPT, OTHER = "a red circle moves left", "the blue square moves up"
TOKENS = (HEIGHT // 16) * (WIDTH // 16)  # of one latent frame
SETTINGS = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": 25,
    "num_inference_steps": 3,
    "max_sequence_length": 8,
    "output_type": "latent",
}


@pytest.fixture(scope="module")
def components():
    return tiny_components()


@pytest.fixture
def pipe(components):
    pipe = CausalWanPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seed(number=0):
    return torch.Generator().manual_seed(number)


def generate(pipe, prompt=PROMPT, **changes):
    settings = {"generator": seed(), **SETTINGS, **changes}
    return pipe(None if "prompt_embeds" in changes else prompt, **settings).frames


def pixels(frames, number=0):
    return torch.rand(frames, 3, HEIGHT, WIDTH, generator=seed(number))


def distance(a, b):
    return float((a - b).abs().max())


# -- the oracle: no cache, no offsets, every forward over the whole sequence under a block-causal mask ------------


class Masked(WanAttnProcessor):
    """The stock processor; its self-attention sees keys of its own block and of earlier ones."""

    def __init__(self, block_of_token):
        super().__init__()
        self.mask = block_of_token[:, None] >= block_of_token[None, :]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def full_forward(transformer, latents, times, text, blocks):
    """The velocity of every frame of `latents`; `times` and `blocks` give each frame's noise level and block."""
    model = copy.deepcopy(transformer)
    for block in model.blocks:
        block.attn1.processor = Masked(torch.tensor(blocks).repeat_interleave(TOKENS))
    per_token = torch.tensor(times).repeat_interleave(TOKENS)[None].expand(latents.shape[0], -1)
    with torch.no_grad():
        return model(latents, per_token, text, return_dict=False)[0]


def oracle(transformer, noise, texts, sizes, sigmas, guidance, *, fresh=None, context=None, given=0):
    """Latents of all blocks. `fresh` draws noise (few-step); later blocks see `context`; `given` blocks are kept."""
    latents = noise.clone()
    block_of_frame = [b for b, size in enumerate(sizes) for _ in range(size)]
    for index in range(given, len(sizes)):
        start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
        past = (latents if context is None else context)[:, :, :start]
        x = noise[:, :, start:stop]
        for sigma, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            sequence = torch.cat([past, x], dim=2)
            times = [0.0] * start + [sigma * 1000] * (stop - start)
            v = [full_forward(transformer, sequence, times, t, block_of_frame[:stop])[:, :, start:] for t in texts]
            v = v[0] if len(v) == 1 else v[1] + guidance * (v[0] - v[1])
            x = x + (after - sigma) * v if fresh is None else (1 - after) * (x - sigma * v) + after * fresh(x.shape)
        latents[:, :, start:stop] = x
    return latents


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


def euler_sigmas(steps, shift):
    return [float(shifted(s, shift)) for s in np.linspace(1.0, shifted(0.001, shift), steps)]


@torch.no_grad()
def texts(pipe, prompts, negative=None):
    embeds = pipe.encode_prompt(prompts, negative, negative is not None, max_sequence_length=8)
    return [e for e in embeds if e is not None]


def first_noise(rows=1, frames=7):
    return torch.randn(rows, CHANNELS, frames, HEIGHT // 8, WIDTH // 8, generator=seed())


# -- what is generated --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "size", "lengths"),
    [(7, 3, [1, 3, 3]), (8, 3, [2, 3, 3]), (9, 3, [3, 3, 3]), (2, 3, [2]), (5, 1, [1] * 5), (4, 9, [4]), (0, 3, [])],
)
def test_first_block_takes_the_remainder(frames, size, lengths):
    blocks = block_ranges(10, 10 + frames, size)
    assert [len(b) for b in blocks] == lengths
    assert [f for b in blocks for f in b] == list(range(10, 10 + frames))


@pytest.mark.parametrize(("size", "sizes"), [(3, [1, 3, 3]), (2, [1, 2, 2, 2])], ids=str)
def test_cached_blocks_equal_a_block_causal_forward(pipe, size, sizes):
    found = generate(pipe, negative_prompt=OTHER, guidance_scale=3.0, frames_per_block=size)
    expected = oracle(pipe.transformer, first_noise(), texts(pipe, PROMPT, OTHER), sizes, euler_sigmas(3, 3.0), 3.0)
    assert distance(found, expected) <= 1e-5
    unconnected = oracle(pipe.transformer, first_noise(), texts(pipe, PROMPT, OTHER), [7], euler_sigmas(3, 3.0), 3.0)
    assert distance(found, unconnected) > 1e-2  # the oracle can tell


def test_few_step_equals_predict_and_renoise(pipe):
    found = generate(pipe, sampler="few_step", num_inference_steps=None)
    rng = seed()
    noise = torch.randn(1, CHANNELS, 7, HEIGHT // 8, WIDTH // 8, generator=rng)
    sigmas = [float(shifted(s, 5.0)) for s in (1.0, 0.75, 0.5, 0.25)]

    def fresh(shape):
        return torch.randn(shape, generator=rng)

    expected = oracle(pipe.transformer, noise, texts(pipe, PROMPT), [1, 3, 3], sigmas, 1.0, fresh=fresh)
    assert pipe.guidance_scale == 1.0
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("generators", [1, 2, "on the device"])
def test_a_few_step_is_the_schedulers_bit_for_bit(generators, device):
    def seeded():
        if generators == "on the device":
            return torch.Generator(device).manual_seed(1)
        found = [torch.Generator().manual_seed(seed) for seed in range(generators)]
        return found if generators > 1 else found[0]

    latents = torch.randn(2, 4, 3, 6, 5, device=device)
    stock, ours = (block_schedule(FlowMatchEulerDiscreteScheduler(), "few_step", 3, device=device) for _ in range(2))
    assert few_step.fits(ours)
    assert not few_step.fits(FlowMatchEulerDiscreteScheduler())
    drawn, again, found, expected = seeded(), seeded(), latents, latents
    for t in ours.timesteps:
        velocity = torch.randn(latents.shape, device=device).bfloat16().float()
        expected = stock.step(velocity, t, expected, generator=drawn, return_dict=False)[0]
        found = few_step.step(ours, velocity, t, found, again)
        assert torch.equal(found, expected)


def test_few_step_levels_are_self_forcings(pipe):
    seen = []
    generate(
        pipe,
        sampler="few_step",
        num_inference_steps=None,
        num_frames=1,
        callback_on_step_end=lambda _, __, t, ___: seen.append(float(t)),
    )
    assert seen == pytest.approx([1000.0, 937.5, 833.3333, 625.0], abs=1e-3)


@pytest.mark.parametrize("sampler", ["multistep", "few_step"])
def test_published_timesteps_are_taken_as_they_are(sampler):
    scheduler = block_schedule(
        FlowMatchEulerDiscreteScheduler(shift=8.0, stochastic_sampling=True), sampler, timesteps=[1000, 757, 522]
    )
    assert scheduler.timesteps.tolist() == [1000, 757, 522]
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.757, 0.522, 0.0], abs=1e-6)


def test_few_step_keeps_a_stochastic_scheduler_of_the_pipeline():
    own = FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True)
    assert block_schedule(own, "few_step").sigmas[1].item() == pytest.approx(shifted(0.75, 2.0))
    assert block_schedule(FlowMatchEulerDiscreteScheduler(shift=2.0), "few_step").config.shift == 5.0


def test_scalar_and_per_token_timesteps_agree(components, pipe):
    per_token = CausalWanPipeline(**components, expand_timesteps=True)
    per_token.set_progress_bar_config(disable=True)
    seen = set()
    hook = per_token.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: seen.add(kwargs["timestep"].ndim), with_kwargs=True
    )
    found = generate(per_token)
    hook.remove()
    assert seen == {2}
    assert distance(found, generate(pipe)) <= 1e-5


def test_same_seed_same_bits(pipe):
    first = generate(pipe)
    assert torch.equal(first, generate(pipe))
    assert distance(first, generate(pipe, generator=seed(1))) > 0.1
    noise = first_noise()
    assert torch.equal(first, generate(pipe, generator=None, latents=noise))
    assert torch.equal(noise, first_noise())  # the caller's tensor is not written to


@pytest.mark.parametrize("sampler", ["multistep", "few_step"])
def test_a_row_of_a_batch_is_the_row_alone(pipe, sampler):
    prompts = [PROMPT, OTHER]
    both = generate(pipe, prompts, generator=[seed(1), seed(2)], sampler=sampler)
    for row, prompt in enumerate(prompts):
        alone = generate(pipe, prompt, generator=seed(row + 1), sampler=sampler)
        assert distance(both[row : row + 1], alone) <= 1e-5
    assert distance(both[0], both[1]) > 0.1


def test_several_videos_per_prompt(pipe):
    rngs = [seed(i) for i in range(4)]
    found = generate(pipe, [PROMPT, OTHER], num_videos_per_prompt=2, generator=rngs, num_frames=5)
    alone = generate(pipe, OTHER, generator=seed(2), num_frames=5)
    assert distance(found[2:3], alone) <= 1e-5
    given = generate(
        pipe,
        prompt_embeds=texts(pipe, [PROMPT, OTHER])[0],
        negative_prompt_embeds=texts(pipe, ["", ""])[0],
        num_videos_per_prompt=2,
        generator=[seed(i) for i in range(4)],
        num_frames=5,
    )
    assert distance(given, found) <= 1e-5


def test_half_precision_keeps_latents_in_fp32(pipe):
    half = tiny_pipeline()
    half.transformer.to(torch.bfloat16)
    found = generate(half)
    assert found.dtype == torch.float32
    assert distance(found, generate(pipe)) < 0.5
    assert not torch.equal(found, found.bfloat16().float())


def test_other_schedulers_start_afresh_in_every_block(components):
    components = {
        **components,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }
    pipe = CausalWanPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    starts = []
    generate(pipe, callback_on_step_end=lambda _, step, t, __: starts.append(float(t)))
    assert len(starts) == 9
    assert starts[:3] == starts[3:6] == starts[6:]
    assert torch.equal(generate(pipe), generate(pipe))
    with pytest.raises(ValueError, match="UniPCMultistepScheduler takes no timesteps"):
        generate(pipe, timesteps=[900, 500], num_inference_steps=None)


# -- conditions ---------------------------------------------------------------------------------------------------


def test_image_is_kept_and_continued(pipe):
    image = pixels(1)
    found = generate(pipe, image=image, num_frames=17, negative_prompt=OTHER, guidance_scale=3.0)
    with torch.no_grad():
        condition = encode(pipe.vae, image[:, :, None] * 2 - 1)
    assert torch.equal(found[:, :, :1], condition)
    start = torch.cat([condition, first_noise(frames=5)[:, :, 1:]], dim=2)
    words = texts(pipe, PROMPT, OTHER)
    expected = oracle(pipe.transformer, start, words, [1, 1, 3], euler_sigmas(3, 3.0), 3.0, given=1)
    assert distance(found, expected) <= 1e-5
    assert distance(found, generate(pipe, image=pixels(1, 1), num_frames=17, guidance_scale=3.0)) > 0.1


def test_forms_of_an_image_agree(pipe):
    array = (pixels(1)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    forms = [
        PIL.Image.fromarray(array),
        array,
        array.astype(np.float32) / 255,
        torch.from_numpy(array).permute(2, 0, 1),
        torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255,
    ]
    results = [generate(pipe, image=form, num_frames=5) for form in forms]
    assert max(distance(results[0], other) for other in results[1:]) <= 1e-5
    as_video = generate(pipe, video=[forms[0]], num_frames=5)
    assert distance(results[0], as_video) <= 1e-5


def test_one_image_for_each_prompt(pipe):
    both = [pixels(1, 1)[0], pixels(1, 2)[0]]
    found = generate(pipe, [PROMPT, OTHER], image=both, num_frames=5, generator=[seed(1), seed(2)])
    alone = generate(pipe, OTHER, image=both[1], num_frames=5, generator=seed(2))
    assert distance(found[1:], alone) <= 1e-5


def test_video_is_kept_and_continued(pipe):
    video = pixels(13)
    found = generate(pipe, video=video, num_frames=25, frames_per_block=3, guidance_scale=1.0)
    with torch.no_grad():
        condition = encode(pipe.vae, video.permute(1, 0, 2, 3)[None] * 2 - 1)
    assert torch.equal(found[:, :, :4], condition)
    start = torch.cat([condition, first_noise()[:, :, 4:]], dim=2)
    expected = oracle(pipe.transformer, start, texts(pipe, PROMPT), [1, 3, 3], euler_sigmas(3, 3.0), 1.0, given=2)
    assert distance(found, expected) <= 1e-5
    frames = [PIL.Image.fromarray((f.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for f in video]
    assert distance(found, generate(pipe, video=frames, guidance_scale=1.0)) < 0.2  # the same up to 8-bit rounding


# -- shared history -----------------------------------------------------------------------------------------------


def test_own_history_changes_nothing(pipe):
    free = generate(pipe)
    assert torch.equal(generate(pipe, history=free), free)


def test_every_block_follows_the_given_history(pipe):
    history = generate(pipe, OTHER, generator=seed(5))
    found = generate(pipe, history=history, guidance_scale=1.0)
    expected = oracle(
        pipe.transformer, first_noise(), texts(pipe, PROMPT), [1, 3, 3], euler_sigmas(3, 3.0), 1.0, context=history
    )
    assert distance(found, expected) <= 1e-5
    free = generate(pipe, guidance_scale=1.0)
    assert torch.equal(found[:, :, :1], free[:, :, :1])
    assert distance(found[:, :, 1:], free[:, :, 1:]) > 1e-2


# -- callbacks ----------------------------------------------------------------------------------------------------


def test_step_callback_counts_through_all_blocks(pipe):
    seen = []

    def note(pipeline, step, t, tensors):
        assert pipeline.current_timestep == t
        seen.append((step, tuple(tensors["latents"].shape), set(tensors)))
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    found = generate(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    assert [s for s, _, _ in seen] == list(range(9))
    assert pipe.num_timesteps == 9
    assert [shape[2] for _, shape, _ in seen] == [1] * 3 + [3] * 6
    assert all(keys == set(names) for _, _, keys in seen)
    assert torch.equal(found, generate(pipe))
    assert pipe.current_timestep is None


def test_chunk_callback_replaces_what_is_committed(pipe):
    seen = []
    black = torch.zeros(1, CHANNELS, 1, HEIGHT // 8, WIDTH // 8)

    def replace_first(pipeline, block, blocks, tensors):
        seen.append((block, blocks, tensors["latents"].shape[2]))
        return {"latents": black} if block == 0 else None

    found = generate(pipe, callback_on_chunk_end=replace_first)
    assert seen == [(0, 3, 1), (1, 3, 3), (2, 3, 3)]
    assert torch.equal(found[:, :, :1], black)
    history = torch.cat([black, found[:, :, 1:]], dim=2)
    assert distance(generate(pipe, history=history)[:, :, 1:], found[:, :, 1:]) == 0
    assert distance(generate(pipe)[:, :, 1:], found[:, :, 1:]) > 1e-2


def test_prompt_can_change_between_blocks(pipe):
    [other] = texts(pipe, OTHER)
    plain = generate(pipe)
    found = generate(pipe, callback_on_chunk_end=lambda _, block, *__: {"prompt_embeds": other} if block == 1 else {})
    assert torch.equal(found[:, :, :4], plain[:, :, :4])
    assert distance(found[:, :, 4:], plain[:, :, 4:]) > 1e-3


def test_condition_blocks_fire_no_callback(pipe):
    seen = []
    generate(pipe, image=pixels(1), num_frames=13, callback_on_chunk_end=lambda _, b, n, __: seen.append((b, n)))
    assert seen == [(1, 2)]


def test_unknown_names_from_a_callback_are_refused(pipe):
    with pytest.raises(ValueError, match=r"got latent$"):
        generate(pipe, callback_on_chunk_end=lambda *_: {"latent": torch.zeros(1)})


def test_interrupt_ends_the_video_with_the_block_in_progress(pipe):
    def stop(pipeline, step, t, tensors):
        pipeline._interrupt = step == 4  # second step of the second block
        return {}

    found = generate(pipe, callback_on_step_end=stop)
    assert found.shape[2] == 4
    assert torch.equal(found[:, :, :1], generate(pipe)[:, :, :1])
    assert generate(pipe).shape[2] == 7  # the next call is not interrupted


# -- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["multistep", "few_step"])
def test_stream_is_the_call_in_chunks(pipe, sampler):
    settings = {**SETTINGS, "output_type": "np", "sampler": sampler}
    whole = pipe(PROMPT, generator=seed(), **settings).frames
    chunks = list(pipe.stream(PROMPT, generator=seed(), **settings))
    assert [c.shape[1] for c in chunks] == [1, 12, 12]
    assert np.array_equal(np.concatenate(chunks, axis=1), whole)
    assert whole.shape == (1, 25, HEIGHT, WIDTH, 3)
    assert 0 <= whole.min() < whole.max() <= 1


def test_output_types(pipe):
    kinds = {kind: generate(pipe, num_frames=5, output_type=kind) for kind in ("np", "pt", "pil", "latent")}
    assert kinds["pt"].shape == (1, 5, 3, HEIGHT, WIDTH)
    assert np.array_equal(kinds["pt"].permute(0, 1, 3, 4, 2).numpy(), kinds["np"])
    assert len(kinds["pil"][0]) == 5
    assert kinds["pil"][0][0].size == (WIDTH, HEIGHT)
    assert kinds["latent"].shape == (1, CHANNELS, 2, HEIGHT // 8, WIDTH // 8)
    settings = {**SETTINGS, "num_frames": 5, "output_type": "latent"}
    streamed = list(pipe.stream(PROMPT, generator=seed(), **settings))
    assert torch.equal(torch.cat(streamed, dim=2), kinds["latent"])
    assert isinstance(pipe(PROMPT, return_dict=False, **settings), tuple)


def test_stream_of_a_condition_begins_with_it(pipe):
    settings = {**SETTINGS, "output_type": "pt", "video": pixels(5), "num_frames": 17}
    chunks = list(pipe.stream(PROMPT, generator=seed(), **settings))
    assert [c.shape[1] for c in chunks] == [5, 12]
    assert torch.equal(torch.cat(chunks, dim=1), pipe(PROMPT, generator=seed(), **settings).frames)


def test_stream_refuses_before_the_first_chunk(pipe):
    with pytest.raises(ValueError, match="num_frames is"):
        pipe.stream(PROMPT, **{**SETTINGS, "num_frames": 4})
    with pytest.raises(TypeError, match="nonsense"):
        pipe.stream(PROMPT, nonsense=1)


def test_one_stream_at_a_time(pipe):
    stream = pipe.stream(PROMPT, **SETTINGS)
    next(stream)
    with pytest.raises(UnsupportedError, match="in the middle of a stream"):
        generate(pipe)
    assert sum(chunk.shape[2] for chunk in stream) == 6
    generate(pipe)


def test_stream_does_not_outlive_its_accel(pipe):
    with Accel()(pipe):
        stream = pipe.stream(PROMPT, **SETTINGS)
        next(stream)
    with pytest.raises(UnsupportedError, match="was left"):
        next(stream)
    generate(pipe)


# -- another prompt in the middle ---------------------------------------------------------------------------------


def switched(pipe, how, after=1, accel=None, **changes):
    """A stream whose prompt changes once `after` chunks are out; the latents, and the run."""
    with (accel or Accel())(pipe) as run:
        stream = pipe.stream(PROMPT, generator=seed(), on_prompt_change=how, **{**SETTINGS, **changes})
        chunks = [next(stream) for _ in range(after)]
        stream.change_prompt(OTHER)
        chunks += list(stream)
    return torch.cat(chunks, dim=2), run


def test_a_changed_prompt_holds_from_the_next_block_on(pipe):
    before = generate(pipe)
    found, _ = switched(pipe, "keep", after=2)
    embeds = pipe.encode_prompt(OTHER, None, False, max_sequence_length=8)[0]

    def change(pipe, block, blocks, tensors):
        return {"prompt_embeds": embeds} if block == 1 else None

    assert torch.equal(found[:, :, :4], before[:, :, :4])
    assert distance(found[:, :, 4:], before[:, :, 4:]) > 1e-3
    torch.testing.assert_close(found, generate(pipe, callback_on_chunk_end=change), atol=1e-5, rtol=0)


def test_a_recomputed_cache_is_that_of_the_new_prompt(pipe):
    found, _ = switched(pipe, "recompute", after=2)
    everything_new = generate(pipe, OTHER, history=found)
    assert torch.equal(found[:, :, 4:], everything_new[:, :, 4:])
    kept, _ = switched(pipe, "keep", after=2)
    assert distance(found[:, :, 4:], kept[:, :, 4:]) > 1e-5


def test_a_flushed_cache_holds_the_last_block_only(pipe):
    counts = []

    def count(pipe, step, timestep, tensors):
        counts.append(max(memory.count for memory in run._memories.values()) // TOKENS)
        return {}

    with Accel()(pipe) as run:
        settings = {**SETTINGS, "num_frames": 37, "on_prompt_change": "flush", "callback_on_step_end": count}
        stream = pipe.stream(PROMPT, generator=seed(), **settings)
        next(stream), next(stream)
        stream.change_prompt(OTHER)
        assert torch.isfinite(torch.cat(list(stream), dim=2)).all()
    assert counts[:: SETTINGS["num_inference_steps"]] == [0, 1, 3, 6]


def test_a_rebased_sink_after_a_flush_moves_by_its_own_gap(pipe):
    moved = []
    with Accel(cache=RollingRebased(recent_frames=3, sink_frames=3))(pipe) as run:
        later = run.later
        run.later = lambda k, frames: moved.append(frames) or later(k, frames)
        stream = pipe.stream(
            PROMPT, generator=seed(), on_prompt_change="flush", guidance_scale=1.0, **{**SETTINGS, "num_frames": 97}
        )
        next(stream), next(stream), next(stream)
        stream.change_prompt(OTHER)
        list(stream)
    # the sink is now frames 4 to 6: nothing lies between it and frames 7 to 9, then one block after the other
    assert sorted(set(moved)) == [3, 6, 9, 12]


def test_only_blocks_still_held_are_recomputed(pipe):
    clean = []
    forward = pipe.transformer.forward

    def watch(*args, **kwargs):
        if float(kwargs["timestep"].max()) == 0:
            clean.append(pipe)
        return forward(*args, **kwargs)

    pipe.transformer.forward = watch
    try:
        accel = Accel(cache=SinkRecent(recent_frames=3, sink_frames=1))
        switched(pipe, "recompute", after=4, accel=accel, num_frames=61, guidance_scale=1.0)
    finally:
        del pipe.transformer.forward
    # five commits as usual; at the change after the fourth block, blocks 0 (the sink) and 2 again
    assert len(clean) == 5 + 2


@pytest.mark.parametrize(
    ("prompt", "message"), [("  ", "may not be empty"), ([OTHER, OTHER], "1 prompts goes on with as many, got 2")]
)
def test_a_bad_change_is_refused_and_the_stream_goes_on(pipe, prompt, message):
    stream = pipe.stream(PROMPT, generator=seed(), **SETTINGS)
    first = next(stream)
    with pytest.raises(ValueError, match=message):
        stream.change_prompt(prompt)
    assert torch.equal(torch.cat([first, *stream], dim=2), generate(pipe))
    with pytest.raises(UnsupportedError, match="has ended"):
        stream.change_prompt(OTHER)
    with pytest.raises(ValueError, match="did you mean 'flush'"):
        generate(pipe, on_prompt_change="flsh")


def test_gradients_are_off_only_inside(pipe):
    stream = pipe.stream(PROMPT, **SETTINGS)
    assert not next(stream).requires_grad
    assert torch.is_grad_enabled()
    stream.close()


# -- no trace -----------------------------------------------------------------------------------------------------


def state(pipe):
    """Everything a call could leave behind."""
    modules = list(pipe.transformer.modules())
    return {
        "processors": [id(p) for p in pipe.transformer.attn_processors.values()],
        "attributes": [sorted(vars(m)) for m in (*modules, *pipe.vae.modules())],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        "forwards": [getattr(m.forward, "__func__", m.forward) for m in modules],
        "scheduler": {name: str(value) for name, value in vars(pipe.scheduler).items()},
        "config": dict(pipe.config),
        "generating": pipe._generating,
        "vae": {name: str(value) for name, value in vars(pipe.vae).items() if "feat" in name or "conv_" in name},
    }


def fail_at(step):
    def callback(pipeline, count, t, tensors):
        if count == step:
            raise KeyboardInterrupt
        return {}

    return callback


def test_a_call_leaves_the_pipeline_untouched():
    pipe = tiny_pipeline()  # one that no other test has called
    pipe.vae.clear_cache()  # the stock decode leaves these attributes, empty, the first time
    before = state(pipe)
    generate(pipe, output_type="np")
    assert state(pipe) == before


@pytest.mark.parametrize("step", [0, 5])
def test_an_exception_leaves_the_pipeline_untouched(pipe, step):
    expected, pipe = generate(pipe), tiny_pipeline()
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, callback_on_step_end=fail_at(step))
    assert state(pipe) == before
    with pytest.raises(KeyboardInterrupt):
        list(pipe.stream(PROMPT, **SETTINGS, callback_on_step_end=fail_at(step)))
    assert state(pipe) == before
    assert torch.equal(generate(pipe), expected)


def test_leaving_a_stream_early_leaves_the_pipeline_untouched():
    pipe = tiny_pipeline()
    before = state(pipe)
    stream = pipe.stream(PROMPT, **SETTINGS)
    assert state(pipe) == before  # nothing happens before the first chunk is asked for
    next(stream)
    assert state(pipe) != before
    stream.close()
    assert state(pipe) == before


def test_an_accel_around_the_call_is_the_one_that_runs(pipe):
    plain = generate(pipe)
    with Accel(kernel="reference")(pipe) as run:
        found = generate(pipe)
        chunks = list(pipe.stream(PROMPT, generator=seed(), **{**SETTINGS, "num_frames": 5, "output_type": "np"}))
        report = run.report()
    assert distance(found, plain) <= 1e-5
    assert sum(c.shape[1] for c in chunks) == 5
    assert report.frames == 25 + 5
    assert report.kernel == "reference"
    assert report.seconds["denoise"] > 0
    assert report.seconds["decode"] > 0


def test_forwards_of_a_call(pipe):
    """Three blocks of three steps in two branches, and a clean pass for all but the last block."""
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    generate(pipe)
    hook.remove()
    assert len(calls) == 2 * (3 * 3 + 2)
    assert calls.count(0.0) == 2 * 2


# -- saving and loading -------------------------------------------------------------------------------------------


def test_folders_are_shared_with_the_stock_pipeline(components, pipe, tmp_path):
    WanPipeline(**components).save_pretrained(tmp_path / "stock")
    loaded = CausalWanPipeline.from_pretrained(tmp_path / "stock")
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.frames_per_block, loaded.config.sampler) == (3, "multistep")
    assert torch.equal(generate(loaded), generate(pipe))

    CausalWanPipeline(**components, frames_per_block=2, sampler="few_step").save_pretrained(tmp_path / "causal")
    again = CausalWanPipeline.from_pretrained(tmp_path / "causal")
    assert (again.config.frames_per_block, again.config.sampler) == (2, "few_step")
    index = json.loads((tmp_path / "causal" / "model_index.json").read_text())
    assert index["_class_name"] == "CausalWanPipeline"
    stock = WanPipeline.from_pretrained(tmp_path / "causal")
    assert set(stock.components) == set(again.components)
    assert CausalWanPipeline(**stock.components).config.frames_per_block == 3


def test_config_is_what_a_call_starts_from(components, pipe):
    own = CausalWanPipeline(**components, frames_per_block=2, sampler="few_step")
    own.set_progress_bar_config(disable=True)
    assert torch.equal(generate(own), generate(pipe, frames_per_block=2, sampler="few_step"))


def test_two_transformers_are_refused(components):
    with pytest.raises(UnsupportedError, match="transformer_2"):
        CausalWanPipeline(**components, transformer_2=components["transformer"])
    with pytest.raises(UnsupportedError, match=r"boundary_ratio=0\.9"):
        CausalWanPipeline(**components, boundary_ratio=0.9)


# -- bad inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_frames": 24}, "got 24, the nearest valid values are 21 and 25"),
        ({"num_frames": 0}, "got 0, the nearest valid values are 1 and 5"),
        ({"num_frames": -3}, "got -3, the nearest valid values are 1 and 5"),
        ({"height": 40}, "height is a multiple of 16 .* got 40, the nearest valid values are 32 and 48"),
        ({"width": 7}, "width is a multiple of 16 .* got 7, the nearest valid values are 16 and 32"),
        ({"frames_per_block": 0}, "frames_per_block is at least 1, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is at least 1, got 0"),
        ({"sampler": "few-step"}, "did you mean 'few_step'"),
        ({"output_type": "mp4"}, "unknown output_type 'mp4'"),
        ({"prompt": ""}, "may not be empty"),
        ({"prompt": [PROMPT, "  "]}, "may not be empty"),
        ({"prompt": []}, "may not be empty"),
        ({"prompt": 3}, "`prompt` has to be of type"),
        ({"prompt": None}, "Provide either `prompt`"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is at least 1, got 0"),
        ({"sigmas": [1.0, 0.5], "timesteps": [900]}, "got both"),
        ({"sigmas": [0.5, 0.75]}, r"sigmas fall from at most 1 .* got \[0.5, 0.75\]"),
        ({"timesteps": [1200, 3]}, "timesteps fall from at most 1000"),
        ({"sigmas": [1.0, 0.5]}, "num_inference_steps=3 and 2 sigmas disagree"),
        ({"latents": torch.zeros(1, 4, 3, 4, 6)}, r"latents has shape .* \(1, 4, 7, 4, 6\) .* got\s+\(1, 4, 3, 4, 6\)"),
        ({"history": torch.zeros(1, 4, 7, 4, 4)}, "history has shape"),
        ({"image": pixels(1), "video": pixels(1)}, "got both"),
        ({"video": pixels(6)}, "number of frames of video is .* got 6, the nearest valid values are 5 and 9"),
        ({"video": pixels(25)}, "pass num_frames=29 or more"),
        ({"image": [pixels(1)[0]] * 3, "prompt": [PROMPT, OTHER]}, "got 3 for 2 prompts"),
        ({"generator": [seed(), seed()]}, "generators of length 2"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_inputs_are_refused_with_the_remedy(pipe, changes, says):
    before = state(pipe)
    prompt = changes.get("prompt", PROMPT)
    with pytest.raises(ValueError, match=says):
        generate(pipe, prompt, **{name: value for name, value in changes.items() if name != "prompt"})
    assert state(pipe) == before


def test_unread_words_are_told(pipe, caplog):
    logging.getLogger("diffaccel.pipelines.causal_wan").addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, "diffaccel.pipelines.causal_wan")  # the command line, if it ran before, set it
    generate(pipe, ["a purple circle moves sideways", PROMPT], num_frames=1, generator=None)
    [told] = pipe.prompt_warnings
    assert '"purple", "sideways"' in told
    assert "prompt 1 of 2" in told
    assert told in caplog.text
    generate(pipe, num_frames=1)
    assert pipe.prompt_warnings == []


def test_a_cut_prompt_is_told_with_what_was_cut(pipe):
    generate(pipe, PROMPT, max_sequence_length=4, num_frames=1)
    [told] = pipe.prompt_warnings
    assert "6 tokens" in told
    assert told.endswith('this was cut: "moves left"')
    generate(pipe, PROMPT, max_sequence_length=6, num_frames=1)
    assert pipe.prompt_warnings == []


def test_embeddings_stand_for_prompts(pipe):
    embeds = texts(pipe, PROMPT, "")
    assert embeds[0].shape == (1, 8, TEXT_DIM)
    found = generate(pipe, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    assert torch.equal(found, generate(pipe))


@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_an_overlapped_stream_gives_the_same_chunks_a_block_later(output_type):
    settings, given = {**SETTINGS, "output_type": output_type, "num_frames": 33}, []

    def note(pipe, block, blocks, tensors):
        given.append(block)

    plain = list(tiny_pipeline().stream(PROMPT, generator=seed(), **settings))
    stream = tiny_pipeline().stream(PROMPT, generator=seed(), overlap=True, callback_on_chunk_end=note, **settings)
    chunks = [next(stream)]
    assert given == [0, 1]
    chunks += list(stream)
    assert len(chunks) == len(plain) == 3
    for chunk, expected in zip(chunks, plain, strict=True):
        assert (np.array_equal if output_type == "np" else torch.equal)(chunk, expected)


def test_a_decoder_of_ones_own_gets_the_blocks_in_order():
    settings, met = {**SETTINGS, "output_type": "pt", "num_frames": 33}, []
    pipe = tiny_pipeline()
    latents = pipe(PROMPT, generator=seed(), **settings | {"output_type": "latent"}).frames

    def small(block):
        met.append(block.clone())
        first = sum(x.shape[2] for x in met) == block.shape[2]
        frames = 4 * block.shape[2] - 3 * first
        return block.mean((1, 2), keepdim=True).clamp(-1, 1).repeat(1, 3, frames, 8, 8)

    frames = pipe(PROMPT, generator=seed(), decoder=small, **settings).frames
    assert frames.shape == (1, 33, 3, HEIGHT, WIDTH)
    assert torch.equal(torch.cat(met, 2), latents)
    met.clear()
    chunks = list(pipe.stream(PROMPT, generator=seed(), decoder=small, overlap=True, **settings))
    assert torch.equal(torch.cat(chunks, 1), frames)
    with pytest.raises(KnobError, match=r"for this block \(1, 3, 9\)"):
        pipe(PROMPT, generator=seed(), decoder=lambda block: block, **settings)


@pytest.mark.gpu
def test_decoding_beside_denoising_changes_nothing_on_a_gpu():
    settings = {**SETTINGS, "output_type": "pt", "num_frames": 33}
    pipe = tiny_pipeline().to("cuda")
    plain, overlapped = (list(pipe.stream(PROMPT, generator=seed(), overlap=how, **settings)) for how in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, overlapped, strict=True))
    assert torch.equal(pipe(PROMPT, generator=seed(), **settings).frames, torch.cat(plain, 1))


def test_model_offload_changes_no_bit_and_is_renewed():
    settings = {**SETTINGS, "output_type": "np", "num_frames": 17}
    expected = tiny_pipeline()(PROMPT, generator=seed(), **settings).frames
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks work alike on every device
    before = pipe._all_hooks
    assert np.array_equal(pipe(PROMPT, generator=seed(), **settings).frames, expected)
    renewed = pipe._all_hooks
    assert renewed is not before
    stream = pipe.stream(PROMPT, generator=seed(), **settings)
    assert np.array_equal(np.concatenate(list(stream), axis=1), expected)
    assert pipe._all_hooks is not renewed
    renewed = pipe._all_hooks
    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, callback_on_step_end=fail_at(0), **settings)
    assert pipe._all_hooks is not renewed  # weights leave the device after a failure too
