"""The settings that `tune` chooses from: which technique fills a slot, its knobs, and switches layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Trial(Protocol):
    """What of optuna's trial is used."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int: ...


STARTS: tuple[dict[str, Any], ...] = (
    {"prompt": "PadCollapse", "cache": "none", "reuse": "none", "selection": "none"},  # preset exact
    {"prompt": "PadCollapse", "cache": "TempCache", "cache.threshold first": 95, "cache.threshold last": 95,
     "cache.budget": "none", "cache.bits": "none", "reuse": "FlashBlock", "reuse.refresh": "2", "selection": "none"},
    {"prompt": "PadCollapse", "cache": "TempCache", "cache.threshold first": 90, "cache.threshold last": 90,
     "cache.budget": "none", "cache.bits": "none", "reuse": "FlashBlock", "reuse.refresh": "3", "selection": "none"},
)  # fmt: skip
"""Tried first: the presets, in the names of what is suggested."""

_PARTS = ("first", "middle", "last")


@dataclass(frozen=True)
class Space:
    """The settings of one pipeline, of `layers` attentions, for videos of `frames` latent frames in blocks of `block`.

    `fixed` are `--set` changes, which are not searched: a slot's method, or a knob. A profile among them brings its
    share into the search. `memory`: whether techniques that save memory and no time are worth trying.
    """

    layers: int
    frames: int
    block: int
    causal: bool
    memory: bool = False
    cuda: bool = False
    fixed: tuple[str, ...] = ()

    def suggest(self, trial: Trial) -> list[str]:
        """One setting, as `--set` changes of the preset exact."""
        changes = self._pick(trial, "prompt", ("PadCollapse", "AnnCA", "none"))
        if self.causal:
            changes += self._cache(trial) + self._reuse(trial)
        return [*changes, *self._selection(trial), *self.fixed]

    def _cache(self, trial: Trial) -> list[str]:
        host = ("HostCache",) if self.memory and self.cuda else ()
        changes = self._pick(trial, "cache", ("none", "TempCache", "SinkRecent", *host))
        if changes == ["cache=TempCache"]:
            if not self._fixes("cache.threshold"):
                ends = [trial.suggest_int(f"cache.threshold {end}", 70, 98) for end in ("first", "last")]
                changes.append(f"cache.threshold={self._ramp(*ends)}")
            changes += self._pick(trial, "cache.budget", ("none", *self._shares_of_frames()))
            if self.memory:
                changes += self._pick(trial, "cache.bits", ("none", "8", "4"))
        elif changes == ["cache=SinkRecent"] and not self._fixes("cache.recent_frames"):
            most = max(self.block, self.frames - 2)
            changes.append(f"cache.recent_frames={trial.suggest_int('cache.recent_frames', self.block, most)}")
        return changes

    def _reuse(self, trial: Trial) -> list[str]:
        changes = self._pick(trial, "reuse", ("none", "FlashBlock"))
        if changes == ["reuse=FlashBlock"]:
            if self._fixes("reuse.profile"):
                changes += self._share(trial, "reuse.share", 10, 90)
            else:
                changes += self._pick(trial, "reuse.refresh", ("2", "3", "4", "6", "0,"))
        return changes

    def _selection(self, trial: Trial) -> list[str]:
        changes = self._pick(trial, "selection", ("none", "AnnSA"))
        if changes != ["selection=AnnSA"]:
            return changes
        changes += self._share(trial, "selection.density", 10, 70)
        if self._fixes("selection.profile"):
            changes += self._share(trial, "selection.sparse_layers", 20, 100)
        elif not self._fixes("selection.layers"):
            names = [f"selection.layers {part}" for part in _PARTS]
            on = [bool(trial.suggest_categorical(name, (True, False))) for name in names]
            if not any(on):
                return ["selection=none"]
            chosen = [layer for layer in range(self.layers) if on[layer * len(_PARTS) // self.layers]]
            changes += [] if all(on) or not chosen else [f"selection.layers={_tuple(chosen)}"]
        return changes

    def _fixes(self, name: str) -> bool:
        return any(change.partition("=")[0].strip() == name for change in self.fixed)

    def _pick(self, trial: Trial, name: str, choices: Sequence[str]) -> list[str]:
        given = [change.partition("=")[2].strip() for change in self.fixed if change.partition("=")[0].strip() == name]
        return [f"{name}={given[-1] if given else trial.suggest_categorical(name, choices)}"]

    def _share(self, trial: Trial, name: str, low: int, high: int) -> list[str]:
        return [] if self._fixes(name) else [f"{name}={trial.suggest_int(name, low, high, step=5) / 100:g}"]

    def _shares_of_frames(self) -> list[str]:
        counts = dict.fromkeys(max(2 * self.block, round(share * self.frames)) for share in (0.25, 0.5, 0.75))
        return [f"{count} frames" for count in counts]

    def _ramp(self, first: int, last: int) -> str:
        """A threshold in hundredths for each layer, from the first layer's to the last one's on a straight line."""
        if first == last or self.layers == 1:
            return f"{first / 100:g}"
        steps = [first + (last - first) * layer / (self.layers - 1) for layer in range(self.layers)]
        return _tuple([round(step) / 100 for step in steps])


def _tuple(values: Sequence[float]) -> str:
    return "".join(f"{value:g}," for value in values)
