"""Rolling Forcing's window: a joint forward finishes a block and takes one in, as a plain loop without a cache does."""

import numpy as np
import pytest
import torch
from test_causal_wan import (
    HEIGHT,
    OTHER,
    PROMPT,
    SETTINGS,
    TOKENS,
    WIDTH,
    distance,
    full_forward,
    generate,
    pixels,
    seed,
    shifted,
    texts,
)
from test_graphed import launched  # noqa: F401
from tiny import CHANNELS, tiny_pipeline

from diffaccel import Accel, AnnCA, AnnSA, FlashBlock, FrameWindow, PadCollapse, RollingRebased, SinkRecent, TempCache
from diffaccel.errors import UnsupportedError
from diffaccel.pipelines.streaming import encode

W = 3  # steps, and blocks in a window
ROLLING = {"sampler": "rolling", "num_inference_steps": W, "frames_per_block": 2}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def levels(steps):
    return [float(shifted(1 - i / steps, 5.0)) for i in range(steps)] + [0.0]


def frames_of(sizes, block):
    return range(sum(sizes[:block]), sum(sizes[: block + 1]))


def oracle(pipe, rng, words, sizes, steps=W, guidance=1.0, given=0, start=None, forward=None):
    """Every forward over everything so far, under a mask: clean blocks see what is before them, the window all."""
    forward = forward or (lambda x, at, text, group, turn: full_forward(pipe.transformer, x, at, text, group))
    noise = torch.randn(1, CHANNELS, sum(sizes), HEIGHT // 8, WIDTH // 8, generator=rng)
    if start is not None:
        noise[:, :, : start.shape[2]] = start
    x, sigma, forwards = noise.clone(), levels(steps), 0
    for turn in range(len(sizes) - given + steps - 1):
        first, last = given + max(0, turn - steps + 1), given + min(len(sizes) - given - 1, turn)
        begin, end = frames_of(sizes, first).start, frames_of(sizes, last).stop
        step_of = {b: turn - (b - given) for b in range(first, last + 1)}
        at = [sigma[step_of[b]] if b in step_of else 0.0 for b in range(last + 1) for _ in frames_of(sizes, b)]
        group = [min(b, first) for b in range(last + 1) for _ in frames_of(sizes, b)]  # the window is one block
        v = [forward(x[:, :, :end], [1000 * s for s in at], text, group, turn) for text in words]
        forwards += 1
        v = (v[0] if len(v) == 1 else v[1] + guidance * (v[0] - v[1]))[:, :, begin:]
        fresh = torch.randn(v.shape, generator=rng)
        for b in range(first, last + 1):
            own = frames_of(sizes, b)
            here, now, after = slice(own.start - begin, own.stop - begin), sigma[step_of[b]], sigma[step_of[b] + 1]
            clean = x[:, :, own.start : own.stop] - now * v[:, :, here]
            x[:, :, own.start : own.stop] = (1 - after) * clean + after * fresh[:, :, here]
    return x, forwards


class Forwards:
    """Counts forwards of a transformer, and what each was given: frames, and the distinct times."""

    def __init__(self, pipe):
        self.seen = []
        self.hook = pipe.transformer.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, given):
        times = given["timestep"].flatten().unique().tolist()
        self.seen.append((given["hidden_states"].shape[2], [round(t / 1000, 4) for t in times]))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self.hook.remove()


@pytest.mark.parametrize(
    ("frames", "sizes", "steps"),
    [(25, [1, 2, 2, 2], 3), (29, [2, 2, 2, 2], 2), (9, [1, 2], 4)],
    ids=["grows, runs and shrinks", "a window of two", "a video shorter than the window"],
)
def test_a_rolling_window_is_a_plain_loop_without_a_cache(pipe, frames, sizes, steps):
    with Forwards(pipe) as seen:
        found = generate(pipe, **ROLLING | {"num_inference_steps": steps}, num_frames=frames)
    expected, joint = oracle(pipe, seed(), texts(pipe, PROMPT), sizes, steps)
    assert distance(found, expected) <= 2e-5
    clean = [forward for forward in seen if forward[1] == [0.0]]
    assert joint == len(sizes) + steps - 1
    assert (len(seen) - len(clean), len(clean)) == (joint, len(sizes) - 1)


def test_the_oracle_can_tell(pipe):
    found = generate(pipe, **ROLLING)
    expected, _ = oracle(pipe, seed(), texts(pipe, PROMPT), [2, 2, 2, 1])  # the blocks lie elsewhere
    assert distance(found, expected) > 1e-2
    assert distance(found, generate(pipe, **ROLLING | {"sampler": "few_step"})) > 1e-2


def test_guidance_has_a_window_in_each_branch(pipe):
    with Forwards(pipe) as seen:
        found = generate(pipe, **ROLLING, negative_prompt=OTHER, guidance_scale=3.0)
    expected, _ = oracle(pipe, seed(), texts(pipe, PROMPT, OTHER), [1, 2, 2, 2], guidance=3.0)
    assert distance(found, expected) <= 1e-4
    assert len(seen) == 2 * (4 + W - 1 + 3)


def test_given_frames_are_the_clean_past_of_the_first_window(pipe):
    video = pixels(5)
    found = generate(pipe, **ROLLING, video=video, num_frames=25)
    with torch.no_grad():
        condition = encode(pipe.vae, video.permute(1, 0, 2, 3)[None] * 2 - 1)
    expected, _ = oracle(pipe, seed(), texts(pipe, PROMPT), [2, 1, 2, 2], given=1, start=condition)
    assert torch.equal(found[:, :, :2], condition)
    assert distance(found, expected) <= 2e-5


def test_windows_and_levels_are_the_papers(pipe):
    steps = []
    with Forwards(pipe) as seen:
        generate(
            pipe,
            **ROLLING | {"num_inference_steps": None, "frames_per_block": 1},
            callback_on_step_end=lambda p, step, t, tensors: steps.append((step, round(float(t) / 1000, 4))),
        )
    five = [round(x, 4) for x in reversed(levels(5)[:5])]
    windows = [(frames, times) for frames, times in seen if times != [0.0]]
    assert windows[:5] == [(n, five[-n:]) for n in range(1, 6)]
    assert windows[5:7] == [(5, five)] * 2
    assert windows[7:] == [(n, five[:n]) for n in range(4, 0, -1)]
    assert steps == [*enumerate([*reversed(five), *[five[0]] * 6])]
    assert pipe.num_timesteps == len(windows) == 7 + 5 - 1


@pytest.mark.parametrize(("frames", "steps"), [(5, 4), (25, 1)], ids=["one block", "one step"])
def test_without_a_neighbour_it_is_few_step_sampling(pipe, frames, steps):
    given = {"num_frames": frames, "num_inference_steps": steps, "frames_per_block": 2}
    found, usual = (generate(pipe, sampler=sampler, **given) for sampler in ("rolling", "few_step"))
    assert distance(found, usual) <= 1e-5


def test_a_stream_gives_blocks_as_they_are_finished(pipe):
    settings, count = {**SETTINGS, **ROLLING}, []
    note = {"callback_on_step_end": lambda *_: count.append(1)}
    stream = pipe.stream(PROMPT, generator=seed(), **settings, **note)
    chunks, forwards = [], []
    for chunk in stream:
        chunks.append(chunk)
        forwards.append(len(count))
    assert [chunk.shape[2] for chunk in chunks] == [1, 2, 2, 2]
    assert forwards == [W, W + 1, W + 2, W + 3]
    assert torch.equal(torch.cat(chunks, 2), generate(pipe, **ROLLING))
    settings["output_type"] = "np"
    shown = list(pipe.stream(PROMPT, generator=seed(), overlap=True, **settings))
    assert np.array_equal(np.concatenate(shown, 1), generate(pipe, **ROLLING, output_type="np"))


def test_a_row_of_a_batch_is_the_row_alone(pipe):
    both = generate(pipe, [PROMPT, OTHER], generator=[seed(1), seed(2)], **ROLLING)
    assert distance(both[1:], generate(pipe, OTHER, generator=seed(2), **ROLLING)) <= 2e-5


def test_a_shared_history_is_what_the_window_sees(pipe):
    history = generate(pipe, OTHER, generator=seed(5), **ROLLING)
    free, shared = generate(pipe, **ROLLING), generate(pipe, **ROLLING, history=history)
    assert torch.equal(shared[:, :, :1], free[:, :, :1])
    assert distance(shared[:, :, 1:], free[:, :, 1:]) > 1e-3
    assert torch.equal(generate(pipe, **ROLLING, history=free), free)


def test_an_interrupted_window_ends_with_its_oldest_block(pipe):
    def stop(pipeline, step, t, tensors):
        pipeline._interrupt = step == W  # the first forward after the first block is out
        return {}

    found = generate(pipe, **ROLLING, callback_on_step_end=stop)
    assert torch.equal(found, generate(pipe, **ROLLING)[:, :, :3])


ENGAGED = {
    "SinkRecent": Accel(cache=SinkRecent(2, 1)),
    "RollingRebased": Accel(cache=RollingRebased(2, 1)),
    "TempCache": Accel(cache=TempCache(0.3, budget="12 frames")),
    "AnnSA": Accel(selection=AnnSA(0.3, min_past=0)),
    "AnnCA": Accel(prompt=AnnCA(bits=4, tables=1)),
    "PadCollapse": Accel(prompt=PadCollapse()),
    "FrameWindow": Accel(window=FrameWindow(frames=4)),
    "together": Accel(cache=RollingRebased(4, 1), selection=AnnSA(0.3, min_past=0), prompt=AnnCA(bits=4, tables=1)),
}


@pytest.mark.parametrize("name", ENGAGED)
def test_techniques_engage_in_a_rolling_window(pipe, name):
    given = {**ROLLING, "num_frames": 97, "height": 64, "width": 64}
    dense = generate(pipe, **given)
    with ENGAGED[name](pipe) as run:
        found = generate(pipe, **given)
        again = generate(pipe, **given)
    assert torch.isfinite(found).all()
    assert torch.equal(found, again)
    assert all(counts.engaged for counts in run.report().slots.values())
    far = distance(found, dense)
    assert far <= 1e-4 if name == "PadCollapse" else far > 1e-4


def test_prompt_tokens_are_chosen_for_every_window(pipe, monkeypatch):
    chosen, choose = [], AnnCA._kept
    monkeypatch.setattr(AnnCA, "_kept", lambda self, q, prompt: chosen.append(q.shape[1]) or choose(self, q, prompt))
    with Accel(prompt=AnnCA(bits=4, tables=1))(pipe):
        generate(pipe, **ROLLING)
    frames = [tokens // TOKENS for tokens in chosen[:: pipe.transformer.config.num_layers]]
    # windows that grow; then clean pass and window by turns, and of the last ones, in which no block is new, the first
    assert frames == [1, 3, 5, 1, 6, 2, 4, 2, 2]


def test_a_rebased_sink_lies_before_the_window(pipe):
    """As published: the sink, the newest frames, the window, without a gap between their positions."""
    with Accel(cache=RollingRebased(2, 2))(pipe) as run:
        later, moved, kept = run.later, [], []
        run.later = lambda k, frames: moved.append(frames) or later(k, frames)

        def note(*_):
            kept.append({memory.count // TOKENS for memory in run._memories.values()})

        generate(pipe, **ROLLING | {"num_frames": 45}, callback_on_step_end=note)
    assert kept[W - 1 :] == [{0}, {2}, {4}, {4}, {4}, {4}]
    assert sorted(set(moved)) == [2, 4, 6]  # 2 frames a block: of 6, 8 and 10 that were finished, 4 stay


EXACT = {
    "budget": Accel(cache=TempCache(threshold=None)),
    "sink": Accel(cache=RollingRebased(recent_frames=None)),
    "reuse": Accel(reuse=FlashBlock(refresh=1)),
    "selection": Accel(selection=AnnSA(density=1.0)),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_settings_are_dense(pipe, name):
    with EXACT[name](pipe):
        found = generate(pipe, **ROLLING)
    assert distance(found, generate(pipe, **ROLLING)) <= 1e-5


def test_reuse_over_steps_is_refused_before_anything_is_computed(pipe):
    with Forwards(pipe) as seen, Accel(reuse=FlashBlock(refresh=2))(pipe) as run:
        with pytest.raises(UnsupportedError, match=r"FlashBlock .* others at every forward: leave reuse out"):
            generate(pipe, **ROLLING)
        generate(pipe, sampler="few_step", num_inference_steps=4, num_frames=41)  # the pipeline is free again
    assert run.report().slots["reuse"].engaged
    assert seen[0][0] == 2


def test_a_budget_has_room_for_the_window(pipe):
    with (
        Accel(cache=TempCache(0.3, budget="6 frames", recent_frames=2))(pipe),
        pytest.raises(ValueError, match="6 fra"),
    ):
        generate(pipe, **ROLLING)


def test_windows_that_repeat_are_replayed(launched):  # noqa: F811
    pipe, given = tiny_pipeline(), {**ROLLING, "num_frames": 97}
    accel = Accel(cache=SinkRecent(2, 1))
    with accel(pipe):
        expected = generate(pipe, **given)
    with accel(pipe) as run:
        found = generate(pipe, **given, graphs=True)
    assert distance(found, expected) <= 1e-5
    assert run.replayed > 10


def test_it_is_saved_with_the_pipeline(pipe, tmp_path):
    own = tiny_pipeline("rolling")
    assert own.config.sampler == "rolling"
    found = own(PROMPT, generator=seed(), **SETTINGS | {"frames_per_block": 2, "num_inference_steps": W}).frames
    assert torch.equal(found, generate(pipe, **ROLLING))
    assert own.guidance_scale == 1
