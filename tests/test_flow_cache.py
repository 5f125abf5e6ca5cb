"""FlowCache skips forwards by how far a block's latents moved (arXiv 2602.10825); RKV keeps keys unlike others."""

from dataclasses import replace

import pytest
import torch
from test_scored_papers import look
from tiny import tiny_pipeline
from torch.nn.functional import cosine_similarity

from diffaccel import RKV, Accel, FlowCache, Grid, NotEngagedError, Run, UnsupportedError
from diffaccel.pipelines.loading import load
from diffaccel.reuse.flow_cache import change

GRID, STEPS = Grid(1, 2, 3), 12
CALL = {"height": 32, "width": 48, "num_frames": 33, "num_inference_steps": STEPS, "output_type": "latent"}
PROMPTS = ["a red circle moves left", "a blue square moves up"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def generate(pipe, accel, prompts=PROMPTS, **changes):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with accel(pipe) as run:
        return pipe(prompts, generator=generators, guidance_scale=2.0, **CALL | changes).frames, run


def steps_of(run, moves, block=0, start=1.0, text=None, steps=STEPS):
    """Which forwards are made, by their number of a block whose latents grow by such shares; and what each gave."""
    made, gave, size = [], [], torch.full((2, 4), start)
    for step in range(steps):
        size = size * (1 + torch.as_tensor(moves[step - 1] if step else 0.0).expand(2)[:, None])
        with run.at(block=block, start=block, step=step, steps=steps):
            run.enter(GRID, None, None, None)
            run.prepare_prompt(text if text is not None else TEXT)
            gave.append(run.forward(size, lambda step=step, size=size: (made.append(step), (size.clone(),))[1])[0])
            run.leave()
    return made, gave


TEXT = torch.zeros(1, 2, 3)


def begun(policy):
    run = Run(Accel(reuse=policy), causal=True)
    run.begin(frames=4)
    return run


@pytest.mark.parametrize(
    ("threshold", "warmup", "made"),
    [
        (0.0, 1, [*range(12)]),
        (0.05, 1, [*range(12)]),
        (0.15, 1, [0, 2, 4, 6, 8, 10, 11]),
        (0.25, 1, [0, 3, 6, 9, 11]),
        (0.25, 4, [0, 1, 2, 3, 6, 9, 11]),
        (9.0, 5, [0, 1, 2, 3, 4, 11]),
    ],
)
def test_a_step_is_skipped_while_the_sum_of_changes_is_small(threshold, warmup, made):
    """Every step changes the latents by a tenth; a computed one starts the sum anew, the last is always computed."""
    found, gave = steps_of(begun(FlowCache(threshold, warmup)), [0.1] * STEPS)
    assert found == made
    for step, out in enumerate(gave):
        last = max(one for one in made if one <= step)
        torch.testing.assert_close(out, gave[last], rtol=0, atol=0)


def test_changes_are_relative_and_the_video_that_moved_most_decides():
    x, y = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    expected = torch.stack([(b - a).abs().mean() / a.abs().mean() for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(change(x, y), expected)
    one = steps_of(begun(FlowCache(0.25, 1)), [torch.tensor([0.0, 0.2])] * STEPS)[0]
    assert one == steps_of(begun(FlowCache(0.25, 1)), [0.2] * STEPS)[0]
    assert one != steps_of(begun(FlowCache(0.25, 1)), [0.1] * STEPS)[0]


@pytest.mark.parametrize("what", ["block", "past", "prompt", "size"])
def test_nothing_is_taken_over_from_what_changed(what):
    run = begun(FlowCache(9.0, 1))
    x, text = torch.ones(2, 4), TEXT

    def forward(step, block=0):
        made = []
        with run.at(block=block, start=block, step=step, steps=STEPS):
            run.enter(GRID, None, None, None)
            run.prepare_prompt(text)
            run.forward(x, lambda: (made.append(step), (x,))[1])
        return bool(made)

    assert forward(0)
    assert not forward(1)
    if what == "past":
        run.memory(run.site(0, "self")).version += 1
    elif what == "prompt":
        text = TEXT + 1
    elif what == "size":
        x = torch.ones(3, 4)
    assert forward(2, block=what == "block")


def test_the_clean_pass_is_computed_and_a_step_that_was_left_out_is_not_bridged():
    run = begun(FlowCache(9.0, 1))
    for step, phase, expected in (
        (0, "denoise", 1),
        (1, "denoise", 0),
        (3, "denoise", 1),
        (4, "denoise", 0),
        (10, "denoise", 1),
        (11, "denoise", 1),
        (STEPS, "clean", 1),
    ):
        made = []
        with run.at(block=0, start=0, step=step, steps=STEPS, phase=phase):
            run.enter(GRID, None, None, None)
            run.prepare_prompt(TEXT)
            run.forward(torch.ones(1, 4), lambda made=made: (made.append(1), (torch.ones(1),))[1])
        assert len(made) == expected, step


def test_forwards_that_are_skipped_are_not_made_and_counted(pipe):
    made = []
    handle = pipe.transformer.blocks[0].register_forward_hook(lambda *_: made.append(1))
    _, dense = generate(pipe, Accel())
    every = len(made)
    made.clear()
    found, run = generate(pipe, Accel(reuse=FlowCache(0.2, 2)))
    handle.remove()
    counts, layers = run.report().slots["reuse"], len(pipe.transformer.blocks)
    assert 0 < counts.skipped == layers * (every - len(made))
    assert counts.calls == layers * every
    assert (
        0
        < counts.keys_read
        < counts.keys_total
        == sum(layer.keys_total for layer in dense.report().layers if layer.part == "self")
    )
    assert torch.isfinite(found).all()
    assert counts.bytes > 0


def test_few_steps_are_refused_before_anything_is_computed(pipe):
    made = []
    handle = pipe.transformer.blocks[0].register_forward_hook(lambda *_: made.append(1))
    with pytest.raises(UnsupportedError, match="fewer than 10 none do; got 9: take FlashBlock"):
        generate(pipe, Accel(reuse=FlowCache()), num_inference_steps=9)
    handle.remove()
    assert not made
    with pytest.raises(NotEngagedError, match=r"no step changed its latents by less than .* threshold=1e-06"):
        generate(pipe, Accel(reuse=FlowCache(1e-6)), num_inference_steps=10)
    with pytest.raises(NotEngagedError, match="with warmup=11 and the last one, all of 12 steps are computed"):
        generate(pipe, Accel(reuse=FlowCache(1.0, 11)))


def test_guidance_branches_skip_the_same_steps_each_with_its_own_output(pipe):
    where = []

    class Spy(FlowCache):
        def forward(self, latents, site, run, compute):
            return super().forward(
                latents, site, run, lambda: (where.append((site.branch, site.block, site.step)), compute())[1]
            )

    generate(pipe, Accel(reuse=Spy(0.2, 2)))
    cond, uncond = ([at[1:] for at in where if at[0] == branch] for branch in ("cond", "uncond"))
    assert cond == uncond
    assert len(cond) < 3 * (STEPS + 1)


@pytest.mark.parametrize(("threshold", "least", "most"), [(0.05, 0.08, 0.1), (0.15, 0.3, 0.25)])
def test_on_the_bundled_model_what_it_skips_costs_little(threshold, least, most):
    pipe = load("tiny-world", device="cpu")
    call = {"height": 128, "width": 128, "num_frames": 25, "num_inference_steps": 20, "guidance_scale": 1.0}

    def video(accel):
        with accel(pipe) as run:
            generator = torch.Generator().manual_seed(1)
            made = pipe(
                "a large red circle moves left over a teal checkerboard",
                **call,
                generator=generator,
                output_type="latent",
            )
        return made.frames, run

    dense, _ = video(Accel())
    found, run = video(Accel(reuse=FlowCache(threshold)))
    counts = run.report().slots["reuse"]
    assert counts.skipped > least * counts.calls
    assert (found - dense).square().mean().sqrt() < most * dense.std()


# -- RKV -------------------------------------------------------------------------------------------------------------


def test_what_a_key_is_worth_is_attention_less_likeness():
    seen = look()
    seen.there[0, 1, 7:10] = False
    found, keys = RKV(balance=0.3, pool=1).score(seen), seen.k.transpose(1, 2)
    alike = cosine_similarity(keys[:, :, :, None], keys[:, :, None], dim=-1)  # all pairs
    alike.diagonal(dim1=2, dim2=3).zero_()
    there = seen.there[:, :, None] & seen.there[:, :, :, None]
    mean = (alike * there).sum(-1) / seen.there.sum(-1, keepdim=True)
    red = mean.masked_fill(~seen.there, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, 0.3 * seen.p.mean(2) - 0.7 * red, atol=1e-6, rtol=1e-4)
    assert red.std() > 0.005


def test_of_keys_that_are_alike_the_odd_one_is_worth_most():
    seen = look()
    k = torch.randn(1, 1, seen.k.shape[2], seen.k.shape[3]).expand_as(seen.k).clone()
    k[:, 5] = -k[:, 5]
    score = RKV(balance=0.0).score(replace(seen, k=k))
    assert (score.argmax(-1) == 5).all()
