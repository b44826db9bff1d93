"""Filling the hole that lost stages leave in a running route; pure.

The cheapest repair replaces just the lost stages (`router.routing.replan`): the others keep their
KV, and one newcomer computes the history of a few layers. Where the peers that are left hold other
spans, so that they cannot fill that hole alone, it is widened by a stage to the left, to
the right, to both sides, and at last to the whole route; peers inside the wider hole may serve
again, with the span that fits now.

A repair keeps the request's limits if it can, with a wider hole if need be: a second of replay is
paid once, a missed limit with every token. If no route keeps them, the best there is goes on
without: somebody who is in the middle of an answer prefers it late to not at all, and the
`Completion` shows the route and what is predicted of it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import replace

from hexswarm.errors import NoRoute
from hexswarm.records import PeerId, Route, RouteRequest, Span, Stage
from hexswarm.router.network import Snapshot
from hexswarm.router.routing import replan

NOBODY = "-"
"""Stands for the peer of a stage that is to be filled; no peer id looks like this."""


def fill(
    snapshot: Snapshot,
    request: RouteRequest,
    route: Route,
    gone: Collection[PeerId],
    now: float,
    rng: random.Random,
) -> tuple[Route, RouteRequest]:
    """`route` without the peers in `gone`, changed as little as possible, and the request that it
    answers: without limits if none could be kept.

    `snapshot` knows every peer of the route. One of `gone` may be chosen again unless the request
    denies it: it may have come back. Raises NoRoute, that of the smallest hole.
    """
    free = replace(request, ttft_s=None, tpot_s=None)
    why: NoRoute | None = None
    for asked in [request, free] if request != free else [free]:
        why = None
        for holes in attempts(route, gone):
            try:
                return _filled(snapshot, asked, route, holes, now, rng), asked
            except NoRoute as error:
                why = why or error
    assert why is not None
    raise why


def kept(before: Route, after: Route) -> int:
    """How many stages go on with what they hold."""
    return len({(s.peer, s.span) for s in before.stages} & {(s.peer, s.span) for s in after.stages})


def attempts(route: Route, gone: Collection[PeerId]) -> Iterator[list[Span]]:
    """Sets of holes to fill, the smallest first."""
    stages = route.stages
    lost = [index for index, stage in enumerate(stages) if stage.peer in gone]
    exact = [stages[index].span for index in lost]
    yield joined(exact)
    first, last = lost[0], lost[-1]
    tried = {(first, last)} if len(joined(exact)) == 1 else set()
    for a, b in ((first, last), (first - 1, last), (first, last + 1), (first - 1, last + 1)):
        if a >= 0 and b < len(stages) and (a, b) not in tried:
            tried.add((a, b))
            yield [Span(stages[a].span.first, stages[b].span.end)]
    if (0, len(stages) - 1) not in tried:
        yield [Span(0, stages[-1].span.end)]


def joined(spans: list[Span]) -> list[Span]:
    """Spans in order, those that adjoin made one."""
    holes: list[Span] = []
    for span in spans:
        if holes and holes[-1].end == span.first:
            holes[-1] = Span(holes[-1].first, span.end)
        else:
            holes.append(span)
    return holes


def _filled(
    snapshot: Snapshot,
    request: RouteRequest,
    route: Route,
    holes: list[Span],
    now: float,
    rng: random.Random,
) -> Route:
    for hole in holes:
        route = replan(snapshot, request, _emptied(route, hole), hole, now, rng)
    return route


def _emptied(route: Route, hole: Span) -> Route:
    """Nobody serves the stages in the hole: whoever did is a candidate like all others."""
    stages = tuple(
        Stage(PeerId(f"{NOBODY}{index}"), stage.span) if hole.covers(stage.span) else stage
        for index, stage in enumerate(route.stages)
    )
    return replace(route, stages=stages)
