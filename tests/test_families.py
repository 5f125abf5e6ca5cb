"""What holds for every family of backbones, each as one tiny random model: see `families.py`."""

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, STEPS, noise
from torch._dynamo.testing import CompileCounter

from diffaccel import (
    Accel,
    AnnCA,
    AnnSA,
    FlashBlock,
    FullFieldGuide,
    InwardWindow,
    PadCollapse,
    TempCache,
    UnsupportedError,
    port,
)
from diffaccel.attend import attend

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's rotary angles, under no autocast at all
AT_ONCE = [family for family in FAMILIES if not family.causal]
WINDOW, SELECTION = InwardWindow((3, 3)), AnnSA(0.4, dense_steps=0, min_past=0, sink_frames=0)
EXACT = [
    Accel(), Accel(window=InwardWindow(size=None)), Accel(selection=AnnSA(density=1)), Accel(prompt=PadCollapse()),
    Accel(prompt=AnnCA(bits=0)),
]  # fmt: skip
LOSSY = [Accel(window=WINDOW), Accel(selection=SELECTION), Accel(window=WINDOW, reuse=FullFieldGuide(shrink=2))]


def name(value):
    return value.name if hasattr(value, "name") else "+".join(type(x).__name__ for x in value.policies().values())


@pytest.fixture(params=AT_ONCE, ids=name)
def family(request):
    return request.param


def takes(accel, pipe):
    """Whether a pipeline takes what is asked."""
    try:
        accel.apply(pipe).remove()
    except UnsupportedError:
        return False
    return True


@pytest.mark.parametrize("accel", EXACT, ids=name)
def test_exact_settings_are_the_stock_model(family, accel):
    pipe = family.pipe()
    if not takes(accel, pipe):
        pytest.skip("refused, see test_what_is_refused")
    stock = family.generate(pipe, 2)
    with accel(pipe):
        torch.testing.assert_close(family.generate(pipe, 2), stock, atol=3e-5, rtol=0)
    assert torch.equal(family.generate(pipe, 2), stock)


@pytest.mark.parametrize("accel", LOSSY, ids=name)
def test_what_is_lossy_engages_and_reads_less(family, accel):
    pipe = family.pipe()
    if not takes(accel, pipe):
        pytest.skip("refused, see test_what_is_refused")
    stock = family.generate(pipe)
    with accel(pipe) as run:
        found = family.generate(pipe)
    assert torch.isfinite(found).all()
    assert (found - stock).abs().max() > 1e-3
    for slot in accel.policies():
        counts = run.report().slots[slot]
        assert counts.engaged
        if slot != "reuse":
            assert counts.keys_read < 0.9 * counts.keys_total


def test_a_window_reads_its_own_tokens_of_every_layer_and_branch(family):
    pipe = family.pipe()
    with Accel(window=WINDOW)(pipe) as run:
        family.generate(pipe)
    [geometry] = Accel().describe(pipe)
    layers = [layer for layer in run.report().layers if layer.part == "self"]
    assert len(layers) == geometry["layers"]
    for layer in layers:
        assert layer.calls == 2 * STEPS
        text = layer.keys_total / layer.calls - family.grid.tokens
        assert layer.keys_read / layer.calls - text == pytest.approx(9 * family.grid.frames, abs=1)


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 4, 7), (2, 5, 2)])
def test_tokens_lie_as_the_grid_says(family, monkeypatch, place):
    """What is changed at one place of the latents is felt by the keys of that token alone, in the first layer."""
    seen = []
    monkeypatch.setattr(port, "attend", lambda q, k, v, site, run: seen.append((site, k)) or attend(q, k, v, site, run))
    pipe, grid = family.pipe(), family.grid
    frame, row, column = (at % side for at, side in zip(place, (grid.frames, grid.height, grid.width), strict=True))
    token = (frame * grid.height + row) * grid.width + column
    at = [slice(None)] * (1 + len(family.shape))
    sides = (grid.tokens,) if len(family.axes) == 1 else (grid.frames, grid.height, grid.width)
    for axis, side, index in zip(
        family.axes, sides, (token,) if len(sides) == 1 else (frame, row, column), strict=True
    ):
        patch = family.shape[axis] // side
        at[1 + axis] = slice(index * patch, (index + 1) * patch)
    x = noise(1, *family.shape)
    with Accel()(pipe), torch.no_grad():
        for change in (0, 1):
            x[tuple(at)] += change
            pipe.transformer(hidden_states=x, timestep=family.timestep(0.5, 1), **family.given(1, 0))
    calls = [(site, k) for site, k in seen if site.part == "self"]
    (site, before), (_, after) = calls[0], calls[len(calls) // 2]
    if site.text is not None:
        before, after = site.text.split(before)[0], site.text.split(after)[0]
    assert site.grid == grid
    assert (after != before).flatten(2).any(2)[0].nonzero().flatten().tolist() == [token]


@pytest.mark.parametrize("accel", [Accel(window=WINDOW), Accel(selection=SELECTION)], ids=name)
def test_a_batch_row_equals_the_row_alone(family, accel):
    pipe = family.pipe()
    with accel(pipe):
        both = family.generate(pipe, 2)
        for only in range(2):
            alone = family.generate(pipe, 2, only)
            torch.testing.assert_close(alone, both[only : only + 1], atol=family.rounding, rtol=0)


def test_branches_are_told_apart(family, monkeypatch):
    seen, plan = [], AnnSA.plan
    monkeypatch.setattr(AnnSA, "plan", lambda *args: seen.append(args[-1]) or plan(*args))
    pipe = family.pipe()
    with Accel(selection=SELECTION)(pipe):
        family.generate(pipe)
    layers = Accel().describe(pipe)[0]["layers"]
    assert len(seen) == 2 * STEPS * layers
    order = [site.branch for site in seen[::layers]]
    assert order == order[:2] * STEPS
    assert order[0] != order[1]
    assert [site.step for site in seen[::layers]] == [step for step in range(STEPS) for _ in range(2)]
    assert {site.grid for site in seen} == {family.grid}


def state(pipe):
    """Everything that acceleration changes of a model."""
    modules = list(pipe.transformer.modules())
    return [(set(vars(m)), getattr(m, "processor", None), list(m._forward_hooks.values())) for m in modules]


def test_leaving_restores_everything_also_after_an_exception(family):
    pipe = family.pipe()
    stock = family.generate(pipe)
    before = state(pipe)

    def half_way():
        with Accel(selection=SELECTION)(pipe):
            family.generate(pipe)
            assert state(pipe) != before
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_way()
    assert state(pipe) == before
    assert torch.equal(family.generate(pipe), stock)


def test_what_is_refused(family):
    pipe = family.pipe()
    before = state(pipe)
    for accel in (Accel(cache=TempCache()), Accel(reuse=FlashBlock())):
        with pytest.raises(UnsupportedError, match=r"generates the whole video at once|has none that stay"):
            accel.apply(pipe)
    for accel in (Accel(prompt=PadCollapse()), Accel(prompt=AnnCA(bits=4))):
        assert takes(accel, pipe) == family.takes_prompt
    assert takes(LOSSY[2], pipe) == family.takes_guide
    assert state(pipe) == before


def test_another_processor_is_refused(family):
    pipe = family.pipe()
    first = next(port for port in replaced(pipe) if port is not None)
    first.processor = type("Mine", (type(first.processor),), {})()
    with pytest.raises(UnsupportedError, match="runs Mine already"):
        Accel().apply(pipe)


def replaced(pipe):
    """The attentions that acceleration touches."""
    stock = {m: m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")}
    with Accel()(pipe):
        return [m for m, processor in stock.items() if m.processor is not processor]


def test_blocks_compile_into_as_many_graphs_as_of_the_stock_model(family):
    pipe, accel = family.pipe(), Accel(window=WINDOW)
    if not getattr(pipe.transformer, "_repeated_blocks", None):
        pytest.skip("diffusers compiles none of its blocks")

    def go(context):
        torch._dynamo.reset()
        counter.clear()
        with context:
            return family.generate(pipe, steps=2), counter.frame_count

    counter = CompileCounter()
    (stock, _), (windows, _) = go(nullcontext()), go(accel(pipe))
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    (compiled_stock, graphs), (compiled_windows, graphs_of_windows) = go(nullcontext()), go(accel(pipe))
    torch.testing.assert_close(compiled_stock, stock, atol=3e-5, rtol=0)
    torch.testing.assert_close(compiled_windows, windows, atol=3e-5, rtol=0)
    assert graphs_of_windows == graphs
