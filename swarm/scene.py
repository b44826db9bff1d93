"""The map as it is laid out: a place for everybody, before anything is drawn.

`lay_out` turns a swarm into places in pixels. Whom it draws is bounded whatever the swarm: of more
than `DOTS` peers each region sends a share, and those of the route always come.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from hexswarm.layout import Array, Box, Curve, Point, View, apart, regions, turning, view
from hexswarm.paint import Subject
from hexswarm.records import Announcement, Coordinates, PeerId
from hexswarm.router.network import Snapshot

WIDTH = 1200.0
MARGIN = 24.0
HEADER = 74.0
SIDE = 180.0
"""Pixels at the right of the map for peers without coordinates."""

DOTS = 400
"""Most peers drawn on the map, the route's aside."""
LOOSE = 40
"""Most peers drawn without coordinates."""
NAMED_LOOSE = 7
"""Up to so many of them bear their names."""

Places = dict[PeerId, Point]


@dataclass(slots=True)
class Scene:
    """The map as it is laid out, before it is drawn."""

    subject: Subject
    snapshot: Snapshot
    panel: Box
    view: View
    at: Places = field(default_factory=dict)
    radius: dict[PeerId, float] = field(default_factory=dict)
    beyond: set[PeerId] = field(default_factory=set)
    """Whose coordinates lie outside the picture."""
    more: int = 0
    """Peers with coordinates for which there is no room."""
    loose: list[Announcement] = field(default_factory=list)
    """Drawn without coordinates."""
    loose_more: int = 0
    side: Box | None = None
    """The part of the panel for peers without coordinates, if others have some."""
    groups: list[list[Announcement]] = field(default_factory=list)
    """Regions of two peers or more, the largest first."""
    client: Point | None = None
    client_beyond: bool = False

    @property
    def drawn(self) -> list[Announcement]:
        return [item for item in self.subject.peers if item.peer in self.at]


def lay_out(subject: Subject, snapshot: Snapshot, client: Coordinates | None) -> Scene:
    placed = [item for item in subject.peers if item.coordinates is not None]
    loose = [item for item in subject.peers if item.coordinates is None]
    whole = Box(MARGIN, HEADER, WIDTH - 2 * MARGIN, 320 if placed else 240)
    wide = whole.w - (SIDE if loose and placed else 0)
    positions = _positions(item.coordinates for item in [*placed])
    everybody = np.concatenate([positions, _positions([client] if client else [])])
    inner = Box(whole.x + 90, whole.y + 62, wide - 180, 430)
    seen = view(everybody, inner)
    if placed:
        used = _extent(seen, everybody)
        inner = Box(inner.x, inner.y, inner.w, min(430.0, max(210.0, used)))
        seen = view(everybody, inner)
        whole = Box(whole.x, whole.y, whole.w, inner.h + 62 + 78)
    scene = Scene(subject, snapshot, whole, seen)
    found = regions(positions)
    chosen = _chosen(subject, placed, found)
    scene.more = len(placed) - len(chosen)
    _place(scene, [placed[index] for index in chosen], client)
    scene.groups = [[placed[i] for i in members] for members in found if len(members) > 1]
    if loose and placed:
        scene.side = Box(whole.x + wide, whole.y, SIDE, whole.h)
    _place_loose(scene, loose, scene.side or whole)
    return scene


def _positions(coordinates: Iterable[Coordinates | None]) -> Array:
    rows = [item.position_s for item in coordinates if item is not None]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _extent(seen: View, positions: Array) -> float:
    """How much of the height of the view is used."""
    _, beyond = seen.pixels(positions)
    y = seen.pixels(positions)[0][~beyond, 1]
    return float(y.max() - y.min()) if len(y) else 0.0


def _chosen(
    subject: Subject, placed: Sequence[Announcement], found: Sequence[Sequence[int]]
) -> list[int]:
    """Whom to draw: everybody, or of each region as many as is fair; always those of the route."""
    if len(placed) <= DOTS:
        return list(range(len(placed)))
    chosen = {i for i, item in enumerate(placed) if item.peer in subject.stage_of}
    for members in found[: DOTS // 4]:
        share = max(1, DOTS * 3 // 4 * len(members) // len(placed))
        chosen.update(members[k * len(members) // share] for k in range(share))
    return sorted(chosen)


def _place(scene: Scene, peers: Sequence[Announcement], client: Coordinates | None) -> None:
    """Places for peers and client, moved apart until none hides another."""
    crowd = min(1.0, math.sqrt(80 / max(len(peers), 1)))
    radii = [_radius(item, scene.subject, crowd) for item in peers]
    own = [client] if client else []
    positions = np.concatenate([_positions(item.coordinates for item in peers), _positions(own)])
    pixels, beyond = scene.view.pixels(positions)
    room = Box(
        scene.view.box.x - 50, scene.view.box.y - 24, scene.view.box.w + 100, scene.view.box.h + 48
    )
    moved = apart(pixels, np.array([*radii, *(9.0 for _ in own)]), room, gap=2 + 4 * crowd)
    points = [(float(x), float(y)) for x, y in moved]
    for item, radius, point, is_far in zip(peers, radii, points, beyond, strict=False):
        scene.at[item.peer], scene.radius[item.peer] = point, radius
        if is_far:
            scene.beyond.add(item.peer)
    if client:
        scene.client, scene.client_beyond = points[-1], bool(beyond[-1])


def _radius(item: Announcement, subject: Subject, crowd: float) -> float:
    """Of its dot: the area grows with the layers held."""
    radius = 4 + 7 * math.sqrt(min(1.0, len(item.span) / subject.layers))
    if item.peer in subject.stage_of:
        return max(7.0, radius * crowd)
    return max(2.5, radius * crowd)


def _place_loose(scene: Scene, peers: Sequence[Announcement], box: Box) -> None:
    """Peers without coordinates in rows, those of the route first."""
    ordered = sorted(peers, key=lambda item: (item.peer not in scene.subject.stage_of, item.peer))
    on_route = sum(item.peer in scene.subject.stage_of for item in peers)
    count = max(LOOSE, on_route)
    scene.loose, scene.loose_more = ordered[:count], max(0, len(ordered) - count)
    named = len(scene.loose) <= NAMED_LOOSE
    columns = 1 if named else max(1, int((box.w - 40) // 34))
    rows = -(-len(scene.loose) // columns)
    pitch = min(40.0, (box.h - 90) / max(rows, 1))
    for index, item in enumerate(scene.loose):
        row, column = divmod(index, columns)
        scene.at[item.peer] = (box.x + 34 + column * 34, box.y + 62 + row * pitch)
        scene.radius[item.peer] = min(_radius(item, scene.subject, 0.8), max(2.5, pitch / 2 - 2))


def ring(scene: Scene) -> list[Curve]:
    """One curve for each way of the ring, from the head on; none for a single stage."""
    stages = scene.subject.route.stages if scene.subject.route else ()
    peers = [stage.peer for stage in stages if stage.peer in scene.at]
    if len(peers) < 2 or len(peers) < len(stages):
        return []
    # Every way bulges out of the ring, so that the ring encloses an area even if it is thin.
    side = turning([scene.at[peer] for peer in peers])
    return [
        Curve.between(scene.at[a], scene.at[b], scene.radius[a] + 4, scene.radius[b] + 5, side)
        for a, b in zip(peers, [*peers[1:], peers[0]], strict=True)
    ]


def inner_rtt(scene: Scene, members: Sequence[Announcement]) -> float:
    """The median round trip between peers of a region: as known, else by coordinates."""
    step = max(1, len(members) // 16)
    trips = []
    for a, b in combinations(members[::step][:16], 2):
        link, origin = scene.snapshot.known_link(a.peer, b.peer)
        known = origin in ("measured", "announced")
        trips.append(link.rtt_s if known else _estimate(a.coordinates, b.coordinates))
    return float(np.median(trips))


def _estimate(a: Coordinates | None, b: Coordinates | None) -> float:
    if a is None or b is None:
        return math.inf
    return math.dist(a.position_s, b.position_s) + a.height_s + b.height_s


def stem_length(item: Announcement) -> float:
    """Pixels: grows with the square root, so that fibre and satellite are both seen."""
    height = item.coordinates.height_s if item.coordinates else 0.0
    return min(24.0, 3.2 * math.sqrt(height * 1e3))
