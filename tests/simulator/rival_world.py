"""A handful of machines in one place, and questions to policies, for the tests of rivals."""

from __future__ import annotations

from collections.abc import Mapping

from hexswarm.records import Announcement, PeerId, Span, Speed
from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model, Node, Profile, Way
from hexswarm.router.placement.cluster import NodeType as Type
from hexswarm.router.placement.plan import Plan, Unit
from hexswarm.simulator.policy import Request, View, Visits

LAYERS = 4
MODEL = Model("m", LAYERS, 1e6, 1000, 2, 100, 75, 25, 2048)
MS = 1e-3


def profile(rate: float = 100.0, *, kv: int = 10_000, layer_s: float = MS) -> Profile:
    """Of a machine that holds all layers at `rate`, and fewer in proportion faster."""
    counts = range(1, LAYERS + 1)
    return Profile(
        throughput=(0.0, *(rate * LAYERS / k for k in counts)),
        kv_tokens=(0, *(kv for _ in counts)),
        prefill=((100.0, 10 * layer_s),),
        decode=((1.0, layer_s),),
    )


def world(
    spans: Mapping[str, tuple[int, int]],
    profiles: Mapping[str, Profile] | None = None,
    ways: Mapping[tuple[str, str], Way] | None = None,
    types: Mapping[str, str] | None = None,
) -> tuple[Cluster, Plan]:
    """Machines in one place, 1 ms and 1 GB/s apart; and where their layers are."""
    held, kinds = profiles or {}, types or {}
    usual = {(a, b): Way(1e9, MS) for a in (COORDINATOR, *spans) for b in (COORDINATOR, *spans)}
    nodes = tuple(Node(name, kinds.get(name, "t"), "here", 1e9, 1e9) for name in spans)
    kind_of = {node.type: Type(node.type, "gpu", 1, 1e9, {}) for node in nodes}
    hub = Node(COORDINATOR, "", "here", 1e9, 1e9)
    cluster = Cluster(
        "c", "", {"m": MODEL}, kind_of, nodes, hub, usual | dict(ways or {}), {}, {}, {}
    )
    units = tuple(Unit(name, name, held.get(name, profile())) for name in spans)
    return cluster, Plan("m", "c", units, tuple(Span(*ends) for ends in spans.values()))


def view(plan: Plan, *, refused: frozenset[int] = frozenset(), free: int = 10_000) -> View:
    """Everybody announced, with so much room."""
    words = tuple(
        Announcement(
            peer=PeerId(unit.id),
            model="m",
            model_name="m",
            layers=LAYERS,
            span=span or Span(0, 1),
            state="online",
            dtype="bfloat16",
            device="cuda",
            speed=Speed(MS, MS, 0.0),
            free_kv_tokens=free,
            queue_s=0.0,
            addresses=(),
        )
        for unit, span in zip(plan.units, plan.spans, strict=True)
    )
    return View(words, (COORDINATOR, 0), refused)


def ask(number: int, tokens: int = 75) -> Request:
    """One request at the coordinator."""
    return Request(number, float(number), tokens, 25, COORDINATOR)


def units(visits: Visits | None) -> tuple[int, ...] | None:
    """Whom a route visits."""
    return visits and tuple(visit.unit for visit in visits)


FORK = {"slow": (0, 2), "fast": (0, 2), "end": (2, 4), "other": (2, 4)}
FORK_PROFILES = {"slow": profile(25.0), "fast": profile(75.0)}
"""Two heads of unlike speed, two tails."""
