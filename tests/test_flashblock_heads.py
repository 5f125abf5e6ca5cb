"""FlashBlock head by head: schedules from drift, partials of some heads, what a selection leaves out, calibration."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from oracle import assert_within, attention64
from test_flashblock import GRID, go
from tiny import tiny_pipeline

from diffaccel import Accel, AnnSA, FlashBlock, Grid, KnobError, Run, Site, TempCache, UnsupportedError
from diffaccel.calibrate import calibrate, frames_wanted, summary
from diffaccel.kernel import KERNELS, Partial, merge
from diffaccel.profile import Model, Profile
from diffaccel.reuse.history import History, index, without
from diffaccel.reuse.schedule import by_share, by_thresholds, drift

HEADS, DIM, SCALE = 2, 16, 0.25
F32 = torch.float32


def profile(steps=4, layers=1, heads=HEADS, seed=0, **tables):
    """Drift of every head from every earlier step; the later and the longer ago the more, with some noise."""
    draw = np.random.default_rng(seed)
    shape = (steps, steps, layers, heads)
    found = {name: draw.random(shape) for name in ("cos", "lse", "error")} | tables
    axes = {name: tuple(map(float, range(1, steps + 1))) for name in ("step", "gap")}
    size = {"width": 48, "height": 32, "frames": 33, "steps": steps}
    model = Model("WanTransformer3DModel", layers, heads, DIM, "0")
    return Profile("FlashBlock", model, size, 1, {}, {}, axes, found)


def policy(path, computed, **knobs):
    """FlashBlock that computes these heads at every step from 1 on: `computed` (steps, heads), True or False."""
    computed = np.array(computed, bool)
    cos = np.where(computed, -1.0, 1.0)[:, None, None].repeat(len(computed), 1)  # (step, gap, layer, head)
    profile(*cos.shape[1:], cos=cos, lse=np.zeros_like(cos)).save(path)
    return FlashBlock(profile=str(path), min_past=0, **knobs)


# -- schedules -------------------------------------------------------------------------------------------------------


def test_drift_is_read_by_the_step_that_reuses_and_the_one_that_was_computed():
    found = profile(steps=4)
    cost = drift(found, "error", 4)
    for t in range(1, 5):
        for s in range(t):
            assert np.allclose(cost[s, t], found.tables["error"][t - 1, t - s - 1])
    assert np.isinf(cost[2, 2]).all()
    assert np.isinf(cost[3, 1]).all()


def test_steps_of_another_number_lie_between_those_measured():
    found, cost = profile(steps=5), drift(profile(steps=5), "error", 3)  # steps 0, 1, 2 lie at 0, 2, 4
    assert np.allclose(cost[0, 1], found.tables["error"][1, 1])
    assert np.allclose(cost[1, 2], found.tables["error"][3, 1])
    assert np.allclose(cost[2, 3], found.tables["error"][4, 0])  # and the clean pass after all


def test_thresholds_are_those_of_the_drift_since_a_head_was_last_computed():
    cos, lse = np.ones((4, 4, 1, 2)), np.zeros((4, 4, 1, 2))
    cos[1, 1, 0, 0] = 0.8  # head 0 at step 2, last computed at step 0
    lse[3, 1, 0, 0] = 0.2  # and at step 4, the clean pass, since step 2
    cos[2, 2, 0, 1] = 0.89  # head 1 at step 3, since step 0: above 0.85 and below 0.9
    found = profile(steps=4, cos=cos, lse=lse)
    expected = [[1, 1], [0, 0], [1, 0], [0, 0], [1, 0]]
    assert by_thresholds(found, 4, (0.85,), 0.05)[:, 0].astype(int).tolist() == expected
    expected[3][1] = 1
    assert by_thresholds(found, 4, (0.85, 0.85, 0.9), 0.05)[:, 0].astype(int).tolist() == expected
    assert by_thresholds(found, 4, (1.0,), 0.0)[:, 0, 0].astype(int).tolist() == [1, 0, 1, 0, 1]  # nothing moved


def total(cost, computed):
    """What a schedule (steps, layers, heads) loses."""
    loss = 0.0
    for layer, head in np.ndindex(*computed.shape[1:]):
        last = 0
        for step in range(1, len(computed)):
            last = step if computed[step, layer, head] else last
            loss += 0.0 if last == step else cost[last, step, layer, head]
    return loss


@pytest.mark.parametrize("budget", [2, 3, 5, 6, 8])
def test_no_other_schedule_of_the_same_share_loses_less(budget):
    steps = 4
    found = profile(steps=steps, seed=budget)
    cost = drift(found, "error", steps) ** 2
    schedule = by_share(found, steps, budget / (HEADS * steps))[:steps]
    assert schedule[0].all()
    assert schedule.sum() == budget
    every = [
        [frozenset(later) for n in range(steps) for later in combinations(range(1, steps), n)] for _ in range(HEADS)
    ]
    best = np.inf
    for choice in product(*every):
        if sum(len(later) + 1 for later in choice) == budget:
            computed = np.zeros((steps, 1, HEADS), bool)
            computed[0] = True
            for head, later in enumerate(choice):
                computed[list(later), 0, head] = True
            best = min(best, total(cost, computed))
    # a price that is one for all finds the best where gains fall with their number; by one head's step it may miss
    assert total(cost, schedule) <= best + cost[np.isfinite(cost)].max() * 0.35


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.8, 1.0])
def test_the_share_is_met(share):
    found = profile(steps=8, layers=3, heads=6)
    schedule = by_share(found, 8, share)[:8]
    assert schedule.mean() == pytest.approx(max(share, 1 / 8), abs=1 / schedule.size)


def test_steady_heads_are_computed_less_often():
    error = np.full((8, 8, 1, 2), 0.5)
    error[..., 1] = 0.001
    counts = by_share(profile(steps=8, error=error), 8, 0.5)[:8].sum((0, 1))
    assert counts.tolist() == [7, 1]


# -- what is held ----------------------------------------------------------------------------------------------------


def partials(count=1, heads=HEADS):
    found = [Partial(torch.randn(1, 5, heads, DIM), torch.randn(1, 5, heads)) for _ in range(count)]
    return found[0] if count == 1 else found


def test_two_computations_are_followed_damped_and_no_further_than_they_lie_apart():
    first, second = partials(2)
    history = History()
    history.replace((1, 1, "all"), first, 1.0, True)
    assert history.recall(0.9, 0.5).out is first.out  # one alone says nothing
    history.replace((1, 1, "all"), second, 0.8, True)
    for noise, step in ((0.7, 0.5), (0.6, 1.0), (0.1, 1.0), (0.8, 0.0)):
        found = history.recall(noise, 0.5)
        for got, a, b in zip(found, first, second, strict=True):
            torch.testing.assert_close(got, b + 0.5 * step * (b - a), atol=1e-6, rtol=1e-5)
    assert not history.holds((1, 2, "all"))
    history.replace((1, 2, "all"), first, 0.5, True)  # of another cache: what was before is not
    assert history.moved is None


@pytest.mark.parametrize("heads", [None, (0,), (0, 1)], ids=str)
def test_a_query_that_had_or_has_no_key_is_not_extrapolated(heads):
    first, second = (Partial(x.out, x.lse.clone()) for x in partials(2))
    first.lse[:, 0], second.lse[:, 1] = -torch.inf, -torch.inf
    history, expected = History(), second.lse.clone()
    history.replace((1, 1, "all"), Partial(*(x.clone() for x in first)), 1.0, True)
    if heads is None:
        history.replace((1, 1, "all"), second, 0.8, True)
    else:
        history.update(heads, Partial(*(x[:, :, heads] for x in second)), 0.8, True)
        expected[:, :, len(heads) :] = first.lse[:, :, len(heads) :]
    found = history.recall(0.7, 1.0)
    assert torch.equal(found.lse[:, :2], expected[:, :2])
    assert not found.out.isnan().any()


def test_heads_are_followed_each_from_its_own_computations():
    first, second = partials(2)
    history = History()
    history.replace((1, 1, "all"), Partial(*(x.clone() for x in first)), 1.0, True)
    history.update((1,), Partial(*(x[:, :, 1:] for x in second)), 0.8, True)
    found = history.recall(0.7, 1.0)
    for got, a, b in zip(found, first, second, strict=True):
        torch.testing.assert_close(got[:, :, 0], a[:, :, 0])
        torch.testing.assert_close(got[:, :, 1], b[:, :, 1] + 0.5 * (b - a)[:, :, 1], atol=1e-6, rtol=1e-5)


def test_neighbouring_heads_are_a_view():
    x = torch.randn(1, 3, 6, 2)
    assert x[:, :, index((2, 3, 4), x.device)].data_ptr() == x[:, :, 2:].data_ptr()
    assert torch.equal(x[:, :, index((0, 4), x.device)], x[:, :, [0, 4]])


def test_without_undoes_the_merge():
    one, other = partials(2)
    one = Partial(one.out, one.lse.index_fill(1, torch.tensor([0]), -torch.inf).index_fill(1, torch.tensor([1]), -30.0))
    found = without(merge([one, other]), other)
    assert_within(found.out[:, 2:], one.out[:, 2:].double(), F32, inputs=40)
    assert_within(found.lse[:, 2:], one.lse[:, 2:].double(), F32, inputs=40)
    again = merge([found, other])
    assert_within(again.out, merge([one, other]).out.double(), F32, inputs=8)  # also where nothing is left
    assert not again.out.isnan().any()


# -- in attention ----------------------------------------------------------------------------------------------------


def tensors():
    return [torch.randn(1, GRID.tokens, HEADS, DIM) for _ in range(3)]


def started(accel):
    run = Run(accel, causal=True)
    run.begin(frames=6)
    first = tensors()
    go(run, 4, 0, *first, phase="clean")
    return run, first


def parts64(q_outside, first, q, k, v):
    """Outside and inside, merged in fp64."""
    (out, lse), (out_in, lse_in) = (
        attention64(q_outside, *first[1:], scale=SCALE),
        attention64(q, k, v, scale=SCALE),
    )
    both = torch.logaddexp(lse, lse_in)
    return (lse - both).exp()[..., None] * out + (lse_in - both).exp()[..., None] * out_in


def test_some_heads_are_computed_and_the_others_are_those_of_their_last_step(tmp_path):
    run, first = started(
        Accel(reuse=policy(tmp_path / "fb.json", [[0, 1], [0, 0], [1, 0], [1, 1]]), kernel="reference")
    )
    steps, last = [tensors() for _ in range(4)], [0, 0]
    for step, computed in enumerate(([1, 1], [0, 1], [0, 0], [1, 0])):
        found = go(run, step, 1, *steps[step])
        last = [step if now else before for now, before in zip(computed, last, strict=True)]
        for head in range(HEADS):
            expected = parts64(steps[last[head]][0], first, *steps[step])
            assert_within(found[:, :, head], expected[:, :, head], F32, inputs=4)
    assert run.slots["reuse"].skipped == pytest.approx(0.5 + 1 + 0.5)
    # keys of the past and its own, of the past only for heads that were computed
    assert float(run.slots["reuse"].keys_read) == 6 + 4 * 6 + 6 * (2 + 1 + 0 + 1) / 2


def test_a_cache_that_changed_is_computed_anew(tmp_path):
    run, first = started(Accel(reuse=policy(tmp_path / "fb.json", [[0, 0]] * 4), kernel="reference"))
    q, k, v = tensors()
    go(run, 0, 1, q, k, v)
    run.memory(run.site(0, "self")).version += 1
    q1 = torch.randn_like(q)
    assert_within(go(run, 1, 1, q1, k, v), parts64(q1, first, q1, k, v), F32, inputs=4)
    assert run.slots["reuse"].skipped == 0


def test_queries_that_stand_still_lose_nothing(tmp_path):
    for extrapolate in (0.0, 1.0):
        made = policy(tmp_path / "fb.json", [[1, 0], [0, 0], [0, 1], [1, 1]], extrapolate=extrapolate)
        run, first = started(Accel(reuse=made, kernel="reference"))
        q, k, v = tensors()
        for step in range(4):
            assert_within(go(run, step, 1, q, k, v), parts64(q, first, q, k, v), F32, inputs=4)


def test_what_is_selected_is_computed_and_the_rest_reused():
    accel = Accel(
        selection=AnnSA(0.3, groups="place", summaries=False, dense_steps=0, min_past=0, sink_frames=0),
        reuse=FlashBlock(refresh=(0,), min_past=0, residual=True),
        kernel="reference",
    )
    run, first = Run(accel, causal=True), []
    run.begin(frames=30)
    for block in range(8):
        first.append(tensors())
        go(run, 4, block, *first[-1], phase="clean")
    past = [torch.cat(x, 1) for x in zip(*first, strict=True)]
    q, k, v = tensors()
    assert_within(go(run, 0, 8, q, k, v), parts64(q, past, q, k, v), F32, inputs=4)  # everything is computed
    assert_within(go(run, 1, 8, q, k, v), parts64(q, past, q, k, v), F32, inputs=8)  # a part is, and nothing moved
    q1 = q + 0.5 * torch.randn_like(q)
    site = run.site(0, "self")
    chosen = accel.selection.plan(q1, run.memory(site).past()[0].entries, site)
    listed = chosen.blocks.listed(-(-48 // chosen.blocks.key_block)).repeat_interleave(chosen.blocks.key_block, 3)
    found = go(run, 2, 8, q1, k, v)
    for head, query in np.ndindex(HEADS, GRID.tokens):
        block = query // chosen.blocks.query_block
        some = listed[0, head, block, :48]
        pieces = [
            attention64(
                at[:, query : query + 1, head : head + 1], *(x[:, keep, head : head + 1] for x in kv), scale=SCALE
            )
            for at, keep, kv in (
                (q1, some, past[1:]),
                (q, ~some, past[1:]),  # from step 0
                (q1, torch.ones(GRID.tokens, dtype=torch.bool), (k, v)),
            )
        ]
        assert 0 < some.sum() < 48
        lse = torch.stack([lse for _, lse in pieces]).logsumexp(0)
        expected = sum((one - lse).exp()[..., None] * out for out, one in pieces)
        assert_within(found[:, query, head], expected[:, 0, 0], F32, inputs=8)
    run.memory(site).version += 1  # what the rest was computed from has changed
    assert_within(go(run, 3, 8, q1, k, v), parts64(q1, past, q1, k, v), F32, inputs=8)
    assert run.slots["reuse"].skipped == 2


def test_a_past_too_short_to_choose_from_is_read_once_and_nothing_is_reused():
    accel = Accel(
        selection=AnnSA(0.3, summaries=False, dense_steps=0, min_past=4),
        reuse=FlashBlock(refresh=(0,), min_past=0, residual=True),
        kernel="reference",
    )
    run, first = started(accel)
    for step in range(2):
        q, k, v = tensors()
        assert_within(go(run, step, 1, q, k, v), parts64(q, first, q, k, v), F32, inputs=4)
    assert (run.slots["reuse"].skipped, run.slots["reuse"].engaged) == (0, False)
    assert float(run.slots["reuse"].keys_read) == 6 + 2 * 12  # the clean pass of the first block, then both


# -- knobs and models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"reuse": {"residual": True}}, "there is no selection"),
        ({"reuse": {"residual": True}, "selection": AnnSA()}, "summaries=False"),
        ({"reuse": {"profile": True}, "selection": AnnSA()}, "single heads"),
        ({"reuse": {"profile": True}, "cache": TempCache(heads="per_head")}, "single heads"),
    ],
    ids=["no selection", "means", "selection", "per head"],
)
def test_what_does_not_go_together_is_refused(others, message, tmp_path):
    knobs = others.pop("reuse")
    if "profile" in knobs:
        profile().save(tmp_path / "fb.json")
        knobs = {"profile": str(tmp_path / "fb.json")}
    with pytest.raises(KnobError, match=message):
        Accel(reuse=FlashBlock(**knobs), **others)


@pytest.fixture(scope="module")
def measured():
    pipe = tiny_pipeline(layers=3)
    call = {"prompts": ["a red circle"], "width": 48, "height": 32, "num_frames": 49, "num_inference_steps": 4}
    return pipe, calibrate(pipe, FlashBlock(min_past=1), **call, guidance_scale=2.0)


def test_calibration_measures_how_far_the_outside_moved(measured):
    pipe, found = measured
    assert found.method == "FlashBlock"
    assert found.axes == {"step": (1, 2, 3, 4), "gap": (1, 2, 3, 4)}  # the clean pass is the fourth
    assert found.tables["cos"].shape == (4, 4, 3, pipe.transformer.config.num_attention_heads)
    for name in ("cos", "lse", "error"):
        table = found.tables[name]
        assert np.isfinite(table).all()
        assert np.allclose(table[0, 1:], table[0, :1])  # step 1 has one step before it
    assert (found.tables["cos"] <= 1 + 1e-6).all()
    assert (found.tables["error"] > 0).all()
    assert len(list(summary(found))) == 5


def test_what_it_measured_is_what_reusing_costs(measured):
    """The error of one head at one step, by generating with the attention of that call written out."""
    pipe, found = measured
    seen = {}

    class Listen(FlashBlock):
        def answer(self, site):
            return "together" if site.start < self.min_past * site.grid.frames else "store"

        def saw(self, site, outside, inside):
            seen.setdefault((site.branch, site.layer, site.block), []).append((outside, inside))

    with Accel(reuse=Listen(min_past=1))(pipe) as run:
        pipe(
            "a red circle", width=48, height=32, num_frames=49, num_inference_steps=4, guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
        run.slots["reuse"].engaged = True  # it only listens
    errors = []
    for (_, layer, _), steps in seen.items():
        if layer == 1:
            exact = KERNELS["reference"] and merge(list(steps[3])).out.double()
            stale = merge([steps[1][0], steps[3][1]]).out.double()
            errors.append((((stale - exact) ** 2).sum(-1).mean((0, 1)) / (exact**2).sum(-1).mean()).sqrt())
    expected = torch.stack(errors).mean(0).numpy()
    assert np.allclose(found.tables["error"][2, 1, 1], expected, rtol=1e-3)  # step 3, two steps after step 1


@pytest.mark.parametrize("knobs", [{"share": 0.5}, {"share": 0.5, "extrapolate": 0.5}, {"cos": -1.0, "lse": 0.15}])
def test_a_profile_says_which_heads_are_computed(measured, knobs, tmp_path):
    pipe, found = measured
    found.save(tmp_path / "fb.json")
    reuse = FlashBlock(profile=str(tmp_path / "fb.json"), min_past=1, **knobs)
    assert frames_wanted(pipe, reuse, 1) > 1
    with Accel(reuse=reuse)(pipe) as run:
        pipe("a red circle", width=48, height=32, num_frames=49, num_inference_steps=4, guidance_scale=2.0)
    counts = run.report().slots["reuse"]
    table = by_share(found, 4, 0.5) if "share" in knobs else by_thresholds(found, 4, (-1.0,), 0.15)
    assert 0 < table[1:4].mean() < 1
    blocks = 3  # of 5: the first has no past, and the second one of a frame
    assert counts.skipped == pytest.approx(float((~table[:4]).mean(2).sum()) * blocks * 2, abs=0.01)


def test_a_profile_of_another_model_is_refused(measured, tmp_path):
    measured[1].save(tmp_path / "fb.json")
    with pytest.raises(UnsupportedError, match="of another model"):
        Accel(reuse=FlashBlock(profile=str(tmp_path / "fb.json"))).apply(tiny_pipeline(layers=2))


def test_the_first_step_computes_every_head(tmp_path):
    made = policy(tmp_path / "fb.json", [[0, 0]] * 4)
    assert made.answer(Site(0, "self", 0, 4, 1, 3, "denoise", "cond", Grid(1, 1, 1))) == "store"
    assert made.answer(Site(0, "self", 1, 4, 1, 3, "denoise", "cond", Grid(1, 1, 1))) == ()
    assert made.answer(Site(0, "self", 4, 4, 1, 3, "clean", "cond", Grid(1, 1, 1))) == "store"
