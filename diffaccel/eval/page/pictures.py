"""The charts of one folder of results."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from markupsafe import Markup

from ..frontier import memory
from .charts import Series, Strip, chart, heat
from .tables import WAYS

MOST_LINES, MOST_UNITS = 6, 24
"""Arms in one chart, and prompts and seeds with curves; a page says what it leaves out."""

FRAMES = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS"}


def curves(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[Markup]:
    """A chart for every measure that has a number a frame, of the rows of one prompt and seed."""
    charts, order = [], {arm: number for number, arm in enumerate([*arms, "dense"])}
    for name, label in FRAMES.items():
        series = []
        for row in sorted(rows, key=lambda row: order.get(row["arm"], 0)):
            values = row["frames"].get(name)
            if values is None or row["arm"] not in order:
                continue
            who = WAYS[row["way"]] if row["arm"] == "dense" else f"{row['arm']}, {WAYS[row['way']]}"
            style = {"noise_floor": "floor", "other_seed": "other"}.get(row["way"]) or arms.index(row["arm"])
            series.append(Series(who, range(len(values)), values, style, int(row["way"] == "shared_history")))
        charts.append(chart(f"{label.split(',')[0]} to dense, frame by frame", "frame", label, series))
    return [found for found in charts if found is not None]


def lengths(speed: Mapping[str, Any], arms: Sequence[str]) -> list[Markup]:
    """Frames a second, and speed-up over dense, against the length of the video; none for a single length."""
    found = speed["lengths"]
    if len(found) < 2:
        return []
    everywhere = [arm for arm in ("dense", *arms) if any(arm in here for here in found.values())]
    charts = []
    for part, title in (("denoise", "Denoising"), ("total", "End to end")):
        series = []
        for arm in everywhere:
            x = [frames for frames, here in found.items() if arm in here and here[arm]["seconds"][part]]
            spreads = [found[frames][arm]["seconds"][part] for frames in x]
            series.append(
                Series(
                    arm,
                    x,
                    [frames / s["median"] for frames, s in zip(x, spreads, strict=True)],
                    "dense" if arm == "dense" else arms.index(arm),
                    spread=[(frames / s["most"], frames / s["least"]) for frames, s in zip(x, spreads, strict=True)],
                    marks=True,
                )
            )
        charts.append(chart(f"{title}: throughput", "frames generated", "frames a second", series, from_zero=True))
        ratios, even = [], []
        for arm in everywhere:
            if arm == "dense":
                continue
            known = [(n, r["ratio"]) for n, here in found.items() if (r := here[arm].get("speedup", {}).get(part))]
            ratios.append(Series(arm, [n for n, _ in known], [r for _, r in known], arms.index(arm), marks=True))
            where = speed["break_even"][arm][part]
            if isinstance(where, float):
                even.append((where, f"{arm}: {where:.0f}"))
        charts.append(
            chart(
                f"{title}: against dense",
                "frames generated",
                "times as fast",
                ratios,
                level=(1, "as fast as dense"),
                uprights=even,
            )
        )
    return [found for found in charts if found is not None]


def frontier(found: Mapping[str, Any]) -> list[Markup]:
    """Quality against time and against memory, with dense attention, and the settings that nothing beats joined."""
    settings, way = found["points"], found["way"]
    costs: dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]] = {
        "time": ("end to end, s", lambda p: p["speed"]["seconds"]["total"]),
        "memory": ("memory, MiB", lambda p: None if (held := memory(p)) is None else held / 2**20),
    }
    charts = []
    for name, (label, cost) in costs.items():
        shown: dict[str, list[tuple[float, float | None, str]]] = {"best": [], "beaten": []}
        dense: list[tuple[float, str]] = []
        for number, point in enumerate(settings):
            if (price := cost(point)) is None:
                continue
            if point["arm"] == "dense":  # so far above the others that a point would flatten them
                floor = point["quality"]["noise_floor"]["psnr_pooled"]
                dense.append((price, "dense" if floor is None else f"dense, noise floor {floor:.0f} dB"))
                continue
            kind = "best" if found["marked"][name][number] else "beaten"
            shown[kind].append((price, point["quality"][way]["psnr_pooled"], f"{number}: {point['arm']}"))
        series = []
        for kind, title, style in (
            ("best", "nothing beats it", 0),
            ("beaten", "beaten by another", "other"),
        ):
            x, y, notes = (
                zip(*sorted(shown[kind], key=lambda one: one[0]), strict=True) if shown[kind] else ((), (), ())
            )
            series.append(Series(title, x, y, style, joined=kind == "best", marks=True, notes=notes))
        other = next((p["quality"]["other_seed"]["psnr_pooled"] for p in settings if p["arm"] == "dense"), None)
        level = None if other is None else (other, "another seed")
        charts.append(
            chart(f"Quality against {name}", label, f"PSNR, {WAYS[way]}, dB", series, level=level, uprights=dense)
        )
    return [made for made in charts if made is not None]


def caches(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[Markup]:
    """What the caches held over the blocks of the videos, on average over prompts and seeds."""
    blocks = {arm: _blocks(rows, arm) for arm in arms}
    known = {arm: found for arm, found in blocks.items() if found}
    if not known:
        return []
    first = max(known.values(), key=len)
    frames = [block["frame"] for block in first]
    dense = Series("dense", frames, [block["seen"] for block in first], "dense")

    def lines(title: str, unit: str, value: Any, *more: Series) -> Markup | None:
        series = [
            Series(arm, [b["frame"] for b in found], [value(b) for b in found], arms.index(arm), marks=len(found) < 3)
            for arm, found in known.items()
        ]
        return chart(title, "latent frame", unit, [*more, *series], from_zero=True)

    whole = Series("dense", frames, [1.0] * len(first), "dense")
    charts = [
        lines("Cache length", "keys a layer (mean)", lambda b: b["tokens"], dense),
        lines("Density: keys kept of those seen", "share", lambda b: b["tokens"] / b["seen"], whole),
        lines("Memory of the caches", "MiB", lambda b: b["bytes"] / 2**20),
        lines("Seconds a block, decoding left out", "s", lambda b: b["seconds"]),
    ]
    return [made for made in charts if made is not None]


def _blocks(rows: Sequence[Mapping[str, Any]], arm: str) -> list[dict[str, float]]:
    """The lines of the blocks, each the mean over the free-running rows of that arm."""
    runs = [row["blocks"] for row in rows if row["arm"] == arm and row["way"] == "free_running" and row["blocks"]]
    length = min(map(len, runs), default=0)
    return [{name: mean(run[i][name] for run in runs) for name in runs[0][i]} for i in range(length)]


def layers(rows: Sequence[Mapping[str, Any]], arm: str) -> list[Markup]:
    """Heat maps of self- and cross-attention: what changed the calls, shares of keys, milliseconds."""
    table: dict[str, dict[int, list[Mapping[str, Any]]]] = {"self": {}, "cross": {}}
    for row in rows:
        if row["arm"] == arm and row["way"] == "free_running":
            for layer in row.get("layers", ()):
                table[layer["part"]].setdefault(layer["layer"], []).append(layer)
    return [_heat(arm, part, found) for part, found in table.items() if found]


def _heat(arm: str, part: str, found: Mapping[int, Sequence[Mapping[str, Any]]]) -> Markup:
    def total(number: int, value: Any) -> float:
        return sum(value(layer) for layer in found[number])

    numbers = sorted(found)
    strips = []
    for slot in dict.fromkeys(slot for layers in found.values() for layer in layers for slot in layer["engaged"]):
        shares = [total(n, lambda x, s=slot: x["engaged"].get(s, 0)) / total(n, lambda x: x["calls"]) for n in numbers]
        if any(shares):
            strips.append(Strip(f"{slot} engaged", shares, [f"at {s:.0%} of the calls" for s in shares]))
    for name, said in (("keys_kept", "kept"), ("keys_read", "read")):
        shares = [total(n, lambda x, k=name: x[k]) / total(n, lambda x: x["keys_total"]) for n in numbers]
        if name == "keys_read" or min(shares) < 1:
            strips.append(Strip(f"keys {said}", shares, [f"{s:.1%} of the keys" for s in shares]))
    if all(layer["seconds"] is not None for layers in found.values() for layer in layers):
        ms = [1e3 * total(n, lambda x: x["seconds"]) / total(n, lambda x: x["calls"]) for n in numbers]
        strips.append(Strip("time", [m / max(ms) if max(ms) else 0 for m in ms], [f"{m:.3f} ms a call" for m in ms]))
    return heat(f"{arm}: {part}-attention", [str(n) for n in numbers], strips, "layer")
