"""Small worlds whose times can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

from hexswarm.records import Span
from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model, Node, NodeType, Way
from hexswarm.router.placement.cluster import Profile as Speeds
from hexswarm.router.placement.plan import Plan, Unit
from hexswarm.simulator.policy import Execution, Plain, Request, View, Visit, Visits

LAYERS = 8
MODEL = Model("m", LAYERS, 1e6, 1000.0, 2.0, 100.0, 60, 20, 2048)

TOKEN_S, ROW_S, READ_S = 1e-5, 1e-4, 1e-3
"""Of one layer: a prompt token; a decode row, and what every decode batch costs beside."""

WAY = Way(1e6, 0.01)
WIRED = 1e9

WHOLE = Execution(chunked=False, ring=False, lanes=False, opens=False)
"""As the rivals work."""


def profile(kv: int = 4096, slower: float = 1.0, prompts: int = 0) -> Speeds:
    """Linear in tokens and in rows."""
    prefill = tuple((float(n), slower * TOKEN_S * n) for n in (1, 4000))
    decode = tuple((float(n), slower * (READ_S + ROW_S * n)) for n in (1, 500))
    rates = (0.0, *(1 / (slower * TOKEN_S * k) for k in range(1, LAYERS + 1)))
    return Speeds(rates, (0, *[kv] * LAYERS), prefill, decode, prompts)


def world(
    spans: Sequence[tuple[int, int] | None],
    *,
    way: Way = WAY,
    nic: float = WIRED,
    profiles: Sequence[Speeds] | None = None,
) -> tuple[Cluster, Plan]:
    """One machine for each span, all as far from each other and from the coordinator."""
    names = [f"n{number}" for number in range(len(spans))]
    ends = [COORDINATOR, *names]
    cluster = Cluster(
        name="small",
        about="",
        models={"m": MODEL},
        types={"t": NodeType("t", "gpu", 1, 1e9, {})},
        nodes=tuple(Node(name, "t", "here", nic, nic) for name in names),
        coordinator=Node(COORDINATOR, "", "here", nic, nic),
        ways={(a, b): way for a in ends for b in ends if a != b},
        regions={},
        estimate={},
        reference={},
    )
    held = profiles or [profile()] * len(spans)
    units = tuple(Unit(name, name, speeds) for name, speeds in zip(names, held, strict=True))
    placed = tuple(None if ends is None else Span(*ends) for ends in spans)
    return cluster, Plan("m", "small", units, placed)


class Fixed(Plain):
    """The same route for all, or the next one after a refusal."""

    name = "fixed"

    def __init__(self, *routes: Visits, execution: Execution = WHOLE) -> None:
        self.routes, self.execution = routes, execution
        self.batches = 0

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        for visits in self.routes:
            if not view.refused & {visit.unit for visit in visits}:
                return visits
        return None

    def computed(self, now: float, work: object) -> None:
        self.batches += 1


def chain(plan: Plan, *units: int) -> Visits:
    """Those units in order, each from where the one before ended."""
    visits, reached = [], 0
    for unit in units:
        span = plan.spans[unit]
        assert span is not None
        visits.append(Visit(unit, Span(reached, span.end)))
        reached = span.end
    return tuple(visits)


def request(
    number: int = 0,
    at_s: float = 0.0,
    prompt: int = 100,
    answer: int = 5,
    client: str = COORDINATOR,
) -> Request:
    return Request(number, at_s, prompt, answer, client)
