"""The setting that serves a target best, searched for by successive halving within a time.

A trial is a setting. It is measured on one prompt first; the better half of the trials so far goes on to two, four, and
all of them, with one more timed round each (optuna's asynchronous successive halving; what to try next comes from its
tree-structured Parzen estimator). The number of frames stays the same, since what pays depends on it. A setting that
has missed a quality or a memory is not measured on. Finalists are measured anew, alternating, as by `eval frontier`.

Every measurement is a row of `tune.jsonl`; asked again, the same search replays them and goes on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from ..accel import Accel
from ..errors import DiffaccelError, KnobError, UnsupportedError
from ..settings import UsageError, describe_accel
from .goal import Figures, Goal
from .space import STARTS, Space
from .store import Store

if TYPE_CHECKING:
    import optuna

FINALISTS, ROUNDS = 3, 3
"""Settings that are measured anew at the end, and timed rounds of each."""

_MOST_REPEATS = 60  # trials in a row that propose what was tried: the space is exhausted


class TuneError(DiffaccelError):
    """A search cannot be made; the message says what is missing."""


class Measurer(Protocol):
    """What is measured of a setting, one row at a time."""

    def quality(self, accel: Accel, prompt: int) -> dict[str, Any]:
        """`psnr` in dB to the dense video of that prompt, None if they are identical; `bytes` that caches held or the
        peak of a GPU, None where neither is known; `idle`: the sentence about what never engaged, else None."""

    def timing(self, accel: Accel, number: int) -> dict[str, Any]:
        """Seconds of denoising in a round: `dense`, then `arm`."""


@dataclass
class Candidate:
    """A setting that was tried: its `changes` of the preset exact, and what is known of it after `prompts`."""

    accel: Accel
    changes: list[str]
    figures: Figures = field(default_factory=Figures)
    prompts: int = 0
    idle: str | None = None

    @property
    def name(self) -> str:
        return describe_accel(self.accel)


class _OutOfTimeError(Exception):
    """The next measurement would end after the time that was given."""


@dataclass
class Search:
    """One search; `run` gives the candidates.

    `build` makes a setting of changes and refuses what does not fit. `seconds`: of measuring, those of rows that are
    there included; what is begun is finished. `keep`: of these, what the finalists' measurement takes, as a number of
    generations. `trials`: at most. `clock`: what measures time.
    """

    goal: Goal
    space: Space
    measurer: Measurer
    store: Store
    prompts: int
    seconds: float
    build: Callable[[Sequence[str]], Accel]
    seed: int = 0
    keep: int = 0
    trials: int = 1000
    clock: Callable[[], float] = time.monotonic
    tell: Callable[[str], None] = lambda label: None

    def __post_init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in self.store.rows("tune")}
        self.tried: dict[str, Candidate] = {}
        self.refused = 0
        self.stopped = "every setting that was proposed has been tried"

    @property
    def spent(self) -> float:
        """Seconds of all rows."""
        return float(sum(row["took"] for row in self.rows.values()))

    def run(self) -> list[Candidate]:
        """All settings that were tried and measured, the best first."""
        optuna = check_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=self.seed),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        )
        for start in STARTS:
            study.enqueue_trial(start)
        repeats = 0
        while repeats < _MOST_REPEATS:
            if len(study.trials) >= self.trials:
                self.stopped = f"{self.trials} settings were proposed"
                break
            trial, before = study.ask(), len(self.tried)
            try:
                score = self._trial(trial)
            except _OutOfTimeError:
                self.stopped = f"the time is up: {self.spent:.0f} s were measured"
                break
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, score)
            repeats = 0 if len(self.tried) > before else repeats + 1
        measured = [candidate for candidate in self.tried.values() if candidate.figures != Figures()]
        return sorted(measured, key=lambda c: (c.idle is None, c.prompts, self.goal.score(c.figures)), reverse=True)

    def floor(self) -> Figures:
        """How far dense attention, rounded otherwise, is from itself on the first prompt."""
        dense = Candidate(Accel(kernel="split"), [])
        self._quality(dense, 0)
        return dense.figures

    def finalists(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The best of those that reached the target as far as they were measured."""
        reached = [c for c in candidates if c.idle is None and self.goal.missing(c.figures) <= 0]
        return reached[:FINALISTS]

    def nearest(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """The one that misses the target least."""
        able = [c for c in candidates if c.idle is None]
        return min(able, key=lambda c: self.goal.missing(c.figures), default=None)

    def _trial(self, trial: "optuna.Trial") -> float:
        from optuna import TrialPruned

        changes = self.space.suggest(trial)
        try:
            accel = self.build(changes)
        except (KnobError, UnsupportedError, UsageError):
            self.refused += 1
            raise TrialPruned from None
        candidate = self.tried.setdefault(describe_accel(accel), Candidate(accel, changes))
        score = 0.0
        for number, prompts in enumerate(rungs(self.prompts)):
            self._measure(candidate, prompts, number + 1)
            if candidate.idle is not None:
                raise TrialPruned
            score = self.goal.score(candidate.figures)
            trial.report(score, prompts)
            if prompts < self.prompts and (self.goal.hopeless(candidate.figures) or trial.should_prune()):
                raise TrialPruned
        return score

    def _measure(self, candidate: Candidate, prompts: int, rounds: int) -> None:
        """What the target is about comes first; a setting that has missed it for good is not measured on."""
        goal = self.goal
        if goal.kind == "speedup":
            self._time(candidate, rounds)
        for prompt in range(prompts):
            if candidate.idle is not None or goal.hopeless(candidate.figures):
                return
            self._quality(candidate, prompt)
        if candidate.idle is not None or goal.hopeless(candidate.figures):
            return
        if goal.kind == "psnr":  # where memory decides, only the finalists are timed
            self._time(candidate, rounds)
        candidate.prompts = max(candidate.prompts, prompts)

    def _quality(self, candidate: Candidate, prompt: int) -> None:
        self.tell(f"prompt {prompt + 1}, {candidate.name}")
        row = self._row("quality", prompt, candidate, lambda: self.measurer.quality(candidate.accel, prompt))
        known, psnr = candidate.figures, float("inf") if row["psnr"] is None else row["psnr"]
        held = [size for size in (known.bytes, row["bytes"]) if size is not None]
        lowest = psnr if known.psnr is None else min(known.psnr, psnr)
        candidate.figures = Figures(lowest, known.speedups, max(held, default=None))
        candidate.idle = candidate.idle or row["idle"]

    def _time(self, candidate: Candidate, rounds: int) -> None:
        ratios = []
        for number in range(rounds):
            self.tell(f"round {number + 1}, {candidate.name}")
            row = self._row("timing", number, candidate, lambda n=number: self.measurer.timing(candidate.accel, n))  # type: ignore[misc]
            ratios.append(row["dense"] / row["arm"])
        known = candidate.figures
        candidate.figures = Figures(known.psnr, max(tuple(ratios), known.speedups, key=len), known.bytes)

    def _row(
        self, what: str, number: int, candidate: Candidate, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """A measurement: from the store, or now if there is time for one that takes as long as usual."""
        key = f"{what} {number:03d} {candidate.name}"
        if key not in self.rows:
            if self.spent + self._usual(what) + self._kept() > self.seconds:
                raise _OutOfTimeError
            began = self.clock()
            found = measure()
            row = {"key": key, "set": candidate.changes, **found, "took": self.clock() - began}
            self.store.append("tune", row)
            self.rows[key] = row
        return self.rows[key]

    def _usual(self, what: str) -> float:
        """Seconds that a measurement of that kind takes: the median, as the first of a prompt makes its dense video."""
        took = [row["took"] for row in self.rows.values() if row["key"].startswith(what)]
        return median(took) if took else 0.0

    def _kept(self) -> float:
        """Seconds for the finalists: at most half of the time, so that there is a search."""
        return min(self.keep * self._usual("quality"), self.seconds / 2)


def rungs(prompts: int) -> list[int]:
    """Numbers of prompts that a setting is measured on, one after the other: 1, 2, 4, ... and all."""
    found: list[int] = []
    while not found or 2 * found[-1] < prompts:
        found.append(1 if not found else 2 * found[-1])
    return found if found[-1] == prompts else [*found, prompts]


def check_optuna() -> Any:
    """optuna. Raises `TuneError` where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise TuneError("optuna, which chooses what to try, is not installed: pip install 'diffaccel[tune]'") from error
    return optuna
