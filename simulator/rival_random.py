"""Any next hop, with equal chances: the least that a router can do (Helix's scheduling study)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.policy import Request, View, Visits
from hexswarm.simulator.rival_hops import Rival, flows


class Chance(Rival):
    """A seeded one."""

    name = "random"

    def __init__(self, cluster: Cluster, model: Model, plan: Plan, *, seed: int) -> None:
        super().__init__(cluster, model, plan, exact=flows(cluster, model, plan)[1])
        self._rng = Random(seed)

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        def choose(sender: int | None, among: Sequence[int]) -> int:
            return self._rng.choice(among)

        return self.walk(self.usable(now, view), choose)
