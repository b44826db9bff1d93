"""What is drawn for a seed of the simulated world: peers, clients, requests and faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hexswarm.peer.groups.actions import AUTO
from hexswarm.records import Span
from tests.loopback import VOCABULARY
from tests.simulation import faults
from tests.simulation.faults import LAN_KINDS, Fault
from tests.simulation.invariants import Ask
from tests.simulation.lan import GroupSpec
from tests.simulation.peers import PeerSpec

SETTLED_S = 3.0
"""From then on clients ask and things go wrong."""
LAYERS = 6
SPANS = ((0, 2), (2, 4), (4, 6))
FIRST_CLIENT = 50
FIRST_MEMBER = 30
"""Of the peers that are to be groups."""
FORMED_S = 5.0
"""What groups are given to form, before it all begins."""
GROUPED = 0.25
"""Share of the seeds that have any."""
AUTO_SHARE = 0.25
"""Of those with one LAN: whose peers serve by themselves until together they are faster."""
ROOMY = 40
"""Blocks that are enough for all requests of a seed at once."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was drawn for a seed."""

    seed: int
    mild: bool
    specs: tuple[PeerSpec, ...]
    clients: tuple[int, ...]
    victims: tuple[int, ...]
    delay_s: float
    faults_end_s: float
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    stops: frozenset[int]
    lan: tuple[GroupSpec, ...] = ()
    """Peers that are to be groups, beside the others."""
    settled_s: float = SETTLED_S
    """When the clients have joined."""

    def __str__(self) -> str:
        kind = "mild" if self.mild else "wild"
        peers = " ".join(
            f"{s.number}:{s.span}" + "!" * (s.number in self.victims) for s in self.specs
        )
        asks = (
            f"{a.at_s:6.2f} {a.style} by {a.client}, {len(a.prompt)}+{a.max_new}" for a in self.asks
        )
        lines = [f"seed {self.seed}, {kind}: peers {peers}", *asks, *map(str, self.faults)]
        if self.lan:
            said = (f"{s.number}:{s.span}" + "*" * s.leads + f" {s.name}" for s in self.lan)
            size = self.lan[0].size
            lines.insert(1, f"groups of {size}: " + ", ".join(said))
        return "\n  ".join(lines)


def draw(seed: int, *, quiet: bool = False) -> Plan:
    """The plan of a seed; a `quiet` one has no faults."""
    rng = random.Random(f"world {seed}")
    mild = quiet or rng.random() < 0.5
    specs, victims = _draw_peers(rng, seed, mild)
    clients = tuple(range(FIRST_CLIENT, FIRST_CLIENT + rng.randint(1, 2)))
    end_s = SETTLED_S + rng.uniform(6.0, 22.0)
    stops = frozenset({rng.randrange(VOCABULARY)} if rng.random() < 0.3 else ())
    asks = tuple(_draw_ask(rng, n, clients, stops, end_s) for n in range(rng.randint(3, 6)))
    wrong = faults.draw(rng, specs, clients, victims, SETTLED_S + 0.5, end_s, mild=mild)
    return _with_groups(
        Plan(
            seed=seed,
            mild=mild,
            specs=specs,
            clients=clients,
            victims=victims,
            delay_s=rng.choice((0.002, 0.01, 0.04)),
            faults_end_s=end_s,
            asks=_alike(asks, seed),
            faults=() if quiet else wrong,
            stops=stops,
        ),
        quiet=quiet,
    )


def _with_groups(plan: Plan, *, quiet: bool) -> Plan:
    """In some seeds there are groups beside the peers, and all happens once they may be there."""
    lan = _draw_lan(plan.seed)
    if not lan:
        return plan
    rng, end_s = random.Random(f"group faults {plan.seed}"), plan.faults_end_s + FORMED_S
    wrong = [replace(fault, at_s=fault.at_s + FORMED_S) for fault in plan.faults]
    if not quiet:
        numbers = [spec.number for spec in lan]
        given = (rng, lan, plan.clients, numbers, SETTLED_S + FORMED_S, end_s)
        wrong += faults.draw(*given, mild=False, counts=(0, 5), kinds=LAN_KINDS)
    return replace(
        plan,
        lan=lan,
        settled_s=SETTLED_S + FORMED_S,
        faults_end_s=end_s,
        asks=tuple(replace(ask, at_s=ask.at_s + FORMED_S) for ask in plan.asks),
        faults=tuple(sorted(wrong, key=lambda fault: fault.at_s)),
    )


def _draw_peers(
    rng: random.Random, seed: int, mild: bool
) -> tuple[tuple[PeerSpec, ...], tuple[int, ...]]:
    """Peers, and which of them may be harmed in a mild world: the others can serve alone."""
    specs: list[PeerSpec] = []
    victims: list[int] = []
    for first, end in SPANS:
        for copy in range(rng.randint(2, 3)):
            if copy and (mild or rng.random() < 0.7):
                victims.append(len(specs))
            blocks = ROOMY if not copy else rng.choice((6, 16, ROOMY))
            layer_s = 0.01 * rng.choice((1.0, 1.5, 2.0, 4.0))
            if copy:  # often the better ones, so that they are used
                layer_s /= rng.choice((1.0, 4.0, 4.0))
            specs.append(PeerSpec(len(specs), Span(first, end), LAYERS, blocks, layer_s))
    if rng.random() < 0.3:  # one that fits no scheme
        span = Span(*rng.choice(((0, 4), (1, 5), (2, 6), (0, 6))))
        victims.append(len(specs))
        specs.append(PeerSpec(len(specs), span, LAYERS, rng.choice((6, ROOMY)), 0.003))
    # Some have no room for a journal, or for a short one only.
    rooms = random.Random(f"journals {seed}")
    sizes = [rooms.choice((0, 100, 1 << 20, 1 << 20)) for _ in specs]
    kept = (replace(spec, journal_bytes=size) for spec, size in zip(specs, sizes, strict=True))
    return tuple(kept), tuple(victims)


def _draw_lan(seed: int) -> tuple[GroupSpec, ...]:
    """In some seeds a LAN or two, each with a group's peers and perhaps one to spare."""
    rng = random.Random(f"groups {seed}")
    if rng.random() >= GROUPED:
        return ()
    specs: list[GroupSpec] = []
    names = ("lan-a", "lan-b")[: 1 + (rng.random() < 0.2)]
    for name in names:
        span = Span(*rng.choice((*SPANS, (0, 4), (2, 6), (0, 6))))
        size, many = rng.choice((2, 2, 3)), rng.random() < 0.3
        for turn in range(size + (rng.random() < 0.5)):
            specs.append(
                GroupSpec(
                    *(FIRST_MEMBER + len(specs), span, LAYERS, ROOMY),
                    layer_s=0.001 * rng.choice((1.0, 1.0, 2.0)),
                    name=name,
                    size=size,
                    leads=not turn or many,
                    load_s=rng.uniform(0.1, 1.5),
                )
            )
    if len(names) == 1 and random.Random(f"auto {seed}").random() < AUTO_SHARE:
        return tuple(replace(spec, name=AUTO, layer_s=10 * spec.layer_s) for spec in specs)
    return tuple(specs)


def _alike(asks: tuple[Ask, ...], seed: int) -> tuple[Ask, ...]:
    """In every other seed prompts begin alike, as those with one system prompt do."""
    rng = random.Random(f"prefixes {seed}")
    if rng.random() < 0.5:
        return asks
    common = tuple(rng.randrange(VOCABULARY) for _ in range(34))
    return tuple(
        replace(ask, prompt=common + ask.prompt[-6:]) if len(ask.prompt) >= 12 else ask
        for ask in asks
    )


def _draw_ask(
    rng: random.Random, number: int, clients: tuple[int, ...], stops: frozenset[int], end_s: float
) -> Ask:
    prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 5, 12, 40))))
    style = rng.choice(("whole", "whole", "whole", "talk", "cancel", "logits"))
    at_s = rng.uniform(SETTLED_S + 0.1, SETTLED_S + 0.6 * (end_s - SETTLED_S))
    return Ask(number, rng.choice(clients), at_s, prompt, rng.randint(8, 40), style, stops)
