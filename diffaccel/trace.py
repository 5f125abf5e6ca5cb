"""A trace of a generation for chrome://tracing or ui.perfetto.dev, with the parts of the seam as named ranges.

    with accel(pipe) as run, traced(run, pipe, "trace.json") as trace:
        pipe(prompt)
    print(trace.table())

Ranges lie in each other: block, step, layer, and in a layer what the slots do and the kernels. They are put around the
functions of the seam while a trace is taken and taken off again, so that nothing is spent on them otherwise. Compiled
blocks keep them, as attention is one operator there; a forward that a CUDA graph stands for has none inside.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from . import attend, backbone, call
from . import run as run_module
from .cache import Memory
from .errors import DiffaccelError
from .port import Port
from .reuse.history import History
from .run import Run, _progress

PREFIX = "diffaccel: "
"""Of the name of every range."""


class TraceError(DiffaccelError):
    """A trace cannot be taken or read; the message says why."""


@dataclass
class Row:
    """One part: how many ranges, their seconds on the host and those of them outside of any part inside, and their
    seconds on the GPU, each from its first kernel to its last (0 without one)."""

    path: tuple[str, ...]
    count: int = 0
    seconds: float = 0.0
    own_seconds: float = 0.0
    gpu_seconds: float = 0.0


@dataclass
class Trace:
    """What `traced` gives; `rows` is filled when the trace is written."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    def table(self) -> str:
        """Seconds by part as aligned text, parts indented under what they are part of."""
        on_gpu = any(row.gpu_seconds for row in self.rows)
        lines = [("part", "times", "seconds", "its own", *(("on the GPU",) if on_gpu else ()))]
        for row in self.rows:
            name = "  " * (len(row.path) - 1) + row.path[-1]
            gpu = (f"{row.gpu_seconds:.3f}",) if on_gpu else ()
            lines.append((name, str(row.count), f"{row.seconds:.3f}", f"{row.own_seconds:.3f}", *gpu))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )


@contextmanager
def traced(run: Run, pipe: Any, path: str | os.PathLike[str], blocks: int = 2) -> Iterator[Trace]:
    """Trace the last `blocks` blocks of the first generation inside, whose past is the longest, to `path`.

    A pipeline that makes the video at once has its last `blocks` denoising steps traced. The file is written on the
    way out, also of an interrupted generation, if it came that far.

    Raises:
        TraceError: `blocks` is below 1, or another profiler is at work.
    """
    if blocks < 1:
        raise TraceError(f"a trace is of 1 or more blocks, got {blocks}")
    if torch.autograd._profiler_enabled():  # a second one would end the process
        raise TraceError("torch.profiler is at work already, and there is one a process: leave it first")
    recorder, trace = _Recorder(), Trace(Path(path))
    with ExitStack() as installed:
        _install(installed, recorder, run, pipe, blocks)
        try:
            yield trace
        finally:
            if recorder.stop():
                trace.rows = recorder.write(trace.path)


class _Recorder:
    """A profiler that is off, on, or done."""

    def __init__(self) -> None:
        self.profiler: profile | None = None
        self.on = False

    def start(self) -> None:
        if self.profiler is not None:
            return
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
        self.profiler.start()
        self.on = True

    def stop(self) -> bool:
        """Whether anything was recorded."""
        if self.on:
            assert self.profiler is not None
            self.profiler.stop()
        self.on = False
        return self.profiler is not None

    def write(self, path: Path) -> list[Row]:
        assert self.profiler is not None
        partial = path.absolute().parent / f".{path.stem}.partial-{os.getpid()}.json"
        try:
            self.profiler.export_chrome_trace(str(partial))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return summary(json.loads(path.read_text(encoding="utf-8")))

    @contextmanager
    def span(self, *names: str) -> Iterator[None]:
        with ExitStack() as ranges:
            for name in names if self.on else ():
                ranges.enter_context(record_function(PREFIX + name))
            yield


def _install(installed: ExitStack, recorder: _Recorder, run: Run, pipe: Any, blocks: int) -> None:
    def around(owner: Any, attribute: str, name: Callable[..., str]) -> None:
        inner = getattr(owner, attribute)

        def outer(*args: Any, **given: Any) -> Any:
            with recorder.span(name(*args, **given)):
                return inner(*args, **given)

        _replace(installed, owner, attribute, outer)

    def at(**where: Any) -> AbstractContextManager[None]:
        extent = run.extent
        if extent is None or where["start"] >= run._video_frames - blocks * extent.block.frames:
            recorder.start()
        step = "clean pass" if where.get("phase") == "clean" else f"step {where['step']}"
        names = f"block {where['block']}", f"{step}, {where.get('branch', 'cond')}"
        return _both(recorder.span(*names), inner_at(**where))

    def begin(*args: Any, **given: Any) -> None:
        recorder.stop()  # the first generation is over
        inner_begin(*args, **given)

    def clock(section: str, device: torch.device) -> AbstractContextManager[None]:
        names = () if section == "denoise" else (section,)  # what is denoised has its blocks
        return _both(recorder.span(*names), inner_clock(section, device))

    inner_at, inner_begin, inner_clock = run.at, run.begin, run.clock
    if run.causal:
        _replace(installed, run, "at", at)
        _replace(installed, run, "begin", begin)
    else:
        _on_forwards(installed, recorder, pipe, blocks)
    _replace(installed, run, "clock", clock)
    around(run, "prepare_prompt", lambda *_: "prompt: prepare")
    around(Port, "attend", lambda port, *_: f"layer {port.layer}, {port.part}")
    around(Memory, "place", lambda *_, **__: "cache: place")
    around(type(run.cache), "commit", lambda *_: "cache: commit")
    for selector in run._selectors:
        around(type(selector), "plan", lambda selector, *_: f"{selector.slot}: plan")
    if run.accel.prompt is not None:
        around(type(run.accel.prompt), "near", lambda *_: "prompt: near")
    for name in ("replace", "update", "recall"):
        around(History, name, lambda *_, name=name: f"reuse: {'recall' if name == 'recall' else 'store'}")
    for name in ("over_entries", "over_boxes", "over_blocks"):
        around(call, name, lambda *_: "kernel")
    for module in (run_module, attend):
        around(module, "merge", lambda *_: "merge")


def _on_forwards(installed: ExitStack, recorder: _Recorder, pipe: Any, blocks: int) -> None:
    """Ranges around the forwards of a pipeline that tells nobody where it is."""
    open_: list[AbstractContextManager[None]] = []

    def before(*_: Any) -> None:
        step, steps = _progress(pipe.scheduler)
        if step >= steps - blocks:
            recorder.start()
        open_.append(recorder.span(f"step {step}"))
        open_[-1].__enter__()

    def after(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    for denoiser in backbone.find(pipe)[1]:
        installed.callback(denoiser.register_forward_pre_hook(before, prepend=True).remove)
        installed.callback(denoiser.register_forward_hook(after, always_call=True).remove)


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield


def _replace(installed: ExitStack, owner: Any, attribute: str, value: Any) -> None:
    if attribute in vars(owner):
        installed.callback(setattr, owner, attribute, vars(owner)[attribute])
    else:
        installed.callback(delattr, owner, attribute)
    setattr(owner, attribute, value)


def summary(trace: dict[str, Any]) -> list[Row]:
    """The rows of a Chrome trace that `traced` wrote: parts under what they are part of, the longest first.

    A range is part of the range of its thread that it lies in; block, step and layer numbers are left out.
    """
    found: dict[tuple[str, ...], Row] = {}
    threads: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    on_gpu: list[dict[str, Any]] = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and str(event["name"]).startswith(PREFIX):
            if event["cat"] == "gpu_user_annotation":
                on_gpu.append(event)
            else:
                threads[event["pid"], event["tid"]].append(event)
    paths: dict[int, tuple[str, ...]] = {}
    for events in threads.values():
        stack: list[tuple[float, str]] = []  # where the ranges around this one end
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while stack and stack[-1][0] <= event["ts"]:
                stack.pop()
            stack.append((event["ts"] + event["dur"], _part(event["name"])))
            path = paths[event["args"]["External id"]] = tuple(part for _, part in stack)
            row = found.setdefault(path, Row(path))
            row.count += 1
            row.seconds += event["dur"] / 1e6
    for event in on_gpu:
        found[paths[event["args"]["External id"]]].gpu_seconds += event["dur"] / 1e6
    return list(_ordered((), found))


def _ordered(path: tuple[str, ...], found: dict[tuple[str, ...], Row]) -> Iterator[Row]:
    inside = [row for row in found.values() if row.path[:-1] == path]
    if path:
        found[path].own_seconds = found[path].seconds - sum(row.seconds for row in inside)
        yield found[path]
    for row in sorted(inside, key=lambda row: -row.seconds):
        yield from _ordered(row.path, found)


def _part(name: str) -> str:
    """What a range is one of: "layer 3, self" is "self-attention", "step 2, cond" a "step"."""
    name = name.removeprefix(PREFIX)
    if name.startswith("layer"):
        return f"{name.rpartition(' ')[2]}-attention"
    return re.sub(r" \d+", "", name.partition(",")[0])
