"""Helix (Mei et al., ASPLOS'25): per-request pipelines that follow the max-flow.

Every sender, the coordinator first, does *interleaved weighted round-robin* over its next hops: the
one whose load, with this prompt's tokens over its flow, would be least. So in the long run hops
carry tokens in proportion to the flow. Left out are hops with less than 5 % of what the sender
hands on, and units whose KV would, by estimate, pass a high-water mark: every request is expected
to hold its prompt and a share of the mean answer in every layer, from the choice to its end.

As in its artifact: 0.9 and 0.6 for online serving, whole prompts, tokens over the coordinator, a
path for life, the route chosen at once on arrival. Online its scheduler asserts that a hop is left;
here the request waits until another one ends (as its offline mode does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hexswarm.records import Load
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.policy import Request, View, Visits
from hexswarm.simulator.rival_hops import Rival, flows, shares

HIGH_WATER, OUTPUT_RATIO = 0.9, 0.6
"""Online; offline 0.85 and 1."""

LEAST_SHARE = 0.05


class RoundRobin:
    """One sender's turn-taking: loads in seconds of flow."""

    def __init__(self, weights: Mapping[int, float]) -> None:
        self.weights = dict(weights)
        self.loads = dict.fromkeys(self.weights, 0.0)

    def choose(self, tokens: float, among: Sequence[int]) -> int | None:
        """The one with the least load after these tokens; None: none of them has weight."""
        after = [
            (self.loads[at] + tokens / weight, at) for at, weight in shares(self.weights, among)
        ]
        return min(after)[1] if after else None

    def take(self, tokens: float, at: int) -> None:
        """Tokens go that way."""
        self.loads[at] += tokens / self.weights[at]


class Room:
    """The KV that units are expected to hold, in tokens times layers."""

    def __init__(self, plan: Plan, high_water: float) -> None:
        self._layers = [len(span) if span else 0 for span in plan.spans]
        self._most = [
            high_water * unit.profile.kv_tokens[layers] * layers
            for unit, layers in zip(plan.units, self._layers, strict=True)
        ]
        self.held = [0.0] * len(plan.units)
        """By unit, as expected of the requests that have a route."""
        self._booked: dict[int, tuple[float, Visits]] = {}

    def fits(self, unit: int, tokens: float) -> bool:
        """Whether one more request stays below the mark, as if it used all layers there."""
        return self.held[unit] + tokens * self._layers[unit] <= self._most[unit]

    def book(self, request: int, tokens: float, visits: Visits) -> None:
        """A request has a route."""
        self._booked[request] = tokens, visits
        for visit in visits:
            self.held[visit.unit] += tokens * len(visit.span)

    def free(self, request: int) -> None:
        """It has none any more."""
        tokens, visits = self._booked.pop(request, (0.0, ()))
        for visit in visits:
            self.held[visit.unit] -= tokens * len(visit.span)


class Helix(Rival):
    """The coordinator of Helix."""

    name = "helix"

    def __init__(
        self,
        cluster: Cluster,
        model: Model,
        plan: Plan,
        *,
        high_water: float = HIGH_WATER,
        output_ratio: float = OUTPUT_RATIO,
    ) -> None:
        carried, exact = flows(cluster, model, plan)
        super().__init__(cluster, model, plan, exact=exact)
        self.room = Room(plan, high_water)
        self._answer = output_ratio * model.output_tokens
        senders = {sender for sender, _ in carried}
        self._turns = {sender: RoundRobin(_heavy(carried, sender)) for sender in senders}

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        self.room.free(request.id)
        tokens = float(int(request.input_tokens + self._answer))

        def choose(sender: int | None, among: Sequence[int]) -> int | None:
            fitting = [at for at in among if self.room.fits(at, tokens)]
            turns = self._turns.get(sender)
            return turns.choose(request.input_tokens, fitting) if turns else None

        visits = self.walk(self.usable(now, view), choose)
        if visits is not None:
            self._take(request, visits)
            self.room.book(request.id, tokens, visits)
        return visits

    def _take(self, request: Request, visits: Visits) -> None:
        """Its turns count only once the whole route is found."""
        sender: int | None = None
        for visit in visits:
            self._turns[sender].take(request.input_tokens, visit.unit)
            sender = visit.unit

    def refused(
        self, now: float, request: Request, refusing: frozenset[int], loads: Mapping[int, Load]
    ) -> None:
        self.room.free(request.id)

    def ended(self, now: float, request: Request, visits: Visits) -> None:
        self.room.free(request.id)


def _heavy(
    carried: Mapping[tuple[int | None, int | None], float], sender: int | None
) -> dict[int, float]:
    """What it hands to each next unit, without the slight ones."""
    out = {b: rate for (a, b), rate in carried.items() if a == sender and b is not None}
    total = sum(out.values())
    return {at: rate for at, rate in out.items() if rate >= LEAST_SHARE * total}
