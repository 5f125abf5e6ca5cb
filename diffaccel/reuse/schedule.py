"""At which steps each head's outside is computed, from calibrated drift. The clean pass is the step after the last."""

import numpy as np
from numpy.typing import NDArray

from ..profile import Profile

Floats = NDArray[np.float64]
Schedule = NDArray[np.bool_]  # (steps + 1, layers, heads): computed there; step 0 always is


def drift(profile: Profile, table: str, steps: int) -> Floats:
    """What reusing at step t what was computed at step s costs, (steps + 1, steps + 1, layers, heads) by [s, t]; inf
    where s >= t. The last t is the clean pass."""
    size = (steps + 1, steps + 1, profile.model.layers, profile.model.heads)
    found = np.full(size, np.inf)
    end = profile.shape["steps"]
    places = [profile.place(step, steps) for step in range(steps)] + [float(end)]
    for t in range(1, steps + 1):
        for s in range(t):
            found[s, t] = profile.at(table, step=places[t], gap=places[t] - places[s])
    return found


def by_thresholds(profile: Profile, steps: int, cos: tuple[float, ...], lse: float) -> Schedule:
    """FlashBlock's rule: a head is computed where, since it last was, the cosine of its outside fell below `cos` or its
    log-sum-exp moved by more than `lse`. `cos` holds for the steps from 1 on, its last number for all that follow."""
    similar, moved = drift(profile, "cos", steps), drift(profile, "lse", steps)
    computed = np.zeros(similar.shape[1:], bool)
    computed[0] = True
    last = np.zeros(similar.shape[2:], int)
    for t in range(1, steps + 1):
        cosine, distance = (np.take_along_axis(x[:, t], last[None], 0)[0] for x in (similar, moved))
        computed[t] = np.logical_or(cosine < cos[min(t - 1, len(cos) - 1)], distance > lse)
        last = np.where(computed[t], t, last)
    return computed


def by_share(profile: Profile, steps: int, share: float) -> Schedule:
    """The schedule of least total drift that computes `share` of all heads' steps, of all layers together.

    For each head the best steps for every number of them by dynamic programming, then as many as are worth a price that
    is the same for all heads; the clean pass, computed anyway or by whoever asks, counts for nothing.
    """
    cost = drift(profile, "error", steps)[:steps, :steps] ** 2
    until = _until(cost)  # (s, t): cost of steps s + 1 ... t - 1, all reusing s
    best, via = _shortest(until, steps)
    layers, heads = best.shape[1:]
    budget = share * steps * layers * heads
    low, high = 0.0, float(best[1].max()) + 1e-12
    for _ in range(60):
        price = (low + high) / 2
        wanted = _worth(best, price)
        low, high = (price, high) if wanted.sum() > budget else (low, price)
    wanted = _worth(best, high)
    gain = best - np.concatenate([best[1:], best[-1:]])  # of one computation more, for what is left of the budget
    for flat in np.argsort(-np.take_along_axis(gain, wanted[None], 0)[0], axis=None)[: int(budget - wanted.sum())]:
        wanted.flat[flat] = min(steps, int(wanted.flat[flat]) + 1)
    computed = np.zeros((steps + 1, layers, heads), bool)
    for layer in range(layers):
        for head in range(heads):
            at = steps
            for left in range(int(wanted[layer, head]), 0, -1):
                at = int(via[left, at, layer, head])
                computed[at, layer, head] = True
    return computed


def _until(cost: Floats) -> Floats:
    """[s, t]: what is lost if s is computed and t is next; t = steps is the end."""
    steps = cost.shape[0]
    found = np.full((steps, steps + 1, *cost.shape[2:]), np.inf)
    for s in range(steps):
        found[s, s + 1] = 0.0
        for t in range(s + 2, steps + 1):
            found[s, t] = found[s, t - 1] + cost[s, t - 1]
    return found


def _shortest(until: Floats, steps: int) -> tuple[Floats, NDArray[np.int64]]:
    """Least loss (computations, layers, heads) with so many of them, the first at step 0; and by [n, t] the step at
    which the n-th was, where the next is at t."""
    shape = until.shape[2:]
    loss = np.full((steps + 1, steps + 1, *shape), np.inf)  # [n, t]: n computations before t
    via = np.zeros((steps + 1, steps + 1, *shape), np.int64)
    loss[1], via[1] = until[0], 0
    for n in range(2, steps + 1):
        for t in range(n, steps + 1):
            options = loss[n - 1, 1:t] + until[1:t, t]  # the n-th at each of 1 ... t - 1
            via[n, t] = options.argmin(0) + 1
            loss[n, t] = options.min(0)
    return loss[:, steps], via


def _worth(best: Floats, price: float) -> NDArray[np.int64]:
    """How many computations are worth their price, (layers, heads)."""
    count = np.arange(best.shape[0]).reshape(-1, 1, 1)
    found: NDArray[np.int64] = np.where(np.isfinite(best), best + price * count, np.inf).argmin(0)
    return found
