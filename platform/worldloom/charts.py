"""Charts as SVG text, drawn for `report`: axes, ticks at round numbers, a legend; colours come from the page's CSS."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 46
_COLOURS = 8
_MARKED = 40
"""A line of at most this many points shows each as a dot with its value."""
_DRAWN = 1500
"""A longer line is thinned to about this many points; the highest and lowest of each stretch are kept."""


class _Axes:
    """A plot area with its scales: data to pixels."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str, whole: bool = False
    ) -> None:
        self.x_range, self.y_range = x, y
        self.x_label, self.y_label = x_label, y_label
        self.whole = whole  # y counts things

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self) -> list[str]:
        """Grid, ticks and labels."""
        parts: list[str] = []
        floor = _HEIGHT - _BOTTOM
        for tick in ticks(*self.y_range, whole=self.whole):
            at = self.y(tick)
            parts.append(f'<line class="gridline" x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
        for tick in ticks(*self.x_range, count=7):
            at = self.x(tick)
            parts.append(f'<line class="axis" x1="{at:.1f}" y1="{floor}" x2="{at:.1f}" y2="{floor + 4}"/>')
            parts.append(f'<text x="{at:.1f}" y="{floor + 17}" text-anchor="middle">{number(tick)}</text>')
        parts.append(f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - _RIGHT}" y2="{floor}"/>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        if self.x_label:
            label = html.escape(self.x_label)
            parts.append(f'<text class="label" x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{label}</text>')
        if self.y_label:
            at = (_TOP + floor) / 2
            parts.append(
                f'<text class="label" transform="translate(13 {at:.0f}) rotate(-90)" text-anchor="middle">'
                f"{html.escape(self.y_label)}</text>"
            )
        return parts


def _chart(title: str, legend: str, parts: Sequence[str]) -> str:
    label = html.escape(title, quote=True)
    drawing = "\n".join(parts)
    return (
        f'<div class="chart-head"><strong>{html.escape(title)}</strong>{legend}</div>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">\n{drawing}\n</svg>'
    )


def _empty(title: str) -> str:
    text = f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT / 2:.0f}" text-anchor="middle">no data</text>'
    return _chart(title, "", [text])


def line_chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """See `Report.line_chart`."""
    points = {name: [(float(x), float(y)) for x, y in line] for name, line in series.items()}
    finite = [(x, y) for line in points.values() for x, y in line if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return _empty(title)
    axes = _Axes(_span([x for x, _ in finite]), _padded([y for _, y in finite]), x_label, y_label)
    parts = axes.frame()
    for i, (name, line) in enumerate(points.items()):
        colour = f"s{i % _COLOURS}"
        for run in _runs(line):
            kept = _thinned(run)
            path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in kept)
            parts.append(f'<polyline class="line {colour}" points="{path}"/>')
            if len(line) <= _MARKED:
                parts.extend(
                    f'<circle class="dot {colour}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.6">'
                    f"<title>{html.escape(name)}: {number(x)}, {number(y)}</title></circle>"
                    for x, y in run
                )
    keys = "".join(f'<span><i class="s{i % _COLOURS}"></i>{html.escape(name)}</span>' for i, name in enumerate(points))
    return _chart(title, f'<span class="legend">{keys}</span>', parts)


def histogram(title: str, values: Sequence[float], threshold: float | None) -> str:
    """See `Report.histogram`."""
    held = sorted(float(value) for value in values if math.isfinite(value))
    if not held:
        return _empty(title)
    reach = [held[0], held[-1]] + ([threshold] if threshold is not None else [])
    low, high = _span(reach)
    count = max(8, min(40, math.isqrt(len(held)) * 2))
    width = (high - low) / count
    edges = [low + i * width for i in range(count + 1)]
    bars = [0] * count
    dropped = [0] * count
    for value in held:
        bin_ = min(count - 1, int((value - low) / width))
        bars[bin_] += 1
        dropped[bin_] += threshold is not None and value < threshold
    axes = _Axes((low, high), (0.0, max(bars) * 1.05), "", "count", whole=True)
    parts = axes.frame()
    for i, (total, below) in enumerate(zip(bars, dropped, strict=True)):
        left, right = axes.x(edges[i]) + 0.5, axes.x(edges[i + 1]) - 0.5
        told = f"<title>{number(edges[i])} to {number(edges[i + 1])}: {total}</title>"
        # A bar that the threshold cuts is split: what is dropped at the bottom, what is kept on top.
        for amount, base, mark in ((below, 0, "dropped"), (total - below, below, "kept")):
            if amount:
                top = axes.y(base + amount)
                parts.append(
                    f'<rect class="bar {mark}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
                    f'height="{axes.y(base) - top:.1f}">{told}</rect>'
                )
    legend = f'<span class="legend"><span>{len(held)} values</span></span>'
    if threshold is not None:
        at = axes.x(threshold)
        parts.append(f'<line class="threshold" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_HEIGHT - _BOTTOM}"/>')
        gone = sum(dropped)
        legend = (
            f'<span class="legend"><span><i class="dropped"></i>{gone} below {number(threshold)}</span>'
            f'<span><i class="kept"></i>{len(held) - gone} kept</span></span>'
        )
    return _chart(title, legend, parts)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) inside ``[low, high]``; integers if `whole`."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick label: short, and free of binary rounding noise."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        text = f"{value:.5g}"
    elif 1e5 <= abs(value) < 1e15 and value == int(value):
        thousands = next(
            (value / size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= size
        )
        text = f"{thousands[0]:.4g}{thousands[1]}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "\u2212")


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, kept apart where they are equal."""
    low, high = min(values), max(values)
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    reach = abs(low) * 0.05 or 0.5
    return low - reach, high + reach


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = _span(values)
    margin = (high - low) * 0.06
    # Quantities that are never negative should not seem to be.
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _runs(line: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches of finite points."""
    groups = itertools.groupby(line, key=lambda point: math.isfinite(point[0]) and math.isfinite(point[1]))
    return [list(points) for finite, points in groups if finite]


def _thinned(run: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Fewer points of the same look: first, last, and the extremes of each stretch, in order."""
    if len(run) <= _DRAWN:
        return run
    size = math.ceil(len(run) / (_DRAWN // 2))
    kept = {0, len(run) - 1}
    for start in range(0, len(run), size):
        stretch = range(start, min(start + size, len(run)))
        kept.add(min(stretch, key=lambda i: run[i][1]))
        kept.add(max(stretch, key=lambda i: run[i][1]))
    return [run[i] for i in sorted(kept)]
