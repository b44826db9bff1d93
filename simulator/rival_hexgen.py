"""HexGen (Jiang et al., ICML'24): disjoint groups, and a queue that feeds the least loaded one.

Its planner (`hexswarm.router.placement.pipelines` has one after it) makes pipelines whose stages
have tensor-parallel groups and layers of their own; a request belongs to one pipeline for life. Its
dispatcher is not part of the released code; its optimiser's own simulation gives each pipeline a
queue. Here a request goes to the pipeline with the least work in relation to what it can take, and
waits at the coordinator while none has room for its KV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hexswarm.records import Load
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.policy import Request, View, Visits
from hexswarm.simulator.rival_separate import Pipeline, Pipelines


class HexGen(Pipelines):
    """The least loaded pipeline."""

    name = "hexgen"

    def __init__(
        self,
        cluster: Cluster,
        model: Model,
        plan: Plan,
        pipelines: Sequence[Pipeline] | None = None,
    ) -> None:
        super().__init__(cluster, model, plan, pipelines)
        self._serves: dict[int, int] = {}
        """Pipeline of each request under way."""
        self._loads = [0] * len(self.pipelines)

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        self._leave(request)
        able = self.able(now, view)
        if not able:
            return None
        chosen = min(able, key=lambda at: ((self._loads[at] + 1) / self.rates[at], at))
        self._serves[request.id] = chosen
        self._loads[chosen] += 1
        return self.visits(chosen)

    def refused(
        self, now: float, request: Request, refusing: frozenset[int], loads: Mapping[int, Load]
    ) -> None:
        self._leave(request)

    def ended(self, now: float, request: Request, visits: Visits) -> None:
        self._leave(request)

    def _leave(self, request: Request) -> None:
        held = self._serves.pop(request.id, None)
        if held is not None:
            self._loads[held] -= 1
