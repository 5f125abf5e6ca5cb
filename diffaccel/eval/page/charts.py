"""Charts as SVG, drawn here so that they need no script to be seen; what is under the pointer is said by page.js."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 14, 42
STYLES = 8
"""Colours of page.css; further series begin again with other dashes."""

Number = float | int


@dataclass(frozen=True)
class Series:
    """A line through (x, y), a gap where y is None. `style` is a colour of page.css, or "dense", "floor", "other";
    `dash` 0 is a full line; `spread` has least and most of every y; `notes` what is said beside a point."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number | None]
    style: int | str = 0
    dash: int = 0
    joined: bool = True
    marks: bool = False
    spread: Sequence[tuple[Number, Number] | None] = ()
    notes: Sequence[str] = ()

    @property
    def css(self) -> str:
        colour = self.style if isinstance(self.style, str) else str(self.style % STYLES)
        return f"s-{colour} d-{self.dash % 4}"


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    from_zero: bool = False,
    level: tuple[Number, str] | None = None,
    uprights: Sequence[tuple[Number, str]] = (),
) -> Markup | None:
    """A figure with lines or points; None where there is nothing to draw.

    `level` is a horizontal line with its name, `uprights` vertical ones.
    """
    shown = [s for s in series if any(y is not None for y in s.y)]
    if not shown:
        return None
    xs = [x for s in shown for x, y in zip(s.x, s.y, strict=True) if y is not None] + [x for x, _ in uprights]
    ys = [y for s in shown for y in s.y if y is not None]
    ys += [end for s in shown for pair in s.spread if pair is not None for end in pair]
    ys += [level[0]] if level else []
    across, up = _Scale(xs, _LEFT, WIDTH - _RIGHT), _Scale([*ys, 0] if from_zero else ys, HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(across, up, x_label, y_label)]
    if level:
        parts.append(_line(_LEFT, up(level[0]), WIDTH - _RIGHT, up(level[0]), "level"))
        parts.append(_text(WIDTH - _RIGHT - 4, up(level[0]) - 5, level[1], "label end"))
    for x, name in uprights:
        parts.append(_line(across(x), _TOP, across(x), HEIGHT - _BOTTOM, "level"))
        right = across(x) > WIDTH / 2
        parts.append(_text(across(x) + (-4 if right else 4), _TOP + 10, name, "label end" if right else "label"))
    for s in shown:
        parts += _draw(s, across, up)
    data = {
        "series": [
            {
                "name": s.name,
                "points": [
                    [round(across(x), 1), round(up(y), 1), _short(x), _short(y), *(s.notes[i : i + 1])]
                    for i, (x, y) in enumerate(zip(s.x, s.y, strict=True))
                    if y is not None
                ],
            }
            for s in shown
        ],
        "x": x_label,
        "top": _TOP,
        "bottom": HEIGHT - _BOTTOM,
    }
    keys = [
        Markup(
            '<li><svg class="key {}" viewBox="0 0 26 10" aria-hidden="true">{}</svg><span>{}</span>'
            "<strong></strong></li>"
        ).format(s.css, _key(s), s.name)
        for s in shown
    ]
    return Markup(
        '<figure class="chart" data-chart="{data}"><figcaption>{title}</figcaption>'
        '<svg viewBox="0 0 {w} {h}" role="img" tabindex="0" aria-label="{said}">{parts}'
        '<g class="cursor"></g></svg><ul class="legend">{keys}</ul><output></output></figure>'
    ).format(
        data=json.dumps(data, allow_nan=False),
        title=title,
        w=WIDTH,
        h=HEIGHT,
        said=f"{title}: {y_label} over {x_label}, {len(shown)} series; arrow keys read the values",
        parts=Markup("").join(parts),
        keys=Markup("").join(keys),
    )


@dataclass(frozen=True)
class Strip:
    """One row of a heat map: a value a column in [0, 1] by colour, and what is written and said of each."""

    name: str
    shades: Sequence[float | None]
    texts: Sequence[str]


def heat(title: str, columns: Sequence[str], strips: Sequence[Strip], column: str) -> Markup:
    """A heat map, one strip a row; `column` is what a column is called ("layer")."""
    left, cell = 112, 22
    wide = (WIDTH - left - 4) / max(len(columns), 1)
    height = cell * (len(strips) + 1) + 4
    every = math.ceil(len(columns) / 12)
    parts: list[Markup] = []
    for row, strip in enumerate(strips):
        y = row * cell + 2
        parts.append(_text(left - 6, y + 15, strip.name, "label end"))
        for number, (shade, text) in enumerate(zip(strip.shades, strip.texts, strict=True)):
            said = f"{column} {columns[number]}, {strip.name}: {text}"
            parts.append(
                Markup(
                    '<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" data-row="{}" data-column="{}" '
                    'data-said="{}"/>'
                ).format(
                    "h-none" if shade is None else f"h-{round(max(0.0, min(1.0, shade)) * 10)}",
                    left + number * wide,
                    y,
                    max(wide - 1, 1),
                    cell - 2,
                    row,
                    number,
                    said,
                )
            )
    for number in range(0, len(columns), every):
        parts.append(_text(left + (number + 0.5) * wide, height - 5, columns[number], "label middle"))
    parts.append(_text(left - 6, height - 5, column, "label end"))
    return Markup(
        '<figure class="chart heat"><figcaption>{title}</figcaption><svg viewBox="0 0 {w} {h}" role="img" tabindex="0" '
        'aria-label="{title}; arrow keys read the values">{parts}<g class="cursor"></g></svg><output></output></figure>'
    ).format(title=title, w=WIDTH, h=height, parts=Markup("").join(parts))


class _Scale:
    """From values to pixels, with round ticks."""

    def __init__(self, values: Sequence[Number], start: float, stop: float) -> None:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
        self.step = _round_step((high - low) / 5)
        self.low = math.floor(low / self.step + 1e-9) * self.step
        self.high = math.ceil(high / self.step - 1e-9) * self.step
        self.start, self.stop = start, stop

    def __call__(self, value: Number) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        count = round((self.high - self.low) / self.step)
        values = [self.low + number * self.step for number in range(count + 1)]
        return [(value, f"{value + 0.0:,.{digits}f}".replace(",", "\u2009")) for value in values]


def _round_step(rough: float) -> float:
    """The next step up of 1, 2, 5, 10, ..."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _axes(across: _Scale, up: _Scale, x_label: str, y_label: str) -> list[Markup]:
    parts = []
    for value, text in up.ticks():
        parts.append(_line(_LEFT, up(value), WIDTH - _RIGHT, up(value), "grid"))
        parts.append(_text(_LEFT - 6, up(value) + 4, text, "tick end"))
    for value, text in across.ticks():
        parts.append(_line(across(value), HEIGHT - _BOTTOM, across(value), HEIGHT - _BOTTOM + 4, "axis"))
        parts.append(_text(across(value), HEIGHT - _BOTTOM + 17, text, "tick middle"))
    parts.append(_line(_LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, HEIGHT - _BOTTOM, "axis"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_label, "label middle"))
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        Markup('<text class="label middle" transform="translate(12 {:.0f}) rotate(-90)">{}</text>').format(
            middle, y_label
        )
    )
    return parts


def _draw(s: Series, across: _Scale, up: _Scale) -> list[Markup]:
    parts, run = [], []
    places = [(across(x), None if y is None else up(y)) for x, y in zip(s.x, s.y, strict=True)]
    for x, y in [*places, (0.0, None)]:
        if y is not None:
            run.append(f"{x:.1f},{y:.1f}")
            continue
        if len(run) > 1 and s.joined:
            parts.append(Markup('<polyline class="line {}" points="{}"/>').format(s.css, " ".join(run)))
        run = []
    for pair, (x, _) in zip(s.spread, places, strict=False):
        if pair is not None:
            parts.append(_line(x, up(pair[0]), x, up(pair[1]), f"spread {s.css}"))
    if s.marks or not s.joined or len(places) == 1:
        parts += [_mark(x, y, s) for x, y in places if y is not None]
    return parts


def _mark(x: float, y: float, s: Series) -> Markup:
    if s.style == "dense":
        return Markup('<path class="mark {}" d="M{:.1f} {:.1f}m0 -7l6 7l-6 7l-6 -7z"/>').format(s.css, x, y)
    return Markup('<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(s.css, x, y)


def _key(s: Series) -> Markup:
    line = Markup('<path class="line {}" d="M0 5H26"/>').format(s.css) if s.joined else Markup("")
    return line + (_mark(13, 5, s) if s.marks or not s.joined else Markup(""))


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(css, x1, y1, x2, y2)


def _text(x: float, y: float, text: Any, css: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(css, x, y, text)


def _short(value: Number) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}".replace(",", "\u2009")
