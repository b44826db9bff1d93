"""What there is to say of a plan: its flow, the bound, what binds, the times to expect.

Worked out once by `facts` for the table, the JSON and the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hexswarm.paint import counted, layers_text
from hexswarm.router.placement.binding import Binding, Use
from hexswarm.router.placement.bound import upper_bound
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.expected import Estimate, Load
from hexswarm.router.placement.flow import Edge
from hexswarm.router.placement.plan import Plan, Unit
from hexswarm.router.placement.worth import expected, worth
from hexswarm.svg import harmless, milliseconds

USUAL = 0.5
"""Of the flow: the load at which times are told if none is asked for."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A plan and its figures."""

    cluster: Cluster
    model: Model
    plan: Plan
    flow: float
    """Tokens a second."""
    bound: float
    edges: tuple[Edge, ...]
    uses: tuple[Use, ...]
    binding: Binding
    load: float
    """Tokens a second at which `expected` holds; 0 where nothing flows."""
    expected: Estimate | None

    @property
    def ratio(self) -> float:
        """Flow over bound."""
        return self.flow / self.bound if self.bound else 0.0


def facts(cluster: Cluster, plan: Plan, load: float | None) -> Facts:
    """Of a plan for this cluster."""
    model = cluster.model(plan.model)
    found = worth(cluster, model, plan)
    at = load or USUAL * found.flow
    return Facts(
        cluster=cluster,
        model=model,
        plan=plan,
        flow=found.flow,
        bound=upper_bound(cluster, model, plan.units),
        edges=found.edges,
        uses=found.uses,
        binding=found.binding,
        load=at,
        expected=expected(cluster, model, plan, found, Load.of(model, at)) if at > 0 else None,
    )


def gpus(facts: Facts, unit: Unit) -> str:
    """ "4 x L4", "n0: 3 x A6000"."""
    if not unit.grouped:
        kind = facts.cluster.types[facts.cluster.node(unit.node).type]
        return f"{kind.gpus} x {harmless(kind.gpu, 20)}"
    counted: dict[str, int] = {}
    for node, _ in unit.members:
        gpu = facts.cluster.types[facts.cluster.node(node).type].gpu
        counted[gpu] = counted.get(gpu, 0) + 1
    return " + ".join(f"{count} x {harmless(gpu, 20)}" for gpu, count in counted.items())


def cut(unit: Unit) -> str:
    """How a group's layers are cut: "2 equal parts", "50 25 25 %"."""
    if not unit.grouped or len(unit.shares) < 2:
        return ""
    if max(unit.shares) - min(unit.shares) < 1e-4:
        return f"{len(unit.shares)} equal parts"
    return " ".join(f"{share:.0%}"[:-1] for share in unit.shares) + " %"


def what_binds(facts: Facts) -> str:
    """The first narrowest cut in words."""
    if not facts.edges:
        holes = facts.plan.missing(facts.model.layers)
        return "nobody holds " + ", ".join(map(layers_text, holes)) if holes else "no way through"
    found = facts.binding
    units = [f"{name(facts, unit)} ({layers(facts, unit)})" for unit in found.units]
    links = [f"{name(facts, a)} -> {name(facts, b)}" for a, b in found.links]
    more = len(found.all_units) + len(found.all_links) - len(units) - len(links)
    words = listed(units) + (" and the links " if units and links else "links " if links else "")
    words += listed(links)
    if not words:
        words = "the coordinator's own connection"
    return words + (f"; as narrow elsewhere: {more} more" if more > 0 else "")


def listed(words: Sequence[str], most: int = 8) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def name(facts: Facts, unit: int | None) -> str:
    return "coordinator" if unit is None else harmless(facts.plan.units[unit].id, 40)


def layers(facts: Facts, unit: int) -> str:
    span = facts.plan.spans[unit]
    return layers_text(span) if span else "idle"


def expected_text(facts: Facts) -> str:
    """The times to expect, in a line."""
    told = facts.expected
    if told is None or not math.isfinite(told.tpot_s):
        return "nothing can be served"
    words = (
        f"at {facts.load:,.1f} tokens/s: {milliseconds(told.tpot_s)} per token, first token after "
        f"{milliseconds(told.ttft_s)} (long prompts {milliseconds(told.long_ttft_s)}), "
        f"{told.stages:.1f} stages, busiest unit {told.busiest:.0%}, fullest KV {told.kv:.0%}"
    )
    return words + ("; overloaded" if max(told.busiest, told.kv) >= 1 else "")


def plan_table(facts: Facts) -> str:
    """One row a unit, by pipeline and first layer; then the figures."""
    order = sorted(range(len(facts.plan.units)), key=lambda at: _order(facts, at))
    head = ("", "node", "GPUs", "layers", "cut", "tokens/s", "used", "")
    rows: list[tuple[str, ...]] = [head, *(_row(facts, at) for at in order)]
    kept = [column for column in range(8) if column in (1, 7) or any(r[column] for r in rows[1:])]
    wide = [max(len(row[column]) for row in rows) for column in range(8)]
    right = {3, 5, 6}
    table = [
        "  ".join(
            row[column].rjust(wide[column]) if column in right else row[column].ljust(wide[column])
            for column in kept
        ).rstrip()
        for row in rows
    ]
    idle = sum(span is None for span in facts.plan.spans)
    units = f"{counted(len(facts.plan.units), 'unit')}, {idle} idle"
    if facts.plan.pipelines:
        units += f", {counted(len(facts.plan.pipelines), 'pipeline')} that share nothing"
    about = f"{facts.model.name} on {harmless(facts.cluster.name)}: {facts.model.layers} layers, "
    return "\n".join(
        [
            about + units,
            "",
            *table,
            "",
            f"flow      {facts.flow:,.3f} tokens/s, {facts.ratio:.1%} of the bound "
            f"{facts.bound:,.3f}",
            f"expected  {expected_text(facts)}",
            f"binds     {what_binds(facts)}",
        ]
    )


def _row(facts: Facts, at: int) -> tuple[str, ...]:
    unit, span, use = facts.plan.units[at], facts.plan.spans[at], facts.uses[at]
    line = _pipeline(facts.plan, at)
    return (
        "" if line is None else f"pipeline {line + 1}",
        harmless(unit.id, 24),
        gpus(facts, unit),
        str(span) if span else "idle",
        cut(unit),
        f"{use.carried:,.1f}" if span else "",
        f"{use.carried / use.capacity:.0%}" if use.capacity else "",
        "binds" if at in facts.binding.all_units else "",
    )


def _pipeline(plan: Plan, at: int) -> int | None:
    """Number of a unit's pipeline; None: there are none, or it idles."""
    return next((line for line, units in enumerate(plan.pipelines) if at in units), None)


def _order(facts: Facts, at: int) -> tuple[bool, int, int, int, int]:
    span, line = facts.plan.spans[at], _pipeline(facts.plan, at)
    ends = (span.first, span.end) if span else (0, 0)
    return (span is None, line or 0, *ends, at)


def plan_json(facts: Facts) -> dict[str, Any]:
    """The plan as its file has it, and its figures under "figures"."""
    told = facts.expected
    return {
        **facts.plan.to_json(),
        "figures": {
            "flow_tokens_per_s": facts.flow,
            "bound_tokens_per_s": facts.bound,
            "ratio": facts.ratio,
            "load_tokens_per_s": facts.load,
            "expected": told
            and {
                field: _finite(getattr(told, field))
                for field in ("ttft_s", "long_ttft_s", "tpot_s", "stages", "busiest", "kv")
            },
            "binds": {
                "units": [name(facts, unit) for unit in facts.binding.units],
                "links": [[name(facts, a), name(facts, b)] for a, b in facts.binding.links],
            },
            "units": {
                unit.id: {"tokens_per_s": use.carried, "capacity_tokens_per_s": use.capacity}
                for unit, use in zip(facts.plan.units, facts.uses, strict=True)
            },
            "edges": [
                [name(facts, e.sender), name(facts, e.receiver), e.tokens_per_s]
                for e in facts.edges
            ],
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
