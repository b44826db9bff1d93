"""A cluster out of what a real swarm announces: who is there, how fast, how far from whom.

So the simulator can be held against the swarm that it stands for (`benchmarks/reality.py`), and a
plan be tried on the peers that are really there.

*Speeds* are those that a peer announces (`records.Speed`): a decode batch of n rows takes
`decode_layer_s + (n - 1) x row_layer_s` a layer; a prompt piece lies on the line through one token,
which is a decode step, and a piece of usual size; the tail's head is apart, as it is announced.

*Links* are what the client knows: measured, announced or estimated. A round trip has two equal
halves, as the router takes it. Ways that nobody measured take no time, as in the router too.

*The client* is the cluster's coordinator. *KV* is the whole pool of a peer.

Not in it: what else the machines do, that peers of one machine share its cores (they announce the
speed that their latest steps had, so as far as those were held up), jitter, and what it takes a
peer to get a message from the line to its device and back (`Settings.handle_s`, measured apart).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from hexswarm.errors import UsageError
from hexswarm.peer.scheduler import Policy as Scheduling
from hexswarm.peer.steptime import CHUNK_TOKENS
from hexswarm.records import DTYPES, Announcement, ModelSpec, PeerId
from hexswarm.router.network import Snapshot
from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model, Node, Profile, Way
from hexswarm.router.placement.plan import Plan, Unit
from hexswarm.simulator.records import Settings

TOKEN_BYTES = 100.0
"""A token on its way is a frame; its four bytes are the least of it."""


@dataclass(frozen=True, slots=True)
class Census:
    """A swarm as the simulator takes it."""

    cluster: Cluster
    model: Model
    plan: Plan
    accelerated: bool
    """Some peer computes on something else than a CPU."""

    def only(self, peers: Iterable[PeerId]) -> Plan:
        """The plan in which all others idle."""
        wanted = set(peers)
        pairs = zip(self.plan.units, self.plan.spans, strict=True)
        return replace(
            self.plan, spans=tuple(span if unit.id in wanted else None for unit, span in pairs)
        )

    def settings(self, handle_s: float = 0.0) -> Settings:
        """The world's constants for it: peers on CPUs gather few rows."""
        if self.accelerated:
            return Settings(handle_s=handle_s)
        return Settings(handle_s=handle_s, scheduling=_as_on_a_cpu)


def cluster_of(
    view: Snapshot, spec: ModelSpec, *, input_tokens: int = 64, output_tokens: int = 64
) -> Census:
    """The peers that serve `spec` in this view.

    The lengths of requests are needed for the tokens a second that planners reckon with. Raises
    UsageError if nobody serves the model.
    """
    items = view.serving(spec.digest)
    if not items:
        raise UsageError(f"nobody serves model {spec.name} in this view")
    model = _model(items, spec, input_tokens, output_tokens)
    cluster = Cluster(
        name="census",
        about="what a swarm announced",
        models={model.name: model},
        types={},
        nodes=tuple(map(_node, items)),
        coordinator=Node(COORDINATOR, "", "", math.inf, math.inf),
        ways=_ways(view, [item.peer for item in items]),
        regions={},
        estimate={},
        reference={},
    )
    units = tuple(Unit(item.peer, item.peer, _profile(item, model)) for item in items)
    plan = Plan(model.name, cluster.name, units, tuple(item.span for item in items))
    return Census(cluster, model, plan, any(item.device != "cpu" for item in items))


def _model(
    items: Iterable[Announcement], spec: ModelSpec, input_tokens: int, output_tokens: int
) -> Model:
    """Activations travel in the widest type that a peer computes with."""
    element = max(DTYPES[item.dtype.partition("+")[0]] for item in items)
    return Model(
        name=spec.name,
        layers=spec.layers,
        layer_bytes=0.0,  # the directory does not tell, and nothing is loaded here
        activation_bytes=float(spec.hidden * element),
        token_bytes=TOKEN_BYTES,
        kv_bytes=spec.kv_bytes_per_token_layer * element / 2,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        max_input_tokens=spec.context,
    )


def _node(item: Announcement) -> Node:
    """A bandwidth that was not measured is no bound."""
    up, down = item.up_bytes_per_s or math.inf, item.down_bytes_per_s or math.inf
    return Node(item.peer, item.device, "", in_bytes_per_s=down, out_bytes_per_s=up)


def _profile(item: Announcement, model: Model) -> Profile:
    speed, held = item.speed, len(item.span)
    one_s = speed.decode_layer_s
    # A peer that tells no pool has what is free.
    room = item.kv_tokens or item.free_kv_tokens
    tokens = model.input_tokens + model.output_tokens
    layer_s = model.input_tokens * speed.prefill_layer_s + model.output_tokens * one_s
    rate = tokens / max(layer_s, 1e-9)
    return Profile(
        throughput=(0.0, *(rate / layers for layers in range(1, held + 1))),
        kv_tokens=(0, *[room] * held),
        prefill=((1.0, one_s), (float(CHUNK_TOKENS), CHUNK_TOKENS * speed.prefill_layer_s)),
        decode=((1.0, one_s), (2.0, one_s + speed.row_layer_s)),
        head_s=speed.head_s,
    )


def _ways(view: Snapshot, peers: list[PeerId]) -> dict[tuple[str, str], Way]:
    """Between all peers, and between each and the client whose view it is."""
    ends: list[tuple[str, PeerId]] = [(peer, peer) for peer in peers]
    ways: dict[tuple[str, str], Way] = {}
    if view.client is None:
        for peer in peers:
            ways[COORDINATOR, peer] = ways[peer, COORDINATOR] = Way(math.inf, 0.0)
    else:
        ends.append((COORDINATOR, view.client))
    for name, peer in ends:
        for other_name, other in ends:
            if peer != other:
                link = view.link(peer, other)
                ways[name, other_name] = Way(link.bytes_per_s, link.one_way_s)
    return ways


def _as_on_a_cpu(usual: Scheduling) -> Scheduling:
    """As `Scheduling.of` has it without an accelerator."""
    return replace(usual, gather_rows=min(usual.gather_rows, Scheduling().gather_rows))
