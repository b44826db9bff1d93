"""The network as one client sees it at one moment: who serves which layers, and how far apart.

A `Snapshot` is immutable: a route that was computed on it can be explained and computed again
later, and the directory may go on learning while a request is planned. Three sources tell the
length of the way between two peers, in this order of trust:

1. *measured* by this client, from its own traffic;
2. *announced* by either end. Where both ends announce it, the larger figure counts: a peer that
   understates its distance to attract traffic needs the other end to lie with it;
3. *assumed*, if nobody knows: `SAME_HOST_RTT_S` for two peers at one IP address, else
   `UNKNOWN_RTT_S`. The second is deliberately long, so that a known way wins over an unknown one.

Links are symmetric: what is measured is a round trip, and nothing tells its halves apart.
Rejected: one networkx graph as the working form (a dict per edge, 90,000 edges at 300 peers); the
hot path reads matrices (`Snapshot.distances`) and the graph is made for those who want to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hexswarm.errors import UsageError
from hexswarm.records import Announcement, Link, PeerId, Span, uncovered

UNKNOWN_RTT_S = 0.1
"""Round trip, seconds, if nobody knows it: light needs at least 5 ms per 1,000 km of fibre one
way, so this is the floor for 10,000 km, the usual distance between two continents."""

SAME_HOST_RTT_S = 0.0005
"""Round trip, seconds, between two peers at one IP address (one machine, or one router in front
of both): Ethernet and its switches need 0.1-0.5 ms."""

Origin = Literal["measured", "announced", "assumed"]
Pair = tuple[PeerId, PeerId]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An immutable view of all announcements and links; made by `snapshot`."""

    announcements: tuple[Announcement, ...]
    """At most one for a peer and model, in order of (peer, model)."""
    links: Mapping[Pair, Link]
    """Measured by this client, the pair in alphabetical order."""
    taken_s: float
    announced: Mapping[Pair, Link] = field(init=False, repr=False, compare=False)
    """Told by the peers, the pair in alphabetical order."""
    _hosts: Mapping[PeerId, frozenset[str]] = field(init=False, repr=False, compare=False)
    _index: Mapping[tuple[str, PeerId], Announcement] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "announced", MappingProxyType(_announced(self.announcements)))
        hosts = {item.peer: _hosts(item.addresses) for item in self.announcements}
        object.__setattr__(self, "_hosts", MappingProxyType(hosts))
        index = {(item.model, item.peer): item for item in self.announcements}
        object.__setattr__(self, "_index", MappingProxyType(index))

    def of_model(self, model: str) -> tuple[Announcement, ...]:
        """All announcements of the model, serving or not, by peer id."""
        return tuple(item for item in self.announcements if item.model == model)

    def serving(self, model: str) -> tuple[Announcement, ...]:
        """The announcements of peers that accept sessions for the model, by peer id."""
        return tuple(item for item in self.of_model(model) if item.serving)

    def announcement(self, model: str, peer: PeerId) -> Announcement:
        """What `peer` says of `model`; UsageError if it says nothing."""
        found = self._index.get((model, peer))
        if found is None:
            raise UsageError(f"peer {peer[-8:]} announces nothing for model {model[:12]}")
        return found

    def coverage(self, model: str) -> tuple[int, ...]:
        """For each layer of the model, how many serving peers hold it; empty if unknown."""
        layers = max((item.layers for item in self.of_model(model)), default=0)
        steps = np.zeros(layers + 1, dtype=np.int64)
        for item in self.serving(model):
            steps[item.span.first] += 1
            steps[item.span.end] -= 1
        return tuple(int(count) for count in np.cumsum(steps)[:layers])

    def missing(self, model: str, layers: int) -> list[Span]:
        """The runs of layers that no serving peer holds."""
        return uncovered((item.span for item in self.serving(model)), layers)

    def link(self, a: PeerId, b: PeerId) -> Link:
        """The best knowledge of the way between two peers, or a client and a peer."""
        return self.known_link(a, b)[0]

    def known_link(self, a: PeerId, b: PeerId) -> tuple[Link, Origin]:
        """`link` and where the knowledge comes from."""
        if a == b:
            return Link(0.0), "assumed"
        pair = _pair(a, b)
        if pair in self.links:
            return self.links[pair], "measured"
        if pair in self.announced:
            return self.announced[pair], "announced"
        if not self._hosts.get(a, frozenset()).isdisjoint(self._hosts.get(b, frozenset())):
            return Link(SAME_HOST_RTT_S), "assumed"
        return Link(UNKNOWN_RTT_S), "assumed"

    def distances(self, peers: Sequence[PeerId]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`link` for all pairs at once: one-way seconds, and seconds per byte."""
        row = {peer: index for index, peer in enumerate(peers)}
        rtt_s = np.full((len(peers), len(peers)), UNKNOWN_RTT_S)
        per_byte = np.zeros_like(rtt_s)
        shared: dict[str, list[int]] = {}
        for peer, index in row.items():
            for host in self._hosts.get(peer, ()):
                shared.setdefault(host, []).append(index)
        for together in shared.values():
            rtt_s[np.ix_(together, together)] = SAME_HOST_RTT_S
        for source in (self.announced, self.links):
            for (a, b), link in source.items():
                i, j = row.get(a), row.get(b)
                if i is not None and j is not None:
                    rtt_s[i, j] = rtt_s[j, i] = link.rtt_s
                    per_byte[i, j] = per_byte[j, i] = 1 / link.bytes_per_s
        np.fill_diagonal(rtt_s, 0.0)
        np.fill_diagonal(per_byte, 0.0)
        return rtt_s / 2, per_byte

    def to_networkx(self) -> Any:
        """A `networkx.DiGraph`: peers with their announcements, known links in both directions."""
        # Here and not above: networkx takes 0.3 s to import, and no request needs it.
        import networkx

        graph = networkx.DiGraph(taken_s=self.taken_s)
        for item in self.announcements:
            graph.add_node(item.peer, **_facts(item))
        for a, b in sorted({*self.announced, *self.links}):
            link, origin = self.known_link(a, b)
            for one, other in ((a, b), (b, a)):
                graph.add_edge(
                    one, other, rtt_s=link.rtt_s, bytes_per_s=link.bytes_per_s, origin=origin
                )
        return graph

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, ready for `json.dumps`; unlimited bandwidth is None."""
        links = []
        for a, b in sorted({*self.announced, *self.links}):
            link, origin = self.known_link(a, b)
            speed = link.bytes_per_s if math.isfinite(link.bytes_per_s) else None
            links.append(
                {"a": a, "b": b, "rtt_s": link.rtt_s, "bytes_per_s": speed, "origin": origin}
            )
        return {
            "taken_s": self.taken_s,
            "peers": [{"peer": item.peer, **_facts(item)} for item in self.announcements],
            "links": links,
        }


def snapshot(
    announcements: Iterable[Announcement], links: Mapping[Pair, Link], now: float
) -> Snapshot:
    """Freeze what is known `now`; of several words of one peer on one model the last one counts.

    `links` are the client's own measurements, the client's id being one end of most of them.
    """
    latest: dict[tuple[PeerId, str], Announcement] = {}
    for item in announcements:
        key = (item.peer, item.model)
        if key not in latest or _age(item) > _age(latest[key]):
            latest[key] = item
    measured: dict[Pair, Link] = {}
    for (a, b), link in sorted(links.items(), key=lambda entry: entry[0]):
        pair = _pair(a, b)
        # Both directions were measured: the longer one, whichever was entered first.
        if pair not in measured or link.rtt_s > measured[pair].rtt_s:
            measured[pair] = link
    return Snapshot(tuple(latest[key] for key in sorted(latest)), MappingProxyType(measured), now)


def _age(item: Announcement) -> tuple[Any, ...]:
    return item.sequence, item.issued_s, repr(item)


def _pair(a: PeerId, b: PeerId) -> Pair:
    return (a, b) if a < b else (b, a)


def _announced(announcements: Iterable[Announcement]) -> dict[Pair, Link]:
    told: dict[Pair, Link] = {}
    for item in announcements:
        for other, rtt_s in item.neighbours:
            if other == item.peer or not (math.isfinite(rtt_s) and rtt_s >= 0):
                continue
            pair = _pair(item.peer, other)
            if pair not in told or rtt_s > told[pair].rtt_s:
                told[pair] = Link(rtt_s)
    return told


def _hosts(addresses: Iterable[str]) -> frozenset[str]:
    """The IP addresses at which a peer itself listens: those of relays are not its own."""
    hosts = set()
    for address in addresses:
        parts = address.split("/")
        if len(parts) > 2 and parts[1] in ("ip4", "ip6") and "p2p-circuit" not in parts:
            hosts.add(parts[2])
    return frozenset(hosts)


def _facts(item: Announcement) -> dict[str, Any]:
    """One announcement as plain values, without the peer id."""
    facts = asdict(item)
    del facts["peer"]
    facts["span"] = [item.span.first, item.span.end]
    facts["addresses"] = list(item.addresses)
    facts["neighbours"] = [[peer, rtt_s] for peer, rtt_s in item.neighbours]
    facts["serving"] = item.serving
    return facts
