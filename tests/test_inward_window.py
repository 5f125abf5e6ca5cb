"""Windows of the training size in larger frames, and the pass over the whole field that steers them."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanVideoToVideoPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_within, attention64
from test_hunyuan_video import accelerated
from tiny import tiny_components, tiny_hunyuan_pipeline, tiny_pipeline

from diffaccel import (
    Accel,
    FlashBlock,
    FullFieldGuide,
    Grid,
    InwardWindow,
    KnobError,
    NotEngagedError,
    Plan,
    TempCache,
    UnsupportedError,
)
from diffaccel.cache.entries import Entries
from diffaccel.kernel import KERNELS
from diffaccel.kernel.boxes import _progressions, over_boxes
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.backbones._diffusers import WanAttnProcessor
from diffaccel.policy import Selector
from diffaccel.reuse.full_field_guide import _Kept, spread
from diffaccel.rotary import rotate
from diffaccel.site import Site
from diffaccel.window.inward_window import spans

SDPA, REFERENCE = KERNELS["sdpa"], KERNELS["reference"]


def site_of(grid, **changes):
    usual = {"layer": 0, "part": "self", "step": 0, "steps": 4, "block": 0, "start": 0, "phase": "denoise"}
    return Site(**usual | {"branch": "cond", "grid": grid} | changes)


def entries_of(grid, heads=2, dim=16, batch=2, start=0):
    shape = (batch, grid.tokens, heads, dim)
    k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    return Entries(k, v, grid.frame_of_token(start))


def queries_of(grid, heads=2, dim=16, batch=2):
    return torch.randn((batch, grid.tokens, heads, dim), generator=torch.Generator().manual_seed(3))


# -- what a query sees --------------------------------------------------------------------------------------------


def seen_in_the_paper(place, half, length):
    """First and last key of a query, from the four terms of the authors' mask: at a border the window grows inward."""
    below, above = max(0, half - place), max(0, half + place - length + 1)
    return max(0, place - half - above), min(length - 1, place + half + below)


@pytest.mark.parametrize(("length", "half"), [(68, 15), (120, 26), (31, 15), (33, 15), (7, 1), (5, 0)])
def test_a_tile_of_one_token_is_the_window_of_the_paper(length, half):
    found = {}
    for (start, stop), read in spans(length, 1, 2 * half + 1):
        for place in range(start, stop):
            found[place] = read
    for place in range(length):
        first, last = seen_in_the_paper(place, half, length)
        assert found[place] == (first, last + 1)
        assert last + 1 - first == 2 * half + 1


@given(length=st.integers(1, 40), tile=st.integers(1, 12), more=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_tiles_cover_an_axis_once_and_read_a_whole_window_around_themselves(length, tile, more):
    window = tile + more
    found = spans(length, tile, window)
    assert next(own for own, _ in found)[0] == 0
    assert all(a[1] == b[0] for (a, _), (b, _) in itertools.pairwise(found))
    assert found[-1][0][1] == length
    for (start, stop), (left, right) in found:
        assert left >= 0
        assert right <= length
        assert right - left == min(window, length)
        assert left <= start
        assert stop <= right


@pytest.mark.parametrize("tile", [1, 3])
def test_windows_are_the_same_from_both_ends(tile):
    """Of an odd window and an axis that divides."""
    found = spans(21, tile, 7)
    turned = [((21 - b, 21 - a), (21 - d, 21 - c)) for (a, b), (c, d) in reversed(found)]
    assert found == turned


def mask_of(window, grid, keys, first=0):
    """Token by token, from the definition, for tiles of one token."""
    rows, columns = (min(a, b) for a, b in zip(window.size, (grid.height, grid.width), strict=True))

    def start(place, size, length):
        return min(max(place - size // 2, 0), length - size)

    seen = torch.zeros(grid.frames, grid.height, grid.width, keys.frames, grid.height, grid.width, dtype=torch.bool)
    for f in range(grid.frames):
        for h in range(grid.height):
            for w in range(grid.width):
                a, b = start(h, rows, grid.height), start(w, columns, grid.width)
                span = slice(None)
                if window.frames is not None:
                    many = min(window.frames, keys.frames)
                    c = start(first + f, many, keys.frames)
                    span = slice(c, c + many)
                seen[f, h, w, span, a : a + rows, b : b + columns] = True
    return seen.reshape(grid.tokens, keys.tokens)


GRIDS = [Grid(2, 7, 9), Grid(1, 5, 11), Grid(3, 8, 6)]


@pytest.mark.parametrize("kernel", [SDPA, REFERENCE], ids=lambda k: k.name)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("knobs", [{}, {"frames": 1}, {"frames": 3}], ids=str)
@pytest.mark.parametrize("gather", [1, 1024])
def test_boxes_are_attention_under_the_mask(kernel, grid, knobs, gather, monkeypatch):
    window = InwardWindow((3, 5), gather_mib=gather, **knobs)
    q, entries = queries_of(grid), entries_of(grid)
    boxes = window.plan(q, entries, site_of(grid))
    found = over_boxes(kernel, q, entries, 0.3, boxes)
    mask = mask_of(window, grid, grid)
    exact, lse = attention64(q, entries.k, entries.v, scale=0.3, mask=mask)
    assert_within(found.out, exact, torch.float32)
    assert_within(found.lse, lse, torch.float32)
    assert boxes.keys_read == pytest.approx(float(mask.sum()) / grid.tokens)


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (3, 5)])
@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("frames", [None, 3])
def test_tiles_read_windows_of_one_size_in_the_past_too(tile, past, frames):
    grid, keys = Grid(2, 8, 11), Grid(2 + past, 8, 11)
    window = InwardWindow((3, 5), tile, frames=frames)
    q, entries = queries_of(grid), entries_of(keys)
    boxes = window.plan(q, entries, site_of(grid, start=past))
    assert boxes.keys_read == 15 * (keys.frames if frames is None else min(frames, keys.frames))
    found = over_boxes(SDPA, q, entries, 0.25, boxes)
    mask = torch.zeros(*(grid.frames, 8, 11), *(keys.frames, 8, 11), dtype=torch.bool)
    for tiles in itertools.product(boxes.frames, boxes.rows, boxes.columns):
        mask[tuple(slice(*tile[which]) for which in (0, 1) for tile in tiles)] = True
    exact, _ = attention64(q, entries.k, entries.v, scale=0.25, mask=mask.view(grid.tokens, keys.tokens))
    assert_within(found.out, exact, torch.float32)
    if tile == (1, 1):
        assert torch.equal(mask.view(grid.tokens, keys.tokens), mask_of(window, grid, keys, past))


def test_no_more_is_copied_at_a_time_than_allowed_and_what_tiles_share_is_copied_once():
    grid = Grid(2, 16, 16)
    q, entries = queries_of(grid, heads=8, dim=64), entries_of(grid, heads=8, dim=64)
    strip = 2 * 2 * 5 * 16 * 2 * 8 * 64 * 4  # keys and values of two frames, five rows, in two videos
    copied, read = [], []

    class Watched:
        @staticmethod
        def partial(q, k, v, **given):
            copied.append(2 * k.untyped_storage().nbytes())
            read.append(2 * k.numel() * k.element_size())
            return SDPA.partial(q, k, v, **given)

    found = {}
    for mib, strips in ((1, 1), (2, 1), (3, 2), (1024, 10)):  # ten rows of queries that no border shifts
        boxes = InwardWindow((5, 5), gather_mib=mib).plan(q, entries, site_of(grid))
        found[mib] = over_boxes(Watched, q, entries, 0.1, boxes)
        assert max(copied) == strips * strip
        assert max(read) == strips * strip * 10 * 5 // 16  # ten windows of five columns, which overlap
        assert len(copied) == 2 * (-(-10 // strips) + -(-2 // strips))  # tiles between the borders, and those at them
        copied.clear(), read.clear()
        torch.testing.assert_close(found[mib], found[1])


def test_strips_run_where_less_is_copied():
    grid = Grid(2, 16, 24)
    boxes = {tile: InwardWindow((7, 7), tile).plan(None, entries_of(grid), site_of(grid)) for tile in ((1, 7), (7, 1))}
    assert not boxes[1, 7].along_columns
    assert boxes[7, 1].along_columns


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa3", "sdpa"])
@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (5, 7)], ids=str)
@pytest.mark.parametrize("grid", [Grid(3, 11, 13), Grid(2, 24, 17)], ids=str)
@pytest.mark.parametrize("mib", [1, 1024])
def test_overlapping_windows_are_read_in_place_by_the_kernels_of_a_gpu(name, tile, grid, mib):
    kernel = KERNELS[name]
    if why := kernel.unusable(torch.device("cuda"), torch.bfloat16, 64):
        pytest.skip(why)
    q, k, v = (torch.randn(2, grid.tokens, heads, 64, device="cuda").bfloat16() for heads in (4, 4, 4))
    boxes = InwardWindow((5, 7), tile, gather_mib=mib).plan(q, Entries(k, v, grid.frame_of_token()), site_of(grid))
    found = over_boxes(kernel, q, Entries(k, v), 0.2, boxes)
    mask = torch.zeros(2 * (grid.frames, grid.height, grid.width), dtype=torch.bool)
    for tiles in itertools.product(boxes.frames, boxes.rows, boxes.columns):
        mask[tuple(slice(*tile[which]) for which in (0, 1) for tile in tiles)] = True
    exact, lse = attention64(q, k, v, scale=0.2, mask=mask.view(grid.tokens, grid.tokens).cuda())
    assert_within(found.out, exact, torch.bfloat16)
    assert_within(found.lse, lse, torch.bfloat16)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9, unique=True))
@settings(max_examples=200, deadline=None)
def test_batches_hold_every_tile_once_at_equal_distances(starts):
    tiles = [((a, a + 2), (b, b + 5)) for a, b in sorted(starts)]
    found = _progressions(tiles)
    assert sorted(itertools.chain(*found)) == tiles
    for batch in found:
        assert len({(b[0][0] - a[0][0], b[1][0] - a[1][0]) for a, b in itertools.pairwise(batch)}) <= 1
    assert len(found[0]) >= min(2, len(tiles))


def test_a_window_as_large_as_the_frame_reads_all_and_along_one_axis_the_other_is_cut():
    grid = Grid(2, 6, 8)
    q, entries = queries_of(grid), entries_of(grid)
    assert InwardWindow((6, 8)).plan(q, entries, site_of(grid)) is None
    assert InwardWindow((7, 9)).plan(q, entries, site_of(grid)) is None
    assert InwardWindow((7, 3)).plan(q, entries, site_of(grid)).keys_read == 2 * 6 * 3
    assert InwardWindow((6, 8)).scale(site_of(grid)) == 1
    assert InwardWindow((31, 53)).scale(site_of(Grid(1, 68, 120))) == pytest.approx(1.0458, abs=1e-3)
    assert InwardWindow((31, 53), ratio=1).scale(site_of(Grid(1, 68, 120))) == 1


def test_what_does_not_go_with_a_window_is_refused():
    with pytest.raises(KnobError, match="needs whole frames in their order, and TempCache keeps parts"):
        Accel(window=InwardWindow(), cache=TempCache())
    with pytest.raises(KnobError, match="needs all of them in one piece, and FlashBlock parts them"):
        Accel(window=InwardWindow(frames=3), reuse=FlashBlock())


# -- in pipelines ---------------------------------------------------------------------------------------------------


def wan(kind=WanVideoToVideoPipeline, scheduler=None, **transformer):
    components = tiny_components(**transformer)
    pipe = kind(**components)
    pipe.scheduler = scheduler or UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps=6, height=64, width=96, guidance=3.0, **given):
    latents = torch.randn(1, 4, 2, height // 8, width // 8, generator=torch.Generator().manual_seed(5))
    usual = {"strength": 0.7} if isinstance(pipe, WanVideoToVideoPipeline) else {}
    return pipe(
        prompt="a red circle moves left", height=height, width=width, num_inference_steps=steps, latents=latents,
        guidance_scale=guidance, output_type="latent", **usual, **given,
    ).frames  # fmt: skip


def projected(attn, hidden_states, encoder_hidden_states, rotary_emb):
    """Queries, keys and values (B, H, N, D) as the stock processor makes them."""
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
    if rotary_emb is not None:
        q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
    return [x.transpose(1, 2) for x in (q, k, v)]


class TwoRows(WanAttnProcessor):
    """The published loop: row 0 sees windows, row 1 the whole field and lends row 0 its cross-attention."""

    def __init__(self, state, layer, mask, factor):
        super().__init__()
        self.state, self.layer, self.mask, self.factor = state, layer, mask, factor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        cross = encoder_hidden_states is not None
        attend = torch.nn.functional.scaled_dot_product_attention
        q, k, v = projected(attn, hidden_states, encoder_hidden_states, rotary_emb)
        scale = q.shape[-1] ** -0.5
        if not cross:
            window = attend(q[:1], k[:1], v[:1], attn_mask=self.mask, scale=scale * self.factor)
            guided = attend(q[1:], k[1:], v[1:], scale=scale * self.factor) if self.state["guide"] else window
            out = torch.cat([window, guided])
        elif self.state["uncond"]:
            out = attend(q, k, v, scale=scale)
        else:
            if self.state["guide"]:
                self.state[self.layer] = attend(q[1:], k[1:], v[1:], scale=scale)
            out = self.state[self.layer].expand(2, -1, -1, -1)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def two_rows(pipe, window, every, grid):
    """As `run`, by the published loop."""
    site, state, transformer = site_of(grid), {"calls": 0}, pipe.transformer
    mask, factor = mask_of(window, grid, grid), window.scale(site)
    before = [(a, a.processor) for block in transformer.blocks for a in (block.attn1, block.attn2)]
    for number, (attention, _) in enumerate(before):
        attention.processor = TwoRows(state, number, mask, factor)
    forward = transformer.forward

    def doubled(hidden_states, timestep, encoder_hidden_states, **given):
        step, state["uncond"] = divmod(state["calls"], 2)
        state["guide"] = not state["uncond"] and step % every == 0
        state["calls"] += 1
        parts = (x.expand(2, *x.shape[1:]) for x in (hidden_states, timestep, encoder_hidden_states))
        hidden, times, text = parts
        out = forward(hidden_states=hidden, timestep=times, encoder_hidden_states=text, **given)
        return (out[0][:1],)

    transformer.forward = doubled
    try:
        return run(pipe)
    finally:
        del transformer.forward
        for attention, processor in before:
            attention.processor = processor


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_guided_loop_is_that_of_two_rows(every):
    pipe, window, grid = wan(), InwardWindow((3, 3)), Grid(2, 4, 6)
    expected = two_rows(pipe, window, every, grid)
    with Accel(window=window, reuse=FullFieldGuide(every=every))(pipe) as found:
        torch.testing.assert_close(run(pipe), expected, atol=2e-5, rtol=0)
    report = found.report()
    assert report.slots["window"].engaged
    assert report.slots["reuse"].engaged
    assert report.slots["reuse"].bytes == 2 * grid.tokens * 48 * 4  # two layers
    with Accel(window=window)(pipe):
        assert (run(pipe) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("every", [1, 3])
def test_passes_over_the_whole_field_are_made_where_they_matter_and_nowhere_else(every):
    pipe = wan()
    passes = []
    hook = pipe.transformer.blocks[0].register_forward_hook(lambda *_: passes.append(found._where.full_field))
    with Accel(window=InwardWindow((3, 3)), reuse=FullFieldGuide(every=every))(pipe) as found:
        for _ in range(2):  # a second video starts anew
            run(pipe, steps=6)
    hook.remove()
    steps = 4  # of strength 0.7
    looks = -(-steps // every)
    assert passes.count(True) == 2 * looks
    assert passes.count(False) == 2 * steps * 2
    assert passes[:2] == [True, False]


@pytest.mark.parametrize("hold", ["device", "int8", "host"])
def test_a_video_of_another_size_in_the_same_run_is_steered_from_its_own_first_step(hold):
    pipe, accel = wan(), Accel(window=InwardWindow((3, 3)), reuse=FullFieldGuide(every=3, hold=hold))
    with accel(pipe):
        alone = run(pipe, height=80, width=112)
    with accel(pipe):
        run(pipe)
        assert torch.equal(run(pipe, height=80, width=112), alone)


def test_what_is_held_is_not_what_a_layer_may_write_into():
    kept = _Kept("device")
    kept.put(0, given_out := torch.ones(1, 2, 1, 4))
    given_out.zero_()
    kept.get(0).zero_()
    assert kept.get(0).eq(1).all()


@pytest.mark.parametrize("kind", [WanPipeline, WanVideoToVideoPipeline])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("branches", ["cond", "all"])
def test_every_step_without_a_window_is_dense(kind, guidance, branches):
    pipe = wan(kind)
    dense = run(pipe, guidance=guidance)
    with Accel(window=InwardWindow(size=None), reuse=FullFieldGuide(every=1, branches=branches))(pipe):
        assert torch.equal(run(pipe, guidance=guidance), dense)
    with Accel(window=InwardWindow((3, 3)), reuse=FullFieldGuide(every=2, branches=branches))(pipe):
        assert not torch.allclose(run(pipe, guidance=guidance), dense, atol=1e-3)
    assert torch.equal(run(pipe, guidance=guidance), dense)


def spread_by_weights(x, grid, larger):
    """Bilinear, written out: token centres of the larger grid among those of `grid`."""

    def weights(few, many):
        place = ((torch.arange(many) + 0.5) * few / many - 0.5).clamp(0, few - 1)
        return (1 - (place[:, None] - torch.arange(few)).abs()).clamp(min=0)

    x = x.unflatten(1, (grid.frames, grid.height, grid.width))
    rows, columns = weights(grid.height, larger.height), weights(grid.width, larger.width)
    return torch.einsum("Hh,Ww,bfhwnd->bfHWnd", rows, columns, x).flatten(1, 3)


@pytest.mark.parametrize("larger", [Grid(2, 9, 7), Grid(2, 6, 10), Grid(2, 3, 5)], ids=str)
def test_what_a_smaller_pass_found_is_spread_bilinearly(larger):
    grid = Grid(2, 3, 5)
    x = queries_of(grid)
    torch.testing.assert_close(spread(x, grid, larger), spread_by_weights(x, grid, larger))


def natively_guided(pipe, window, every, grid, small):
    """As `run`, each guided step a forward on fewer latents first, whose cross-attention is spread."""
    state, transformer = {"calls": 0}, pipe.transformer
    mask, factor = mask_of(window, grid, grid), window.scale(site_of(grid))
    attend = torch.nn.functional.scaled_dot_product_attention

    class Native(TwoRows):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            cross = encoder_hidden_states is not None
            q, k, v = projected(attn, hidden_states, encoder_hidden_states, rotary_emb)
            windowed = not cross and not state["small"]
            larger = windowed or window.scale(site_of(small)) > 1  # also a pass on a grid that is, if a smaller one
            scale = q.shape[-1] ** -0.5 * (1 if cross or not larger else factor)
            out = attend(q, k, v, attn_mask=mask if windowed else None, scale=scale).transpose(1, 2)
            if cross and state["small"]:
                state[self.layer] = out
            elif cross and not state["uncond"]:
                out = spread_by_weights(state[self.layer], small, grid)
            return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    before = [(a, a.processor) for block in transformer.blocks for a in (block.attn1, block.attn2)]
    for number, (attention, _) in enumerate(before):
        attention.processor = Native(state, number, mask, factor)
    forward = transformer.forward
    rows, columns = (  # of latents, two a token: those nearest to the centres
        [int((place + 0.5) * many / few) for place in range(2 * few)]
        for few, many in ((small.height, grid.height), (small.width, grid.width))
    )

    def twice(hidden_states, **given):
        step, state["uncond"] = divmod(state["calls"], 2)
        state["calls"] += 1
        if not state["uncond"] and step % every == 0:
            state["small"] = True
            forward(hidden_states=hidden_states[:, :, :, rows][..., columns], **given)
        state["small"] = False
        return forward(hidden_states=hidden_states, **given)

    transformer.forward = twice
    try:
        return run(pipe)
    finally:
        del transformer.forward
        for attention, processor in before:
            attention.processor = processor


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("shrink", [2, 1.3])
def test_guided_on_a_smaller_grid_it_is_a_forward_of_that_size_first(every, shrink):
    pipe, window, grid = wan(), InwardWindow((3, 3)), Grid(2, 4, 6)
    small = Grid(2, 2, 3) if shrink == 2 else Grid(2, 3, 5)
    expected = natively_guided(pipe, window, every, grid, small)
    with Accel(window=window, reuse=FullFieldGuide(every=every, shrink=shrink))(pipe) as found:
        torch.testing.assert_close(run(pipe), expected, atol=2e-5, rtol=0)
    assert found.report().slots["reuse"].bytes == 2 * small.tokens * 48 * 4
    with Accel(window=window, reuse=FullFieldGuide(every=every))(pipe):
        assert (run(pipe) - expected).abs().max() > 1e-3


def test_a_smaller_grid_is_refused_where_every_token_has_a_noise_level():
    pipe = CausalWanPipeline(**tiny_components(), expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    accel = Accel(window=InwardWindow((3, 3)), reuse=FullFieldGuide(every=1, shrink=2))
    with pytest.raises(UnsupportedError, match="gives each token its own"), accel(pipe):
        pipe("a red circle moves left", **settings)


def test_in_a_causal_model_smaller_passes_have_a_past_of_their_own():
    pipe, forwards = tiny_pipeline(), []

    def record(module, args, given, out):
        where = accelerated_run._where
        forwards.append((where, given["hidden_states"], given["timestep"], given["encoder_hidden_states"], out[0]))

    hook = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    with Accel(window=InwardWindow((3, 3)), reuse=FullFieldGuide(every=2, shrink=2))(pipe) as accelerated_run:
        pipe(
            "a red circle moves left", height=64, width=96, num_frames=33, num_inference_steps=4,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    hook.remove()
    passes = [call for call in forwards if call[0].full_field]
    assert [(where.block, where.step, where.phase) for where, *_ in passes] == [
        (block, step, phase) for block in range(3) for step, phase in ((0, "denoise"), (2, "denoise"), (4, "clean"))
    ][:-1]  # nothing reads the last block
    with Accel()(pipe) as alone, torch.no_grad():  # the same calls, of a video that has no more than these tokens
        alone.begin(9)
        for where, latents, timestep, prompt, out in passes:
            assert latents.shape[3:] == (4, 6)
            with alone.at(block=where.block, start=where.start, step=where.step, steps=where.steps, phase=where.phase):
                found = pipe.transformer(hidden_states=latents, timestep=timestep, encoder_hidden_states=prompt)
            torch.testing.assert_close(found[0], out, atol=2e-5, rtol=0)


@pytest.mark.parametrize("hold", ["int8", "host"])
def test_how_it_is_held_changes_little_or_nothing(hold):
    pipe, window = wan(), InwardWindow((3, 3))
    with Accel(window=window, reuse=FullFieldGuide(every=2))(pipe) as usual:
        expected = run(pipe)
    with Accel(window=window, reuse=FullFieldGuide(every=2, hold=hold))(pipe) as found:
        got = run(pipe)
    if hold == "host":
        assert torch.equal(got, expected)
        assert found.report().slots["reuse"].bytes == 0
    else:
        assert 0 < (got - expected).abs().max() < 2e-2
        assert found.report().slots["reuse"].bytes < 0.35 * usual.report().slots["reuse"].bytes


def test_a_frame_no_larger_than_the_window_is_an_error_that_says_so():
    pipe = wan()
    message = r"no frame had more than size=\(4, 6\) rows and columns"
    with pytest.raises(NotEngagedError, match=message), Accel(window=InwardWindow((4, 6)))(pipe):
        run(pipe)


def test_a_guide_without_a_window_is_an_error_that_says_so():
    pipe = wan()
    with pytest.raises(NotEngagedError, match="no window to steer"), Accel(reuse=FullFieldGuide(every=2))(pipe):
        run(pipe)


def test_flow_euler_and_a_callback_that_changes_the_latents():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe, seen = wan(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)), []

    def halve(pipe, step, t, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * 0.5}

    with Accel(window=InwardWindow((3, 3)), reuse=FullFieldGuide(every=2))(pipe):
        latents = run(pipe, callback_on_step_end=halve)
    assert seen == [0, 1, 2, 3]
    assert torch.isfinite(latents).all()


def test_in_a_causal_pipeline_every_block_is_steered_and_the_past_is_read_through_windows():
    pipe = tiny_pipeline()
    settings = {"height": 64, "width": 96, "num_frames": 33, "num_inference_steps": 4, "output_type": "latent"}

    def make(**accel):
        with Accel(**accel)(pipe) as found:
            frames = pipe("a red circle moves left", generator=torch.Generator().manual_seed(0), **settings).frames
        return frames, found.report()

    dense, _ = make()
    exact, _ = make(window=InwardWindow(size=None), reuse=FullFieldGuide(every=1))
    assert torch.equal(exact, dense)
    windows, report = make(window=InwardWindow((3, 3)))
    assert report.slots["window"].keys_read < 0.5 * report.slots["window"].keys_total
    guided, _ = make(window=InwardWindow((3, 3)), reuse=FullFieldGuide(every=2))
    assert not torch.allclose(guided, windows, atol=1e-3)
    again, _ = make(window=InwardWindow((3, 3)), reuse=FullFieldGuide(every=2))
    assert torch.equal(again, guided)


@dataclass(frozen=True)
class Masked(Selector):
    """The same window as a plan of single tokens."""

    slot: ClassVar[str] = "window"
    exact: ClassVar[dict[str, Any]] = {"window": None}
    window: Any = None

    def plan(self, q, entries, site):
        return Plan(mask_of(self.window, site.grid, site.grid), q.shape[1], entries.count, 1, 1)


def test_joint_text_reads_and_is_read_whole():
    pipe, window = tiny_hunyuan_pipeline(), InwardWindow((1, 2), ratio=1)
    expected, _ = accelerated(pipe, Accel(window=Masked(window)))
    found, report = accelerated(pipe, Accel(window=window))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert 0 < report.slots["window"].keys_read < report.slots["window"].keys_total
    with pytest.raises(UnsupportedError, match="what steers is cross-attention"):
        accelerated(pipe, Accel(window=window, reuse=FullFieldGuide()))
