"""SANA-WM's refiner: block by block over a cache of its pipeline's, which is the past that policies act on."""

import pytest
import torch
from families import FAMILIES, STEPS, noise, sana_wm_refiner
from test_families import state
from torch._dynamo.testing import CompileCounter

from diffaccel import Accel, AnnSA, FlashBlock, Grid, InwardWindow, PadCollapse, SinkRecent, UnsupportedError, port
from diffaccel.attend import attend

[FAMILY] = [family for family in FAMILIES if family.name == "SANA-WM refiner"]
GRID, LAYERS = Grid(2, 6, 8), 2
EXACT = [Accel(), Accel(selection=AnnSA(density=1)), Accel(reuse=FlashBlock(refresh=1))]
CHOOSES = {"dense_steps": 0, "min_past": 0}
LOSSY = [
    Accel(selection=AnnSA(0.4, **CHOOSES)),
    Accel(reuse=FlashBlock(refresh=2, min_past=0)),
    Accel(selection=AnnSA(0.4, summaries=False, **CHOOSES), reuse=FlashBlock(refresh=(0,), min_past=0, residual=True)),
]


def name(accel):
    return "+".join(type(policy).__name__ for policy in accel.policies().values())


@pytest.mark.parametrize("settings", [{}, {"rope_type": "split"}, {"gated_attn": True}], ids=str)
@pytest.mark.parametrize("accel", EXACT, ids=name)
def test_exact_settings_are_the_stock_pipeline(settings, accel):
    pipe = sana_wm_refiner(**settings)
    stock, before = FAMILY.generate(pipe), state(pipe)
    with accel(pipe) as run:
        for _ in range(2):
            torch.testing.assert_close(FAMILY.generate(pipe), stock, atol=3e-5, rtol=0)
    if "reuse" in accel.policies():
        assert run.report().slots["reuse"].skipped == 0
    assert state(pipe) == before
    assert torch.equal(FAMILY.generate(pipe), stock)


@pytest.mark.parametrize("accel", LOSSY, ids=name)
def test_what_is_lossy_engages_and_reads_less(accel):
    pipe = sana_wm_refiner()
    stock = FAMILY.generate(pipe)
    with accel(pipe) as run:
        found = FAMILY.generate(pipe)
    assert torch.isfinite(found).all()
    assert (found - stock).abs().max() > 1e-3
    for slot in accel.policies():
        counts = run.report().slots[slot]
        assert counts.engaged
        assert counts.keys_read < counts.keys_total


def test_the_past_is_a_sink_and_the_newest_frames_and_stays_for_a_block(monkeypatch):
    seen = []

    def see(q, k, v, site, run):
        out = attend(q, k, v, site, run)
        past = run.memory(site).past()[0].entries
        seen.append((site, past.frames.unique().tolist(), past.k.clone()))
        return out

    monkeypatch.setattr(port, "attend", see)
    pipe = sana_wm_refiner()
    with Accel()(pipe):
        FAMILY.generate(pipe)
        seen.clear()  # a second generation counts from 0 again
        FAMILY.generate(pipe)
    (sink, past, _), *rest = seen[::LAYERS]
    assert (sink.phase, sink.start, sink.grid, past) == ("clean", 0, Grid(1, 6, 8), [])
    blocks = [rest[at : at + STEPS + 1] for at in range(0, len(rest), STEPS + 1)]
    for number, (block, kept) in enumerate(
        zip(blocks, ([0], [0, 1, 2], [0, 1, 2, 3, 4], [0, 3, 4, 5, 6]), strict=True)
    ):
        assert {(site.block, site.start, site.grid) for site, *_ in block} == {(number, 1 + 2 * number, GRID)}
        assert [(site.step, site.phase) for site, *_ in block] == [
            *((step, "denoise") for step in range(STEPS)), (STEPS, "clean")
        ]  # fmt: skip
        assert [site.noise for site, *_ in block] == pytest.approx([0.9, 2 / 3, 13 / 30, 0.2, 0], abs=1e-3)
        assert all(frames == kept for _, frames, _ in block)
        assert all(torch.equal(keys, block[0][2]) for *_, keys in block)


def test_what_does_not_fit_is_refused():
    pipe = sana_wm_refiner()
    for accel, why in (
        (Accel(cache=SinkRecent()), "it keeps a sink and the newest frames itself"),
        (Accel(window=InwardWindow()), "it keeps a sink and the newest frames itself"),
        (Accel(prompt=PadCollapse()), "its prompt is read under a mask"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            accel.apply(pipe)
    given = {"encoder_hidden_states": noise(1, 4, 32), "timestep": torch.zeros(1, 6), "video_rotary_emb": None}
    with Accel()(pipe), pytest.raises(UnsupportedError, match="over the pipeline's cache, at places that"):
        pipe.transformer(hidden_states=noise(1, 6, 8), **given)


def test_an_accelerated_generation_after_an_exception_and_a_stock_one_begins_anew():
    pipe = sana_wm_refiner()
    stock = FAMILY.generate(pipe)

    def stop(module, args):
        raise RuntimeError("half way")

    with Accel()(pipe):
        handle = pipe.transformer.proj_out.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="half way"):
            FAMILY.generate(pipe)
        handle.remove()
        torch.testing.assert_close(FAMILY.generate(pipe), stock, atol=3e-5, rtol=0)


def test_blocks_compile_into_no_more_graphs_than_of_the_stock_model():
    pipe, counter, found = sana_wm_refiner(), CompileCounter(), []
    expected = FAMILY.generate(pipe)
    pipe.transformer.compile_repeated_blocks(backend=counter)
    for accel in (None, Accel()):
        torch._dynamo.reset()
        counter.clear()
        if accel is None:
            out = FAMILY.generate(pipe)
        else:
            with accel(pipe):
                out = FAMILY.generate(pipe)
        torch.testing.assert_close(out, expected, atol=3e-5, rtol=0)
        found.append(counter.frame_count)
    assert found[1] <= found[0]
