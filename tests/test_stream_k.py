"""Lean Attention's split: exact for any workers and lengths, every tile once, no worker with more than its share."""

from math import ceil

import pytest
import torch

from diffaccel import KnobError
from diffaccel.kernel import reference, stream_k
from diffaccel.kernel.stream_k import fixed_split, makespan, occupancy

LENGTHS = [0, 1, 17, 640, 129, 5, 128, 300]


@pytest.mark.parametrize("workers", [1, 3, 7, 132])
@pytest.mark.parametrize("tile", [1, 16, 128])
@pytest.mark.parametrize("plan", [stream_k.stream_k, lambda *sizes: fixed_split(*sizes, parts=3)])
def test_every_key_is_read_once(plan, workers, tile):
    schedule = plan(LENGTHS, tile, workers)
    assert len(schedule) == workers
    read = [torch.zeros(length, dtype=torch.int) for length in LENGTHS]
    for lane, start, stop in (piece for pieces in schedule for piece in pieces):
        assert start % tile == 0
        assert start < stop
        read[lane][start:stop] += 1
    assert all(bool((count == 1).all()) for count in read)


@pytest.mark.parametrize("workers", [1, 3, 7, 132])
def test_no_worker_has_more_than_its_share(workers):
    tiles = sum(ceil(length / 16) for length in LENGTHS)
    assert makespan(stream_k.stream_k(LENGTHS, 16, workers), 16) == ceil(tiles / workers)


def test_the_fixed_split_has_a_ragged_last_wave_and_this_has_none():
    """The saw-tooth: 12 heads in 15 parts each are 180 parts, on 132 workers a wave and a third."""
    lengths = [132 * 128] * 12
    fixed = fixed_split(lengths, 128, 132, 11)  # 132 parts, what fits
    ragged = fixed_split(lengths, 128, 132, 16)
    lean = stream_k.stream_k(lengths, 128, 132)
    assert occupancy(fixed, 128) == occupancy(lean, 128) == 1
    assert occupancy(ragged, 128) < 0.7
    for heads in range(1, 40):  # flat for any number of heads
        assert occupancy(stream_k.stream_k([512 * 128] * heads, 128, 132), 128) > 0.7
    uneven = [64 * 128] * 2 + [1024 * 128] * 2
    assert makespan(stream_k.stream_k(uneven, 128, 132), 128) == 17
    assert makespan(fixed_split(uneven, 128, 132, 33), 128) == 32


def test_pieces_cost_what_starting_them_does():
    assert makespan([[stream_k.Piece(0, 0, 32), stream_k.Piece(1, 0, 16)]], 16, overhead=0.5) == 4


@pytest.mark.parametrize("workers", [1, 3, 7])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_is_exact(workers, heads):
    generator = torch.Generator().manual_seed(workers)
    q = torch.randn(2, 5, heads[0], 16, generator=generator)
    k, v = (torch.randn(2, 90, heads[1], 16, generator=generator) for _ in range(2))
    lengths = [int(n) for n in torch.randint(0, 91, (2 * heads[1],), generator=generator)]
    lengths[0] = 0
    out, lse = stream_k.partial(q, k, v, scale=0.25, workers=workers, tile=16, lengths=lengths)
    share = heads[0] // heads[1]
    for row in range(2):
        for head in range(heads[0]):
            keys = slice(lengths[row * heads[1] + head // share])
            some = slice(head // share, head // share + 1)
            own = q[row : row + 1, :, head : head + 1].double()
            exact = reference.partial(own, k[row : row + 1, keys, some].double(), v[row : row + 1, keys, some].double(),
                                      scale=0.25)  # fmt: skip
            torch.testing.assert_close(out[row, :, head].double(), exact.out[0, :, 0], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(lse[row, :, head].double(), exact.lse[0, :, 0].double(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [([], 16, 2), ([-1], 16, 2), ([4], 0, 2), ([4], 16, 0)])
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(KnobError, match="got"):
        stream_k.stream_k(*sizes)


@pytest.mark.parametrize("lengths", [[3], [3, 91]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    q, k = torch.zeros(1, 2, 2, 8), torch.zeros(1, 90, 2, 8)
    with pytest.raises(KnobError, match="one for each of 1 rows x 2 heads of keys and at most 90"):
        stream_k.partial(q, k, k, scale=1.0, workers=2, lengths=lengths)
