"""Where others would put the layers: the placement rules of our rivals, so that any cluster can be
run with any of them; and the reader of the placements that Helix's authors published.

- *Swarm* (Ryabinin et al., ICML'23, as Helix's authors model it): stages of equal length, as few as
  the smallest machine allows; machines from the fastest on join the stage that has least speed.
- *Petals* (Borzunov et al., NeurIPS'23, appendix D): machines come in random order, each holds as
  many layers as it can, in the window whose sorted speeds are the least: the weakest stretch.
- *Separate pipelines*: machines of one type form pipelines of their own, cut evenly.

None of them looks at links. A type whose machines cannot hold the whole model under the cluster
file's limit (Helix: weights in half of the memory) is *stretched* for separate pipelines, as
Helix's authors did: more layers, and for KV what memory then leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from random import Random
from typing import Any

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.cluster import Cluster, Model, Profile
from hexswarm.router.placement.plan import Plan, Unit, parse_spans, whole_units

REQUEST_TOKENS = 2048 + 1024
"""A machine that has no room for the KV of one long request does not hold that many layers."""


def swarm(cluster: Cluster, name: str, units: Sequence[Unit] | None = None) -> Plan:
    """Equal stages with about equal speed."""
    model, units = cluster.model(name), units or whole_units(cluster, name)
    most = min((unit.profile.max_layers for unit in units), default=0)
    fitting = [size for size in range(1, most + 1) if model.layers % size == 0]
    if not fitting or len(units) < model.layers // fitting[-1]:
        raise UsageError(f"{cluster.name} has too few machines for equal stages of {name}")
    size = fitting[-1]
    speeds = [0.0] * (model.layers // size)
    spans: list[Span | None] = [None] * len(units)
    rate = [unit.profile.throughput[size] for unit in units]
    for at in sorted(range(len(units)), key=lambda at: (rate[at], at), reverse=True):
        stage = speeds.index(min(speeds))
        speeds[stage] += rate[at]
        spans[at] = Span(stage * size, (stage + 1) * size)
    return Plan(name, cluster.name, tuple(units), tuple(spans))


def petals(cluster: Cluster, name: str, rng: Random, units: Sequence[Unit] | None = None) -> Plan:
    """Every machine takes the weakest stretch that it finds, in random order of coming."""
    model, units = cluster.model(name), units or whole_units(cluster, name)
    coming = list(range(len(units)))
    rng.shuffle(coming)
    speeds = [0.0] * model.layers
    spans: list[Span | None] = [None] * len(units)
    for at in coming:
        profile = units[at].profile
        held = min(profile.max_layers, model.layers)
        first = min(
            range(model.layers - held + 1), key=lambda first: sorted(speeds[first : first + held])
        )
        spans[at] = Span(first, first + held)
        for layer in range(first, first + held):
            speeds[layer] += profile.throughput[held]
    return Plan(name, cluster.name, tuple(units), tuple(spans))


def separate(cluster: Cluster, name: str) -> Plan:
    """Pipelines of machines of one type each; a type that cannot hold the model idles."""
    model = cluster.model(name)
    by_type: dict[str, list[Unit]] = {}
    for unit in whole_units(cluster, name):
        by_type.setdefault(cluster.node(unit.node).type, []).append(unit)
    chosen: dict[str, tuple[Unit, Span | None]] = {}
    for units in by_type.values():
        ordered = sorted(units, key=lambda unit: cluster.node(unit.node).region)
        room = sum(unit.profile.max_layers for unit in ordered)
        pipelines = min(max(1, room // model.layers), len(ordered))
        for number in range(pipelines):
            for unit, span in _even(model, ordered[number::pipelines]):
                chosen[unit.id] = unit, span
    if not any(span for _, span in chosen.values()):
        raise UsageError(f"no type of machine of {cluster.name} can hold {name} by itself")
    found = [chosen[node.id] for node in cluster.nodes if node.id in chosen]
    spans = tuple(span for _, span in found)
    return Plan(name, cluster.name, tuple(unit for unit, _ in found), spans)


def _even(model: Model, units: Sequence[Unit]) -> list[tuple[Unit, Span | None]]:
    """One pipeline over all of them, longer parts last; all idle if it does not fit."""
    least, longer = divmod(model.layers, len(units))
    sizes = [least] * (len(units) - longer) + [least + 1] * longer
    wide = [stretched(unit, model, size) for unit, size in zip(units, sizes, strict=True)]
    if least == 0 or not all(wide):
        return [(unit, None) for unit in units]
    ends = list(accumulate(sizes, initial=0))
    return [(unit, Span(*cut)) for unit, cut in zip(wide, pairwise(ends), strict=True) if unit]


def stretched(unit: Unit, model: Model, layers: int, kv_tokens: int | None = None) -> Unit | None:
    """The unit with a profile that allows so many layers; None: nothing is left for KV.

    Memory is what weights and KV take together at the most layers that the profile knows; speed
    falls as layers grow. `kv_tokens` is the room where somebody measured it.
    """
    profile = unit.profile
    if layers <= profile.max_layers:
        return unit
    most = profile.max_layers
    memory = most * (model.layer_bytes + profile.kv_tokens[most] * model.kv_bytes)
    rate, room = list(profile.throughput), list(profile.kv_tokens)
    for held in range(most + 1, layers + 1):
        rate.append(rate[most] * most / held)
        room.append(int((memory / held - model.layer_bytes) / model.kv_bytes))
    if kv_tokens is not None:
        room[layers] = kv_tokens
    if kv_tokens is None and room[layers] < REQUEST_TOKENS:
        return None
    rows = profile.most_rows and (
        *profile.most_rows,
        *[profile.most_rows[most]] * (layers - most),
    )
    return replace(unit, profile=_longer(profile, rate, room, rows))


def _longer(
    profile: Profile, rate: Sequence[float], room: Sequence[int], rows: Sequence[int]
) -> Profile:
    return replace(
        profile,
        throughput=tuple(rate),
        kv_tokens=tuple(max(0, tokens) for tokens in room),
        most_rows=tuple(rows),
    )


def published(cluster: Cluster, said: Mapping[str, Any]) -> Plan:
    """A plan of whole machines from its JSON, which may stretch: `kv_tokens` then tells the room,
    by type and number of layers (`benchmarks/plans/separate-*-70b.json`)."""
    name = said["model"]
    model, spans = cluster.model(name), parse_spans(said["nodes"])
    units = []
    for unit in whole_units(cluster, name):
        span = spans.get(unit.id)
        room = said.get("kv_tokens", {}).get(cluster.node(unit.node).type, {})
        held = span and stretched(unit, model, len(span), room.get(str(len(span))))
        units.append(held or unit)
    if unknown := set(spans) - {unit.id for unit in units}:
        raise UsageError(f"{cluster.name} has no machine {sorted(unknown)[0]!r} for {name}")
    return Plan(name, cluster.name, tuple(units), tuple(spans.get(unit.id) for unit in units))
