"""Small charts in the style of the map: shares over a quantity, and bars.

For distributions and attainment the upward axis is always a share, 0 to 1, so charts can be read
side by side; the rightward one begins at 0. A dashed line marks a limit. Curves are thinned to
`POINTS`: a pixel shows no more.

Rejected: a plotting library (50 MB for three lines, and a style of its own).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hexswarm.layout import Box, nice
from hexswarm.paint import stage_class, style
from hexswarm.svg import document, element, fit, harmless, line, number, text

Point = tuple[float, float]

WIDTH, MARGIN, TOP, HIGH, GAP = 1200.0, 24.0, 84.0, 230.0, 30.0
POINTS = 240
COLUMN, BARS = 150.0, 400
"""Width of a bar's cell; most bars."""

_EXTRA = ".curve{fill:none;stroke-width:2.2;stroke-linejoin:round}"


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: (quantity, share), ascending."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over one axis."""

    title: str
    unit: str
    series: Sequence[Series]
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """(name, share of 1) each."""

    title: str
    rows: Sequence[tuple[str, float]]


def plots(title: str, words: str, charts: Sequence[Chart], bars: Bars) -> str:
    """An SVG with the charts in a row and the bars below."""
    each = (WIDTH - 2 * MARGIN - GAP * (len(charts) - 1)) / max(len(charts), 1)
    parts: list[str] = []
    for number_, chart in enumerate(charts):
        parts += _chart(chart, Box(MARGIN + number_ * (each + GAP), TOP, each, HIGH))
    below, bottom = _bars(bars, TOP + HIGH + 60)
    height = bottom + MARGIN
    head = [
        element("rect", width=WIDTH, height=height, class_="paper"),
        text((MARGIN, 36), fit(harmless(title), 23, WIDTH - 2 * MARGIN), "big ink"),
        text((MARGIN, 58), fit(harmless(words, 200), 12, WIDTH - 2 * MARGIN), "mute"),
    ]
    said = f"{words}. " + ", ".join(chart.title for chart in charts)
    return document((WIDTH, height), title, said, style() + _EXTRA, [*head, *parts, *below])


def _chart(chart: Chart, box: Box) -> list[str]:
    plot = Box(box.x + 34, box.y + 34, box.w - 46, box.h - 62)
    most = _most(chart)
    parts = [
        element("rect", x=box.x, y=box.y, width=box.w, height=box.h, rx=10, class_="panel"),
        text((box.x + 12, box.y + 21), chart.title, "strong ink"),
        text((box.right - 12, box.y + 21), chart.unit, "small mute", "end"),
    ]
    for share in (0.0, 0.5, 0.95, 1.0):
        y = plot.bottom - share * plot.h
        parts.append(line(plot.x, y, plot.right, y, "line-line rim"))
        if share != 1.0:
            parts.append(text((plot.x - 5, y + 4), f"{share:.0%}", "tiny mute", "end"))
    step = nice(most / 4)
    for tick in range(int(most / step * (1 + 1e-9)) + 1):
        x = plot.x + tick * step / most * plot.w
        parts.append(line(x, plot.y, x, plot.bottom, "line-line rim"))
        parts.append(text((x, plot.bottom + 15), f"{tick * step:g}", "tiny mute", "middle"))
    if chart.limit is not None and chart.limit <= most:
        x = plot.x + chart.limit / most * plot.w
        parts.append(line(x, plot.y, x, plot.bottom, "way hole-line"))
    for index, series in enumerate(chart.series):
        if series.points:
            d = _path(series.points, plot, most)
            parts.append(element("path", d=d, class_=f"curve {stage_class(index)}-line"))
    if not any(series.points for series in chart.series):
        parts.append(text((plot.x + plot.w / 2, plot.y + plot.h / 2), "nothing", "mute", "middle"))
    return parts


def _most(chart: Chart) -> float:
    """Right end of the axis: all but the slowest hundredth, and the limit if it is near."""
    ends = [series.points[-1][0] for series in chart.series if series.points]
    usual = [
        next((x for x, share in series.points if share >= 0.99), series.points[-1][0])
        for series in chart.series
        if series.points
    ]
    most = min(max(ends, default=1.0), 1.15 * max(usual, default=1.0))
    if chart.limit is not None and chart.limit <= 2 * most:
        most = max(most, 1.1 * chart.limit)
    return most if most > 0 and math.isfinite(most) else 1.0


def _path(points: Sequence[Point], plot: Box, most: float) -> str:
    """Steps from share to share would be truer and look like noise: straight lines."""
    step = max(1, len(points) // POINTS)
    chosen = [point for point in [*points[::step], points[-1]] if point[0] <= most]
    places = [
        (plot.x + x / most * plot.w, plot.bottom - min(max(share, 0.0), 1.0) * plot.h)
        for x, share in chosen
    ]
    return "M" + " ".join(f"{number(x)},{number(y)}" for x, y in places) if places else ""


def _bars(bars: Bars, top: float) -> tuple[list[str], float]:
    """Cells in as many columns as fit; the bottom of the last row."""
    parts = [text((MARGIN, top - 16), bars.title, "strong ink")]
    columns = int((WIDTH - 2 * MARGIN) / COLUMN)
    rows = bars.rows[:BARS]
    for index, (name, share) in enumerate(rows):
        x, y = MARGIN + index % columns * COLUMN, top + index // columns * 38
        wide = COLUMN - 14
        part = min(max(share, 0.0), 1.0)
        parts += [
            text((x, y + 11), fit(harmless(name), 11, wide - 34), "small ink"),
            text((x + wide, y + 11), f"{share:.0%}", "small mute", "end"),
            element("rect", x=x, y=y + 16, width=wide, height=8, rx=3, class_="region"),
            element(
                "rect", x=x, y=y + 16, width=wide * part, height=8, rx=3, class_="l3", tip=name
            ),
        ]
    bottom = top + math.ceil(len(rows) / columns) * 38
    if len(bars.rows) > BARS:
        parts.append(text((MARGIN, bottom + 12), f"{len(bars.rows) - BARS:,} more", "small mute"))
        bottom += 20
    return parts, bottom
