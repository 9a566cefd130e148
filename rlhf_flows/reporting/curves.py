"""Curves as an SVG picture, written by hand: under a millisecond and a few kilobytes.

The decision here: no plotting library. Importing matplotlib costs a second and a drawing 0.2 s on a
busy core, which is more than a small episode may spend on being watched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from rlhf_flows.reporting.run_board import Curve

__all__ = ["draw"]

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 48, 34
_TRAIN, _HELD_OUT = "#94a9c9", "#1f5fbf"
_INK, _RULE = "#4a5568", "#e2e8f0"
_POINTS = 400
"""Of one line; longer ones are thinned out."""

Point = tuple[float, float]


def draw(curves: Sequence[Curve]) -> str:
    """An SVG with one panel a curve, side by side."""
    panels = [_panel(curve, x=_WIDTH * i) for i, curve in enumerate(curves)]
    width = _WIDTH * max(1, len(curves))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}"'
        f' viewBox="0 0 {width} {_HEIGHT}" font-family="Helvetica, Arial, sans-serif"'
        f' font-size="11" fill="{_INK}"><rect width="{width}" height="{_HEIGHT}" fill="#fff"/>'
        f"{''.join(panels)}</svg>"
    )


def _panel(curve: Curve, *, x: int) -> str:
    points = [*curve.train, *curve.held_out]
    versions, values = [p[0] for p in points] or [0], [p[1] for p in points] or [0.0]
    across = _ticks(min(versions), max(versions), count=6, whole=True)
    up = _ticks(min(values), max(values), count=4)
    x0, x1 = min(across[0], min(versions)), max(across[-1], max(versions))
    y0, y1 = min(up[0], min(values)), max(up[-1], max(values))

    def at(point: Point) -> Point:
        return (
            _LEFT + (point[0] - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (point[1] - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM),
        )

    floor = _HEIGHT - _BOTTOM
    parts = [f'<g transform="translate({x} 0)">']
    parts.append(
        f'<text x="12" y="22" font-size="14" font-weight="bold">{escape(curve.name)}</text>'
    )
    for value in up:
        _, y = at((x0, value))
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="{_RULE}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for version in across:
        left, _ = at((version, y0))
        parts.append(
            f'<text x="{left:.1f}" y="{floor + 16}" text-anchor="middle">{version:g}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:g}" y="{floor + 30}" text-anchor="middle">policy version</text>'
    )
    if curve.train:
        parts.append(_line([at(p) for p in _thinned(curve.train)], _TRAIN, dots=False))
    if curve.held_out:
        parts.append(_line([at(p) for p in _thinned(curve.held_out)], _HELD_OUT, dots=True))
    legend = [(_TRAIN, "trained on")] * bool(curve.train)
    legend += [(_HELD_OUT, "held out")] * bool(curve.held_out)
    for i, (color, text) in enumerate(legend):
        left = _WIDTH - _RIGHT - 92 * (len(legend) - i)
        parts.append(f'<path d="M{left} 18h18" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{left + 24}" y="22">{text}</text>')
    return "".join(parts) + "</g>"


def _line(points: Sequence[Point], color: str, *, dots: bool) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    line = f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>'
    if not dots and len(points) > 1:
        return line
    return line + "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points
    )


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Every nth point, and the last."""
    step = math.ceil(len(points) / _POINTS)
    return [*points[:-1:step], points[-1]]


def _ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """Round numbers that span from `low` to `high`: about `count` steps of 1, 2 or 5 x 10^n."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        margin = 1.0 if whole else max(abs(high), 1.0) * 0.05
        low, high = (low, high + margin) if whole else (low - margin, high + margin)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, round(step))
    first = math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
