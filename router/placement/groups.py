"""Tensor-parallel groups: how the GPUs of a machine, or of a LAN, are put together into units.

A machine of eight GPUs may serve as one unit of degree 8, as two of degree 4, as 4 + 2 + 2, ...:
wide groups read weights sooner, narrow ones lose less in all-reduces. The choices are few (a
machine's GPUs are alike, so a grouping is a partition of their number into the degrees that HexGen
tries, 18 for 8 GPUs), therefore they are listed, and the search over placements varies them
(`regroup`).

A member's share of a layer is a whole number of KV heads, since attention is cut by heads; 8 heads
on 3 GPUs are 3 + 3 + 2. Among unlike GPUs shares follow min(part of the memory, part of the
speed): more than its part of the memory would bound how many layers the group can hold, more than
its part of the speed would hold up every step. Heads go one by one to the member that is then the
least loaded in that sense. Groups over the machines of one LAN pay for its round trip at every
layer (`speeds.Lan`); beyond 2 ms they are not offered.

Rejected: cutting columns apart from heads (finer, but a member's two parts then differ and the
slower half still decides); groups that leave a GPU idle (the search may idle a unit instead).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hexswarm.errors import UsageError
from hexswarm.router.placement.cluster import Cluster, GpuSpec, Model, Node, Profile
from hexswarm.router.placement.plan import (
    SCHEMA,
    Gpu,
    Plan,
    Unit,
    leader,
    parse_spans,
    whole_units,
)
from hexswarm.router.placement.speeds import Lan, estimate_of, profile

DEGREES = (1, 2, 3, 4, 6, 8)
"""What HexGen's optimiser tries."""

MOST_GPUS = 8
"""Of a machine that is regrouped; larger ones have too many partitions to list."""

_LAN_ROUND_TRIP_S = 2e-3
_HEAD_BYTES = 512.0
"""KV of one token in one layer and head: keys and values, 128 numbers of two bytes each."""

Grouping = tuple[Unit, ...]


def kv_heads(model: Model) -> int:
    """Into how many parts a layer can be cut at most, for heads of 128 in 16 bits."""
    return max(1, round(model.kv_bytes / _HEAD_BYTES))


def shares_of(model: Model, members: Sequence[GpuSpec]) -> tuple[float, ...] | None:
    """Each member's part of every layer, in whole KV heads; None: fewer heads than members."""
    heads = kv_heads(model)
    if heads < len(members):
        return None
    memory = sum(gpu.memory_bytes for gpu in members)
    rate = sum(gpu.memory_bytes_per_s for gpu in members)
    flops = sum(gpu.flops for gpu in members)
    worth = [
        min(gpu.memory_bytes / memory, gpu.memory_bytes_per_s / rate, gpu.flops / flops)
        for gpu in members
    ]
    held = [1] * len(members)
    for _ in range(heads - len(members)):
        next_load = [(count + 1) / part for count, part in zip(held, worth, strict=True)]
        held[next_load.index(min(next_load))] += 1
    return tuple(count / heads for count in held)


def group(cluster: Cluster, model: Model, members: Sequence[Gpu]) -> Unit | None:
    """These GPUs as one unit; None: not one layer fits, or there are too few heads for them.

    A whole machine or an equal part of it has the file's own table, if it has one.
    """
    names = list(dict.fromkeys(name for name, _ in members))
    nodes = [cluster.node(name) for name in names]
    specs = [spec_of(cluster, cluster.node(name)) for name, _ in members]
    shares = shares_of(model, specs)
    if shares is None:
        return None
    speed = _measured(cluster, model, nodes, shares)
    if speed is None:
        speed = profile(model, estimate_of(cluster), specs, shares, _lan(cluster, nodes))
    if speed is None:
        return None
    return Unit(name_of(members), leader(cluster, members).id, speed, tuple(members), shares)


def name_of(members: Sequence[Gpu]) -> str:
    """`n4/0-2` for neighbouring GPUs of one machine, machines joined by `+`."""
    held: dict[str, list[int]] = {}
    for name, gpu in members:
        held.setdefault(name, []).append(gpu)
    return "+".join(f"{name}/{_run(sorted(gpus))}" for name, gpus in held.items())


def partitions(count: int, degrees: Sequence[int] = DEGREES) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a sum of degrees, the largest first."""
    if count == 0:
        yield ()
    for degree in sorted(degrees, reverse=True):
        if degree <= count:
            rest = [other for other in degrees if other <= degree]
            for tail in partitions(count - degree, rest):
                yield degree, *tail


def groupings(cluster: Cluster, model: Model, node: Node) -> tuple[Grouping, ...]:
    """All ways to group a machine's GPUs in which every group holds at least one layer."""
    gpus = cluster.types[node.type].gpus
    if gpus > MOST_GPUS:
        raise UsageError(
            f"{node.id} has {gpus} GPUs; machines are grouped up to {MOST_GPUS}",
            remedy="describe it as two machines in one region",
        )
    made = (grouping(cluster, model, node, sizes) for sizes in partitions(gpus))
    return tuple(found for found in made if found)


def grouping(cluster: Cluster, model: Model, node: Node, degrees: Sequence[int]) -> Grouping | None:
    """A machine's GPUs in groups of these sizes, in order; None: some group is impossible."""
    if sum(degrees) > cluster.types[node.type].gpus:
        raise UsageError(f"{node.id} has fewer than {sum(degrees)} GPUs")
    units, begin = [], 0
    for degree in degrees:
        unit = group(cluster, model, [(node.id, gpu) for gpu in range(begin, begin + degree)])
        if unit is None:
            return None
        units.append(unit)
        begin += degree
    return tuple(units)


def lan_groups(cluster: Cluster, model: Model) -> tuple[Unit, ...]:
    """Pairs of whole machines whose round trip is below 2 ms, as one group each."""
    found = []
    for row, first in enumerate(cluster.nodes):
        for second in cluster.nodes[row + 1 :]:
            if 2 * cluster.way(first.id, second.id).one_way_s >= _LAN_ROUND_TRIP_S:
                continue
            unit = group(cluster, model, _gpus(cluster, first) + _gpus(cluster, second))
            found += [unit] if unit else []
    return tuple(found)


def parse_plan(cluster: Cluster, said: Any) -> Plan:
    """A plan from its JSON, as `plan` has it; UsageError names what is wrong with it."""
    if not isinstance(said, dict) or said.get("schema") != SCHEMA:
        raise UsageError("this is not a plan", remedy=f'it is JSON whose "schema" is "{SCHEMA}"')
    meant = said.get("cluster", cluster.name)
    if meant != cluster.name:
        raise UsageError(
            f"the plan is for cluster {meant}, not for {cluster.name}",
            remedy='name that cluster\'s file, or change "cluster" in the plan',
        )
    try:
        model = cluster.model(said["model"])
        spans = parse_spans(said["nodes"])
        whole = {unit.id: unit for unit in whole_units(cluster, model.name)}
        units = [_named(whole, cluster, model, name) for name in spans]
        held = list(spans.values())
        for group in said.get("groups", ()):
            unit = _parse_group(cluster, model, group)
            units.append(unit)
            held.append(parse_spans({unit.id: group["layers"]})[unit.id])
        lines = _parse_pipelines([unit.id for unit in units], said.get("pipelines", ()))
    except KeyError as error:
        raise UsageError(f"the plan lacks the field {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the plan has a field of the wrong kind: {error}") from None
    plan = Plan(model.name, cluster.name, tuple(units), tuple(held), lines)
    _check(cluster, model, plan)
    return plan


def _named(whole: Mapping[str, Unit], cluster: Cluster, model: Model, name: str) -> Unit:
    cluster.node(name)
    if name not in whole:
        raise UsageError(f"{name} cannot hold one layer of {model.name}")
    return whole[name]


def _parse_group(cluster: Cluster, model: Model, said: Mapping[str, Any]) -> Unit:
    members = tuple((str(name), int(gpu)) for name, gpu in said["members"])
    shares = tuple(float(share) for share in said["shares"])
    for name, gpu in members:
        if not 0 <= gpu < cluster.types[cluster.node(name).type].gpus:
            raise UsageError(f"machine {name} has no GPU {gpu}")
    if len(shares) != len(members) or min(shares, default=0.0) <= 0:
        raise UsageError(f"group {said['id']} has one positive number under shares for each member")
    unit = group(cluster, model, members)
    if unit and all(abs(a - b) < 1e-4 for a, b in zip(unit.shares, shares, strict=True)):
        return replace(unit, id=str(said["id"]))
    whole = tuple(share / sum(shares) for share in shares)
    nodes = [cluster.node(name) for name in dict.fromkeys(name for name, _ in members)]
    specs = [spec_of(cluster, cluster.node(name)) for name, _ in members]
    speed = profile(model, estimate_of(cluster), specs, whole, _lan(cluster, nodes))
    if speed is None:
        raise UsageError(f"group {said['id']} cannot hold one layer of {model.name}")
    return Unit(str(said["id"]), leader(cluster, members).id, speed, members, whole)


def _parse_pipelines(
    ids: Sequence[str], said: Sequence[Sequence[str]]
) -> tuple[tuple[int, ...], ...]:
    if doubled := {id for id in ids if ids.count(id) > 1}:
        raise UsageError(f"two units of the plan are called {min(doubled)}")
    place = {id: at for at, id in enumerate(ids)}
    if unknown := {str(id) for line in said for id in line} - {*place}:
        raise UsageError(f"a pipeline names {min(unknown)}, which is no unit of the plan")
    return tuple(tuple(place[id] for id in line) for line in said)


def _check(cluster: Cluster, model: Model, plan: Plan) -> None:
    machines = {unit.node for unit in plan.units if not unit.grouped}
    for unit, span in zip(plan.units, plan.spans, strict=True):
        if span is not None and span.end > model.layers:
            raise UsageError(f"{unit.id} holds {span}, but {model.name} has {model.layers} layers")
        if doubled := machines & {name for name, _ in unit.members}:
            raise UsageError(f"{min(doubled)} is a machine of the plan and in group {unit.id}")


def _measured(
    cluster: Cluster, model: Model, nodes: Sequence[Node], shares: Sequence[float]
) -> Profile | None:
    """The file's table, which is for equal parts of one machine."""
    if len(nodes) > 1 or max(shares) - min(shares) > 1e-9:
        return None
    return cluster.profile(nodes[0], model.name, len(shares))


def _lan(cluster: Cluster, nodes: Sequence[Node]) -> Lan | None:
    if len(nodes) < 2:
        return None
    ways = [cluster.way(a.id, b.id) for a in nodes for b in nodes if a.id != b.id]
    return Lan(
        machines=len(nodes),
        one_way_s=max(way.one_way_s for way in ways),
        bytes_per_s=min(way.bytes_per_s for way in ways),
    )


def spec_of(cluster: Cluster, node: Node) -> GpuSpec:
    spec = cluster.types[node.type].spec
    if spec is None:
        raise UsageError(f"machine {node.id} has no gpu_spec: its GPUs cannot be grouped anew")
    return spec


def _gpus(cluster: Cluster, node: Node) -> list[Gpu]:
    return [(node.id, gpu) for gpu in range(cluster.types[node.type].gpus)]


def _run(gpus: Sequence[int]) -> str:
    if len(gpus) > 1 and gpus[-1] - gpus[0] == len(gpus) - 1:
        return f"{gpus[0]}-{gpus[-1]}"
    return ",".join(map(str, gpus))
