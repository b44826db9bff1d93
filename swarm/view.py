"""What this client sees of the swarm: announcements as it believes them, and the ways it knows.

Three things correct what peers announce before the router sees it: *loads*, told with each lease
granted or refused, where they were heard after the announcement was made; *experience*, which
makes a peer as slow as it was seen to be; and *ways*, measured by this client or, between two
peers, measured on its request by one of them.

Building a `Snapshot` of 10,000 records takes tens of milliseconds, so the last one is kept: as it
is while nothing changed, mended where a few records changed, built anew otherwise. The directory
counts its changes for this. A way that merely jitters is no change (`SAME_WAY`), else every pong
would cost a snapshot.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from hexswarm.clock import Clock
from hexswarm.directory import Directory
from hexswarm.records import Announcement, Coordinates, Link, Load, PeerId
from hexswarm.router.experience import Experience
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.runtime import OpenSession

MEND = 8
"""More changed records than this, and a snapshot is built anew: mending costs about a tenth of that
for each."""
SAME_WAY = 0.1
"""Relative change of a round trip below which it is the same: the jitter of a quiet line."""
SAME_WAY_S = 0.0005
"""The same in seconds, for ways so short that the schedulers of both ends are most of them."""
UNREACHABLE_S = 3.0
"""Round trip of a way that could not be measured: longer than any that is used, so that no route
leads there, and finite, so that predictions stay numbers."""
UNREACHABLE_FOR_S = 60.0
"""So long a way that could not be measured is not tried again."""
TOLD_FOR_S = 600.0
"""So long a way between two peers counts as it was measured on request."""
MAX_TOLD = 4096

BLOCK_TOKENS = 16
"""Peers lease KV in whole blocks of so many tokens."""

Pair = tuple[PeerId, PeerId]
Heard = Mapping[PeerId, tuple[float, Load]]
"""When (monotonic) a peer told its load, and the load."""


class Told:
    """Ways measured on request, and those that could not be: they fade. And those in doubt."""

    def __init__(self) -> None:
        self._ways: dict[Pair, tuple[float, Link]] = {}
        self._doubted: dict[frozenset[PeerId], None] = {}

    def remember(self, pair: Pair, link: Link | None, now: float) -> None:
        """None: the way could not be measured."""
        lasts_s = UNREACHABLE_FOR_S if link is None else TOLD_FOR_S
        self._doubted.pop(frozenset(pair), None)
        self._ways.pop(pair, None)
        self._ways[pair] = (now + lasts_s, link or Link(UNREACHABLE_S))
        while len(self._ways) > MAX_TOLD:
            del self._ways[next(iter(self._ways))]

    def ways(self, now: float) -> dict[Pair, Link]:
        return {pair: link for pair, (until_s, link) in self._ways.items() if until_s > now}

    def doubt(self, pair: Pair) -> None:
        """Something was lost on this way, though both its ends live."""
        self._doubted[frozenset(pair)] = None
        while len(self._doubted) > MAX_TOLD:
            del self._doubted[next(iter(self._doubted))]

    def doubted(self, pairs: Iterable[Pair]) -> set[Pair]:
        """Those of `pairs` that were not measured since something was lost there."""
        return {pair for pair in pairs if frozenset(pair) in self._doubted}


class Leases:
    """What this client itself holds at peers.

    The load that a stage tells with a lease counts that lease as taken. It is given back when the
    session ends, and nobody tells: without this, a client that has just closed a long session would
    find the swarm full until the next announcements.
    """

    def __init__(self) -> None:
        self._sessions: weakref.WeakSet[OpenSession] = weakref.WeakSet()
        self._beside: weakref.WeakKeyDictionary[OpenSession, dict[PeerId, int]]
        self._beside = weakref.WeakKeyDictionary()
        """What we held of its stages beside a session when they were asked for it."""
        self._told: dict[PeerId, tuple[float, int]] = {}
        """When a peer told its load, and how many tokens of it were ours."""

    def asked(self, session: OpenSession) -> None:
        """The stages of `session` are asked for a lease, just now.

        Messages keep their order: what is closed after this counts in the answers, however late
        they are read.
        """
        held = self._held(session)
        self._beside[session] = {s.peer: held[s.peer] for s in session.route.stages}
        self._sessions.add(session)

    def answered(self, session: OpenSession, loads: Heard) -> None:
        """They have granted or refused it, just now."""
        self._told = {
            peer: told
            for peer, told in self._told.items()
            if peer in loads and loads[peer][0] == told[0]
        }
        silent = {stage.peer for stage in session.machine.silent}
        for peer, beside in self._beside.get(session, {}).items():
            if peer in loads:
                granted = 0 if peer in silent else _leased(session)
                self._told[peer] = (loads[peer][0], beside + granted)

    def corrected(self, loads: Heard) -> dict[PeerId, tuple[float, Load]]:
        """The loads with what we have given back since they were told."""
        known, held = dict(loads), self._held()
        for peer, (told_s, ours) in self._told.items():
            heard_s, load = known.get(peer, (-math.inf, Load()))
            back = ours - held[peer]
            if heard_s == told_s and back > 0:
                free = load.free_kv_tokens + back
                known[peer] = (heard_s, replace(load, free_kv_tokens=free))
        return known

    def _held(self, but: OpenSession | None = None) -> Counter[PeerId]:
        """Tokens of each peer. In one pass: this is asked for at every choice of a route."""
        held = Counter[PeerId]()
        for session in self._sessions:
            if session is not but and session.machine.failed is None:
                tokens = _leased(session)
                for peer in {stage.peer for stage in session.route.stages}:
                    held[peer] += tokens
        return held


def _leased(session: OpenSession) -> int:
    return -(-session.machine.kv_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


class View:
    """The last snapshot, kept true."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        experience: Experience,
        loads: Callable[[], Heard],
    ) -> None:
        """`loads` gives a new mapping each time."""
        self.told = Told()
        self._directory = directory
        self._clock = clock
        self._experience = experience
        self._loads = loads
        self._snapshot: Snapshot | None = None
        self._version = 0
        self._expiry_s = -math.inf
        self._shown: dict[PeerId, str] = {}
        """Peers in the snapshot, and the model that each serves."""
        self._heard: Heard = {}
        """Loads that the snapshot knows of."""
        self._doubted: set[PeerId] = set()

    def doubt(self, peers: Iterable[PeerId]) -> None:
        """Experience with these peers has changed."""
        self._doubted.update(peers)

    def snapshot(
        self, client: PeerId, ways: Mapping[PeerId, Link], coordinates: Coordinates | None
    ) -> Snapshot:
        """The swarm as `client` sees it now; `ways` are the ways that it measured itself."""
        held, links = self._snapshot, self._links(client, ways)
        changed, before, self._heard = self._changed(), self._heard, self._loads()
        if held is None or len(changed) > MEND:
            held = self._build(client, links, coordinates)
        else:
            for peer in changed:
                held = self._mend(held, peer)
            held = self._with_loads(held, changed, before)
            if held.coordinates != coordinates or not same_ways(held.links, links):
                held = held.with_links(links, coordinates, self._clock.wall())
        self._snapshot = held
        self._version = self._directory.version
        self._doubted.clear()
        return held

    def _links(self, client: PeerId, ways: Mapping[PeerId, Link]) -> dict[Pair, Link]:
        """Ways in alphabetical order of their ends; one's own measuring counts more than a word."""
        links = {
            (a, b) if a < b else (b, a): link
            for (a, b), link in self.told.ways(self._clock.monotonic()).items()
        }
        for peer, link in ways.items():
            links[(client, peer) if client < peer else (peer, client)] = link
        return links

    def _changed(self) -> set[PeerId]:
        """Peers whose part in the snapshot is no longer true."""
        now = self._clock.wall()
        changed = {*self._directory.changed(self._version), *self._doubted}
        if now >= self._expiry_s:
            changed |= {peer for peer in self._shown if self._directory.record(peer, now) is None}
            self._expiry_s = self._directory.next_expiry(now)
        return changed

    def _build(
        self, client: PeerId, links: Mapping[Pair, Link], coordinates: Coordinates | None
    ) -> Snapshot:
        now = self._clock.wall()
        alive = [self._as_seen(item) for item in self._directory.alive(now)]
        self._shown = {item.peer: item.model for item in alive}
        self._expiry_s = self._directory.next_expiry(now)
        return snapshot(alive, links, now, client=client, coordinates=coordinates)

    def _mend(self, held: Snapshot, peer: PeerId) -> Snapshot:
        """With what is now known of `peer`, in place of what was."""
        now = self._clock.wall()
        record, model = self._directory.record(peer, now), self._shown.get(peer)
        item = None if record is None else self._as_seen(record.announcement)
        if model is not None and not (item and _succeeds(item, held, model)):
            held = held.without(model, peer, now)
            del self._shown[peer]
        if record is not None and item is not None:
            held = held.updated(item, now)
            self._shown[peer] = item.model
            self._expiry_s = min(self._expiry_s, record.expires_s)
        return held

    def _with_loads(self, held: Snapshot, mended: set[PeerId], before: Heard) -> Snapshot:
        """With the loads heard since `before`; those of the peers just mended are in."""
        news: dict[str, dict[PeerId, Load]] = {}
        for peer, (heard_s, load) in self._heard.items():
            model = self._shown.get(peer)
            if model is None or peer in mended or (heard_s, load) == before.get(peer):
                continue
            if self._later(heard_s, held.announcement(model, peer)):
                news.setdefault(model, {})[peer] = load
        for model, loads in news.items():
            held = held.with_loads(model, loads, self._clock.wall())
        return held

    def _as_seen(self, item: Announcement) -> Announcement:
        """An announcement corrected by what is known better."""
        item = self._experience.apply(item, self._clock.monotonic())
        heard = self._heard.get(item.peer)
        if heard is None or not self._later(heard[0], item):
            return item
        return item.with_load(heard[1])

    def _later(self, heard_s: float, item: Announcement) -> bool:
        """Whether something was heard (monotonic time) after the announcement was made."""
        ago_s = self._clock.monotonic() - heard_s
        return self._clock.wall() - ago_s > item.issued_s


def _succeeds(item: Announcement, held: Snapshot, model: str) -> bool:
    """A later word on the same model: it takes the place of the one held by itself."""
    if item.model != model:
        return False
    before = held.announcement(model, item.peer)
    return (item.sequence, item.issued_s) > (before.sequence, before.issued_s)


def same_ways(a: Mapping[Pair, Link], b: Mapping[Pair, Link]) -> bool:
    """Both know the same ways, and none is much longer or shorter in one of them."""
    return a.keys() == b.keys() and all(_same(a[pair], b[pair]) for pair in a)


def _same(a: Link, b: Link) -> bool:
    apart_s = max(SAME_WAY_S, SAME_WAY * a.rtt_s)
    return (
        abs(a.rtt_s - b.rtt_s) <= apart_s
        and abs(a.jitter_s - b.jitter_s) <= apart_s
        and (a.bytes_per_s == b.bytes_per_s or 0.5 < a.bytes_per_s / b.bytes_per_s < 2)
    )
