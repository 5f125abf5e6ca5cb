"""Mixers: forms of one function agree, laws hold, tiers merge, layers come back as they were, and teaching helps."""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffaccel.cache import Entries
from diffaccel.errors import KnobError, UnsupportedError
from diffaccel.kernel import merge, reference
from diffaccel.kernel.weighted import read_plainly
from diffaccel.mixers import MIXERS, convert, distil, errors
from diffaccel.mixers.attention_gate import AttentionGate
from diffaccel.mixers.based import Based, Moments, TaylorTier, features
from diffaccel.mixers.cca import CCA
from diffaccel.mixers.cis import Cis
from diffaccel.mixers.flowformer import Flowformer, conserved
from diffaccel.mixers.flux_router import FluxRouter
from diffaccel.mixers.group_shift import GroupShift
from diffaccel.mixers.lightning import Lightning, Lightning2
from diffaccel.mixers.local_linear import LocalLinear, LocalLinearTier
from diffaccel.mixers.local_linear import Moments as Fit
from diffaccel.mixers.mixer import Past, softmax
from diffaccel.mixers.titans import Rates, State, Titans, gradient, learn, recall

WIDTH, HEADS, DIM = 32, 4, 8
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


class Layer(nn.Module):
    """Attention in diffusers' layout; `block` tokens see each other and all before."""

    def __init__(self, block=None):
        super().__init__()
        self.heads, self.block = HEADS, block
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Identity()])

    def forward(self, x, prompt=None, mask=None, pos=None):
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x)
        q, k, v = (each.unflatten(2, (HEADS, DIM)).transpose(1, 2) for each in (q, k, v))
        place = torch.arange(x.shape[1]) // (self.block or x.shape[1])
        out = nn.functional.scaled_dot_product_attention(q, k, v, place[:, None] >= place)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def tensors(*shapes):
    return [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]


def heads(tokens=24, count=3):
    return tensors(*[(tokens, HEADS, DIM)] * count)


def small(kind, block=None, **settings):
    """A mixer in float64 with tiles of few tokens where it has any."""
    tiles = {Lightning: {"tile": 5}, Lightning2: {"tile": 5}, Based: {"tile": 4, "features": 3}, Titans: {"tile": 4}}
    more = {GroupShift: {"group": 8, "sinks": 2}, FluxRouter: {"window": 4, "sinks": 1}, Cis: {"unit": 4}}
    return kind(Layer().double(), block, **{**tiles.get(kind, {}), **more.get(kind, {}), **settings}).double().eval()


@pytest.mark.parametrize("kind", MIXERS)
def test_calls_in_turn_are_one_call(kind):
    torch.manual_seed(1)
    mixer = small(kind, 4)
    [x] = tensors((24, WIDTH))
    whole, _ = mixer(x)
    state, found = None, []
    for part in x.split(8, 1):
        out, state = mixer(part, state)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 1), whole, **CLOSE)


@pytest.mark.parametrize("kind", MIXERS)
def test_no_token_sees_a_later_block_and_every_token_sees_its_own(kind):
    mixer = small(kind, 4)
    [x] = tensors((16, WIDTH))
    other = x.clone()
    other[:, 11] += 1  # in the third block
    moved = (mixer(x)[0] - mixer(other)[0]).abs().amax((0, 2))
    assert (moved[:8] == 0).all()
    causal = kind is CCA  # its convolutions and values look back, its attention both ways
    assert (moved[8:12] > 0).all() or causal
    assert moved[11] > 0


@pytest.mark.parametrize("kind", MIXERS)
def test_rows_of_a_batch_are_apart(kind):
    mixer = small(kind, 4)
    [x] = tensors((12, WIDTH))
    torch.testing.assert_close(mixer(x)[0][1:], mixer(x[1:])[0], **CLOSE)


@pytest.mark.parametrize("kind", MIXERS)
def test_each_says_where_it_comes_from(kind):
    assert kind.slot == "mixer"
    assert kind.needs == "distillation"
    assert "arXiv" in kind.paper
    assert kind.summary


EXACT = [
    (GroupShift, {"group": 64}),
    (AttentionGate, {}),
    (FluxRouter, {}),
    (Cis, {"density": 1.0}),
    (LocalLinear, {"ridge": 1e12}),
    (Based, {"tile": 64}),
]


@pytest.mark.parametrize(("kind", "settings"), EXACT)
@pytest.mark.parametrize("block", [None, 4])
def test_untaught_it_can_be_the_layer(kind, settings, block):
    layer = Layer(block).double()
    mixer = kind(layer, block, **settings).double().eval()
    [x] = tensors((24, WIDTH))
    torch.testing.assert_close(mixer(x)[0], layer(x), rtol=1e-6, atol=1e-7)


def test_flow_is_conserved():
    q, k = (x.sigmoid() for x in heads(count=2))
    into, out = conserved(q, k)
    torch.testing.assert_close(into.mean(1), torch.ones(2, HEADS).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(out.mean(1), torch.ones(2, HEADS).double(), rtol=1e-4, atol=0)
    assert into.std() > 1e-3  # and it is not all the same


def test_flowformer_is_the_authors_bidirectional_form():
    mixer = small(Flowformer)
    q, k, v = heads()
    found, _ = mixer.mix(SimpleNamespace(q=q, k=k, v=v), None)
    a, b, eps = q.sigmoid(), k.sigmoid(), 1e-6
    row = 1 / torch.einsum("bshd,bhd->bsh", a + eps, b.sum(1) + eps)
    col = 1 / torch.einsum("bshd,bhd->bsh", b + eps, a.sum(1) + eps)
    row_refined = torch.einsum("bshd,bhd->bsh", a + eps, (b * col[..., None]).sum(1) + eps).sigmoid()
    col_refined = torch.einsum("bshd,bhd->bsh", b + eps, (a * row[..., None]).sum(1) + eps).softmax(1) * k.shape[1]
    kv = torch.einsum("bshd,bshe->bhde", b, v * col_refined[..., None])
    wanted = torch.einsum("bshd,bhde->bshe", a, kv) * row[..., None] * row_refined[..., None]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # epsilon lies elsewhere


@pytest.mark.parametrize("kind", [Lightning, Lightning2])
@pytest.mark.parametrize("block", [1, 4, 7, 24])
@pytest.mark.parametrize("tile", [1, 5, 64])
def test_both_schedules_are_the_quadratic_form(kind, block, tile):
    mixer = small(kind, tile=tile)
    q, k, v = heads()
    state, found = None, []
    for part in zip(*(x.split(block, 1) for x in (q, k, v)), strict=True):
        out, state = mixer.scan(*part, state)
        found.append(out)
    place = torch.arange(24)
    apart = (place[:, None] - place).abs()
    seen = place[:, None] // block >= place // block
    mask = (mixer.decay * apart[..., None]).exp() * seen[..., None]
    wanted = torch.einsum("bsnh,bnhd->bshd", torch.einsum("bshd,bnhd->bsnh", q, k) * mask, v)
    torch.testing.assert_close(torch.cat(found, 1), wanted, **CLOSE)


def test_deeper_layers_forget_less():
    ends = [small(Lightning, depth=depth).decay.exp() for depth in (0.0, 0.5, 0.9)]
    assert all((later > earlier).all() for earlier, later in pairwise(ends))


def test_taylor_features_are_the_series():
    q, k = torch.randn(2, 5, 6, dtype=torch.float64)
    s = (q * k).sum(-1) * 6**-0.5
    torch.testing.assert_close((features(q) * features(k)).sum(-1), 1 + s + s**2 / 2)
    assert features(torch.zeros(16)).shape == (153,)


def taylor_softmax(q, k, v):
    s = torch.einsum("bshd,bnhd->bshn", q, k) * DIM**-0.5
    w = 1 + s + s**2 / 2
    return torch.einsum("bshn,bnhd->bshd", w / w.sum(-1, keepdim=True), v), w.sum(-1).log()


def test_a_taylor_tier_answers_and_adds():
    q, k, v = heads()
    tier = TaylorTier()
    for part in (slice(0, 10), slice(10, 24)):
        tier.take(Entries(k[:, part], v[:, part], torch.arange(24)[part]))
    found = tier.partial(q, read_plainly)
    out, lse = taylor_softmax(q, k, v)
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(found.lse, lse.float())
    assert tier.count == 24
    assert torch.cat(tier.frames()).tolist() == list(range(24))
    size = tier.bytes
    tier.take(Entries(k, v))
    assert tier.bytes == size


def test_a_taylor_tier_of_small_scores_merges_with_attention():
    q, k, v = heads()
    q, wanted = 0.1 * q, reference.partial(0.1 * q, k, v, scale=DIM**-0.5)
    tier = TaylorTier()
    tier.take(Entries(k[:, :16], v[:, :16]))
    near = read_plainly(q, Entries(k[:, 16:], v[:, 16:]))
    found = merge([tier.partial(q, read_plainly), near])
    alone = (near.out - wanted.out).norm() / wanted.out.norm()
    assert (found.out - wanted.out).norm() / wanted.out.norm() < 0.01 * alone
    torch.testing.assert_close(found.lse, wanted.lse, rtol=0, atol=0.01)


@pytest.mark.parametrize("block", [None, 8])
def test_based_reads_its_tile_exactly_and_moments_of_the_rest(block):
    mixer = small(Based, block)
    q, k, v = heads()
    state, found = None, []
    for part in zip(*(x.split(block or 24, 1) for x in (q, k, v)), strict=True):
        out, state = mixer.mix(SimpleNamespace(**dict(zip("qkv", part, strict=True))), state)
        found.append(out)
    place = torch.arange(24)
    near = place[:, None] // 4 == place // 4
    seen = torch.ones_like(near)
    if block:
        start = place // block * block
        near |= (place < start[:, None]) & (place >= start[:, None] - 4)
        seen = place < start[:, None] + block
    to_q, to_k = mixer.to_q, mixer.to_k
    s = torch.einsum("bshf,bnhf->bshn", *(torch.einsum("bshd,hdf->bshf", x, w) for x, w in ((q, to_q), (k, to_k))))
    s = s * to_q.shape[-1] ** -0.5
    exact = (torch.einsum("bshd,bnhd->bshn", q, k) * DIM**-0.5).exp()
    w = torch.where(near[:, None], exact, 1 + s + s**2 / 2) * seen[:, None]
    wanted = torch.einsum("bshn,bnhd->bshd", w / w.sum(-1, keepdim=True), v)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-5, atol=1e-6)  # log-sums are fp32


def weighted_ridge(q, k, v, ridge):
    """The fit solved for itself: minimise sum w |v - a - B z|^2 + ridge |B|^2; read at z = 0, which is a."""
    w = (torch.einsum("d,nd->n", q, k) * DIM**-0.5).exp()
    w = w / w.max()
    x = torch.cat([torch.ones(len(k), 1).double(), k - q], 1)
    penalty = ridge * torch.eye(DIM + 1).double()
    penalty[0, 0] = 0
    return torch.linalg.solve(x.T @ (w[:, None] * x) + penalty, x.T @ (w[:, None] * v))[0]


@pytest.mark.parametrize("queries", [24, 4])  # more than channels and fewer: products are made in another order
def test_the_fit_is_weighted_ridge_regression_and_its_moments_add(queries):
    q, k, v = heads()
    q = q[:, :queries]
    parts = [Fit.of(q, k[:, part], v[:, part]) for part in (slice(0, 9), slice(9, 24))]
    found = parts[0].plus(parts[1]).solve(0.05)
    for at in ((0, 0, 0), (1, 3, 3)):
        b, s, h = at
        wanted = weighted_ridge(q[b, s, h], k[b, :, h], v[b, :, h], 0.05)
        torch.testing.assert_close(found.out[at], wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.lse, reference.partial(q, k, v, scale=DIM**-0.5).lse)


def test_the_fit_is_right_where_values_are_linear_in_keys():
    q, k, _ = heads(64)
    slope = torch.randn(DIM, DIM, dtype=torch.float64)
    out = Fit.of(q, k, k @ slope).solve(1e-6).out
    average = reference.partial(q, k, k @ slope, scale=DIM**-0.5).out
    assert (out - q @ slope).norm() < 1e-3 * (average - q @ slope).norm()


def test_local_linear_tiers_merge_to_attention_at_a_large_ridge():
    q, k, v = heads()
    tiers = [LocalLinearTier(Entries(k[:, part], v[:, part]), ridge=1e12) for part in (slice(0, 9), slice(9, 24))]
    wanted = reference.partial(q, k, v, scale=DIM**-0.5)
    found = merge([tier.partial(q, read_plainly) for tier in tiers])
    torch.testing.assert_close(found.out, wanted.out, rtol=1e-6, atol=1e-7)
    narrow = LocalLinearTier(Entries(k, v)).partial(q, read_plainly)
    assert (narrow.out - wanted.out).norm() > 0.1 * wanted.out.norm()
    with pytest.raises(KnobError, match="ridge is above 0, got 0"):
        LocalLinearTier(Entries(k, v), ridge=0)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_the_gradient_of_a_memory_is_its_gradient(memory):
    mixer = small(Titans, memory=memory)
    k, v = heads(5, 2)
    [weight] = tensors((5, HEADS))
    weights = tuple((each + 0.1 * torch.randn_like(each)).detach().expand(2, *each.shape) for each in mixer.start)
    free = [each.clone().requires_grad_() for each in weights]
    loss = (weight[..., None] * (recall(tuple(free), k) - v) ** 2).sum() / 2
    wanted = torch.autograd.grad(loss, free)
    for found, right in zip(gradient(weights, k, v, weight), wanted, strict=True):
        torch.testing.assert_close(found, right, **CLOSE)


def rates(tokens):
    return Rates(*(x.sigmoid() for x in tensors(*[(tokens, HEADS)] * 3)))


def test_a_linear_memory_without_momentum_is_the_gated_delta_rule():
    k, v = heads(6, 2)
    given = rates(6)._replace(momentum=torch.zeros(2, 6, HEADS).double())
    zero = (torch.zeros(2, HEADS, DIM, DIM).double(),)
    state, wanted = State(zero, zero), zero[0]
    for t in range(6):
        state = learn(state, k[:, t : t + 1], v[:, t : t + 1], Rates(*(x[:, t : t + 1] for x in given)))
        off = torch.einsum("bhed,bhd->bhe", wanted, k[:, t]) - v[:, t]
        step = given.learn[:, t, :, None, None] * off[..., None] * k[:, t, :, None]
        wanted = (1 - given.forget[:, t, :, None, None]) * wanted - step
    torch.testing.assert_close(state.memory[0], wanted, **CLOSE)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_a_tile_learns_as_token_by_token_from_its_first_memory(memory):
    mixer = small(Titans, memory=memory)
    k, v = heads(6, 2)
    given = rates(6)
    first = tuple((each + 0.1 * torch.randn_like(each)).detach().expand(2, *each.shape) for each in mixer.start)
    found = learn(State(first, tuple(torch.ones_like(x) for x in first)), k, v, given)
    m, s = list(first), [torch.ones_like(x) for x in first]
    for t in range(6):
        step = gradient(first, k[:, t : t + 1], v[:, t : t + 1], given.learn[:, t : t + 1])
        for i in range(len(first)):
            s[i] = given.momentum[:, t, :, None, None] * s[i] - step[i]
            m[i] = (1 - given.forget[:, t, :, None, None]) * m[i] + s[i]
    for got, right in zip((*found.memory, *found.surprise), (*m, *s), strict=True):
        torch.testing.assert_close(got, right, **CLOSE)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
@pytest.mark.parametrize(("tile", "block"), [(64, None), (64, 8), (4, 1)])
@torch.no_grad()
def test_a_memory_stays_bounded_and_alive(memory, tile, block):
    mixer = Titans(Layer(), block, tile=tile, memory=memory)
    out, state = mixer(3 * torch.randn(2, 1024, WIDTH))
    assert out.isfinite().all()
    for each, first in zip(state.memory, mixer.start, strict=True):
        assert 1e-3 < (each - first).norm(dim=(-2, -1)).max() < 20


def test_what_is_forgotten_falls_back_to_the_start():
    k, v = heads(6, 2)
    [memory, start] = [(x,) for x in tensors((HEADS, DIM, DIM), (HEADS, DIM, DIM))]
    zero = torch.zeros(2, 6, HEADS).double()
    kept = learn(State(memory, (0 * memory[0],)), k, v, Rates(zero + 0.5, zero, zero), start).memory[0]
    torch.testing.assert_close(kept, start[0] + 0.5**6 * (memory[0] - start[0]), **CLOSE)


def test_cca_is_smaller_by_its_factor():
    mixer = small(CCA, heads=2, kv_heads=1)
    [x] = tensors((12, WIDTH))
    _, state = mixer(x)
    assert state.past.k.shape == state.past.v.shape == (2, 12, 1, DIM)
    assert state.x.shape == (2, 2, WIDTH)


def test_half_of_a_compressed_value_is_that_of_the_token_before():
    mixer = small(CCA)
    [x] = tensors((12, WIDTH))
    _, _, v = mixer.compressed(x, None, None)
    moved = x.clone()
    moved[:, 5] += 1
    change = (mixer.compressed(moved, None, None)[2] - v).abs().amax((0, 2))
    assert (change[5, : DIM // 2] > 0).all()
    assert (change[5, DIM // 2 :] == 0).all()
    assert (change[6, DIM // 2 :] > 0).all()


def test_what_a_group_reads():
    mixer = small(GroupShift, group=4, sinks=1)
    q, k, _ = heads(8)
    v = torch.eye(8, DIM).double()[None, :, None].expand(2, 8, HEADS, DIM)
    weights, _ = mixer.mix(SimpleNamespace(q=q, k=k, v=v), None)  # values are places, so outputs are weights
    read = weights[0] > 0
    assert read[5, 0].nonzero().flatten().tolist() == [0, 4, 5, 6, 7]
    assert read[5, HEADS - 1].nonzero().flatten().tolist() == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("past", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("new", [1, 2, 5, 11])
@pytest.mark.parametrize("sinks", [0, 1, 5])
def test_groups_are_a_mask_over_all_tokens_written_out(past, new, sinks):
    mixer, total = small(GroupShift, group=4, sinks=sinks), past + new
    q, k, v = heads(total)
    place = torch.arange(total)
    shift = 2 * (torch.arange(HEADS) >= HEADS // 2)
    own = (place[:, None] + shift) // 4
    reads = (own[past:, :, None] == own.mT[None]) | (place < sinks)
    bias = torch.zeros(reads.shape).double().masked_fill(~reads, -torch.inf)
    state = Past(k[:, :past], v[:, :past]) if past else None
    found, seen = mixer.mix(SimpleNamespace(q=q[:, past:], k=k[:, past:], v=v[:, past:]), state)
    torch.testing.assert_close(found, softmax(q[:, past:], k, v, bias).out)
    assert torch.equal(seen.k, k)


def test_low_rank_changes_are_all_that_is_learned():
    mixer = small(GroupShift)
    assert {name.split(".")[-2] for name, p in mixer.named_parameters() if p.requires_grad} == {"up", "down"}


def test_closed_gates_drop_their_keys():
    mixer = small(AttentionGate)
    [x] = tensors((12, WIDTH))
    with torch.no_grad():
        mixer.gate[2].weight.mul_(20)
        mixer.gate[2].bias.zero_()
    kept = mixer.kept(x)
    assert 0.1 < kept.float().mean() < 0.9
    q, k, v = mixer.layer.heads(x, None)
    bias = torch.zeros(2, 12, HEADS, 12).double().masked_fill(~kept.mT[:, None], -torch.inf)
    bias[:, range(12), :, range(12)] = 0
    s = torch.einsum("bshd,bnhd->bshn", q, k) * DIM**-0.5 + bias
    wanted = mixer.layer.close(torch.einsum("bshn,bnhd->bshd", s.softmax(-1), v))
    torch.testing.assert_close(mixer(x)[0], wanted, **CLOSE)
    out = mixer(x)[0].square().mean()
    out.backward()
    assert mixer.gate[0].weight.grad.abs().sum() > 0


def test_a_router_that_prefers_the_window_reads_it():
    mixer = small(FluxRouter, window=2, sinks=1)
    [x] = tensors((12, WIDTH))
    with torch.no_grad():
        mixer.choose[2].bias.copy_(torch.tensor([-9.0, 9.0]))
    moved = x.clone()
    moved[:, 3] += 1
    change = (mixer(moved)[0] - mixer(x)[0]).abs().amax((0, 2))
    assert (change[:6] > 0)[1:].all()
    assert (change[6:] == 0).all()
    mixer.train()
    mixer(x)[0].sum().backward()
    assert float(mixer.penalty().detach()) > 0


def test_importance_is_a_log_weight():
    mixer = small(Cis, density=1.0)
    [x] = tensors((12, WIDTH))
    with torch.no_grad():
        mixer.amount.fill_(1.0)
    q, k, v = mixer.layer.heads(x, None)
    s = torch.einsum("bshd,bnhd->bshn", q, k) * DIM**-0.5
    w = s.exp() * mixer.importance(v).exp().mT[:, None]
    wanted = mixer.layer.close(torch.einsum("bshn,bnhd->bshd", w / w.sum(-1, keepdim=True), v))
    torch.testing.assert_close(mixer(x)[0], wanted, **CLOSE)


def test_what_does_not_go_by_the_query_is_the_same_for_all():
    mixer = small(Cis, density=0.5, aware=0.0, unit=2)
    [x] = tensors((16, WIDTH))
    with torch.no_grad():
        mixer.amount.fill_(1.0)
    q, k, v = mixer.layer.heads(x, None)
    tokens = SimpleNamespace(q=q, k=k, v=v)
    read = mixer._unread(tokens, SimpleNamespace(k=k, v=v, weight=mixer.importance(v))).isfinite()
    assert (read.sum(-1) == 8).all()
    best = mixer.importance(v).unflatten(1, (8, 2)).amax(2)  # (B, units, H)
    most = best[:, 1:].argmax(1) + 1
    for b in range(2):
        for h in range(HEADS):
            assert read[b, :, h, 2 * most[b, h]].all()


SETTINGS = [
    (Based, {"block": 0}, "block is a number of tokens >= 1 or None, got block=0"),
    (Lightning, {"tile": 0}, "tile is a number of tokens >= 1, got tile=0"),
    (Lightning, {"depth": 1.0}, r"depth is in \[0, 1\), got depth=1.0"),
    (Based, {"tile": 0}, "tile is"),
    (Based, {"features": 0}, "features is"),
    (LocalLinear, {"ridge": 0.0}, "ridge is above 0"),
    (CCA, {"heads": 0}, "heads is"),
    (CCA, {"heads": 4, "kv_heads": 3}, "kv_heads divides heads, got heads=4, kv_heads=3"),
    (Titans, {"tile": 0}, "tile is"),
    (Titans, {"memory": "deep"}, "memory is 'linear' or 'mlp', got memory='deep'"),
    (Titans, {"persistent": -1}, "persistent is"),
    (GroupShift, {"group": 5}, "group is an even number"),
    (GroupShift, {"sinks": -1}, "sinks is"),
    (GroupShift, {"rank": 0}, "rank is"),
    (AttentionGate, {"keep": 0.0}, "keep is"),
    (AttentionGate, {"hidden": 0}, "hidden is"),
    (AttentionGate, {"pull": -1.0}, "pull is"),
    (FluxRouter, {"density": 2.0}, "density is"),
    (FluxRouter, {"window": 0}, "window is"),
    (FluxRouter, {"sinks": -1}, "sinks is"),
    (FluxRouter, {"pool": 0}, "pool is"),
    (Cis, {"density": 0.0}, "density is"),
    (Cis, {"aware": 2.0}, "aware is"),
    (Cis, {"unit": 0}, "unit is"),
]


@pytest.mark.parametrize(("kind", "settings", "rule"), SETTINGS)
def test_bad_settings_are_refused(kind, settings, rule):
    with pytest.raises(KnobError, match=rule):
        kind(Layer(), **settings)


def test_layers_come_back_as_they_were():
    model = Model()
    layers, weights = list(model.layers), {name: p.clone() for name, p in model.state_dict().items()}
    x = torch.randn(2, 16, WIDTH)
    before = model(x)

    def work():
        with convert(model, ["layers.0", "layers.1"], Flowformer) as made:
            distil(made, [partial(model, x)] * 3)
            assert not torch.equal(model(x), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert all(now is was for now, was in zip(model.layers, layers, strict=True))
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(x), before)
    assert all(p.grad is None for p in model.parameters())


TAUGHT = [*((kind, {}) for kind in MIXERS if kind not in (AttentionGate, FluxRouter, Cis)), (Titans, {"memory": "mlp"})]


@pytest.mark.parametrize(("kind", "settings"), TAUGHT)
def test_teaching_lowers_the_error(kind, settings):
    torch.manual_seed(3)
    model = Model()
    scale = torch.linspace(2, 0.1, WIDTH)
    data = [partial(model, scale * torch.randn(4, 16, WIDTH)) for _ in range(60)]
    unseen = [partial(model, scale * torch.randn(8, 16, WIDTH))]
    small_ones = {GroupShift: {"group": 4, "sinks": 1}, Based: {"tile": 4}, Titans: {"tile": 8}}
    given = {**small_ones.get(kind, {}), **settings}
    if kind is Lightning2:
        given["tile"] = 4
    with convert(model, ["layers.1"], partial(kind, **given)) as made:
        [before] = errors(made, unseen).values()
        losses = distil(made, data, lr=3e-3)
        [after] = errors(made, unseen).values()
    assert len(losses) == 60
    assert after < 0.97 * before


def test_teaching_finds_keys_that_all_queries_want():
    torch.manual_seed(3)
    model = Model()
    teacher = model.layers[1]
    teacher.to_v = teacher.to_k  # so that values tell which keys they are
    with torch.no_grad():
        teacher.to_q.bias.copy_(10 * torch.randn(WIDTH))
    data = [partial(model, torch.randn(4, 32, WIDTH)) for _ in range(150)]
    unseen = [partial(model, torch.randn(8, 32, WIDTH))]
    with convert(model, ["layers.1"], partial(Cis, density=0.25, unit=1)) as made:
        made["layers.1"].mixer.layer.requires_grad_(False)  # so that the importance alone learns
        [before] = errors(made, unseen).values()
        distil(made, data, lr=2e-2)
        [after] = errors(made, unseen).values()
    assert after < 0.85 * before


@pytest.mark.parametrize(
    ("kind", "settings"), [(AttentionGate, {"keep": 0.5, "pull": 10.0}), (FluxRouter, {"density": 0.0})]
)
def test_teaching_brings_a_gate_to_its_rate(kind, settings):
    model = Model()
    data = [partial(model, torch.randn(4, 16, WIDTH)) for _ in range(5)]
    with convert(model, ["layers.0"], partial(kind, **settings)) as made:
        mixer = made["layers.0"].mixer
        data[0]()
        before = float(mixer.penalty().detach())
        distil(made, data * 40, lr=1e-2)
        data[0]()
        assert float(mixer.penalty().detach()) < 0.2 * before


@pytest.mark.parametrize("kind", MIXERS)
def test_a_model_in_low_precision_has_mixers_in_fp32(kind):
    model, x = Model().bfloat16(), torch.randn(2, 16, WIDTH).bfloat16()
    with convert(model, ["layers.0"], kind) as made:
        distil(made, [partial(model, x)])
        assert {p.dtype for p in made["layers.0"].mixer.parameters()} == {torch.float32}
        assert model(x).dtype == torch.bfloat16


def test_what_is_no_attention_is_refused():
    model = Model()
    with pytest.raises(UnsupportedError, match=r"Model has no layer layers\.7"), convert(model, ["layers.7"], Based):
        pass
    with pytest.raises(UnsupportedError, match="got Linear"), convert(model, ["layers.0.to_q"], Based):
        pass
    with convert(model, ["layers.0"], Based) as made:
        put, x = made["layers.0"], torch.randn(1, 4, WIDTH)
        with pytest.raises(UnsupportedError, match="reads a prompt"):
            put(x, x)
        with pytest.raises(UnsupportedError, match="use_cache=False"):
            put(hidden_states=x, past_key_values=object())


def test_moments_of_no_tokens_are_nothing():
    q, k, v = heads()
    none = Moments.of(k[:, :0], v[:, :0])
    torch.testing.assert_close(none.plus(Moments.of(k, v)).read(q).out, Moments.of(k, v).read(q).out)
