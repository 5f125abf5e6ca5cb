"""Pictures of a report: what the cache held and how fast it was, over the frames of a video."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DiffaccelError


class PlotError(DiffaccelError):
    """A picture cannot be drawn; the message says what is missing."""


def check_plots() -> None:
    """Raise `PlotError` where the library that draws is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotError("matplotlib, which draws plots, is not installed: pip install 'diffaccel[plots]'") from error


def plot_cache(report: Mapping[str, Any], path: Path) -> Path:
    """Draw the cache of a report (`Report.to_dict`) to a PNG; its folder must exist.

    Raises `PlotError` without matplotlib, or for a report without finished blocks.
    """
    check_plots()
    from matplotlib.figure import Figure

    blocks = report["blocks"]
    if not blocks:
        raise PlotError("the report holds no finished block: only block-causal generation of two or more has any")
    frames = [block["frame"] for block in blocks]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 3).flat
    slot = report["slots"].get("cache")
    figure.suptitle(f"{slot['method'] if slot else 'KVCache'}: {report['frames']} frames, kernel {report['kernel']}")

    def lines(axis: Any, title: str, unit: str, **series: list[float]) -> None:
        for name, values in series.items():
            axis.plot(frames, values, label=name.replace("_", " "))
        axis.set(title=title, xlabel="latent frame", ylabel=unit)
        axis.set_ylim(bottom=0)
        if len(series) > 1:
            axis.legend()

    kept, seen = [block["tokens"] for block in blocks], [block["seen"] for block in blocks]
    lines(next(axes), "cache length", "keys a layer (mean)", kept=kept, dense=seen)
    lines(next(axes), "compression", "kept / dense", kept=[k / s for k, s in zip(kept, seen, strict=True)])
    lines(next(axes), "memory of the cache", "MiB", held=[block["bytes"] / 2**20 for block in blocks])
    lines(next(axes), "time of a block, clean pass included", "s", seconds=[block["seconds"] for block in blocks])
    axis = next(axes)
    for layer, points in report["cache"].get("recall", {}).items():
        axis.plot([frame for frame, _ in points], [value for _, value in points], label=f"layer {layer}")
    axis.set(title="recall of attention mass", xlabel="latent frame", ylim=(0, 1.02))
    if axis.lines:
        axis.legend()
    else:
        axis.text(0.5, 0.5, "not observed", ha="center", transform=axis.transAxes)
    axis = next(axes)
    histogram = report["cache"].get("multiplicity", {})
    axis.bar(list(histogram), list(histogram.values()))
    axis.set(title="multiplicity at the end, all layers", xlabel="tokens an entry stands for", ylabel="entries")
    figure.savefig(path, dpi=110)
    return path
