"""What to accelerate with, and how it gets into and out of a pipeline."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from . import backbone
from .errors import KnobError, UnsupportedError
from .kernel import CHOICES
from .policy import SLOTS, CachePolicy, Policy, PromptPolicy, ReusePolicy, Selector
from .preset_file import find_config, read_preset, write_config
from .run import Run
from .suggest import choose
from .techniques import TECHNIQUES

_ACTIVE: "weakref.WeakKeyDictionary[nn.Module, Run]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Accel:
    """One technique for each slot, None for dense. `Accel()` is exact everywhere.

        with Accel(cache=TempCache(), reuse=FlashBlock())(pipe) as run:
            video = pipe(prompt).frames
        print(run.report())

    `kernel`: "auto" takes the fastest kernel that can run there and the report names it; an explicit one ("sdpa",
    "fa3", "fa4", "reference", "split") is used or refused, it never falls back.

    Raises `KnobError` for a policy in the wrong slot or an unknown kernel.
    """

    cache: CachePolicy | None = None
    selection: Selector | None = None
    prompt: PromptPolicy | None = None
    reuse: ReusePolicy | None = None
    window: Selector | None = None
    kernel: str = "auto"

    def __post_init__(self) -> None:
        choose(self.kernel, CHOICES, "kernel")
        for slot, kind in SLOTS.items():
            policy = getattr(self, slot)
            if policy is None:
                continue
            if not isinstance(policy, Policy):
                raise KnobError(f"Accel({slot}=...) takes a policy such as TempCache(), or None; got {policy!r}")
            name = type(policy).__name__
            if policy.slot != slot or not isinstance(policy, kind):
                raise KnobError(
                    f"{name} is a policy of the slot {policy.slot!r}, got it as {slot}: "
                    f"write Accel({policy.slot}={name}())"
                )

        for policy in self.policies().values():
            reason = policy.conflict(other for other in self.policies().values() if other is not policy)
            if reason:
                raise KnobError(f"{type(policy).__name__} does not go with this combination: {reason}")

    def policies(self) -> dict[str, Any]:
        """The techniques asked for, by slot."""
        found = {item.name: getattr(self, item.name) for item in fields(self) if item.name in SLOTS}
        return {slot: policy for slot, policy in found.items() if policy is not None}

    @contextmanager
    def __call__(self, pipe: Any, *, timing: bool = False, observe: bool = False) -> Iterator[Run]:
        """Accelerate `pipe` inside the `with`; leaving restores it, also after an exception.

        Raises `NotEngagedError` on a normal exit if a technique was asked for and never fired.
        """
        run = self.apply(pipe, timing=timing, observe=observe)
        try:
            yield run
        except BaseException:
            run.remove(check=False)
            raise
        run.remove()

    def apply(self, pipe: Any, *, timing: bool = False, observe: bool = False) -> "AppliedRun":
        """Accelerate `pipe` until `run.remove()`.

        Raises `UnsupportedError` for a pipeline of an unknown family, one that is accelerated already, or a technique
        it cannot take.
        """
        family, denoisers = backbone.find(pipe)
        for denoiser in denoisers:
            if denoiser in _ACTIVE:
                raise UnsupportedError(
                    f"{type(pipe).__name__} is accelerated already: leave that `with` (or call run.remove()) first, "
                    "and give one Accel all the techniques"
                )
        causal = goes_by_blocks(pipe, family)
        for slot, policy in self.policies().items():
            reason = _refusal(family, denoisers, slot, policy, type(pipe).__name__, causal)
            if reason:
                raise UnsupportedError(reason)
        run = AppliedRun(self, causal=causal, timing=timing, observe=observe)
        run.pipe = pipe
        try:
            layer = 0
            for denoiser in denoisers:
                run.undo.append(family.install(denoiser, run, layer))
                _ACTIVE[denoiser] = run
                run.undo.append(partial(_ACTIVE.pop, denoiser, None))
                layer += family.geometry(denoiser).layers
        except BaseException:
            run.remove(check=False)
            raise
        return run

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the setting into a folder as `diffaccel_config.json`, with copies of the profiles it names, so that it
        goes with a pipeline saved there. Raises `UsageError` for a technique that is not diffaccel's own."""
        write_config(Path(folder), self)

    @classmethod
    def from_pretrained(cls, source: Any) -> "Accel":
        """The setting that was saved in a folder, in a hub repository `owner/name`, or where a pipeline was opened.

        Raises `UsageError` where there is none, and for a file that this version cannot read.
        """
        return read_preset(find_config(source))

    def describe(self, pipe: Any) -> list[dict[str, Any]]:
        """What `apply` would patch: a row a denoiser with its geometry, and why it cannot take a slot (or None)."""
        family, denoisers = backbone.find(pipe)
        causal = goes_by_blocks(pipe, family)
        rows = []
        for denoiser in denoisers:
            row = dict(vars(family.geometry(denoiser)), causal=causal, refuses={})
            for technique in TECHNIQUES:
                reason = _refusal(family, [denoiser], technique.slot, technique(), type(pipe).__name__, causal)
                row["refuses"][technique.__name__] = reason
            rows.append(row)
        return rows


class AppliedRun(Run):
    """A run that is in a pipeline now, and can be taken out."""

    undo: list[Callable[[], Any]]

    def __init__(self, accel: Accel, *, causal: bool, timing: bool, observe: bool) -> None:
        super().__init__(accel, causal=causal, timing=timing, observe=observe)
        self.undo = []

    def remove(self, *, check: bool = True) -> None:
        """Restore the pipeline bit for bit; calling it again does nothing. `check`: raise if a technique was idle."""
        applied = bool(self.undo)
        while self.undo:
            self.undo.pop()()
        self.pipe = None
        self.forget()  # and with it the memory that caches hold
        if check and applied:
            self.check_engaged()


def active_run(pipe: Any) -> Run | None:
    """The run that accelerates `pipe` now, if any.

    Raises `UnsupportedError` where another pipeline, of whole videos, is accelerated and shares its denoiser.
    """
    for name in ("transformer", "transformer_2"):
        denoiser = getattr(pipe, name, None)
        if isinstance(denoiser, nn.Module) and denoiser in _ACTIVE:
            run = _ACTIVE[denoiser]
            if getattr(pipe, "block_causal", False) and not run.causal:
                raise UnsupportedError(
                    f"{type(run.pipe).__name__} is accelerated and shares its {name} with this {type(pipe).__name__}, "
                    "which needs earlier blocks that such a run does not keep: leave that `with` first"
                )
            return run
    return None


def goes_by_blocks(pipe: Any, family: backbone.Backbone) -> bool:
    """Whether it generates block by block: as a pipeline of ours says of itself, or the family of a stock one."""
    return bool(getattr(family, "block_causal", False) or any(map(_says_causal, (pipe, getattr(pipe, "blocks", None)))))


def _says_causal(part: Any) -> bool:
    """Of a pipeline, or a block of a modular one with those inside it."""
    inside = getattr(part, "sub_blocks", None) or {}
    return getattr(part, "block_causal", False) or any(map(_says_causal, inside.values()))


def _refusal(
    family: backbone.Backbone, denoisers: list[nn.Module], slot: str, policy: Policy, pipe: str, causal: bool
) -> str | None:
    name = type(policy).__name__
    for denoiser in denoisers:
        reason = family.refuses(denoiser, slot)
        if reason:
            return f"{name} (slot {slot}) cannot run on {pipe}: {reason}"
    if policy.needs_blocks and not causal:
        why = getattr(family, "no_blocks", None)
        return (
            f"{name} (slot {slot}) acts on earlier blocks, and {pipe} "
            f"{f'has none that stay, for {why}' if why else 'generates the whole video at once'}: "
            f"use CausalWanPipeline with a causal checkpoint, or leave {slot} out"
        )
    reason = policy.refuses_model([(family.geometry(denoiser), denoiser) for denoiser in denoisers])
    return None if reason is None else f"{name} (slot {slot}) cannot run on this {pipe}: {reason}"


__all__ = ["Accel", "AppliedRun", "active_run"]
