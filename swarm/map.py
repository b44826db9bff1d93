"""The swarm as a picture: where its peers are in the delay space, and who holds which layers.

`swarm_map` makes one SVG file that needs nothing else: no scripts, fonts or images. Above, the map:
each peer at a flat projection of its network coordinates, so that distance on paper is round-trip
time; the ring of a route with the time of each way. Below, the layer axis (`hexswarm.axis`).

A map must show what cannot be shown: peers of one region are nearer to one another than a dot is
wide, so dots are moved apart until each can be seen; a swarm of 10,000 is drawn as a few hundred,
region by region, and says how many more there are; peers without coordinates stand in a row of
their own; those who claim to be farther away than Earth is large stand at the edge. Peers of the
route are always drawn. The same input gives the same bytes.

Rejected: drawing known links (at 8 neighbours a peer they hide everything else); a force layout of
round trips (it looks well and its distances mean nothing); a plotting library (a dependency of
50 MB for circles and lines).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hexswarm.axis import layer_axis
from hexswarm.caption import description, header, legend, model_name
from hexswarm.layout import Box, Curve, Labels, Point, bounds, hull, nice
from hexswarm.paint import (
    Subject,
    counted,
    layers_text,
    letters_on,
    load_class,
    short,
    stage_class,
    style,
    tip,
)
from hexswarm.records import Announcement, Coordinates, Route
from hexswarm.router.network import Snapshot
from hexswarm.scene import MARGIN, NAMED_LOOSE, WIDTH, Scene, inner_rtt, lay_out, ring, stem_length
from hexswarm.svg import (
    document,
    element,
    fit,
    harmless,
    line,
    milliseconds,
    path,
    text,
    width,
)

NAMED_REGIONS = 12


def swarm_map(
    snapshot: Snapshot,
    model: str,
    layers: int,
    route: Route | None = None,
    client: Coordinates | None = None,
) -> str:
    """An SVG of the peers that announce `model` (a digest), and of `route` through them."""
    subject = Subject(snapshot.of_model(model), layers, route)
    scene = lay_out(subject, snapshot, client)
    axis = layer_axis(subject, MARGIN, scene.panel.bottom + 64, WIDTH - 2 * MARGIN)
    height = scene.panel.bottom + 64 + axis.height + MARGIN
    name = model_name(subject.peers)
    parts = [
        element("rect", width=WIDTH, height=height, class_="paper"),
        *header(subject, name, model),
        *_map(scene),
        *legend(scene),
        *axis.parts,
    ]
    title = f"The swarm of {name}" if name else "An empty swarm"
    return document((WIDTH, height), title, description(subject, scene), style(), parts)


# -- drawing the map ---------------------------------------------------------------------------


def _map(scene: Scene) -> list[str]:
    panel = scene.panel
    curves = ring(scene)
    labels = _obstacles(scene, curves)
    scale = _scale_bar(scene, labels)
    side = _side(scene, labels)
    stages = _stage_labels(scene, labels)
    ways = _way_labels(scene, curves, labels)
    client = _client(scene, labels)
    return [
        element("rect", x=panel.x, y=panel.y, width=panel.w, height=panel.h, rx=10, class_="panel"),
        *_hulls(scene),
        *side,
        *_region_labels(scene, labels),
        *_memberships(scene),
        *client[:-2],
        *_stems(scene),
        *(_dot(scene, item) for item in scene.drawn if item.peer not in scene.subject.stage_of),
        *_arrows(scene, curves),
        *(_dot(scene, item) for item in scene.drawn if item.peer in scene.subject.stage_of),
        *client[-2:],
        *scale,
        *stages,
        *ways,
    ] + ([] if scene.subject.peers else [_nobody(panel)])


def _obstacles(scene: Scene, curves: Sequence[Curve]) -> Labels:
    """What labels should not cover: dots with their stems, the ring, the side column."""
    labels = Labels(scene.panel.shrunk(4))
    for item in scene.drawn:
        (x, y), r = scene.at[item.peer], scene.radius[item.peer] + 2
        harm = 3.0 if item.peer in scene.subject.stage_of else 1.0
        labels.block(Box(x - r, y - r, 2 * r, 2 * r), harm)
        stem = stem_length(item)
        labels.block(Box(x - 2, y - r - stem, 4, stem))
    for points in _extents(scene):
        if len(points) > 1:
            labels.block(bounds(points).shrunk(-22), 0.3)
    for curve in curves:
        for x, y in curve.points(9.0):
            labels.block(Box(x - 5, y - 5, 10, 10), 2.0)
    for start, end in _client_ways(scene):
        long = max(1, int(math.dist(start, end) / 12))
        for step in range(long):
            x = start[0] + (end[0] - start[0]) * step / long
            y = start[1] + (end[1] - start[1]) * step / long
            labels.block(Box(x - 4, y - 4, 8, 8), 1.5)
    if scene.side is not None:
        labels.block(scene.side, 0.5)
    return labels


def _nobody(panel: Box) -> str:
    middle = (panel.x + panel.w / 2, panel.y + panel.h / 2)
    return text(middle, "no peer announces this model", "mid mute", "middle")


def _extents(scene: Scene) -> list[list[Point]]:
    """For each region the places of those of it that are drawn within the map."""
    within = scene.at.keys() - scene.beyond
    return [
        [scene.at[item.peer] for item in members if item.peer in within] for members in scene.groups
    ]


def _hulls(scene: Scene) -> list[str]:
    corners = [hull(points) for points in _extents(scene) if len(points) > 1]
    return [
        element("path", d=path(shape, closed=True), class_="region region-line soft")
        for shape in corners
    ]


def _region_labels(scene: Scene, labels: Labels) -> list[str]:
    parts = []
    for members, points in list(zip(scene.groups, _extents(scene), strict=True))[:NAMED_REGIONS]:
        if len(points) < 2:
            continue
        words = f"{counted(len(members), 'peer')} · {milliseconds(inner_rtt(scene, members))} apart"
        hidden = len(members) - len(points)
        more = f"{hidden:,} more than drawn" if hidden else ""
        size = max(width(words, 12), width(more, 11)), 30.0 if more else 16.0
        place = labels.place(_around(points, *size, 25))
        if place is not None:
            parts.append(text((place.x, place.y + 12), words, "mute"))
            parts.append(text((place.x, place.y + 26), more, "small mute") if more else "")
    return parts


def _around(points: Sequence[Point], w: float, h: float, away: float) -> list[Box]:
    """Places for a label below, above, right and left of all points."""
    around = bounds(points)
    left, right, top, bottom = around.x, around.right, around.y, around.bottom
    middle, centre = (left + right) / 2 - w / 2, (top + bottom) / 2 - h / 2
    found = []
    for more in (0.0, 14.0, 30.0):
        gap = away + more
        for shift in (0.0, -0.35, 0.35, -0.6, 0.6):
            found.append(Box(middle + shift * w, bottom + gap, w, h))
            found.append(Box(middle + shift * w, top - gap - h, w, h))
        found.append(Box(right + gap, centre, w, h))
        found.append(Box(left - gap - w, centre, w, h))
    return found


def _memberships(scene: Scene) -> list[str]:
    """Lines from the leader of each tensor-parallel group to its members."""
    members: dict[tuple[str, int], list[Announcement]] = {}
    for item in scene.drawn:
        if item.group is not None and item.group.size > 1:
            members.setdefault((item.group.group, item.group.epoch), []).append(item)
    parts = []
    for together in members.values():
        ranked = sorted(
            together, key=lambda item: (item.group.rank if item.group else 0, item.peer)
        )
        for other in ranked[1:]:
            (ax, ay), (bx, by) = scene.at[ranked[0].peer], scene.at[other.peer]
            parts.append(element("line", x1=ax, y1=ay, x2=bx, y2=by, class_="member mute-line"))
    return parts


def _stems(scene: Scene) -> list[str]:
    parts = []
    for item in scene.drawn:
        length = stem_length(item)
        if length >= 3:
            x, y = scene.at[item.peer]
            top = y - scene.radius[item.peer] - length
            parts.append(element("line", x1=x, y1=y, x2=x, y2=top, class_="stem mute-line"))
    return parts


def _dot(scene: Scene, item: Announcement) -> str:
    (x, y), r = scene.at[item.peer], scene.radius[item.peer]
    stage = scene.subject.stage_of.get(item.peer)
    fill = load_class(item.busy) if item.serving else "panel hollow"
    line = "mute-line rim" if stage is None else f"{stage_class(stage)}-line mine"
    where = ", beyond the map" if item.peer in scene.beyond else ""
    body = [element("circle", cx=x, cy=y, r=r, class_=f"{fill} {line}")]
    if stage is not None and r >= 7 and stage < 99:
        letters = letters_on(fill) if item.serving else "ink"
        body.append(text((x, y + 3.6), str(stage + 1), f"tiny strong {letters}", "middle"))
    return element("g", *body, tip=tip(item) + where, class_="peer")


def _arrows(scene: Scene, curves: Sequence[Curve]) -> list[str]:
    parts = []
    for index, curve in enumerate(curves):
        colour = stage_class(index)
        (ax, ay), (cx, cy), (bx, by) = curve.start, curve.control, curve.end
        guess = " guess" if _way(scene, index)[1] == "unmeasured" else ""
        d = f"{path([(ax, ay)])}Q{path([(cx, cy), (bx, by)])[1:]}"
        parts.append(element("path", d=d, class_=f"arrow{guess} {colour}-line"))
        dx, dy = bx - cx, by - cy
        length = math.hypot(dx, dy) or 1.0
        dx, dy = dx / length, dy / length
        head = [
            (bx + 3 * dx, by + 3 * dy),
            (bx - 8 * dx - 5 * dy, by - 8 * dy + 5 * dx),
            (bx - 8 * dx + 5 * dy, by - 8 * dy - 5 * dx),
        ]
        parts.append(element("path", d=path(head, closed=True), class_=colour))
    return parts


def _way(scene: Scene, index: int) -> tuple[str, str]:
    """What to write on a way of the ring, and where the knowledge is from."""
    route = scene.subject.route
    assert route is not None
    a = route.stages[index].peer
    b = route.stages[(index + 1) % len(route.stages)].peer
    if (a, b) in route.unmeasured or (b, a) in route.unmeasured:
        return "not measured", "unmeasured"
    link, origin = scene.snapshot.known_link(a, b)
    sure = origin in ("measured", "announced")
    return f"{'' if sure else '~'}{milliseconds(link.one_way_s)}", origin


def _way_labels(scene: Scene, curves: Sequence[Curve], labels: Labels) -> list[str]:
    parts = []
    for index, curve in enumerate(curves):
        words, _ = _way(scene, index)
        w, h = width(words, 12), 15.0
        choices = []
        for t in (0.5, 0.42, 0.58, 0.34, 0.66, 0.26, 0.74):
            x, y = curve.at(t)
            nx, ny = curve.normal(t)
            for side in (1, -1):
                reach = side * (8 + abs(nx) * w / 2 + abs(ny) * h / 2)
                choices.append(Box(x + nx * reach - w / 2, y + ny * reach - h / 2, w, h))
        place = labels.place(choices)
        if place is not None:
            at = (place.x + w / 2, place.y + 11.5)
            colour = f"strong halo panel-line {stage_class(index)}"
            parts.append(text(at, words, colour, "middle"))
    return parts


def _stage_labels(scene: Scene, labels: Labels) -> list[str]:
    """Number, layers and device beside each peer of the route."""
    stages = scene.subject.route.stages if scene.subject.route else ()
    known = {item.peer: item for item in scene.drawn}
    parts = []
    for index, stage in enumerate(stages):
        item = known.get(stage.peer)
        if item is None:
            continue
        first = f"{index + 1} · {layers_text(stage.span)}"
        second = "" if len(stages) > 12 else f"{harmless(item.device, 20)} · {short(item.peer)}"
        w = max(width(first, 12), width(second, 11))
        h = 30.0 if second else 15.0
        place = labels.place(_around([scene.at[stage.peer]], w, h, scene.radius[stage.peer] + 6))
        if place is None:
            continue
        halo = "halo panel-line"
        at = (place.x, place.y + 12)
        parts.append(text(at, first, f"strong {halo} {stage_class(index)}"))
        if second:
            parts.append(text((place.x, place.y + 26), second, f"small {halo} ink"))
    return parts


def _client_ways(scene: Scene) -> list[tuple[Point, Point]]:
    """From the client to head and tail."""
    if scene.client is None or scene.subject.route is None:
        return []
    ends = dict.fromkeys((scene.subject.route.head.peer, scene.subject.route.tail.peer))
    return [(scene.client, scene.at[peer]) for peer in ends if peer in scene.at]


def _client(scene: Scene, labels: Labels) -> list[str]:
    """The client's diamond and its name last, before them its ways to head and tail."""
    if scene.client is None:
        return ["", ""]
    x, y = scene.client
    ways = [element("path", d=path(way), class_="way mute-line") for way in _client_ways(scene)]
    diamond = [(x, y - 9), (x + 9, y), (x, y + 9), (x - 9, y)]
    words = "client, beyond the map" if scene.client_beyond else "client"
    labels.block(Box(x - 9, y - 9, 18, 18), 3.0)
    place = labels.place(_around([(x, y)], width(words, 12), 15, 12))
    assert place is not None
    return [
        *ways,
        element("path", d=path(diamond, closed=True), tip="the client", class_="ink"),
        text((place.x, place.y + 12), words, "strong halo panel-line ink"),
    ]


def _scale_bar(scene: Scene, labels: Labels) -> list[str]:
    if not scene.groups and len(scene.at) - len(scene.loose) < 2:
        return []
    seconds = nice(150 / scene.view.pixels_per_s * 1e3) / 1e3
    long = seconds * scene.view.pixels_per_s
    x, y = scene.panel.x + 20, scene.panel.bottom - 18
    words = f"{milliseconds(seconds)} round trip"
    labels.block(Box(x - 4, y - 24, max(long, width(words, 11)) + 8, 36), 9.0)
    line = f"{path([(x, y - 5), (x, y), (x + long, y), (x + long, y - 5)])}"
    return [
        element("path", d=line, fill="none", class_="mute-line stem"),
        text((x, y - 9), words, "small mute"),
    ]


def _side(scene: Scene, labels: Labels) -> list[str]:
    """Heading of the peers without coordinates, and how many more there are."""
    if not scene.loose:
        return []
    x, top, bottom = (scene.side or scene.panel).x + 20, scene.panel.y, scene.panel.bottom
    words = "no coordinates yet"
    labels.block(Box(x - 10, top, width(words, 11) + 10, 40), 9.0)
    parts = [text((x, top + 30), words, "small mute")]
    if scene.side is not None:
        parts.append(line(scene.side.x, top + 16, scene.side.x, bottom - 16, "line-line rim"))
    if len(scene.loose) <= NAMED_LOOSE:
        for item in scene.loose:
            dot_x, dot_y = scene.at[item.peer]
            if item.peer not in scene.subject.stage_of:
                at = (dot_x + scene.radius[item.peer] + 6, dot_y + 4)
                parts.append(
                    text(
                        at,
                        fit(f"{short(item.peer)} · {harmless(item.device, 40)}", 11, 132),
                        "small mute",
                    )
                )
    if scene.loose_more:
        parts.append(text((x, bottom - 14), f"{scene.loose_more:,} more", "small mute"))
    return parts
