"""What a run did: which techniques engaged, what they read, how long it took, where."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass
class SlotReport:
    """One technique in one run. Key counts are sums over its attention calls, per query.

    `calls` it was asked at; `skipped` of them it answered without reading what it stands for, a call of which it
    answered some heads so by their share. `keys_total` is what
    dense attention would read there, `keys_kept` what was left after this technique, `keys_read` what the kernel
    read after all of them. `bytes` is the most memory its state held at once.
    """

    method: str
    knobs: dict[str, Any]
    engaged: bool
    calls: int = 0
    skipped: float = 0
    keys_kept: int = 0
    keys_read: int = 0
    keys_total: int = 0
    bytes: int = 0

    def rounded(self) -> "SlotReport":
        """A copy with whole key counts: while a run goes on they may be fractions, or tensors on the GPU."""
        return replace(self, skipped=_tidy(self.skipped), **_whole(self))


@dataclass
class LayerReport:
    """One attention ("self" or "cross") of one layer: the counts of its `calls` as in `SlotReport`, of all slots.

    `keys_kept` is what the cache left, `keys_read` what the kernel read. `engaged` has for every slot the calls that it
    changed: a cache that held less than all or held it otherwise, a window or selection that left keys out, a prompt
    that was shortened, a reuse that answered (some heads of a call by their share). `seconds` is None unless attention
    was timed.
    """

    layer: int
    part: str
    engaged: dict[str, float]
    calls: int = 0
    keys_kept: int = 0
    keys_read: int = 0
    keys_total: int = 0
    seconds: float | None = None

    def add(self, engaged: Mapping[str, float], total: Any, kept: Any, read: Any) -> None:
        """Count one call."""
        self.calls += 1
        self.keys_total += total
        self.keys_kept += kept
        self.keys_read += read
        for slot, share in engaged.items():
            if slot in self.engaged:
                self.engaged[slot] += share

    def rounded(self, seconds: float | None) -> "LayerReport":
        """A copy as `SlotReport.rounded`, with its seconds."""
        engaged = {slot: _tidy(share) for slot, share in self.engaged.items()}
        return replace(self, engaged=engaged, seconds=seconds, **_whole(self))


@dataclass
class Report:
    """The report of a run; `to_json` is the stable format that `diffaccel generate --report` writes.

    `kernel`: what attended, with the reason for the largest calls; `choices` has every one that was measured.
    `seconds`: `attention` (all attention calls; None on a GPU unless the run was asked for timing), `denoise`,
    `decode`, `total`, wall clock. `frames` counts pixel frames, `fps` is frames over total seconds.
    `peak_memory_bytes` is the allocator's peak on a GPU since the last generation began, and the process's on the CPU.
    `cache.max_tokens` is the most entries any layer and branch kept; what else it holds is the policy's
    (`CachePolicy.describe`), and `recall` of an observed run. `blocks`, of a block-causal generation, has a line for
    each finished block: the latent `frame` it ends at, `tokens` a layer kept on average and `seen`, `bytes` of all
    caches, and `seconds` since the block before, decoding included where frames are streamed. `layers` has a row for
    each attention of each layer.
    """

    slots: dict[str, SlotReport]
    kernel: str
    choices: list[str]
    seconds: dict[str, float | None]
    frames: int
    fps: float | None
    peak_memory_bytes: int
    cache: dict[str, Any]
    environment: dict[str, str]
    blocks: list[dict[str, Any]]
    layers: list[LayerReport]
    quality: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def table(self) -> str:
        """The report as aligned text."""
        rows = [("slot", "method", "engaged", "calls", "skipped", "keys kept", "keys read", "state")]
        for slot, r in self.slots.items():
            kept, read = (f"{n / r.keys_total:.1%}" if r.keys_total else "-" for n in (r.keys_kept, r.keys_read))
            engaged = "yes" if r.engaged else "NO"
            state = f"{r.bytes / 2**20:.1f} MiB" if r.bytes else "-"
            rows.append((slot, r.method, engaged, str(r.calls), f"{r.skipped:g}", kept, read, state))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        seconds = ", ".join(f"{k} {v:.2f} s" for k, v in self.seconds.items() if v is not None)
        fps = "" if self.fps is None else f", {self.fps:.2f} frames/s"
        lines.append(f"{self.frames} frames; {seconds}{fps}; kernel {self.kernel}")
        lines.append(
            f"peak memory {self.peak_memory_bytes / 2**20:.0f} MiB; most keys in a cache {self.cache['max_tokens']}, "
            f"{self.cache['tokens_per_frame']} a latent frame"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _whole(counts: "SlotReport | LayerReport") -> dict[str, Any]:
    return {name: round(float(getattr(counts, name))) for name in ("keys_kept", "keys_read", "keys_total")}


def _tidy(calls: float) -> float:
    rounded = round(calls, 3)
    return int(rounded) if rounded == int(rounded) else rounded


def environment(device: torch.device | None, dtype: torch.dtype | None) -> dict[str, str]:
    """Versions and hardware, so that a figure can be placed."""
    import diffusers

    from .version import __version__

    cuda = device is not None and device.type == "cuda"
    return {
        "diffaccel": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"{platform.machine()} cpu, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
    }


def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """All or nothing: a reader never sees half a file."""
    partial = path.absolute().parent / f".{path.name}.partial-{os.getpid()}"
    try:
        partial.write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
