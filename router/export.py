"""A snapshot in other people's forms: a networkx graph, plain values for JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hexswarm.records import Announcement, PeerId

if TYPE_CHECKING:
    from hexswarm.router.network import Snapshot


def graph(view: Snapshot) -> Any:
    """A `networkx.DiGraph`: peers with their announcements, and the ways that somebody has
    measured, in both directions."""
    # Here and not above: networkx takes 0.3 s to import, and no request needs it.
    import networkx

    result = networkx.DiGraph(taken_s=view.taken_s)
    for item in view.announcements:
        result.add_node(item.peer, **_facts(item))
    for a, b in view.measured_pairs():
        for one, other in ((a, b), (b, a)):
            link, origin = view.known_link(one, other)
            result.add_edge(one, other, **asdict(link), origin=origin)
    return result


def plain(view: Snapshot) -> dict[str, Any]:
    """The same as plain values, ready for `json.dumps`; unlimited bandwidth is None."""
    return {
        "taken_s": view.taken_s,
        "peers": [{"peer": item.peer, **_facts(item)} for item in view.announcements],
        "links": [_way(view, a, b) for a, b in view.measured_pairs()],
    }


def _way(view: Snapshot, a: PeerId, b: PeerId) -> dict[str, Any]:
    link, origin = view.known_link(a, b)
    speeds = (link.bytes_per_s, view.link(b, a).bytes_per_s)
    there, back = (speed if math.isfinite(speed) else None for speed in speeds)
    return {
        "a": a,
        "b": b,
        "rtt_s": link.rtt_s,
        "jitter_s": link.jitter_s,
        "bytes_per_s": there,
        "back_bytes_per_s": back,
        "relayed": link.relayed,
        "origin": origin,
    }


def _facts(item: Announcement) -> dict[str, Any]:
    """One announcement as plain values, without the peer id."""
    facts = asdict(item)
    del facts["peer"]
    facts["span"] = [item.span.first, item.span.end]
    facts["addresses"] = list(item.addresses)
    facts["neighbours"] = [[peer, rtt_s] for peer, rtt_s in item.neighbours]
    facts["serving"] = item.serving
    return facts
