"""Caches that go by a profile: what is measured, against the papers' formulas, and what they make of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from profiles import made, profile_of
from test_scored_papers import look
from tiny import tiny_pipeline, tiny_transformer
from typer.testing import CliRunner

from diffaccel import (
    Accel,
    CompressKV,
    DuoAttention,
    Grid,
    KnobError,
    NotEngagedError,
    RazorAttention,
    TriAttention,
    UnsupportedError,
)
from diffaccel import calibrate as calibration
from diffaccel.cache.look import probes
from diffaccel.cache.share_out import whole_first
from diffaccel.calibrate import calibrate, frames_wanted, summary
from diffaccel.cli import app
from diffaccel.gates import Gated, GateLearner
from diffaccel.profile import Profile
from diffaccel.rotary import rotate

CALIBRATED = [TriAttention, RazorAttention, DuoAttention, CompressKV]
every = pytest.mark.parametrize("technique", CALIBRATED, ids=lambda technique: technique.__name__)
PROMPT = "a red circle moves left"
CALL = {"width": 48, "height": 32, "num_frames": 49, "num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def generate(pipe, accel, **changes):
    with accel(pipe) as run:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, **CALL | changes, generator=generator, output_type="latent").frames, run


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr("diffaccel.gates.ROUNDS", 5)


# -- profiles --------------------------------------------------------------------------------------------------------


@every
def test_from_calibration_to_a_video(pipe, technique, tmp_path, few_rounds):
    profile = calibrate(pipe, technique(), prompts=[PROMPT], **CALL)
    assert set(profile.tables) == set(technique.tables)
    assert all(table.shape[-2:] == (2, 2) for table in profile.tables.values())
    profile.save(tmp_path / "p.json")
    knobs = {"budget": "5 frames", "recent_frames": 2, "profile": str(tmp_path / "p.json")}
    _, run = generate(pipe, Accel(cache=technique(**knobs)))
    assert run.report().slots["cache"].engaged
    assert list(summary(profile))
    other = tiny_pipeline(layers=3)
    with pytest.raises(UnsupportedError, match=r"profile is of another model \(Wan.*calibrate this one"):
        Accel(cache=technique(**knobs)).apply(other)


@every
def test_without_a_profile_it_says_how_to_make_one(pipe, technique):
    name = technique.__name__.lower()
    with pytest.raises(UnsupportedError, match=f"make a profile with diffaccel calibrate --method {name} and pass it"):
        Accel(cache=technique(budget="5 frames")).apply(pipe)
    Accel(cache=technique(**technique.exact)).apply(pipe).remove(check=False)


@every
def test_what_is_generated_while_it_is_calibrated_is_dense(pipe, technique, few_rounds, monkeypatch):
    videos = []
    call = type(pipe).__call__

    def keeping(self, **given):
        videos.append(call(self, **given))
        return videos[-1]

    monkeypatch.setattr(type(pipe), "__call__", keeping)
    calibrate(pipe, technique(), prompts=[PROMPT], **CALL)
    monkeypatch.undo()
    assert torch.equal(videos[0].frames, generate(pipe, Accel())[0])


@every
def test_what_cannot_be_measured_is_refused(pipe, technique):
    with pytest.raises(KnobError, match=r"got profile='.*: leave cache.profile out"):
        calibrate(pipe, made(technique), prompts=[PROMPT], **CALL)
    if technique is not TriAttention:
        with pytest.raises(NotEngagedError, match="no block had frames between the first and the newest"):
            calibrate(pipe, technique(), prompts=[PROMPT], **CALL | {"num_frames": 17})
    wanted = frames_wanted(pipe, technique(), 9)
    assert calibrate(pipe, technique(), prompts=[PROMPT], **CALL | {"num_frames": wanted}).tables


def test_on_the_command_line(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    size = ["--size", "48x32", "--frames", "49", "--steps", "2", "--device", "cpu", "--model", "model"]
    arguments = ["calibrate", PROMPT, "--method", "razorattention", "--set", "cache.recent_frames=2", *size]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "farthest: layer" in result.stdout
    profile = Profile.load("razorattention.json", "RazorAttention", (), ("reach",))
    assert (profile.knobs["recent_frames"], profile.shape["frames"]) == (2, 49)


# -- TriAttention ----------------------------------------------------------------------------------------------------


def turning(grid, start, dim):
    """Rotary tables of a block and how keys turn over frames: 4 channels each for time, rows and columns."""
    speed = torch.tensor([1.0, 0.1])
    t = torch.arange(start, start + grid.frames).repeat_interleave(grid.tokens_per_frame)
    y, x = torch.arange(grid.tokens_per_frame).div(grid.width, rounding_mode="floor"), torch.arange(6) % grid.width
    places = [t, y.repeat(grid.frames), x.repeat(grid.frames)]
    angles = torch.cat([place[:, None] * speed for place in places], 1).repeat_interleave(2, 1)[None, :, None]

    def later(k, frames):
        angle = torch.cat([frames * speed, torch.zeros(dim // 2 - 2)]).repeat_interleave(2)
        return rotate(k, angle.cos()[None, None, None], angle.sin()[None, None, None])

    return (angles.cos(), angles.sin()), later, speed


def tri_look(start=6, heads=2, dim=12, seed=0):
    """Keys before they are rotated, of all frames so far, and what is seen of them."""
    grid, generator = Grid(2, 2, 3), torch.Generator().manual_seed(seed)
    raw = torch.randn(1, (start + 2) * 6, heads, dim, generator=generator)
    tables, later, speed = turning(grid, start, dim)
    whole, _, _ = turning(Grid(start + 2, 2, 3), 0, dim)
    k, n = rotate(raw, *whole), raw.shape[1]
    one = replace(
        look(heads=heads), k=k, v=k, grid=grid, start=start, rotary=tables, later=later,
        q=rotate(torch.randn(1, 5, heads, dim, generator=generator), *(x[:, probes(grid, 5)] for x in tables)),
        columns={"token": torch.arange(n).expand(1, heads, -1)}, there=torch.ones(1, heads, n, dtype=torch.bool),
    )  # fmt: skip
    return one, raw, speed


def with_centres(monkeypatch, heads=2, pairs=6):
    random = np.random.default_rng(1)
    real, imag = random.normal(size=(2, pairs, 1, heads))
    tables = {"real": real, "imag": imag, "size": np.hypot(real, imag) + random.uniform(0, 1, real.shape)}
    monkeypatch.setattr(TriAttention, "table", lambda self, name: tables[name])
    return tables


def test_tri_attention_scores_are_the_papers(monkeypatch):
    tables, (one, raw, speed) = with_centres(monkeypatch), tri_look()
    found = TriAttention(horizon=4).score(one)[0]
    pairs = torch.view_as_complex(raw.unflatten(-1, (-1, 2)).contiguous())[0]  # (N, H, F)
    turns = torch.cat([speed, torch.zeros(4)])
    for head in range(2):
        centre = torch.complex(*(torch.tensor(tables[name][:, 0, head]).float() for name in ("real", "imag")))
        size = torch.tensor(tables["size"][:, 0, head]).float()
        for at in range(0, raw.shape[1], 5):
            k = pairs[at, head]
            amplitude, phase = centre.abs() * k.abs(), (centre * k.conj()).angle()
            distances = [7 + offset - at // 6 for offset in (1, 2, 4)]  # 7: the newest frame
            first = sum((amplitude * torch.cos(turns * d + phase)).sum() for d in distances) / 3
            expected = first + ((size - centre.abs()) * k.abs()).sum()
            torch.testing.assert_close(found[head, at], expected, atol=1e-4, rtol=1e-4)


def test_tri_attention_does_not_ask_what_else_is_kept(monkeypatch):
    """Where others take what is left for contiguous, a key scores by its own place and time."""
    with_centres(monkeypatch)
    one, _, _ = tri_look()
    whole, left = TriAttention().score(one), torch.tensor([0, 3, 11, 12, 25, 40, 47])
    some = replace(
        one, k=one.k[:, left], v=one.v[:, left], columns={"token": left.expand(1, 2, -1)}, there=one.there[..., left]
    )
    torch.testing.assert_close(TriAttention().score(some), whole[..., left])


def test_tri_attention_measures_queries_before_they_turned():
    one, _, _ = tri_look()
    places = probes(one.grid, 5)
    still = torch.view_as_complex(
        torch.randn(1, len(places), 2, 6, 2, generator=torch.Generator().manual_seed(3)).contiguous()
    )
    q = rotate(torch.view_as_real(still).flatten(-2), *(x[:, places] for x in one.rotary))
    found = TriAttention(probes=5).measure(replace(one, q=q))
    mean = still.mean((0, 1)).T
    torch.testing.assert_close(torch.complex(found["real"], found["imag"]), mean)
    torch.testing.assert_close(found["size"], still.abs().mean((0, 1)).T)
    assert (mean.abs() <= found["size"]).all()


def test_low_concentration_is_told(pipe):
    profile = Profile.load(profile_of(TriAttention), "TriAttention", TriAttention.axes, TriAttention.tables)
    size = profile.tables["size"]
    for share, low in ((0.9, False), (0.2, True)):
        tables = {"real": share * size, "imag": 0 * size, "size": size}
        lines = list(summary(replace(profile, tables=tables)))
        assert lines[0].startswith(f"concentration {share:.3f}")
        assert (len(lines) == 2 and "low: below 0.5 in 100% of the heads" in lines[-1]) is low


def test_tri_attention_refuses_a_family_that_does_not_say_how_keys_turn(monkeypatch):
    with_centres(monkeypatch)
    one, _, _ = tri_look()
    with pytest.raises(UnsupportedError, match="this model's family does not say how"):
        TriAttention().score(replace(one, later=None))


# -- heads that keep everything --------------------------------------------------------------------------------------


def test_razor_measures_attention_on_frames_that_the_others_would_lose():
    policy, one = RazorAttention(sink_frames=1, recent_frames=1), look(tokens=20)
    one = replace(one, grid=Grid(2, 2, 2), start=3)  # frames 0 to 4, the block's are 3 and 4
    expected = one.p[0, :, :, 4:8].sum(-1).mean(1)  # of frame 1 alone
    torch.testing.assert_close(policy.measure(one)["reach"], expected)
    assert policy.measure(replace(one, start=2)) == {}


@pytest.mark.parametrize("technique", [RazorAttention, DuoAttention])
def test_the_heads_that_reach_farthest_keep_everything(pipe, technique, monkeypatch):
    ranks = np.array([[0.1, 0.9], [0.5, 0.2]])
    monkeypatch.setattr(technique, "table", lambda self, name: ranks)
    shares = [torch.tensor(ranks[layer]).expand(2, -1) for layer in range(2)]
    available = [((20, 20), (20, 20))] * 2
    policy = technique(share=0.5, profile=profile_of(technique))
    assert policy.allocate(shares, available, 20) == [((0, 20), (0, 20)), ((20, 0), (20, 0))]
    bounded = replace(policy, budget="12 frames")
    assert bounded.allocate(shares, available, 12) == [((4, 20), (4, 20)), ((20, 4), (20, 4))]
    assert bounded.allocate(shares, available, 6) == [((1, 20), (1, 20)), ((1, 2), (1, 2))]


def test_heads_that_come_first_keep_all_as_long_as_that_fits():
    assert whole_first([10, 5, 8], [0, 1], 16) == [10, 5, 1]
    assert whole_first([10, 5, 8], [0, 1], 12) == [10, 1, 1]
    assert whole_first([10, 5, 8], [], 30) == [10, 5, 8]
    assert whole_first([0, 0], [0], 0) == [0, 0]


def test_the_mean_of_razor_may_be_left_out():
    assert [len(RazorAttention(**knobs).tiers(1)[0]) for knobs in ({}, {"dropped": None})] == [2, 1]


def test_what_local_heads_lose_is_one_mean_of_razor_and_nothing_of_duo(pipe):
    held = {}
    for technique in (RazorAttention, DuoAttention):
        policy = technique(share=0.5, recent_frames=2, profile=profile_of(technique))

        def noting(pipe, index, blocks, tensors, technique=technique):
            held[technique] = [memory.older for memory in run.all_memories()]

        with Accel(cache=policy)(pipe) as run:
            pipe(PROMPT, **CALL, output_type="latent", callback_on_chunk_end=noting)
    means = [count for tiers in held[RazorAttention] for count in (tiers[1].counts or ((0, 0),))[0]]
    assert sorted(means) == [0, 0, 1, 1]
    assert all(len(tiers) == 1 for tiers in held[DuoAttention])
    counts = [count for tiers in held[DuoAttention] for count in tiers[0].counts[0]]
    assert sorted(counts) == [0, 0, 42, 42]  # 10 frames of 6 tokens, without the first and the two newest


# -- DuoAttention's gates --------------------------------------------------------------------------------------------


def test_a_gated_head_mixes_everything_and_streaming():
    k, v, q = torch.randn(3, 1, 8, 2, 4, dtype=torch.float64)
    own, near = (torch.randn(1, 3, 2, 4, dtype=torch.float64) for _ in range(2)), torch.arange(8) >= 6
    memory, (own_k, own_v) = Gated(k, v, near, torch.tensor([0.25, 1.0])), own
    memory.place(own_k, own_v, None)
    found = memory.partial(q, None).out
    for head, gate in ((0, 0.25), (1, 1.0)):
        outs = []
        for some in (slice(0, 8), slice(6, 8)):
            keys, values = (torch.cat([x[0, some, head], y[0, :, head]]) for x, y in ((k, own_k), (v, own_v)))
            outs.append((q[0, :, head] @ keys.T / 2).softmax(-1) @ values)
        torch.testing.assert_close(found[0, :, head], gate * outs[0] + (1 - gate) * outs[1])


def test_gates_close_where_the_past_does_not_count(monkeypatch):
    """A head whose values never reach the output needs nothing; weights get no gradients and stay as they are."""
    transformer = tiny_transformer()
    with torch.no_grad():
        transformer.blocks[0].attn1.to_out[0].weight[:, :24] = 0  # head 0 of layer 0
    pipe = tiny_pipeline()
    pipe.transformer = transformer
    before = {name: weight.clone() for name, weight in transformer.named_parameters()}
    monkeypatch.setattr("diffaccel.gates.ROUNDS", 40)
    learners = []
    original = GateLearner.means

    def noting(self, layers):
        learners.append(self)
        return original(self, layers)

    monkeypatch.setattr(GateLearner, "means", noting)
    reach = calibrate(pipe, DuoAttention(recent_frames=1), prompts=[PROMPT], **CALL).tables["reach"]
    assert reach[0, 0] < 0.25
    assert reach[0, 0] < reach.max() - 0.2
    assert ((reach >= 0) & (reach <= 1)).all()
    [learner] = learners
    assert learner.losses[0] == pytest.approx(0.05, abs=1e-4)  # all open is dense attention
    assert learner.losses[-1] < learner.losses[0]
    for name, weight in transformer.named_parameters():
        assert weight.grad is None
        assert torch.equal(weight, before[name])


def test_the_run_stands_where_it_stood_after_learning(pipe, few_rounds, monkeypatch):
    learn, seen = GateLearner._learn, []

    def noting(self, memories, site, run):
        before = run._where, run._told, dict(run._memories)
        learn(self, memories, site, run)
        seen.append(before == (run._where, run._told, run._memories) and bool(self.losses))

    monkeypatch.setattr(GateLearner, "_learn", noting)
    calibrate(pipe, DuoAttention(recent_frames=1), prompts=[PROMPT], **CALL | {"guidance_scale": 2.0})
    assert seen == [True], "of the two branches one learns"


# -- CompressKV ------------------------------------------------------------------------------------------------------


def test_compress_kv_lets_lead_heads_vote_for_all(monkeypatch):
    lead = np.array([[0.1, 0.7, 0.4]])
    monkeypatch.setattr(CompressKV, "table", lambda self, name: lead)
    one = look(heads=3)
    for count, heads in ((1, [1]), (2, [1, 2]), (9, [0, 1, 2])):
        expected = one.p.sum(2)[:, heads].mean(1, keepdim=True).expand(-1, 3, -1)
        torch.testing.assert_close(CompressKV(lead=count, pool=1).score(one), expected)


def test_compress_kv_shares_by_error_within_bounds(monkeypatch):
    errors = np.array([[0.0] * 2, [0.1] * 2, [0.2] * 2, [0.9] * 2])
    monkeypatch.setattr(CompressKV, "table", lambda self, name: errors)
    policy, one = CompressKV(least=0.1, most=2.0), look()
    found = [float(policy.shares(replace(one, layer=layer)).mean()) for layer in range(4)]
    assert found == pytest.approx([0.1, 1 / 3, 2 / 3, 2.0])


def test_compress_kv_measures_what_heads_find_near_their_place_and_what_compression_costs(monkeypatch):
    policy = CompressKV(sink_frames=0, recent_frames=0, probes=4)
    one = replace(look(tokens=24), grid=Grid(1, 2, 4), start=2)  # frames 0 and 1 may be dropped
    places = probes(one.grid, 4).tolist()
    one = replace(one, q=one.q[:, : len(places)])
    found = policy.measure(one)
    lead = torch.zeros(2)
    for number, place in enumerate(places):
        for token in range(16):
            row, column = token % 8 // 4, token % 4
            if abs(row - place // 4) <= 1 and abs(column - place % 4) <= 1:
                lead += one.p[0, :, number, token] / len(places)
    torch.testing.assert_close(found["lead"], lead)
    kept = [*one.p[0].sum((0, 1))[:16].argsort(descending=True)[:4].tolist(), *range(16, 24)]
    v = one.v[0].transpose(0, 1)
    part = one.p[0][..., kept] / one.p[0][..., kept].sum(-1, keepdim=True) @ v[:, kept]
    whole = one.p[0] @ v
    torch.testing.assert_close(found["error"], ((part - whole).norm() / whole.norm()).expand(2))
    monkeypatch.setattr("diffaccel.cache.compress_kv.TRIED", 1.0)
    assert float(policy.measure(one)["error"].max()) < 1e-5


# -- the bundled model -----------------------------------------------------------------------------------------------


@every
def test_the_bundled_model(technique, tmp_path, few_rounds):
    from diffaccel.pipelines.loading import load

    pipe = load(device="cpu")
    call = CALL | {"width": 128, "height": 128, "num_frames": 61}
    profile = calibrate(pipe, technique(), prompts=calibration.PROMPTS[:1], **call)
    profile.save(tmp_path / "p.json")
    assert profile.model.layers == 8
    if technique is TriAttention:
        real, imag, size = (profile.tables[name] for name in technique.tables)
        assert (np.hypot(real, imag).sum(0) / size.sum(0)).mean() > 0.5  # the premise
    policy = technique(budget="6 frames", recent_frames=2, profile=str(tmp_path / "p.json"))
    frames, run = generate(pipe, Accel(cache=policy), **call)
    assert torch.isfinite(frames).all()
    assert run.report().cache["max_tokens"] <= (6 + 3) * 64
