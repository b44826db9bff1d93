"""Separate pipelines: every machine serves in one pipeline, and pipelines share nothing.

What operators do without a planner for unlike machines: a pipeline for each type of machine, and
requests in turn to each by what it can take. Helix's authors compare with it at a load that they
fixed for each pipeline by hand; here turns are weighted by an estimate. A request whose pipeline
has no room for its KV tries the next one, else it waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from hexswarm.errors import UsageError
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.policy import Request, View, Visit, Visits
from hexswarm.simulator.rival_helix import RoundRobin
from hexswarm.simulator.rival_hops import Rival

Pipeline = tuple[int, ...]
"""Units in order of their layers."""


def chains(cluster: Cluster, model: Model, plan: Plan) -> tuple[Pipeline, ...]:
    """Disjoint pipelines in a plan: each unit is followed by one that begins where it ends, if
    possible of its own type and region. Units that find no place serve nobody."""
    kinds = [cluster.node(unit.node) for unit in plan.units]
    free = {at for at, span in enumerate(plan.spans) if span}
    found = []
    for head in sorted(free):
        pipeline, layer = [head], 0
        span = plan.spans[head]
        while span is not None and span.first == layer:
            layer = span.end
            here = kinds[pipeline[-1]]
            following = [at for at in free - {*pipeline} if _first(plan, at) == layer]
            if not following:
                break
            pipeline.append(
                min(
                    following,
                    key=lambda at: (
                        kinds[at].type != here.type,
                        kinds[at].region != here.region,
                        at,
                    ),
                )
            )
            span = plan.spans[pipeline[-1]]
        if layer == model.layers and free.issuperset(pipeline):
            found.append(tuple(pipeline))
            free -= {*pipeline}
    return tuple(found)


def _first(plan: Plan, at: int) -> int:
    span = plan.spans[at]
    return span.first if span else -1


def requests_per_s(model: Model, plan: Plan, pipeline: Pipeline) -> float:
    """What a pipeline can take of requests with mean lengths: as many as its slowest stage computes
    when all that its KV has room for decode in one batch, and no more than are through in the time
    that one of them takes."""
    held = [(plan.units[at].profile, plan.spans[at]) for at in pipeline]
    layers = [(profile, len(span)) for profile, span in held if span]
    tokens = model.input_tokens + model.output_tokens
    rows = max(1.0, min(profile.kv_tokens[k] for profile, k in layers) / tokens)
    prompt_s = [k * profile.prefill_layer_s(model.input_tokens) for profile, k in layers]
    step_s = [k * profile.decode_layer_s(rows) for profile, k in layers]
    busy_s = [a + model.output_tokens * b / rows for a, b in zip(prompt_s, step_s, strict=True)]
    life_s = sum(prompt_s) + model.output_tokens * sum(step_s)
    return min(1 / max(busy_s), rows / life_s)


class Pipelines(Rival):
    """What policies with disjoint pipelines have in common."""

    def __init__(
        self,
        cluster: Cluster,
        model: Model,
        plan: Plan,
        pipelines: Sequence[Pipeline] | None = None,
    ) -> None:
        super().__init__(cluster, model, plan, exact=True)
        self.pipelines = tuple(pipelines) if pipelines else chains(cluster, model, plan)
        if not self.pipelines:
            raise UsageError("the plan has no pipeline of its own that holds all layers")
        self.rates = [requests_per_s(model, plan, pipeline) for pipeline in self.pipelines]

    def able(self, now: float, view: View) -> list[int]:
        """Pipelines of which every unit may be used now."""
        usable = self.usable(now, view)
        return [at for at, units in enumerate(self.pipelines) if usable.issuperset(units)]

    def visits(self, pipeline: int) -> Visits:
        """All of its units with all they hold."""
        return tuple(Visit(at, self._held[at]) for at in self.pipelines[pipeline])


class Separate(Pipelines):
    """Weighted turns."""

    name = "separate"

    def __init__(
        self,
        cluster: Cluster,
        model: Model,
        plan: Plan,
        pipelines: Sequence[Pipeline] | None = None,
    ) -> None:
        super().__init__(cluster, model, plan, pipelines)
        self._turns = RoundRobin(dict(enumerate(self.rates)))

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        chosen = self._turns.choose(request.input_tokens, self.able(now, view))
        if chosen is None:
            return None
        self._turns.take(request.input_tokens, chosen)
        return self.visits(chosen)
