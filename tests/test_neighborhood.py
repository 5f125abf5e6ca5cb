"""Windows with stride, dilation and causal axes: their masks, what they read, and the tiles that they fill."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_within, attention64
from test_inward_window import entries_of, queries_of, site_of

from diffaccel import (
    Accel,
    AnnSA,
    FlashBlock,
    Grid,
    HostCache,
    InwardWindow,
    KnobError,
    NeighborhoodAttention,
    TempCache,
)
from diffaccel.kernel import KERNELS, merge
from diffaccel.kernel.boxes import Dilated, over_boxes
from diffaccel.kernel.reference import partial
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.loading import bundled_model
from diffaccel.window.spans import spans, strided
from diffaccel.window.tiles import count_tiles

F32 = torch.float32


def of_the_authors(length, window, stride, dilation, causal):
    """Which query of an axis reads which key, bool (length, length), by NATTEN's conditions on a pair of places."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for q, k in product(range(length), repeat=2):
        if q % dilation != k % dilation:
            continue
        size = length // dilation + (1 if q % dilation < length % dilation else 0)  # of the places in their turn
        own, other, most = q // dilation, k // dilation, min(window, size)
        left, right = most // 2, most // 2 + (most % 2 - 1)
        if causal:
            leader = min(own // stride * stride + stride - 1, size - 1)
            seen[q, k] = own >= other and leader - other < most
        else:
            leader = min(own // stride * stride + stride // 2, size - 1)
            centre = min(max(leader, left), size - 1 - right)
            seen[q, k] = 0 <= centre - other <= left or 0 <= other - centre <= right
    return seen


def mask_of(window, grid, keys, first=0):
    """Token by token; queries are those from frame `first` of the keys on."""
    axes = []
    for axis, length in enumerate((keys.frames, keys.height, keys.width)):
        size = window.kernel[axis] or length
        axes.append(of_the_authors(length, size, window.stride[axis], window.dilation[axis], window.causal[axis]))
    axes[0] = axes[0][first : first + grid.frames]
    mask = torch.einsum("ad,be,cf->abcdef", *(axis.int() for axis in axes)).bool()
    return mask.reshape(grid.tokens, keys.tokens)


def spread(tiles, queries, keys):
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for own, read in tiles:
        seen[slice(*own), slice(*read)] = True
    return seen


@given(length=st.integers(1, 30), window=st.integers(1, 12), stride=st.integers(1, 12), causal=st.booleans())
@settings(max_examples=300, deadline=None)
def test_along_an_axis_windows_are_those_of_the_authors(length, window, stride, causal):
    stride = min(stride, window)
    tiles = strided(length, stride, window, causal)
    assert [own[0] for own, _ in tiles] == [0, *(own[1] for own, _ in tiles[:-1])]
    assert torch.equal(spread(tiles, length, length), of_the_authors(length, window, stride, 1, causal))


def test_a_stride_of_one_is_the_window_that_is_shifted_inward():
    """Odd and even windows, extents shorter than the window and longer."""
    tried = 0
    for length, window in product(range(1, 41), range(1, 21)):
        assert strided(length, 1, window) == spans(length, 1, window)
        assert strided(2, 1, window, first=length - 1, keys=length + 1) == spans(2, 1, window, length - 1, length + 1)
        tried += 2
    assert tried == 1600


@pytest.mark.parametrize("grid", [Grid(3, 8, 11), Grid(1, 5, 4), Grid(2, 7, 7)], ids=str)
@pytest.mark.parametrize("size", [(3, 5), (4, 4)])
@pytest.mark.parametrize("past", [0, 3])
def test_in_three_axes_it_is_inward_window(grid, size, past):
    entries, where = entries_of(Grid(grid.frames + past, grid.height, grid.width)), site_of(grid, start=past)
    ours = NeighborhoodAttention((0, *size), (1, 1, 1)).plan(None, entries, where)
    assert ours == InwardWindow(size).plan(None, entries, where)


SETTINGS = [
    {"kernel": (0, 4, 6), "stride": (1, 2, 3)},
    {"kernel": (2, 3, 5), "stride": (2, 3, 5)},
    {"kernel": (0, 3, 3), "stride": (1, 1, 2), "dilation": (1, 2, 3)},
    {"kernel": (2, 3, 0), "stride": (1, 1, 1), "dilation": (2, 1, 2)},
    {"kernel": (2, 3, 4), "stride": (1, 2, 2), "causal": (True, False, True)},
    {"kernel": (0, 9, 3), "stride": (1, 3, 1), "causal": (True, False, False), "dilation": (2, 1, 4)},
]


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
@pytest.mark.parametrize(("grid", "past"), [(Grid(3, 8, 11), 0), (Grid(2, 5, 9), 3), (Grid(1, 6, 7), 4)], ids=str)
def test_boxes_are_attention_under_the_mask_and_counters_are_true(kernel, knobs, grid, past):
    window, keys = NeighborhoodAttention(**knobs), Grid(grid.frames + past, grid.height, grid.width)
    q, entries = queries_of(grid), entries_of(keys)
    boxes = window.plan(q, entries, site_of(grid, start=past))
    assert isinstance(boxes, Dilated) == (window.dilation != (1, 1, 1))
    mask = mask_of(window, grid, keys, past)
    found = over_boxes(KERNELS[kernel], q, entries, 0.3, boxes)
    exact, lse = attention64(q, entries.k, entries.v, scale=0.3, mask=mask)
    assert_within(found.out, exact, F32)
    assert_within(found.lse, lse, F32)
    assert boxes.keys_read == pytest.approx(float(mask.sum()) / grid.tokens)


@pytest.mark.parametrize("knobs", SETTINGS[1:3], ids=str)
def test_with_what_it_leaves_out_it_is_dense(knobs):
    grid, window = Grid(3, 8, 11), NeighborhoodAttention(**knobs)
    q, entries = queries_of(grid), entries_of(grid)
    rest = ~mask_of(window, grid, grid)
    scores = torch.einsum("bshd,bnhd->bhsn", q, entries.k) * 0.3
    beside = scores.masked_fill(~rest, -torch.inf)
    outside = partial(q, entries.k, entries.v, scale=0.3)._replace(
        out=(beside.softmax(-1) @ entries.v.transpose(1, 2)).transpose(1, 2), lse=beside.logsumexp(-1).transpose(1, 2)
    )
    inside = over_boxes(KERNELS["sdpa"], q, entries, 0.3, window.plan(q, entries, site_of(grid)))
    exact, lse = attention64(q, entries.k, entries.v, scale=0.3)
    found = merge([inside, outside])
    assert_within(found.out, exact, F32, inputs=8)
    assert_within(found.lse, lse, F32)


def test_what_covers_every_axis_reads_all():
    grid = Grid(2, 6, 8)
    q, entries = queries_of(grid), entries_of(grid)
    assert NeighborhoodAttention((0, 6, 8), (1, 3, 8)).plan(q, entries, site_of(grid)) is None
    assert NeighborhoodAttention((0, 6, 7), (1, 3, 7)).plan(q, entries, site_of(grid)).keys_read == 2 * 6 * 7
    causal = NeighborhoodAttention((0, 0, 0), (1, 1, 1), causal=(True, False, False))
    assert causal.plan(q, entries, site_of(grid)).keys_read == 1.5 * 48


def test_what_does_not_go_with_a_window_is_refused():
    with pytest.raises(KnobError, match="needs whole frames in their order, and TempCache keeps parts"):
        Accel(window=NeighborhoodAttention(), cache=TempCache())
    assert "leave one out" in NeighborhoodAttention().conflict([AnnSA()])
    for knobs in ({"kernel": (3, 24, 24)}, {"causal": (True, False, False)}, {"dilation": (2, 1, 1)}):
        with pytest.raises(KnobError, match="in one piece, and FlashBlock parts them: make frames 0"):
            Accel(window=NeighborhoodAttention(**knobs), reuse=FlashBlock())
    Accel(window=NeighborhoodAttention(), reuse=FlashBlock(), cache=HostCache())


# -- tiles of a kernel ------------------------------------------------------------------------------------------------


def tiles_of_the_mask(mask, grid, keys, queries, of_keys):
    """The same counts, token by token."""
    axes = [(grid.frames, grid.height, grid.width), (keys.frames, keys.height, keys.width)]
    mask = mask.view(*axes[0], *axes[1])
    visited = full = total = 0
    starts = [range(0, n, tile) for n, tile in zip((*axes[0], *axes[1]), (*queries, *of_keys), strict=True)]
    for corner in product(*starts):
        cut = tuple(slice(at, at + tile) for at, tile in zip(corner, (*queries, *of_keys), strict=True))
        total, visited, full = total + 1, visited + bool(mask[cut].any()), full + bool(mask[cut].all())
    return total, visited, full


@pytest.mark.parametrize("knobs", [SETTINGS[0], SETTINGS[1], SETTINGS[4]], ids=str)
@pytest.mark.parametrize(
    ("queries", "of_keys"), [((1, 2, 2), (1, 4, 2)), ((2, 3, 4), (2, 3, 4)), ((1, 1, 1), (1, 1, 1))]
)
def test_tiles_are_counted_as_in_the_mask(knobs, queries, of_keys):
    window, grid = NeighborhoodAttention(**knobs), Grid(3, 8, 11)
    boxes = window.plan(None, entries_of(grid), site_of(grid))
    mask = mask_of(window, grid, grid)
    found = count_tiles(boxes, queries, of_keys)
    assert tuple(found) == tiles_of_the_mask(mask, grid, grid, queries, of_keys)
    assert found.bound == found.total / found.visited


def test_tiles_of_a_dilated_grid_are_those_of_its_parts():
    grid = Grid(1, 8, 8)
    boxes = NeighborhoodAttention((0, 4, 4), (1, 4, 4), (1, 2, 2)).plan(None, entries_of(grid), site_of(grid))
    assert count_tiles(boxes, (1, 4, 4), (1, 4, 4)) == (16, 4, 4)  # each of four parts is one tile, and reads itself


def count(stride, kernel=24, tile=8):
    grid = Grid(1, 64, 64)
    window = NeighborhoodAttention((0, kernel, kernel), (1, stride, stride))
    return count_tiles(window.plan(None, entries_of(grid, 1, 1, 1), site_of(grid)), (1, tile, tile), (1, tile, tile))


def test_a_stride_that_fits_the_tiles_fills_them():
    sliding, fitting = count(1), count(8)
    assert fitting.visited == fitting.full
    assert fitting.bound == pytest.approx((64 / 24) ** 2)  # all that leaving keys out can gain
    assert sliding.full < sliding.visited
    assert sliding.bound < 0.7 * fitting.bound
    blocks = count(24)
    assert blocks.visited == blocks.full


def test_on_the_bundled_model_a_stride_of_one_makes_the_same_video_as_inward_window():
    pipe = CausalWanPipeline.from_pretrained(bundled_model())
    size = {"height": 128, "width": 128, "num_frames": 21, "num_inference_steps": 2, "output_type": "latent"}

    def make(window):
        with Accel(window=window)(pipe) as run:
            seed = torch.Generator().manual_seed(1)
            latents = pipe("a small green square moves up over gray", generator=seed, guidance_scale=1.0, **size).frames
        return latents, run.report().slots["window"]

    (sliding, counts), (inward, theirs) = (
        make(NeighborhoodAttention((0, 5, 5), (1, 1, 1))),
        make(InwardWindow((5, 5), ratio=1)),
    )
    assert torch.equal(sliding, inward)
    assert counts.keys_read == theirs.keys_read == pytest.approx(25 / 64 * counts.keys_total)
    strided, _ = make(NeighborhoodAttention((0, 5, 5), (1, 5, 5)))
    assert not torch.equal(strided, sliding)
