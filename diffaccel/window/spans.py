"""Where windows lie along one axis: tiles of queries, and the keys that each reads."""

from itertools import pairwise

from ..kernel.boxes import Span, Tile


def spans(queries: int, tile: int, window: int, first: int = 0, keys: int | None = None) -> list[Tile]:
    """Along one axis: tiles of `queries` tokens, and the `window` of `keys` (all of them where it is larger) that each
    reads, centred on it and shifted inward. Query 0 is at key `first`. Neighbours that read the same are one tile."""
    keys = queries if keys is None else keys
    tile = min(tile, queries)
    borders = sorted({0, *range(queries % tile // 2, queries + 1, tile), queries})
    owns = list(pairwise(borders))
    return _joined([(own, _inward(first + (own[0] + own[1] - min(window, keys)) // 2, window, keys)) for own in owns])


def strided(
    queries: int, stride: int, window: int, causal: bool = False, first: int = 0, keys: int | None = None
) -> list[Tile]:
    """The same where `stride` queries, counted from key 0, share the window of one of them, the leader.

    The leader is the middle one, the later of two; its window is shifted inward. `causal`: the last one, and a query
    reads from where the leader's window starts to itself, which is fewer keys than `window`.
    """
    keys = queries if keys is None else keys
    found: list[Tile] = []
    for place in range(first, first + queries):
        leader = min(place // stride * stride + (stride - 1 if causal else stride // 2), keys - 1)
        if causal:
            read = (max(leader - min(window, keys) + 1, 0), place + 1)
        else:
            read = _inward(leader - min(window, keys) // 2, window, keys)
        found.append(((place - first, place - first + 1), read))
    return _joined(found)


def _inward(left: int, window: int, keys: int) -> Span:
    """A window that starts at `left`, moved to lie among the keys."""
    window = min(window, keys)
    left = min(max(left, 0), keys - window)
    return left, left + window


def _joined(tiles: list[Tile]) -> list[Tile]:
    """Neighbours that read the same as one tile."""
    found: list[Tile] = []
    for own, read in tiles:
        if found and found[-1][1] == read:
            found[-1] = ((found[-1][0][0], own[1]), read)
        else:
            found.append((own, read))
    return found
