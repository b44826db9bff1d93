"""A plan as a picture: regions, spans over the layer axis, and the flow from span to span.

Across runs the layer axis. Each region is a band with its units in lanes: a bar over the layers
that a unit holds, in the colour of its kind of GPU, filled as far as its capacity is used. With
partial entry a token changes units at one layer boundary, so every hop stands upright over its
boundary, as wide as the tokens that it carries. So that hops do not hide bars, the axis is pulled
apart at each boundary where something is handed over: an *aisle*. Prompts come in from the left
edge and leave at the right one. What binds has a red rim: it is in a narrowest cut.

The picture stays bounded: above `NAMED` units bars have no names, above `DRAWN` only those that
carry most are drawn, and it says how many are not. The same plan gives the same bytes.

Rejected: units at places of a map (a plan is about layers; a hop over the ocean shows as one
between bands); bars as high as their capacity (T(k) differs by a factor of a hundred).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hexswarm.layout import Box, Point, lanes
from hexswarm.paint import counted, layers_text, stage_class, style
from hexswarm.plan_facts import Facts, expected_text, gpus, name, what_binds
from hexswarm.records import Span
from hexswarm.router.placement.flow import Edge
from hexswarm.router.placement.worth import lines
from hexswarm.svg import document, element, fit, harmless, line, number, text, width

WIDTH, MARGIN, TOP = 1200.0, 24.0, 150.0
SIDE = 96.0
"""Left of the axis: names of regions; and the edges where prompts enter and tokens leave."""
NAMED, DRAWN = 80, 400
AISLE, AISLES = 26.0, 0.45
"""Widest aisle in pixels; most of the axis that all of them take."""
THICK, THIN = 13.0, 0.7
"""Width of a hop that carries the whole flow; the least of any."""
HOPS = 1500

_EXTRA = (
    ".hop{fill:none;stroke-opacity:.45;stroke-linecap:butt}.hop.hole-line{stroke-opacity:.8}"
    ".spare{fill-opacity:.3}.binds{stroke-width:2.6}"
)


@dataclass(frozen=True, slots=True)
class Axis:
    """Where layers are across the paper."""

    left: float
    scale: float
    aisle: float
    boundaries: tuple[int, ...]
    """At which something is handed over, in order."""

    def starts(self, layer: int) -> float:
        """Left edge of a span that begins at this layer: right of the boundary's aisle."""
        return self.ends(layer) + (self.aisle if layer in self.boundaries else 0.0)

    def ends(self, layer: int) -> float:
        """Right edge of a span that ends before this layer."""
        before = sum(boundary < layer for boundary in self.boundaries)
        return self.left + layer * self.scale + before * self.aisle


@dataclass(frozen=True, slots=True)
class Band:
    """One region."""

    region: str
    box: Box
    idle: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """Everything in its place."""

    facts: Facts
    axis: Axis
    bands: tuple[Band, ...]
    bars: dict[int, Box]
    kinds: tuple[str, ...]
    """Kinds of GPU, the most frequent first."""
    hidden: int
    """Units that hold something and are not drawn."""

    @property
    def bottom(self) -> float:
        return self.bands[-1].box.bottom if self.bands else TOP


def plan_map(facts: Facts) -> str:
    """An SVG file that needs nothing else."""
    sheet = lay_out(facts)
    height = sheet.bottom + 86
    parts = [
        element("rect", width=WIDTH, height=height, class_="paper"),
        *_header(facts),
        *_bands(sheet),
        *_ticks(sheet),
        *_hops(sheet),
        *(_bar(sheet, unit, box) for unit, box in sheet.bars.items()),
        *_legend(sheet),
    ]
    title = f"A plan for {harmless(facts.model.name)} on {harmless(facts.cluster.name)}"
    said = f"Flow {facts.flow:,.1f} tokens/s, {facts.ratio:.0%} of the bound. "
    said += f"Binds: {what_binds(facts)}."
    return document((WIDTH, height), title, said, style() + _EXTRA, parts)


def lay_out(facts: Facts) -> Sheet:
    """A place for every unit."""
    held = [unit for unit, span in enumerate(facts.plan.spans) if span]
    held.sort(key=lambda unit: (-facts.uses[unit].carried, unit))
    drawn = sorted(held[:DRAWN], key=lambda unit: (_span(facts, unit), unit))
    axis = _axis(facts)
    region_of = {node.id: node.region for node in facts.cluster.nodes}
    pitch = 27.0 if len(drawn) <= NAMED else 12.0
    bands, bars, top = [], {}, TOP
    for region in dict.fromkeys(region_of.values()):
        mine = [unit for unit in drawn if region_of[facts.plan.units[unit].node] == region]
        idle = tuple(
            unit
            for unit, span in enumerate(facts.plan.spans)
            if span is None and region_of[facts.plan.units[unit].node] == region
        )
        rows = _rows(facts, mine)
        for unit, row in zip(mine, rows, strict=True):
            span = _span(facts, unit)
            x, right = axis.starts(span.first), axis.ends(span.end)
            bars[unit] = Box(x, top + 10 + row * pitch, max(right - x, 1.5), pitch - 7)
        count = max(rows, default=-1) + 1
        size = max(34.0, 13 + count * pitch + (16 if idle else 0))
        bands.append(Band(region, Box(MARGIN, top, WIDTH - 2 * MARGIN, size), idle))
        top += size + 10
    kinds = Counter(_kind(facts, unit) for unit in range(len(facts.plan.units)))
    order = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    return Sheet(facts, axis, tuple(bands), bars, tuple(order), len(held) - len(drawn))


def _rows(facts: Facts, units: Sequence[int]) -> list[int]:
    """The lane of each unit: pipelines that share nothing have lanes of their own."""
    row: dict[int, int] = {}
    for together in lines(facts.plan):
        mine = [unit for unit in units if unit in together]
        top = max(row.values(), default=-1) + 1
        found = lanes([_span(facts, unit) for unit in mine])
        row |= {unit: top + lane for unit, lane in zip(mine, found, strict=True)}
    return [row[unit] for unit in units]


def _axis(facts: Facts) -> Axis:
    ends = {_span(facts, edge.sender).end for edge in facts.edges if edge.sender is not None}
    inner = tuple(sorted(ends - {facts.model.layers}))
    left, right = MARGIN + SIDE + AISLE, WIDTH - MARGIN - 2 * AISLE
    aisle = min(AISLE, AISLES * (right - left) / max(len(inner), 1))
    scale = (right - left - aisle * len(inner)) / facts.model.layers
    return Axis(left, scale, aisle, inner)


def _span(facts: Facts, unit: int) -> Span:
    span = facts.plan.spans[unit]
    assert span is not None
    return span


def _kind(facts: Facts, unit: int) -> str:
    node = facts.cluster.node(facts.plan.units[unit].node)
    return facts.cluster.types[node.type].gpu


# --- drawing ------------------------------------------------------------------------------------


def _header(facts: Facts) -> list[str]:
    promise = f"{facts.flow:,.1f} tokens/s"
    terms = f"{facts.ratio:.1%} of the bound, {facts.bound:,.1f} tokens/s"
    idle = sum(span is None for span in facts.plan.spans)
    title = f"{facts.model.name} on {facts.cluster.name}"
    room = WIDTH - 2 * MARGIN
    about = f"{counted(len(facts.plan.units), 'unit')}, {idle:,} idle"
    if facts.plan.pipelines:
        about += f" · {counted(len(facts.plan.pipelines), 'pipeline')} that share nothing"
    about += f" · {facts.model.layers} layers"
    binds = f"binds: {what_binds(facts)}"
    return [
        text((MARGIN, 36), fit(harmless(title), 23, room - width(promise, 16) - 30), "big ink"),
        text((MARGIN, 58), about, "mute"),
        text((WIDTH - MARGIN, 36), promise, "mid ink", "end"),
        text((WIDTH - MARGIN, 58), terms, "mute", "end"),
        text((MARGIN, 80), fit(expected_text(facts), 12, room), "ink"),
        text((MARGIN, 100), fit(binds, 12, room), "strong hole"),
    ]


def _bands(sheet: Sheet) -> list[str]:
    parts = []
    for band in sheet.bands:
        box = band.box
        parts.append(
            element("rect", x=box.x, y=box.y, width=box.w, height=box.h, rx=10, class_="panel")
        )
        place = harmless(band.region or "one place", 40)
        parts.append(text((box.x + 10, box.y + 22), fit(place, 13, SIDE - 12), "strong ink"))
        if band.idle:
            names = ", ".join(name(sheet.facts, unit) for unit in band.idle)
            words = fit(f"idle: {names}", 11, box.w - SIDE - 20)
            parts.append(text((box.x + SIDE, box.bottom - 7), words, "small mute"))
    return parts


def _ticks(sheet: Sheet) -> list[str]:
    """Numbers over the axis; where there is an aisle, in its middle."""
    axis, layers = sheet.axis, sheet.facts.model.layers
    parts = []
    wanted = {0, layers, *axis.boundaries, *range(0, layers, max(1, layers // 10))}
    inner = sorted(wanted - {0, layers}, key=lambda layer: (layer not in axis.boundaries, layer))
    taken: list[float] = []
    for layer in [0, layers, *inner]:
        x = (axis.ends(layer) + axis.starts(layer)) / 2
        if all(abs(x - other) >= 22 for other in taken):
            taken.append(x)
            parts.append(text((x, TOP - 10), str(layer), "small mute", "middle"))
            parts.append(line(x, TOP - 6, x, sheet.bottom, "line-line rim"))
    parts.append(text((MARGIN, TOP - 10), "layers", "small mute"))
    return parts


def _hops(sheet: Sheet) -> list[str]:
    """Thin ones last, so that they are seen."""
    edges = sorted(sheet.facts.edges, key=lambda edge: -edge.tokens_per_s)[:HOPS]
    return [_hop(sheet, edge) for edge in edges if _both_drawn(sheet, edge)]


def _both_drawn(sheet: Sheet, edge: Edge) -> bool:
    return all(unit is None or unit in sheet.bars for unit in (edge.sender, edge.receiver))


def _hop(sheet: Sheet, edge: Edge) -> str:
    facts, bars, axis = sheet.facts, sheet.bars, sheet.axis
    if edge.sender is None:
        assert edge.receiver is not None
        end = _middle(bars[edge.receiver])
        start: Point = (axis.left - AISLE, end[1])
        end = (axis.starts(0), end[1])
    elif edge.receiver is None:
        box = bars[edge.sender]
        start = (box.right, _middle(box)[1])
        end = (box.right + AISLE, start[1])
    else:
        box = bars[edge.sender]
        start = (box.right, _middle(box)[1])
        end = (axis.starts(_span(facts, edge.sender).end), _middle(bars[edge.receiver])[1])
    bent = (start[0] + end[0]) / 2
    d = f"M{_at(start)}C{_at((bent, start[1]))} {_at((bent, end[1]))} {_at(end)}"
    binds = (edge.sender, edge.receiver) in facts.binding.all_links
    return element(
        "path",
        tip=f"{name(facts, edge.sender)} to {name(facts, edge.receiver)}: "
        f"{edge.tokens_per_s:,.1f} of {edge.capacity:,.0f} tokens/s",
        d=d,
        stroke_width=max(THIN, THICK * edge.tokens_per_s / max(facts.flow, 1e-9)),
        class_=f"hop {'hole-line' if binds else 'mute-line'}",
    )


def _middle(box: Box) -> Point:
    return box.x + box.w / 2, box.y + box.h / 2


def _at(point: Point) -> str:
    return f"{number(point[0])},{number(point[1])}"


def _bar(sheet: Sheet, unit: int, box: Box) -> str:
    """Pale as wide as the span, and as much of it in full colour as is used."""
    facts = sheet.facts
    use = facts.uses[unit]
    share = min(1.0, use.carried / use.capacity) if use.capacity else 0.0
    colour = stage_class(sheet.kinds.index(_kind(facts, unit)))
    binds = unit in facts.binding.all_units
    place: dict[str, Any] = {"x": box.x, "y": box.y, "height": box.h, "rx": min(3.0, box.w / 3)}
    used: dict[str, Any] = {"x": box.x, "y": box.bottom - 4, "height": 4.0}
    words = f"{name(facts, unit)} · {use.carried:,.0f}/s"
    body = [
        element("rect", **place, width=box.w, class_="paper"),
        element("rect", **place, width=box.w, class_=f"{colour} spare"),
        element("rect", **used, width=box.w * share, class_=colour),
        element(
            "rect",
            **place,
            width=box.w,
            fill="none",
            class_="hole-line binds" if binds else f"{colour}-line rim",
        ),
    ]
    if box.h > 12 and len(sheet.bars) <= NAMED:
        said = words if width(words, 11) <= box.w - 6 else name(facts, unit)
        room = box.w + 0.6 * sheet.axis.aisle  # into the aisles: better than no name
        body.append(text((_middle(box)[0], box.y + 12), fit(said, 10, room), "tiny ink", "middle"))
    tip = (
        f"{name(facts, unit)}, {gpus(facts, facts.plan.units[unit])}: "
        f"{layers_text(_span(facts, unit))}, {use.carried:,.1f} of {use.capacity:,.1f} tokens/s"
        + (", binds" if binds else "")
    )
    return element("g", *body, tip=tip, class_="unit")


def _legend(sheet: Sheet) -> list[str]:
    x, y = MARGIN, sheet.bottom + 28
    parts: list[str] = []

    def item(mark: Sequence[str], wide: float, words: str) -> None:
        nonlocal x, y
        parts.extend(mark)
        parts.append(text((x + wide, y + 4), words, "small mute"))
        x += wide + width(words, 11) + 18
        if x > WIDTH - 260:
            x, y = MARGIN, y + 20

    for index, kind in enumerate(sheet.kinds):
        mark = element("rect", x=x, y=y - 6, width=16, height=12, class_=stage_class(index))
        item([mark], 22, harmless(kind, 24))
    item([line(x, y, x + 22, y, "hop mute-line arrow")], 28, "hop, as wide as its flow")
    rim = element("rect", x=x, y=y - 6, width=16, height=12, fill="none", class_="hole-line binds")
    item([rim], 22, "binds")
    item([], 0, "foot of a bar: share of its capacity in use")
    if sheet.hidden:
        item([], 0, f"{counted(sheet.hidden, 'unit')} not drawn")
    return parts
