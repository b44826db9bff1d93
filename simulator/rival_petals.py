"""Petals (Borzunov et al., ACL'23 and NeurIPS'23): the client's shortest path for one token.

Every client runs Dijkstra over servers: half a round trip and 18 ms for each hand-over, 1 / speed
for each layer, 10 s where the announced free cache would not hold the session. A chosen server runs
all its layers from the entered one on; the path is kept for life. Speeds are announced as measured
alone, one token at a time, and never again, so all clients find the same best path until its cache
is announced as full: no load, no queue, no prompt length, no bandwidth.

*Simplified, in its favour.* Servers batch the steps of all sessions, as everybody's do here (Petals
computes them one after another); a hand-over goes from server to server (its newest release sends
all over the client); pings are the true ones (unknown: 0.15 s). A session takes its cache for the
prompt and the mean answer; a refusal sends it to the next best path, else it asks again after a
second.
"""

from __future__ import annotations

import heapq

from hexswarm.records import Span
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.policy import Execution, Request, View, Visit, Visits
from hexswarm.simulator.rival_hops import Rival

HANDING_S, NO_CACHE_S, MOST_RTT_S = 0.018, 10.0, 10.0


class Petals(Rival):
    """What its clients do."""

    name = "petals"
    execution = Execution(chunked=False, ring=False, lanes=False, opens=True, central=False)

    def __init__(self, cluster: Cluster, model: Model, plan: Plan) -> None:
        super().__init__(cluster, model, plan)
        self._layer_s = [unit.profile.decode_layer_s(1) for unit in plan.units]
        self._nodes = [unit.node for unit in plan.units]
        self._ways: dict[tuple[str, str], float] = {}
        self._paths: dict[object, Visits | None] = {}

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        usable = self.usable(now, view)
        tokens = request.input_tokens + self.model.output_tokens
        lacking = frozenset(
            unit
            for unit in usable
            if (word := view.announced[unit]) is not None and word.free_kv_tokens < tokens
        )
        key = request.client, usable, lacking
        if key not in self._paths:
            self._paths[key] = self._shortest(request.client, usable, lacking)
        return self._paths[key]

    def _shortest(
        self, client: str, usable: frozenset[int], lacking: frozenset[int]
    ) -> Visits | None:
        """Dijkstra over units; each is entered where the one before it ends."""
        heap: list[tuple[float, int, int, Visits]] = [(0.0, -1, 0, ())]
        settled: set[int] = set()
        pushed = 0  # breaks ties by age: visits have no order
        while heap:
            seconds, unit, _, visits = heapq.heappop(heap)
            if unit in settled:
                continue
            settled.add(unit)
            layer = visits[-1].span.end if visits else 0
            if layer == self.model.layers:
                return visits
            for following in self.candidates(usable, layer):
                if following not in settled:
                    span = Span(layer, self._held[following].end)
                    cost_s = self._hop_s(client, unit, following)
                    cost_s += len(span) * self._layer_s[following]
                    cost_s += NO_CACHE_S if following in lacking else 0.0
                    if span.end == self.model.layers:
                        cost_s += self._half_rtt_s(self._nodes[following], client)
                    pushed += 1
                    route = (*visits, Visit(following, span))
                    heapq.heappush(heap, (seconds + cost_s, following, pushed, route))
        return None

    def _hop_s(self, client: str, sender: int, receiver: int) -> float:
        start = client if sender < 0 else self._nodes[sender]
        return self._half_rtt_s(start, self._nodes[receiver]) + HANDING_S

    def _half_rtt_s(self, a: str, b: str) -> float:
        if (a, b) not in self._ways:
            rtt_s = self.cluster.way(a, b).one_way_s + self.cluster.way(b, a).one_way_s
            self._ways[a, b] = min(rtt_s, MOST_RTT_S) / 2
        return self._ways[a, b]
