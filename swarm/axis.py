"""The lower panel of the map: who holds which layers, and where nobody does.

One bar for each peer over the layers that it holds, in as few lanes as the spans permit. The part
that the route uses has the colour of its stage, the rest that of the peer's load. Under the lanes
the number of serving peers for each layer, and a red band through everything where it is nought.

Up to `NAMED` peers the bars bear names, up to `SINGLE` each peer has a bar, and in a larger swarm
a bar stands for all peers of one span: the picture stays as large, whoever joins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hexswarm.groups import standing
from hexswarm.layout import Box, Labels, lanes, nice
from hexswarm.paint import (
    Subject,
    counted,
    layers_text,
    letters_on,
    load_class,
    short,
    stage_class,
    tip,
)
from hexswarm.records import Announcement, Span, uncovered
from hexswarm.svg import element, fit, harmless, number, text, width

NAMED = 60
SINGLE = 400
SHOWN = 300
"""Most spans drawn when a bar is a span."""

SAID = {"member": "in a group", "waiting": "waits for a group"}
"""What is said of peers that do not serve, if not their state."""

HEAD = 62.0
"""Pixels above the lanes: heading, ticks, names of holes."""
CHART = 46.0
"""Pixels of the chart below the lanes."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar before it has a place."""

    span: Span
    words: str
    tip: str
    load: str
    """Class of its colour; hollow if nobody of it serves."""
    used: Span | None = None
    stage: int = -1


@dataclass(frozen=True, slots=True)
class Axis:
    """The finished panel."""

    parts: list[str]
    height: float


def holes(subject: Subject) -> list[Span]:
    """The layers that no serving peer holds."""
    spans = (item.span for item in subject.peers if item.serving)
    return uncovered((span for span in spans if span.first < subject.layers), subject.layers)


def layer_axis(subject: Subject, x: float, y: float, w: float) -> Axis:
    """The panel with its upper left corner at (x, y)."""
    bars, left_out = _bars(subject)
    rows = lanes([bar.span for bar in bars])
    count = max(rows, default=-1) + 1
    pitch = _pitch(len(bars), count)
    lanes_box = Box(x, y + HEAD, w, count * pitch)
    scale = w / subject.layers
    parts = [text((x, y + 14), "Layers, and the peers that hold them", "strong ink")]
    parts.append(text((x + w, y + 14), _heading(subject, left_out), "mute", "end"))
    parts += _ticks(subject.layers, lanes_box, scale)
    for bar, row in zip(bars, rows, strict=True):
        place = Box(
            x + bar.span.first * scale,
            lanes_box.y + row * pitch,
            len(bar.span) * scale,
            max(pitch - (3 if pitch > 8 else 1), 2),
        )
        parts.append(_bar(bar, place, scale))
    parts += _coverage(subject, Box(x, lanes_box.bottom + 10, w, CHART), scale)
    parts += _holes(subject, lanes_box, scale)
    return Axis(parts, HEAD + lanes_box.h + 10 + CHART + 8)


def _pitch(bars: int, count: int) -> float:
    """Height of a lane with its gap."""
    if bars <= NAMED:
        return 21.0 if count <= 30 else 16.0
    return min(9.0, max(4.0, 600 / max(count, 1)))


def _heading(subject: Subject, left_out: int) -> str:
    held = coverage(subject)
    least, most = int(held.min()), int(held.max())
    words = (
        f"each layer is held {least:,} to {most:,} times" if least else "not every layer is held"
    )
    if len(subject.peers) > SINGLE:
        words += "; one bar for each span"
    if left_out:
        words += f", {counted(left_out, 'peer')} more"
    return words


def _bars(subject: Subject) -> tuple[list[Bar], int]:
    """All bars by first layer, then end, then peer; and how many peers none of them stands for."""
    inside = [item for item in subject.peers if item.span.first < subject.layers]
    if len(inside) <= SINGLE:
        ordered = sorted(inside, key=lambda item: (item.span, item.peer))
        return [_peer_bar(subject, item) for item in ordered], 0
    mine = [item for item in inside if item.peer in subject.stage_of]
    others = [item for item in inside if item.peer not in subject.stage_of]
    common = Counter((_clipped(item.span, subject.layers), item.serving) for item in others)
    shown = sorted(common.items(), key=lambda entry: (-entry[1], entry[0]))[:SHOWN]
    busy = _mean_busy(others, subject.layers)
    bars = [
        Bar(
            span,
            f"{count:,} ×",
            f"{layers_text(span)}: {counted(count, 'peer')}",
            load_class(busy[span, serving]) if serving else "",
        )
        for (span, serving), count in shown
    ]
    bars += [_peer_bar(subject, item) for item in mine]
    left_out = len(others) - sum(count for _, count in shown)
    return sorted(bars, key=lambda bar: (bar.span, bar.stage, bar.tip)), left_out


def _mean_busy(peers: Sequence[Announcement], layers: int) -> dict[tuple[Span, bool], float]:
    sums: dict[tuple[Span, bool], list[float]] = {}
    for item in peers:
        sums.setdefault((_clipped(item.span, layers), item.serving), []).append(item.busy)
    return {key: sum(values) / len(values) for key, values in sums.items()}


def _clipped(span: Span, layers: int) -> Span:
    return Span(span.first, min(span.end, layers))


def _peer_bar(subject: Subject, item: Announcement) -> Bar:
    stage = subject.stage_of.get(item.peer, -1)
    used = subject.route.stages[stage].span if subject.route and stage >= 0 else None
    words = f"{short(item.peer)} · {harmless(item.device, 24)}"
    if not item.serving:
        words += f" · {SAID.get(state := standing(item), state)}"
    return Bar(
        _clipped(item.span, subject.layers),
        words,
        tip(item),
        load_class(item.busy) if item.serving else "",
        used and _clipped(used, subject.layers),
        stage,
    )


def _bar(bar: Bar, box: Box, scale: float) -> str:
    inner = max(box.w - 2, 1)
    radius = min(3.0, box.h / 3)
    colour = f"{bar.load} line-line rim" if bar.load else "hollow mute-line"
    body = [
        element("rect", x=box.x + 1, y=box.y, width=inner, height=box.h, rx=radius, class_=colour)
    ]
    letters = letters_on(bar.load)
    label_x, room, words = box.x + 7, box.w - 12, bar.words
    if bar.used is not None:
        stage = stage_class(bar.stage)
        first = box.x + (bar.used.first - bar.span.first) * scale
        size = len(bar.used) * scale
        body.append(
            element(
                "rect",
                x=first + 1,
                y=box.y,
                width=max(size - 2, 1),
                height=box.h,
                rx=radius,
                class_=stage,
            )
        )
        label_x, room, letters = first + 7, size - 12, "paper"
        words = f"{bar.stage + 1} · {words}"
    if box.h >= 12:
        said = fit(words, 11, room)
        body.append(text((label_x, box.y + box.h / 2 + 4), said, f"bar {letters}") if said else "")
    return element("g", *body, tip=bar.tip, class_="peer-bar")


def _ticks(layers: int, box: Box, scale: float) -> list[str]:
    """Numbers of layers above the lanes, and a line down from each."""
    step = max(1, round(nice(max(layers / 12, 1))))
    marks = [*range(0, layers, step), layers]
    if len(marks) > 2 and (layers - marks[-2]) * scale < 30:
        del marks[-2]
    parts = []
    for layer in marks:
        x = box.x + layer * scale
        anchor = "end" if layer == layers else "middle" if layer else ""
        parts.append(text((x, box.y - 28), str(layer), "small mute", anchor))
        parts.append(
            element("line", x1=x, y1=box.y - 22, x2=x, y2=box.bottom + 4, class_="line-line rim")
        )
    return parts


def coverage(subject: Subject) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """For each layer, how many serving peers hold it."""
    steps = np.zeros(subject.layers + 1, dtype=np.int64)
    for item in subject.peers:
        if item.serving and item.span.first < subject.layers:
            steps[item.span.first] += 1
            steps[min(item.span.end, subject.layers)] -= 1
    return np.cumsum(steps)[:-1]


def _coverage(subject: Subject, box: Box, scale: float) -> list[str]:
    """The number of serving peers over the layers, as steps."""
    held = coverage(subject)
    most = int(held.max())
    if not most:
        return []
    changes = [0, *(np.flatnonzero(np.diff(held)) + 1).tolist()]
    path = f"M{number(box.x)},{number(box.bottom)}"
    for layer in changes:
        height = box.bottom - int(held[layer]) / most * (box.h - 14)
        path += f"H{number(box.x + layer * scale)}V{number(height)}"
    path += f"H{number(box.right)}V{number(box.bottom)}Z"
    words = f"how many serve each layer, up to {most:,}"
    return [
        element("path", d=path, class_="region line-line rim"),
        text((box.x, box.y + 8), words, "tiny mute"),
    ]


def _holes(subject: Subject, box: Box, scale: float) -> list[str]:
    parts = []
    room = Box(box.x, box.y - 21, box.w, 20)
    labels = Labels(room)
    for span in holes(subject):
        x, w = box.x + span.first * scale, len(span) * scale
        words = f"no peer: {layers_text(span)}"
        parts.append(
            element(
                "rect",
                tip=words,
                x=x,
                y=box.y - 4,
                width=max(w, 2),
                height=box.h + 14 + CHART,
                fill_opacity=0.3,
                class_="hole hole-line rim",
            )
        )
        wide = width(words, 12) + 4
        starts = (x + w / 2 - wide / 2, x, x + w - wide, box.x, box.right - wide)
        within = [Box(start, room.y, wide, room.h) for start in starts]
        place = labels.place(within, most=1.0)
        if place is not None:
            parts.append(text((place.x + 2, place.y + 13), words, "strong hole"))
    return parts
