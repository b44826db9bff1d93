"""The network as one client sees it at one moment: who serves which layers, and how far apart.

A `Snapshot` is immutable: a route that was computed on it can be explained and computed again
later, and the directory may go on learning while a request is planned. What is known of the way
between two peers, in this order of trust:

1. *measured* by this client, from its own traffic or at its request;
2. *announced* by either end. Where both ends announce it, the larger figure counts: a peer that
   understates its distance to attract traffic needs the other end to lie with it;
3. *estimated* from the network coordinates of both ends (`router.vivaldi`);
4. *unmeasured*: nobody knows. It counts as no time at all, which is a bound and not a guess: the
   search looks at such a way, and the client measures it before it uses it. A guess would either
   hide good peers for ever (too long) or be used unseen (too short).

What is measured is a round trip, and nothing tells its halves apart: one way is half of it, in
both directions. Bandwidth has a direction: what the sender is known to send or the receiver to
receive, whichever is less.

A new word of one peer gives a new snapshot (`updated`) that shares all but one row with the old:
a swarm of 10,000 peers speaks 300 times a second. Rejected: a networkx graph as the working form
(a dict per edge; the graph is made for those who want to look), and a table of all announced pairs
(80,000 entries to rebuild; a pair is found in its two ends' own lists).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hexswarm.errors import UsageError
from hexswarm.records import Announcement, Coordinates, Link, Load, PeerId, Span, uncovered
from hexswarm.router import columns as tables
from hexswarm.router import export, vivaldi, words
from hexswarm.router.columns import LEAST_BYTES_PER_S, Columns
from hexswarm.router.regions import Flags, Floats

JITTER = 0.1
"""How much longer than its median a way that the client did not measure itself is taken to be at
the 95th percentile, as a share of one way. A choice: announcements have no room for the figure,
and a way that is used is measured."""

CACHED = 256
"""The ways between all peers of a model are kept with the snapshot up to so many peers: 1.6 MB."""

Origin = Literal["measured", "announced", "estimated", "unmeasured"]
Pair = tuple[PeerId, PeerId]


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways between k peers as matrices, from row to column; the diagonal is no way at all."""

    rtt_s: Floats
    jitter_s: Floats
    s_per_byte: Floats
    known: Flags
    """Measured, announced or estimated; elsewhere `rtt_s` is 0, a lower bound."""
    linked: Flags
    """The two keep a link: it was measured or announced, nothing needs to be dialled."""


@dataclass(frozen=True, slots=True)
class _Tables:
    """What a snapshot derives from its announcements; the three last are filled when asked for."""

    models: Mapping[str, tuple[Announcement, ...]]
    """By peer id."""
    peers: Mapping[PeerId, Announcement]
    """The newest word of each peer on any model: where it is, and whom it knows."""
    columns: dict[str, Columns]
    ways: dict[str, Ways]
    client_ways: dict[tuple[PeerId | None, str], tuple[Floats, Floats, Flags]]
    """To all rows of a model."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An immutable view of all announcements and links; made by `snapshot`."""

    announcements: tuple[Announcement, ...]
    """At most one for a peer and model, in order of (peer, model)."""
    links: Mapping[Pair, Link]
    """Measured by this client, the pair in alphabetical order."""
    taken_s: float
    client: PeerId | None = None
    """Whose view it is."""
    coordinates: Coordinates | None = None
    """The client's own; of a client that announces itself, its announcement counts."""
    _tables: _Tables = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self._tables is None:
            models = words.by_model(self.announcements)
            derived = _Tables(models, words.by_peer(self.announcements), {}, {}, {})
            object.__setattr__(self, "_tables", derived)

    # --- who serves what ---------------------------------------------------------------------

    def of_model(self, model: str) -> tuple[Announcement, ...]:
        """All announcements of the model, serving or not, by peer id."""
        return self._tables.models.get(model, ())

    def serving(self, model: str) -> tuple[Announcement, ...]:
        """The announcements of peers that accept sessions for the model, by peer id."""
        return tuple(item for item in self.of_model(model) if item.serving)

    def announcement(self, model: str, peer: PeerId) -> Announcement:
        """What `peer` says of `model`; UsageError if it says nothing."""
        items = self.of_model(model)
        row = words.row_of(items, peer)
        if row is None:
            raise UsageError(f"peer {peer[-8:]} announces nothing for model {model[:12]}")
        return items[row]

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

    def columns(self, model: str) -> Columns:
        """All announcements of the model as arrays, one row each, in order of peer id."""
        held = self._tables.columns.get(model)
        if held is None:
            held = tables.build(self.of_model(model), self._tables.peers)
            self._tables.columns[model] = held
        return held

    # --- how far apart -----------------------------------------------------------------------

    def link(self, a: PeerId, b: PeerId) -> Link:
        """The best knowledge of the way from one peer to another, or to or from a client."""
        return self.known_link(a, b)[0]

    def known_link(self, a: PeerId, b: PeerId) -> tuple[Link, Origin]:
        """`link` and where the knowledge comes from."""
        if a == b:
            return Link(0.0), "measured"
        told_bytes_per_s = self._bytes_per_s(a, b)
        measured = self.links.get(_pair(a, b))
        if measured is not None:
            if _limited(measured):
                return measured, "measured"
            return replace(measured, bytes_per_s=told_bytes_per_s), "measured"
        rtt_s, jitter_s, origin = self._told(a, b)
        said = self._tables.peers
        relayed = any(peer in said and said[peer].relayed for peer in (a, b))
        return Link(rtt_s, told_bytes_per_s, jitter_s, relayed), origin

    def linked(self, a: PeerId, b: PeerId) -> bool:
        """Do the two keep a link, as far as this client or either of them has told?"""
        return a == b or _pair(a, b) in self.links or self._announced_s(a, b) is not None

    def ways(self, model: str, rows: NDArray[Any]) -> Ways:
        """`link` for all pairs of distinct rows of `columns(model)` at once."""
        columns = self.columns(model)
        count = len(columns.peers)
        every = len(rows) == count <= CACHED and np.array_equal(rows, np.arange(count))
        if not every:
            return self._ways(columns, rows)
        held = self._tables.ways.get(model)
        if held is None:
            held = self._tables.ways[model] = self._ways(columns, rows)
        return held

    def client_ways(
        self, client: PeerId | None, model: str, rows: NDArray[Any]
    ) -> tuple[Floats, Floats, Flags]:
        """`link` between the client and each row: round trip, jitter, and whether it is known.

        Nothing is known of a client that is not named.
        """
        held = self._tables.client_ways.get((client, model))
        if held is None:
            held = self._client_ways(client, self.columns(model))
            self._tables.client_ways[client, model] = held
        rtt_s, jitter_s, known = held
        return rtt_s[rows], jitter_s[rows], known[rows]

    def _client_ways(self, client: PeerId | None, columns: Columns) -> tuple[Floats, Floats, Flags]:
        """`client_ways` to all rows."""
        rtt_s, jitter_s, known = self._client_estimates(client, columns)
        if client is None:
            return rtt_s, jitter_s, known
        if client in self._tables.peers:
            asked: Iterable[int] = range(len(columns.peers))
        else:  # nobody announces ways to those who are no peers: what it measured is all
            ends = {a if b == client else b for a, b in self.links if client in (a, b)}
            asked = [columns.index[peer] for peer in ends if peer in columns.index]
        for row in asked:
            better = self._measured_or_announced(client, columns.peers[row])
            if better is not None:
                rtt_s[row], jitter_s[row] = better
                known[row] = True
        return rtt_s, jitter_s, known

    def _client_estimates(
        self, client: PeerId | None, columns: Columns
    ) -> tuple[Floats, Floats, Flags]:
        """`_client_ways` from coordinates alone."""
        count = len(columns.peers)
        place = None if client is None else self._place(client)
        if place is None or not vivaldi.informed(place):
            return np.zeros(count), np.zeros(count), np.zeros(count, dtype=np.bool_)
        known = columns.placed
        here = np.array([place.position_s]), np.array([place.height_s])
        rtt_s = vivaldi.rtts_s(*here, columns.position, columns.height)
        jitter_s = _jitter_s(rtt_s, np.array([place.error]), columns.error)
        return np.where(known, rtt_s[0], 0.0), np.where(known, jitter_s[0], 0.0), known

    def _measured_or_announced(self, a: PeerId, b: PeerId) -> tuple[float, float] | None:
        """Round trip and jitter as far as somebody measured them."""
        if a == b:
            return 0.0, 0.0
        measured = self.links.get(_pair(a, b))
        if measured is not None:
            return measured.rtt_s, measured.jitter_s
        announced_s = self._announced_s(a, b)
        return None if announced_s is None else (announced_s, JITTER * announced_s / 2)

    def _told(self, a: PeerId, b: PeerId) -> tuple[float, float, Origin]:
        """Round trip and jitter of a way that the client has not measured."""
        announced_s = self._announced_s(a, b)
        if announced_s is not None:
            return announced_s, JITTER * announced_s / 2, "announced"
        here, there = self._place(a), self._place(b)
        if here is None or there is None:
            return 0.0, 0.0, "unmeasured"
        if not (vivaldi.informed(here) and vivaldi.informed(there)):
            return 0.0, 0.0, "unmeasured"
        rtt_s = vivaldi.rtt_s(here, there)
        return rtt_s, max(JITTER * rtt_s / 2, vivaldi.spread_s(here, there)), "estimated"

    def _announced_s(self, a: PeerId, b: PeerId) -> float | None:
        """The round trip that either end tells, the longer of two; None if neither does.

        Ways are announced between peers: what a peer tells of somebody who is none is not heard.
        """
        longest_s = -1.0
        said = self._tables.peers
        if a not in said or b not in said:
            return None
        for one, other in ((a, b), (b, a)):
            for peer, rtt_s in said[one].neighbours:
                if peer == other and longest_s < rtt_s < math.inf:
                    longest_s = rtt_s
        return longest_s if longest_s >= 0 else None

    def _place(self, peer: PeerId) -> Coordinates | None:
        word = self._tables.peers.get(peer)
        if word is None:
            return self.coordinates if peer == self.client else None
        return word.coordinates

    def _bytes_per_s(self, sender: PeerId, receiver: PeerId) -> float:
        """What both ends tell of themselves; infinite if neither tells anything."""
        said = self._tables.peers
        up = said[sender].up_bytes_per_s if sender in said else None
        down = said[receiver].down_bytes_per_s if receiver in said else None
        slower = min(up or math.inf, down or math.inf)
        return max(LEAST_BYTES_PER_S, slower)

    def _ways(self, columns: Columns, rows: NDArray[Any]) -> Ways:
        """`ways` without the cache: estimates for all pairs, then what is known better."""
        here, placed = (columns.position[rows], columns.height[rows]), columns.placed[rows]
        known = np.logical_and.outer(placed, placed)
        error = columns.error[rows]
        rtt_s = vivaldi.rtts_s(*here, *here)
        jitter_s = _jitter_s(rtt_s, error, error)
        rtt_s[~known] = jitter_s[~known] = 0.0
        s_per_byte = np.maximum.outer(columns.up_s_per_byte[rows], columns.down_s_per_byte[rows])
        slot = {columns.peers[row]: index for index, row in enumerate(rows)}
        told_s = self._announced_matrix(slot)
        told = told_s >= 0
        rtt_s[told] = told_s[told]
        jitter_s[told] = JITTER * told_s[told] / 2
        known |= told
        linked = told.copy()
        for (a, b), link in self.links.items():
            i, j = slot.get(a), slot.get(b)
            if i is None or j is None:
                continue
            rtt_s[i, j] = rtt_s[j, i] = link.rtt_s
            jitter_s[i, j] = jitter_s[j, i] = link.jitter_s
            known[i, j] = known[j, i] = linked[i, j] = linked[j, i] = True
            if _limited(link):
                s_per_byte[i, j] = s_per_byte[j, i] = 1 / link.bytes_per_s
        times, flags = (rtt_s, jitter_s, s_per_byte), (known, linked)
        for matrix, value in (*((time, 0.0) for time in times), *((flag, True) for flag in flags)):
            np.fill_diagonal(matrix, value)
            matrix.setflags(write=False)
        return Ways(rtt_s, jitter_s, s_per_byte, known, linked)

    def _announced_matrix(self, slot: Mapping[PeerId, int]) -> Floats:
        """`_announced_s` for all pairs of the peers in `slot`, -1 where nobody tells."""
        told_s = np.full((len(slot), len(slot)), -1.0)
        for peer, i in slot.items():
            for other, rtt_s in self._tables.peers[peer].neighbours:
                j = slot.get(other)
                if j is not None and told_s[i, j] < rtt_s < math.inf:
                    told_s[i, j] = rtt_s
        longer_s: Floats = np.maximum(told_s, told_s.T)
        return longer_s

    # --- the next snapshot -------------------------------------------------------------------

    def updated(self, item: Announcement, now: float) -> Snapshot:
        """With one more word, which counts unless a newer one of its peer is here already."""
        items = self.of_model(item.model)
        row = words.row_of(items, item.peer)
        if row is None:
            return self._joined(item, now)
        if not words.newer(item, items[row]):
            return replace(self, taken_s=now)
        return self._replaced(item.model, {row: item}, now)

    def with_loads(self, model: str, loads: Mapping[PeerId, Load], now: float) -> Snapshot:
        """With fresher loads than announced; those of peers without the model do not count."""
        items = self.of_model(model)
        found = {words.row_of(items, peer): load for peer, load in loads.items()}
        changed = {row: items[row].with_load(found[row]) for row in found if row is not None}
        if not changed:
            return replace(self, taken_s=now)
        after = self._replaced(model, changed, now)
        # Loads say nothing of ways: those that were made are kept.
        ways, client_ways = self._tables.ways, self._tables.client_ways
        return replace(after, _tables=replace(after._tables, ways=ways, client_ways=client_ways))

    def with_links(
        self, links: Mapping[Pair, Link], coordinates: Coordinates | None, now: float
    ) -> Snapshot:
        """With other ways measured by the client, and where it is now; the peers are as they were.

        All tables are shared but those of the ways.
        """
        derived = replace(self._tables, ways={}, client_ways={})
        return replace(
            self, links=_each_way(links), coordinates=coordinates, taken_s=now, _tables=derived
        )

    def without(self, model: str, peer: PeerId, now: float) -> Snapshot:
        """Without what `peer` says of `model`."""
        items = self.of_model(model)
        row = words.row_of(items, peer)
        if row is None:
            return replace(self, taken_s=now)
        at = words.index_for(self.announcements, items[row])
        rest = (*self.announcements[:at], *self.announcements[at + 1 :])
        models, columns = dict(self._tables.models), dict(self._tables.columns)
        models[model] = (*items[:row], *items[row + 1 :])
        if not models[model]:
            del models[model]
            columns.pop(model, None)
        elif model in columns:
            columns[model] = tables.without_row(columns[model], row)
        return self._next(rest, now, models, columns, model, (peer,))

    def _joined(self, item: Announcement, now: float) -> Snapshot:
        """With a peer that said nothing of the model before."""
        at = words.index_for(self.announcements, item)
        every = (*self.announcements[:at], item, *self.announcements[at:])
        items = self.of_model(item.model)
        row = words.row_for(items, item.peer)
        models, columns = dict(self._tables.models), dict(self._tables.columns)
        models[item.model] = (*items[:row], item, *items[row:])
        if item.model in columns:
            word = words.newest(models, item.peer) or item
            columns[item.model] = tables.with_peer(columns[item.model], row, item, word)
        return self._next(every, now, models, columns, item.model, (item.peer,))

    def _replaced(self, model: str, changed: Mapping[int, Announcement], now: float) -> Snapshot:
        """With other words of the same peers on the model, by row."""
        every, items = list(self.announcements), list(self.of_model(model))
        for row, item in changed.items():
            every[words.index_for(every, item)] = items[row] = item
        models, columns = dict(self._tables.models), dict(self._tables.columns)
        models[model] = tuple(items)
        if model in columns:
            pairs = {row: (it, words.newest(models, it.peer) or it) for row, it in changed.items()}
            columns[model] = tables.with_rows(columns[model], pairs)
        peers = [item.peer for item in changed.values()]
        return self._next(tuple(every), now, models, columns, model, peers)

    def _next(
        self,
        announcements: tuple[Announcement, ...],
        now: float,
        models: Mapping[str, tuple[Announcement, ...]],
        columns: dict[str, Columns],
        model: str,
        peers: Iterable[PeerId],
    ) -> Snapshot:
        """The snapshot after `peers` spoke of `model`: what they say of other models is as it was,
        but they may have said there where they are."""
        said = dict(self._tables.peers)
        for peer in peers:
            word = words.newest(models, peer)
            if word is None:
                del said[peer]
                continue
            said[peer] = word
            for other in columns.keys() - {model}:
                row = columns[other].index.get(peer)
                if row is not None:
                    pair = (columns[other].announcements[row], word)
                    columns[other] = tables.with_rows(columns[other], {row: pair})
        derived = _Tables(models, said, columns, {}, {})
        return replace(self, announcements=announcements, taken_s=now, _tables=derived)

    # --- for those who want to look ----------------------------------------------------------

    def to_networkx(self) -> Any:
        """A `networkx.DiGraph`: peers with their announcements, and the ways that somebody has
        measured, in both directions."""
        return export.graph(self)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, ready for `json.dumps`; unlimited bandwidth is None."""
        return export.plain(self)

    def measured_pairs(self) -> list[Pair]:
        """Pairs that the client has measured or either end announces."""
        told = {
            _pair(word.peer, other)
            for word in self._tables.peers.values()
            for other, rtt_s in word.neighbours
            if other != word.peer and 0 <= rtt_s < math.inf
        }
        return sorted(told | self.links.keys())


def snapshot(
    announcements: Iterable[Announcement],
    links: Mapping[Pair, Link],
    now: float,
    *,
    client: PeerId | None = None,
    coordinates: Coordinates | None = None,
) -> Snapshot:
    """Freeze what is known `now`; of several words of one peer on one model the last one counts.

    `links` are the client's own measurements, the client's id being one end of most of them.
    """
    return Snapshot(words.latest(announcements), _each_way(links), now, client, coordinates)


def _each_way(links: Mapping[Pair, Link]) -> Mapping[Pair, Link]:
    """One figure for each way, whose ends stand in alphabetical order."""
    measured: dict[Pair, Link] = {}
    for (a, b), link in links.items():
        pair = _pair(a, b)
        held = measured.get(pair)
        measured[pair] = _worse(link, held) if held else link
    return MappingProxyType(measured)


def _worse(link: Link, other: Link) -> Link:
    """What counts of two directions of one way: on every point the less favourable."""
    return Link(
        max(link.rtt_s, other.rtt_s),
        min(link.bytes_per_s, other.bytes_per_s),
        max(link.jitter_s, other.jitter_s),
        link.relayed or other.relayed,
    )


def _limited(link: Link) -> bool:
    """Whether its bandwidth was measured."""
    return 0 < link.bytes_per_s < math.inf


def _jitter_s(rtt_s: Floats, error: Floats, others: Floats) -> Floats:
    """What `Snapshot.known_link` gives estimated ways."""
    jitter_s: Floats = np.maximum(JITTER * rtt_s / 2, vivaldi.spreads_s(rtt_s, error, others))
    return jitter_s


def _pair(a: PeerId, b: PeerId) -> Pair:
    return (a, b) if a < b else (b, a)
