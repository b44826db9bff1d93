"""SWARM (Ryabinin et al., ICML'23) as Helix's authors made a baseline of it.

Every sender keeps, for each next unit, a moving average of how long a request sent there took, and
a priority: it sends to the unit with the least priority and adds the average to it. So units get
work in inverse proportion to their response times; memory, load elsewhere and links further on are
not looked at. Averages begin alike, 0.05 s, and a new figure weighs 0.8.

*Simplified.* The figure was taken by request, from the start of its sending to the end of its
computing. A policy here hears of batches: a unit's response is the time of a batch with prompts,
times the batches that what waits there will fill, and what sending a mean prompt takes on an
unloaded link is added. Each sender then averages what all its hops would report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.policy import Computed, Request, View, Visits
from hexswarm.simulator.rival_hops import Rival, flows

FIRST_S, NEW_WEIGHT = 0.05, 0.8


class Turns:
    """One sender's priorities."""

    def __init__(self, sending_s: Mapping[int, float]) -> None:
        """What a prompt to each next unit takes on its way."""
        self._sending_s = sending_s
        self.mean_s: dict[int, float] = {}
        self.priority: dict[int, float] = {}

    def choose(self, among: Sequence[int]) -> int:
        """The next one, whose priority grows by its mean time."""
        best = min(among, key=lambda at: (self.priority.get(at, FIRST_S), at))
        self.priority[best] = self.priority.get(best, FIRST_S) + self.mean_s.get(best, FIRST_S)
        return best

    def learn(self, unit: int, computing_s: float) -> None:
        """A unit took so long for prompts."""
        if unit in self._sending_s:
            new_s = computing_s + self._sending_s[unit]
            old_s = self.mean_s.get(unit, FIRST_S)
            self.mean_s[unit] = NEW_WEIGHT * new_s + (1 - NEW_WEIGHT) * old_s


class Swarm(Rival):
    """Every sender chooses for itself."""

    name = "swarm"

    def __init__(self, cluster: Cluster, model: Model, plan: Plan) -> None:
        super().__init__(cluster, model, plan, exact=flows(cluster, model, plan)[1])
        names = {at: plan.units[at].node for at, span in enumerate(plan.spans) if span}
        self._turns = {
            sender: Turns(self._sending_s(names, node))
            for sender, node in [(None, COORDINATOR), *names.items()]
        }

    def _sending_s(self, names: Mapping[int, str], sender: str) -> dict[int, float]:
        model = self.model
        token = model.token_bytes if sender == COORDINATOR else model.activation_bytes
        ways = {at: self.cluster.way(sender, node) for at, node in names.items()}
        size = model.input_tokens * token
        return {at: way.one_way_s + size / way.bytes_per_s for at, way in ways.items()}

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        def choose(sender: int | None, among: Sequence[int]) -> int:
            return self._turns[sender].choose(among)

        return self.walk(self.usable(now, view), choose)

    def computed(self, now: float, work: Computed) -> None:
        if work.prompt_tokens:
            batches = 1 + work.waiting / (work.decode_rows + 1)
            for turns in self._turns.values():
                turns.learn(work.unit, work.elapsed_s * batches)
