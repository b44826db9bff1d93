"""Peers that join one by one, on a virtual clock: what they pass in the end, over the bound.

Each of the cluster's machines joins at a random place in the order, `GAP_S` apart; five minutes
after the last one the max-flow of what is served then is taken. Nobody knows more than
announcements tell, which take a second to be stored and are read every ten. A joiner chooses by the
potential rule, claims, looks again, loads; a peer that serves reconsiders rarely; once a minute the
one that the lottery draws may publish an advice, and the others check and follow it. The swarm has
no requests yet (`busy` sets the pace of one that has).

Assumed: weights come at 1 GB/s (that is each machine's connection in these clusters), and a peer
loads new layers beside the old ones, for weights are at most half of its memory here. `--drained`:
it drops the old ones first, as `hexswarm peer` does.

    python benchmarks/planning_joining.py [--orders 8] [--busy] [--drained] [--alone] [--after 300]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from hexswarm.records import Span
from hexswarm.router.placement import advice, joining
from hexswarm.router.placement.bound import upper_bound
from hexswarm.router.placement.cluster import Cluster, parse
from hexswarm.router.placement.flow import Flow
from hexswarm.router.placement.joining import Holder, Offer
from hexswarm.router.placement.plan import whole_units

SHARED = Path(__file__).parent.parent.parent / "shared" / "clusters"
CLUSTERS = {"single24": "helix-single24.json", "geo24": "helix-geo24.json"}
MODEL = "llama-70b"
ORDERS = 8
GAP_S = 30.0
AFTER_S = 300.0
STORE_S = 1.0
READ_S = 10.0
YOUNG_S = 60.0
"""An advice is listened to for so long."""
JITTER_S = (2.5, 4.5)
SETTLED_S = (300.0, 600.0)
LOAD_BYTES_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class Word:
    """What one peer announced."""

    told_s: float
    serves: Span | None
    claims: Span | None
    claimed_s: float


@dataclass
class Volunteer:
    """One machine: what is true of it, and what it believes."""

    row: int
    joins_s: float
    rng: Random
    follower: advice.Follower
    looks_s: float
    serves: Span | None = None
    claims: Span | None = None
    claimed_s: float = 0.0
    stage: str = "away"
    loaded_s: float = 0.0
    settled_until_s: float = 0.0
    seen: frozenset[joining.Claim] = frozenset()
    words: list[Word] = field(default_factory=list)


class World:
    """The swarm; `run` gives the flow in the end."""

    def __init__(
        self,
        cluster: Cluster,
        seed: int,
        *,
        busy: bool,
        advised: bool = True,
        after_s: float = AFTER_S,
        beside: bool = True,
    ) -> None:
        self.model = cluster.model(MODEL)
        self.units = whole_units(cluster, MODEL)
        self.flow = Flow(cluster, self.model, self.units)
        self.names = [unit.id for unit in self.units]
        self.busy, self.advised, self.beside = busy, advised, beside
        self.published: list[advice.Advice] = []
        self.moves = 0
        self.drawn_minute = -1
        """The last minute in which somebody searched: peers with other views may draw others."""
        rng = Random(seed)
        order = list(range(len(self.units)))
        rng.shuffle(order)
        self.peers = [
            Volunteer(
                row,
                place * GAP_S,
                Random(rng.random()),
                advice.Follower(self.names[row], beside=beside),
                0.0,
            )
            for place, row in enumerate(order)
        ]
        for peer in self.peers:
            peer.looks_s = peer.joins_s
        self.end_s = (len(order) - 1) * GAP_S + after_s

    def run(self) -> float:
        now = 0.0
        while now <= self.end_s:
            for peer in self.peers:
                if now >= peer.joins_s:
                    self.live(peer, now)
            now += 0.5
        spans: list[Span | None] = [None] * len(self.units)
        for peer in self.peers:
            spans[peer.row] = peer.serves
        return self.flow.value(spans)

    def live(self, peer: Volunteer, now: float) -> None:
        """What this peer does at this moment."""
        if peer.stage == "loading" and now >= peer.loaded_s:
            peer.serves, peer.claims, peer.stage = peer.claims, None, "online"
            peer.settled_until_s = now + peer.rng.uniform(*SETTLED_S)
            self.tell(peer, now)
        if now < peer.looks_s:
            return
        peer.looks_s = now + peer.rng.uniform(0.8, 1.2) * READ_S
        view = self.view(peer, now)
        if peer.stage in ("away", "claiming"):
            self.join(peer, view, now)
        elif peer.stage == "online":
            self.serve(peer, view, now)

    def join(self, peer: Volunteer, view: dict[int, Word], now: float) -> None:
        offer, holders = self.offer(peer), self.holders(peer, view)
        if peer.stage == "away":
            wanted = joining.choose(offer, holders).span
        else:
            assert peer.claims is not None
            wanted = joining.look_again(offer, peer.claims, peer.claimed_s, peer.seen, holders)
        if wanted != peer.claims:
            peer.seen = joining.claims(holders)
        if peer.stage == "claiming" and wanted == peer.claims:
            self.load(peer, wanted, now)
            return
        peer.stage, peer.claims, peer.claimed_s = "claiming", wanted, now
        peer.looks_s = now + peer.rng.uniform(*JITTER_S)
        self.tell(peer, now)

    def serve(self, peer: Volunteer, view: dict[int, Word], now: float) -> None:
        assert peer.serves is not None
        served = {
            self.names[row]: word.serves
            for row, word in view.items()
            if word.serves or not self.beside
        }
        served[self.names[peer.row]] = peer.serves
        moving = {
            self.names[row]: word.claims
            for row, word in view.items()
            if word.claims is not None and (word.serves or not self.beside)
        }
        if self.advised:
            self.advise(peer, served, now)
        layers = self.model.layers
        target = peer.follower.turn(served, moving, layers, now, busy=self.busy)
        if target is None and peer.follower.advice is None and now >= peer.settled_until_s:
            target = joining.reconsider(self.offer(peer), peer.serves, self.holders(peer, view))
            peer.settled_until_s = now + peer.rng.uniform(*SETTLED_S)
        if target is not None and target != peer.serves:
            self.moves += 1
            peer.claimed_s = now
            self.load(peer, target, now)

    def advise(self, peer: Volunteer, served: dict[str, Span | None], now: float) -> None:
        """Publish if it is our minute, and read what others published."""
        served = {name: span for name, span in served.items() if span}
        if len(served) < 2:
            return
        name = self.names[peer.row]
        census = self.census(served)
        minute = int(now // 60)
        load_s = self.load_s(4)
        told = [item for item in self.published if item.made_s < now - STORE_S]
        mine = self.drawn_minute < minute and advice.drawn(census.peers, minute) == name
        if peer.follower.advice is None and mine:
            self.drawn_minute = minute
            made = advice.advise(census, load_s, now, busy=self.busy)
            if made is not None:
                self.published.append(made)
                peer.follower.hear(made, census, load_s, busy=self.busy)
        elif told:
            latest = told[-1]
            if latest.made_s > now - YOUNG_S:
                peer.follower.hear(latest, census, load_s, busy=self.busy)

    def census(self, served: dict[str, Span | None]) -> advice.Census:
        rows = [row for row, name in enumerate(self.names) if name in served]
        names = tuple(self.names[row] for row in rows)
        spans = tuple(served[name] for name in names)
        return advice.Census(names, self.flow.rates.part(rows), spans, beside=self.beside)

    def load(self, peer: Volunteer, span: Span, now: float) -> None:
        held = set(range(peer.serves.first, peer.serves.end)) if peer.serves else set()
        fresh = len(set(range(span.first, span.end)) - held)
        peer.stage, peer.claims, peer.loaded_s = "loading", span, now + self.load_s(fresh)
        if not self.beside:
            peer.serves = None
        self.tell(peer, now)

    def load_s(self, layers: int) -> float:
        return 2.0 + layers * self.model.layer_bytes / LOAD_BYTES_PER_S

    def tell(self, peer: Volunteer, now: float) -> None:
        peer.words.append(Word(now, peer.serves, peer.claims, peer.claimed_s))

    def view(self, reader: Volunteer, now: float) -> dict[int, Word]:
        """The newest word of each other peer that has been stored."""
        found = {}
        for peer in self.peers:
            known = [word for word in peer.words if word.told_s <= now - STORE_S]
            if known and peer is not reader:
                found[peer.row] = known[-1]
        return found

    def offer(self, peer: Volunteer) -> Offer:
        profile = self.units[peer.row].profile
        return Offer(self.names[peer.row], self.model.layers, profile.throughput)

    def holders(self, peer: Volunteer, view: dict[int, Word]) -> list[Holder]:
        rates, found = self.flow.rates, []
        for row, word in view.items():
            span = word.claims or word.serves
            assert span is not None
            found.append(
                Holder(
                    self.names[row],
                    span,
                    float(rates.speed[row, len(span)]),
                    claimed_s=None if word.claims is None else word.claimed_s,
                    to_me_per_s=float(rates.link[row, peer.row]),
                    from_me_per_s=float(rates.link[peer.row, row]),
                )
            )
        return found


def joining_row(orders: int = ORDERS, **world: Any) -> dict[str, Any]:
    """Median, least and most of flow / bound for each cluster, and seconds of computing."""
    row: dict[str, Any] = {}
    for name, file in CLUSTERS.items():
        cluster = parse(json.loads((SHARED / file).read_text()))
        model = cluster.model(MODEL)
        bound = upper_bound(cluster, model, whole_units(cluster, MODEL))
        begun, shares, moves = time.perf_counter(), [], []
        for seed in range(orders):
            swarm = World(cluster, seed, **{"busy": False, **world})
            shares.append(swarm.run() / bound)
            moves.append(swarm.moves)
        row[name] = {
            "median": round(statistics.median(shares), 3),
            "least": round(min(shares), 3),
            "most": round(max(shares), 3),
            "moves": int(np.median(moves)),
            "seconds": round(time.perf_counter() - begun, 1),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=ORDERS)
    parser.add_argument("--busy", action="store_true", help="at the pace of a swarm with sessions")
    parser.add_argument("--drained", action="store_true", help="layers are dropped before loading")
    parser.add_argument("--alone", action="store_true", help="without advice")
    parser.add_argument("--after", type=float, default=AFTER_S, help="seconds after the last join")
    flags = parser.parse_args()
    row = joining_row(
        flags.orders,
        busy=flags.busy,
        advised=not flags.alone,
        after_s=flags.after,
        beside=not flags.drained,
    )
    print(json.dumps({"joining": row}))


if __name__ == "__main__":
    main()
