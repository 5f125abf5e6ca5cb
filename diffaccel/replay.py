"""When a forward repeats an earlier one exactly but for its inputs, so that a captured CUDA graph can stand for it.

A graph launches the kernels of a forward with the addresses they had. So whatever a forward reads and writes must lie
where it lay: the block at work in the cache, the past if it is read, a stored partial if it is reused. What Python does
beside that (where the block lies, what is counted) is done anew at a replay.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .cache.merged import MergedTier
from .call import Call
from .policy import PromptPolicy, ReusePolicy

if TYPE_CHECKING:
    from .cache import Memory, Tier
    from .grid import Grid
    from .run import Run
    from .site import Part, Site


_LOOKS = ("cross", "saw", "forward")
"""What a reuse policy does beside its answer; where it does, Python decides at every forward."""


@dataclass(frozen=True)
class Counted:
    """What one call counted."""

    layer: int
    part: "Part"
    keys_read: Any
    keys: int
    reused: bool
    stored: bool


def key(run: "Run", grid: "Grid", text: Tensor) -> Hashable | None:
    """What is equal for forwards that repeat each other, on `grid` with that prompt; None for one that stands alone.

    Asked inside of `run.at`. None where Python decides anew each time: selections and windows, policies that look at
    single calls, profiles, extrapolation; where what is read of the past lies elsewhere each time; and while time is
    measured call by call.
    """
    accel, reuse, extent, where = run.accel, run.accel.reuse, run.extent, run._where
    prompt = accel.prompt
    if accel.selection is not None or accel.window is not None or run.timing or run.observer is not None:
        return None
    if not run.causal or extent is None:
        return None
    if prompt is not None and type(prompt).near is not PromptPolicy.near:
        return None
    if reuse is not None and (
        reuse.extrapolate or any(vars(ReusePolicy)[name] is not getattr(type(reuse), name) for name in _LOOKS)
    ):
        return None
    read = run.prepare_prompt(text)
    found: list[Hashable] = []
    for layer in range(extent.layers):
        kept = run._projected.get((where.branch, layer))
        if kept is not None:
            if not kept.holds(run._prompt, kept.weights):
                return None
            found.append(kept.k.data_ptr())
        site = replace(where, layer=layer, part="self", grid=grid)
        memory, history = run.memory(site), run._histories[site.branch, layer]
        place, answer = memory.exact.place_of(grid.tokens), run.reuse_answer(site, memory)
        if place is None or (memory.sample is not None and where.phase == "clean"):
            return None
        held = history.last and tuple(x.data_ptr() for x in history.last)
        past = tuple(_address(run, tier) for tier in memory.older if tier.count)
        if answer == "reuse" and history.holds(_part(site, memory)):
            found.append((place, held))
        elif answer == "store" and held and None not in past:
            found.append((place, past, held))
        elif answer == "together" and None not in past:
            found.append((place, past))
        else:
            return None
    return where.branch, grid, read.data_ptr(), read.shape, run.prompt_multiplicity, tuple(found)


def _part(site: "Site", memory: "Memory") -> tuple[int, int, str]:
    return site.block, memory.version, "all"


def _address(run: "Run", tier: "Tier") -> Hashable | None:
    return tier.address() if isinstance(tier, MergedTier) and run.accel.kernel == "auto" else None


@contextmanager
def recording(run: "Run") -> Iterator[None]:
    """The forward inside is what a graph stands for: it counts nothing and finishes no block."""
    before = {slot: replace(counts) for slot, counts in run.slots.items()}
    layers = {key: replace(counts, engaged={**counts.engaged}) for key, counts in run._layers.items()}
    run.recording = True
    try:
        yield
    finally:
        run.recording = False
        for slot, counts in before.items():
            vars(run.slots[slot]).update(vars(counts))
        run._layers = layers


@contextmanager
def counting(run: "Run") -> Iterator[list[Counted]]:
    """What the calls inside count, so that `repeat` can count it again."""
    counted: list[Counted] = []
    run._counted = counted
    try:
        yield counted
    finally:
        run._counted = None


def repeat(run: "Run", grid: "Grid", counted: list[Counted]) -> None:
    """What Python does in a forward, for one that a graph stands for. Asked between `run.enter` and `run.leave`."""
    for call in counted:
        site, read = run.site(call.layer, call.part), call.keys_read
        if call.part == "self":
            memory = run.memory(site)
            memory.exact.reserve(grid.tokens, grid.frame_of_token(site.start))
            read = call.keys if call.reused else call.keys + memory.count
            if call.stored:
                run._histories[site.branch, call.layer].stored_again(_part(site, memory), site.noise)
        engaged = {"reuse": 1.0} if call.reused else {}
        run.close(Call(run, site, 1, read, engaged=engaged), keys=call.keys)
