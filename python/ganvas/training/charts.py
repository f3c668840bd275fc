"""Line charts as inline SVG: no script, no library, in the colours of the page around them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Series = list[tuple[int, float]]
"""(step, value), in order of the steps."""

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 44
_MOST_POINTS = 400
_LARGEST_LINEAR_RATIO = 20
"""Values that span more than this are drawn on a logarithmic scale: a distance falls from hundreds to a few."""
# Told apart by lightness as well as hue, on white and on black.
_COLOURS = ("#3b7dd8", "#e08214", "#2a9d5c", "#c2478f", "#8b6fd6", "#8a8a2e")


def svg_chart(series: Mapping[str, Series], title: str, *, is_share: bool = False) -> str:
    """An ``<svg>`` of the series over the steps, with ticks and a legend.

    Args:
        series: by name, each with at least one point; all values finite.
        title: for screen readers.
        is_share: values in [0, 1], always drawn on a linear scale; others are on a logarithmic one if they span much.
    """
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    x_ticks = _ticks(min(steps), max(steps))
    logarithmic = not is_share and min(values) > 0 and max(values) / min(values) > _LARGEST_LINEAR_RATIO
    scale = math.log10 if logarithmic else float
    y_ticks = (_log_ticks if logarithmic else _ticks)(min(values), max(values))
    left, right = min(steps), max(max(steps), min(steps) + 1)
    low, high = scale(min(y_ticks[0], min(values))), scale(max(y_ticks[-1], max(values)))

    def x(step: float) -> float:
        return _LEFT + (step - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (scale(value) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in y_ticks:
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        if left <= tick <= right:
            parts.append(
                f'<text x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_label(tick)}</text>'
            )
    legend = []
    for index, (name, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in _thinned(points))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
        # One text, whose parts stand where the one before ends, however wide the page's font is.
        legend.append(f'<tspan dx="{18 if index else 0}" style="fill:{colour}">{html.escape(name)}</tspan>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{"".join(legend)}</text>')
    return "".join(parts) + "</svg>"


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[float, float]]:
    """At most ``_MOST_POINTS`` points: the means of neighbouring ones, so that no part of a curve is left out."""
    group = math.ceil(len(points) / _MOST_POINTS)
    if group == 1:
        return points
    chunks = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(s for s, _ in chunk) / len(chunk), sum(v for _, v in chunk) / len(chunk)) for chunk in chunks]


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    interval = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
    first, last = math.floor(low / interval), math.ceil(high / interval)
    return [index * interval for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from at or below ``low`` > 0 to at or above ``high``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    # Over more than three decades the powers alone: labels must not touch.
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    start = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = min(index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[start : end + 1]


def _label(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
