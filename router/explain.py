"""Why this route: the budget of each hop, the best of those rejected, the constraint that decided.

`explain` decides as `find_route` does and then asks what else there was: the fastest route and the
soonest first token of all that the request may use, the route without each busy or distant peer of
the chosen one, the spares. Each is told with the reason for which it was not taken, so that a
person can see whether a limit, a price, a load or a distance decided.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from hexswarm.errors import NoRoute
from hexswarm.records import PeerId, Route, RouteRequest, Span
from hexswarm.router import cost
from hexswarm.router.candidates import check, usable
from hexswarm.router.network import Origin, Snapshot
from hexswarm.router.routing import HYSTERESIS, find_route, predicted

REJECTED = 6
"""Most rejected routes told."""

FOREVER_S = 1e9
"""A limit that is none: the cheapest route is asked for, however slow."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One stage and the way on from it (of the tail: back to the head), medians per token."""

    peer: PeerId
    span: Span
    compute_s: float
    queue_s: float
    link_s: float
    serialise_s: float
    origin: Origin
    """How the way on is known; of a ring of one stage "measured", there is none."""
    rtt_s: float
    price: float


@dataclass(frozen=True, slots=True)
class Budget:
    """Where the predicted time of a route goes; all times of all hops add up to `route.tpot_s`."""

    route: Route
    hops: tuple[Hop, ...]
    open_s: float
    """The part of the time to the first token in which the stages are opened."""
    client_s: float
    """The part of it on the ways client -> head and tail -> client."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """Another route, and in a sentence why it was not taken."""

    route: Route
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision and its reasons."""

    request: RouteRequest
    chosen: Budget | None
    rejected: tuple[Rejected, ...]
    binding: str
    """What decided: speed, price, tpot, ttft, both, previous, or as in `NoRoute.binding`."""
    sentence: str
    error: NoRoute | None = None


def explain(
    snapshot: Snapshot, request: RouteRequest, now: float, rng: random.Random
) -> Explanation:
    """Decide as `find_route` does, and say why. Raises UsageError as it does, but never NoRoute."""
    check(request)
    try:
        route = find_route(snapshot, request, now, rng)
    except NoRoute as error:
        return Explanation(
            request,
            None,
            _without_limits(snapshot, request, now, rng),
            error.binding,
            str(error),
            error,
        )
    others = _others(snapshot, request, route, now, rng)
    rejected = tuple(Rejected(other, _why(request, route, other)) for other in others)
    binding, sentence = _binding(request, route, others)
    return Explanation(request, budget(snapshot, request, route), rejected, binding, sentence)


def budget(snapshot: Snapshot, request: RouteRequest, route: Route) -> Budget:
    """The predicted time of a route, hop by hop."""
    hops = []
    stages = route.stages
    for at, (stage, element) in enumerate(
        zip(stages, cost.elements(snapshot, request, stages), strict=True)
    ):
        link, origin = snapshot.known_link(stage.peer, stages[(at + 1) % len(stages)].peer)
        item = snapshot.announcement(request.model, stage.peer)
        hops.append(
            Hop(
                stage.peer,
                stage.span,
                element.compute_s,
                element.queue_s,
                element.link_s,
                element.serialise_s,
                origin,
                link.rtt_s,
                (len(stage.span) + 1) * cost.peer_price(item),
            )
        )
    times = cost.predict(snapshot, request, stages)
    rows = np.array(
        [snapshot.columns(request.model).index[end.peer] for end in (route.head, route.tail)]
    )
    to_client, _ = cost.client_times(snapshot, request, rows, 0.0)
    return Budget(route, tuple(hops), times.open_s, float(to_client.sum()))


def _plain(request: RouteRequest) -> RouteRequest:
    """The same request without limits or preferences."""
    return replace(request, ttft_s=None, tpot_s=None, spread=0.0, previous=None)


def _others(
    snapshot: Snapshot, request: RouteRequest, route: Route, now: float, rng: random.Random
) -> list[Route]:
    """Routes that could have been taken, without repetition."""
    alone = replace(request, spread=0.0, previous=None)
    asked = [_plain(request), alone]
    if request.tpot_s is not None or request.ttft_s is not None:  # the cheapest of all
        asked.append(replace(alone, tpot_s=FOREVER_S, ttft_s=FOREVER_S))
    asked += [
        replace(request, deny=request.deny | {stage.peer}, spread=0.0, previous=None)
        for stage in route.stages
    ]
    found = list(route.spares)
    for question in asked:
        try:
            answer = find_route(snapshot, question, now, rng)
        except NoRoute:
            continue
        found.append(replace(answer, spares=()))
    if request.previous is not None:
        found += _still(snapshot, request, request.previous)
    seen = {_key(route)}
    different = []
    for other in found:
        if _key(other) not in seen:
            seen.add(_key(other))
            different.append(other)
    if request.tpot_s is None and request.ttft_s is None:
        different.sort(key=lambda other: _whole(request, other))
    else:
        different.sort(key=lambda other: other.price)
    return different[:REJECTED]


def _still(snapshot: Snapshot, request: RouteRequest, route: Route) -> list[Route]:
    """The route of the last request, if its peers are still there."""
    rows = set(usable(snapshot, request).tolist())
    index = snapshot.columns(request.model).index
    if any(index.get(stage.peer, -1) not in rows for stage in route.stages):
        return []
    return [predicted(snapshot, request, route.stages)]


def _without_limits(
    snapshot: Snapshot, request: RouteRequest, now: float, rng: random.Random
) -> tuple[Rejected, ...]:
    """What there would be if the limits were wider."""
    try:
        fastest = find_route(snapshot, _plain(request), now, rng)
    except NoRoute:
        return ()
    routes = [replace(fastest, spares=()), *fastest.spares]
    return tuple(Rejected(route, _late(request, route)) for route in routes)


def _key(route: Route) -> tuple[tuple[PeerId, int], ...]:
    return tuple((stage.peer, stage.span.end) for stage in route.stages)


def _whole(request: RouteRequest, route: Route) -> float:
    """Predicted seconds of the whole answer."""
    return route.ttft_s + max(request.new_tokens - 1, 0) * route.tpot_s


def at_percentile(request: RouteRequest, route: Route) -> tuple[float, float]:
    """(ttft, tpot) of a route at the percentile of the request, seconds."""
    late = cost.lateness(request.percentile)
    return (
        route.ttft_s + late * (route.ttft_p95_s - route.ttft_s),
        route.tpot_s + late * (route.tpot_p95_s - route.tpot_s),
    )


def _late(request: RouteRequest, route: Route) -> str:
    """Which limit a route misses, in words; empty if none."""
    ttft_s, tpot_s = at_percentile(request, route)
    misses = []
    if request.tpot_s is not None and tpot_s > request.tpot_s * (1 + 1e-6):
        misses.append(f"{_ms(tpot_s)} a token, the limit is {_ms(request.tpot_s)}")
    if request.ttft_s is not None and ttft_s > request.ttft_s * (1 + 1e-6):
        misses.append(f"first token after {_ms(ttft_s)}, the limit is {_ms(request.ttft_s)}")
    return "too slow: " + "; ".join(misses) if misses else ""


def _why(request: RouteRequest, route: Route, other: Route) -> str:
    """Why `other` was not taken."""
    late = _late(request, other)
    if late:
        return late
    if request.ttft_s is not None or request.tpot_s is not None:
        more = other.price / route.price - 1
        if more > 0.0005:
            return f"dearer by {more:.1%}: {other.price:.1f} against {route.price:.1f}"
        if more < -0.0005:
            return (
                f"cheaper by {-more:.1%}, within the spread of {request.spread:.0%} among which "
                "routes are drawn"
            )
        return (
            "the same price, and slower"
            if _whole(request, other) >= _whole(request, route)
            else "the same price within the spread among which routes are drawn"
        )
    more = _whole(request, other) / _whole(request, route) - 1
    if more >= 0:
        return (
            f"slower by {more:.1%}: first token {_ms(other.ttft_s)}, then {_ms(other.tpot_s)} each"
        )
    if request.previous is not None and _key(request.previous) == _key(route):
        return f"faster by {-more:.1%}: less than the {HYSTERESIS:.0%} for which a client moves"
    return (
        f"faster by {-more:.1%}, within the spread of {request.spread:.0%} among which routes "
        "are drawn, the less busy of two"
    )


def _binding(request: RouteRequest, route: Route, others: list[Route]) -> tuple[str, str]:
    """What decided, as a word and as a sentence."""
    if request.previous is not None and _key(request.previous) == _key(route):
        return (
            "previous",
            f"the route of the last request: no other is better by more than {HYSTERESIS:.0%}",
        )
    if request.ttft_s is None and request.tpot_s is None:
        return "speed", "without limits the fastest route is taken"
    cheaper = [other for other in others if other.price < route.price * (1 - 5e-4)]
    late = [other for other in cheaper if _late(request, other)]
    if not late:
        return "price", "the cheapest of all routes keeps the limits"
    ttft_s, tpot_s = at_percentile(request, late[0])
    over_t = request.tpot_s is not None and tpot_s > request.tpot_s
    over_a = request.ttft_s is not None and ttft_s > request.ttft_s
    name = "both" if over_t and over_a else "tpot" if over_t else "ttft"
    words = {
        "tpot": "the limit on the time per token",
        "ttft": "the limit on the first token",
        "both": "both limits",
    }
    return name, f"{words[name]}: cheaper routes do not keep it"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
