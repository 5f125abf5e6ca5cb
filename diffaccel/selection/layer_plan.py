"""Which layers choose and at which steps, and who reads whose choice: the fewest that calibrated likeness allows."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Span(NamedTuple):
    """Steps in a row, at the first of which some layers choose."""

    start: int
    length: int
    sources: tuple[int, ...]  # of each layer: whose choice it reads, its own if it chooses


class _Plan(NamedTuple):
    """Ordered as plans are preferred: fewest full calls, then most likeness."""

    full: int
    unlike: float
    sources: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()


def plan(like: Floats, steps: int, least: float, dense: Collection[int] = (), longest: int | None = None) -> list[Span]:
    """The plan with the fewest full calls, and of those the one of most likeness in total: exact, in two stages.

    A full call reads everything and chooses. The other layers read the choice of the last full layer before them; at
    the later steps of a span all layers do, full ones their own. That is allowed where the likeness of the choices is
    `least` or more at every step of the span.

    Args:
        like: [g, i, j], of layer j's choice to that of layer i, g steps before.
        dense: layers whose calls are all full.
        longest: steps of a span at most, and no more than `like` was measured over.
    """
    longest = min(steps, len(like), longest or steps)
    found = {length: _layers(like[:length], least, dense) for length in range(1, longest + 1)}
    best: list[_Plan] = [_Plan(0, 0.0)]
    for end in range(1, steps + 1):
        options = []
        for length, span in found.items():
            if span is not None and length <= end:
                before = best[end - length]
                spans = (*before.spans, Span(end - length, length, span.sources))
                options.append(_Plan(before.full + span.full, before.unlike + span.unlike, (), spans))
        best.append(min(options))
    return list(best[-1].spans)


def _layers(like: Floats, least: float, dense: Collection[int]) -> _Plan | None:
    """The best choice of full layers for a span of `len(like)` steps; None where none may stand for so long."""
    lowest, later = like.min(0), len(like) - 1
    best: dict[int, _Plan] = {}  # by the last full layer
    for layer in range(like.shape[1]):
        options = {}
        before = min(best.values()) if best else _Plan(0, 0.0)
        if layer in dense:
            options[layer] = _Plan(before.full + 1 + later, before.unlike, (*before.sources, layer))
        elif later == 0 or lowest[layer, layer] >= least:
            likeness = float(like[1:, layer, layer].sum())
            options[layer] = _Plan(before.full + 1, before.unlike - likeness, (*before.sources, layer))
        for source, one in best.items():
            if layer not in dense and lowest[source, layer] >= least:
                likeness = float(like[:, source, layer].sum())
                options[source] = _Plan(one.full, one.unlike - likeness, (*one.sources, source))
        if not options:
            return None
        best = options
    return min(best.values())
