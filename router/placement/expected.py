"""What is asked of a plan, what is expected of it, and the arrays that both forms of the estimate
read (`mean_field` in numpy, `router/native_latency.h` compiled; `latency` is the door)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from hexswarm.errors import UsageError
from hexswarm.router.placement.cluster import Cluster, Model, Node, Profile, Way
from hexswarm.router.placement.plan import Unit
from hexswarm.router.placement.rates import Numbers

MOST_ROWS = 256
"""Decode times are tabulated up to here and go on in a straight line."""

LONG = 1.8
"""95th percentile of prompt lengths over their mean (Azure conversation: 1353 and 763)."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a plan."""

    tokens_per_s: float
    """Prompt and answer together, as flows are counted."""
    input_tokens: float
    output_tokens: float
    long_input_tokens: float
    """The 95th percentile: limits of the first token are kept or broken by long prompts."""
    variance: float = 0.3
    """Of prompt lengths, over their squared mean (Azure conversation: 0.28)."""
    chunk_tokens: float = 128.0
    """Of a piece of a prompt (`hexswarm.peer.scheduler`: at most 2 MiB of activations, which are
    128 tokens of a 70B model)."""

    def __post_init__(self) -> None:
        if min(self.tokens_per_s, self.input_tokens, self.output_tokens, self.chunk_tokens) <= 0:
            raise UsageError("a load has positive tokens a second, lengths and chunks")

    @classmethod
    def of(cls, model: Model, tokens_per_s: float) -> Load:
        """With the lengths that the cluster file tells."""
        long = min(LONG * model.input_tokens, float(model.max_input_tokens))
        return cls(tokens_per_s, model.input_tokens, model.output_tokens, long)

    @property
    def requests_per_s(self) -> float:
        return self.tokens_per_s / (self.input_tokens + self.output_tokens)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected service of a plan at a load."""

    ttft_s: float
    """Mean, of a prompt of mean length."""
    long_ttft_s: float
    """Mean, of a long prompt."""
    tpot_s: float
    stages: float
    """Mean number of stages of a route."""
    busiest: float
    """Largest utilisation by prompts of any unit or link; near 1 times are punishments."""
    kv: float
    """Largest share of any unit's room for KV."""
    share: tuple[float, ...]
    """Of each unit: the part of all requests that visits it."""

    def answer_s(self, load: Load) -> float:
        """Seconds of a whole answer."""
        return self.ttft_s + load.output_tokens * self.tpot_s


NOWHERE = Estimate(inf, inf, inf, 0.0, 0.0, 0.0, ())
"""Some layer is held by nobody."""


@dataclass(frozen=True, slots=True)
class Tables:
    """Seconds of the ways between units, the coordinator last, and of layers at each unit."""

    layers: int
    one_way: Numbers
    """[sender, receiver]."""
    token_s: Numbers
    """[sender, receiver]: of one token's hidden state on the line."""
    id_s: Numbers
    """[sender, receiver]: of one token id."""
    decode: Numbers
    """[unit, rows]: of one layer."""
    room: Numbers
    """[unit, k]: tokens of KV that fit beside k layers."""
    profiles: tuple[Profile, ...]

    def chunk(self, tokens: float) -> Numbers:
        """[unit]: of one layer for a piece of a prompt."""
        return np.array([profile.prefill_layer_s(tokens) for profile in self.profiles])


def tables(cluster: Cluster, model: Model, units: Sequence[Unit]) -> Tables:
    """Of these units of a cluster."""
    ways = _ways(cluster, units)
    per_byte = np.array([[1 / way.bytes_per_s for way in row] for row in ways])
    profiles = tuple(unit.profile for unit in units)
    rows = range(MOST_ROWS + 2)
    known = {id(one): [one.decode_layer_s(count) for count in rows] for one in profiles}
    room = np.ones((len(units), max((one.max_layers for one in profiles), default=0) + 1))
    for row, one in zip(room, profiles, strict=True):
        row[: one.max_layers + 1] = np.maximum(one.kv_tokens, 1)
    return Tables(
        layers=model.layers,
        one_way=np.array([[way.one_way_s for way in row] for row in ways]),
        token_s=model.activation_bytes * per_byte,
        id_s=model.token_bytes * per_byte,
        decode=np.array([known[id(one)] for one in profiles]).reshape(len(units), len(rows)),
        room=room,
        profiles=profiles,
    )


def _ways(cluster: Cluster, units: Sequence[Unit]) -> list[list[Way]]:
    """[sender, receiver] with the coordinator last; `Cluster.way` looks machines up each time."""
    known = {node.id: node for node in cluster.nodes}
    ends = [*(known[unit.node] for unit in units), cluster.coordinator]
    return [[_way(cluster, a, b) for b in ends] for a in ends]


def _way(cluster: Cluster, a: Node, b: Node) -> Way:
    between = cluster.regions.get((a.region, b.region))
    if a.id == b.id or between is None or (a.id, b.id) in cluster.ways:
        return cluster.way(a.id, b.id)
    rate = min(between.bytes_per_s, a.out_bytes_per_s, b.in_bytes_per_s)
    return Way(rate, between.one_way_s + a.access_s + b.access_s)
