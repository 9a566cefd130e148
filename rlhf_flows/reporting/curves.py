"""Curves as an SVG picture, written by hand: a few milliseconds and a few kilobytes.

The decision here: no plotting library. Importing matplotlib costs a second and a drawing 0.2 s on a
busy core, which is more than a small episode may spend on being watched. Colours are classes, so
that one picture has a light and a dark face; it stands on a ground of its own, and is readable
where the page around it chose the other one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from rlhf_flows.reporting.panels import Curve, Line

__all__ = ["draw"]

_WIDTH, _HEIGHT = 360, 214
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 54, 32
_COLUMNS = 3
_POINTS = 240
"""Of one line; longer ones are thinned out."""
_BARS = 60
"""Of a stack; of more episodes, means over neighbours."""
_LEGEND_CHARACTER = 6.3

_LIGHT = ("#1f5fbf", "#d9822b", "#2e8b57", "#a23b72", "#6b7785", "#b8860b")
_DARK = ("#7db0f5", "#f0a860", "#6fcf97", "#e08bb9", "#aab4c0", "#e0c050")
_STYLE = "svg{{fill:{ink}}}.g{{fill:{ground}}}.r{{stroke:{rule}}}.q{{fill:{quiet}}}{colors}"

Point = tuple[float, float]


def draw(curves: Sequence[Curve]) -> str:
    """An SVG with one panel a curve, three in a row."""
    columns = max(1, min(_COLUMNS, len(curves)))
    panels = [
        _panel(curve, x=_WIDTH * (i % columns), y=_HEIGHT * (i // columns))
        for i, curve in enumerate(curves)
    ]
    width, height = _WIDTH * columns, _HEIGHT * max(1, math.ceil(len(curves) / columns))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif"'
        f' font-size="11"><style>{_style()}</style>'
        f'<rect class="g" width="{width}" height="{height}" rx="8"/>{"".join(panels)}</svg>'
    )


def _style() -> str:
    light, dark = (
        _STYLE.format(
            ink=ink,
            ground=ground,
            rule=rule,
            quiet=quiet,
            colors="".join(f".s{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(colors)),
        )
        for ink, ground, rule, quiet, colors in (
            ("#2d3748", "#fff", "#e2e8f0", "#667085", _LIGHT),
            ("#e6e9ef", "#161b26", "#323a4a", "#98a2b3", _DARK),
        )
    )
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _panel(curve: Curve, *, x: int, y: int) -> str:
    lines = _binned(curve.lines) if curve.is_stacked else curve.lines
    drawn = _heaped(lines) if curve.is_stacked else [_thinned(line.points) for line in lines]
    if curve.is_log:
        drawn = [[(n, math.log10(value)) for n, value in some if value > 0] for some in drawn]
    numbers = [p[0] for some in drawn for p in some] or [0]
    values = [p[1] for some in drawn for p in some] or [0.0]
    if curve.is_stacked:
        values.append(0.0)
    across = _ticks(min(numbers), max(numbers), count=6, whole=True)
    up = _ticks(min(values), max(values), count=4)
    if curve.is_log:  # whole powers of ten, one at least
        low, high = math.floor(min(values)), math.ceil(max(values))
        up = [float(power) for power in range(low, max(high, low + 1) + 1)]
    x0, x1 = min(across[0], min(numbers)), max(across[-1], max(numbers))
    y0, y1 = min(up[0], min(values)), max(up[-1], max(values))
    if curve.is_stacked:  # bars are as wide as an episode
        half = _bar(drawn[0]) / 2 if drawn else 0.5
        x0, x1 = min(numbers) - half, max(numbers) + half
        across = [tick for tick in across if x0 <= tick <= x1]

    def at(point: Point) -> Point:
        return (
            _LEFT + (point[0] - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (point[1] - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f'<g transform="translate({x} {y})">', _heading(curve)]
    for value in up:
        _, height = at((x0, value))
        parts.append(f'<path class="r" d="M{_LEFT} {height:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="q" x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">'
            f"{_number(10**value if curve.is_log else value)}</text>"
        )
    floor = _HEIGHT - _BOTTOM
    for number in across:
        left, _ = at((number, y0))
        parts.append(
            f'<text class="q" x="{left:.1f}" y="{floor + 15}" text-anchor="middle">'
            f"{number:g}</text>"
        )
    parts.append(
        f'<text class="q" x="{(_LEFT + _WIDTH - _RIGHT) / 2:g}" y="{floor + 28}"'
        f' text-anchor="middle">{escape(curve.across)}</text>'
    )
    if curve.is_stacked:
        bottom = [(n, 0.0) for n, _ in drawn[0]] if drawn else []
        for i, top in enumerate(drawn):
            parts.append(_area([at(p) for p in _steps(top)], [at(p) for p in _steps(bottom)], i))
            bottom = list(top)
    else:
        parts += [_line([at(p) for p in some], i) for i, some in enumerate(drawn) if some]
    return "".join(parts) + "</g>"


def _heading(curve: Curve) -> str:
    """Title and newest value; where there are several lines, which is which, with theirs."""
    parts = [f'<text x="12" y="20" font-size="13" font-weight="bold">{escape(curve.name)}</text>']
    if curve.is_stacked:
        last = max((line.points[-1][0] for line in curve.lines), default=0)
        newest = sum(value for line in curve.lines for n, value in line.points if n == last)
    elif len(curve.lines) == 1:
        newest = curve.lines[0].points[-1][1]
    if curve.is_stacked or len(curve.lines) == 1:
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="20" font-size="13" text-anchor="end">'
            f"{_number(newest, digits=3)}</text>"
        )
    left = 12.0
    for i, line in enumerate(curve.lines if len(curve.lines) > 1 else ()):
        name = _shortened(line.name)
        if not curve.is_stacked:
            name += f" {_number(line.points[-1][1], digits=3)}"
        parts.append(f'<rect class="f{i % len(_LIGHT)}" x="{left:g}" y="33" width="9" height="9"/>')
        parts.append(f'<text class="q" x="{left + 13:g}" y="41">{escape(name)}</text>')
        left += 19 + _LEGEND_CHARACTER * len(name)
    return "".join(parts)


def _line(points: Sequence[Point], i: int) -> str:
    i %= len(_LIGHT)
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    line = f'<path class="s{i}" d="M{path}" fill="none" stroke-width="2"/>'
    # A dot a point while they are few: held-out prompts are asked now and then only.
    dots = points if len(points) <= 12 else ()
    return line + "".join(
        f'<circle class="f{i}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in dots
    )


def _area(top: Sequence[Point], bottom: Sequence[Point], i: int) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*top, *reversed(bottom)])
    return f'<path class="f{i % len(_LIGHT)}" d="M{path}z"/>'


# ---- points -----------------------------------------------------------------------------------


def _binned(lines: Sequence[Line]) -> list[Line]:
    """All lines with the same numbers: means over as many episodes as make `_BARS` of them."""
    numbers = sorted({n for line in lines for n, _ in line.points})
    size = math.ceil(len(numbers) / _BARS) or 1
    bins = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    binned = []
    for line in lines:
        values = dict(line.points)
        means = tuple((b[0], sum(values.get(n, 0.0) for n in b) / len(b)) for b in bins)
        binned.append(Line(name=line.name, points=means))
    return binned


def _heaped(lines: Sequence[Line]) -> list[Sequence[tuple[int, float]]]:
    """The upper edge of each line when it stands on those before it."""
    heaped: list[Sequence[tuple[int, float]]] = []
    heights: dict[int, float] = {}
    for line in lines:
        for number, value in line.points:
            heights[number] = heights.get(number, 0.0) + value
        heaped.append([(number, heights[number]) for number, _ in line.points])
    return heaped


def _bar(points: Sequence[tuple[int, float]]) -> float:
    return float(points[1][0] - points[0][0]) if len(points) > 1 else 1.0


def _steps(points: Sequence[tuple[int, float]]) -> list[Point]:
    """The same as stairs: each value from half a bar before its number to half a bar after."""
    half = _bar(points) / 2
    return [corner for n, value in points for corner in ((n - half, value), (n + half, value))]


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Every nth point, and the last."""
    if not points:
        return points
    step = math.ceil(len(points) / _POINTS)
    return [*points[:-1:step], points[-1]]


def _ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """Round numbers that span from `low` to `high`: about `count` steps of 1, 2 or 5 x 10^n."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        margin = 1.0 if whole else (abs(high) * 0.05 or 1.0)
        low, high = (low, high + margin) if whole else (low - margin, high + margin)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, round(step))
    first = math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


# ---- text -------------------------------------------------------------------------------------


def _number(value: float, *, digits: int = 4) -> str:
    """Short enough for the margin: 12k rather than 12000."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if letter == "k" else size
            return f"{value / scale:.{digits}g}{letter}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _shortened(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
