"""What bounds the flow of any placement of some units, as arrays in tokens a second.

A token that goes on carries its hidden state and its id; between the coordinator and the ends of a
route only the id. So every bandwidth is a number of tokens, and a placement is worth a max-flow.
Two simplifications, both of Helix (ASPLOS'25) and both generous: a machine's own connection bounds
what it sends and what it receives, each as if all of it were hidden states or all of it ids; and
where several units share a machine, each may use the connection alone (who of them used it would
make the flow one of many commodities).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model
from hexswarm.router.placement.plan import Unit

Numbers = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second; the last row and column of `link` are the coordinator."""

    layers: int
    most: Ints
    """[unit]: most layers that it holds."""
    speed: Numbers
    """[unit, k]: through k held layers."""
    link: Numbers
    """[sender, receiver], the machines' own connections included."""
    nic_in: Numbers
    """[unit]: of hidden states; infinite where units share a machine: hops may stay inside."""
    nic_out: Numbers
    limit: float
    """Of all that the coordinator sends or receives."""

    @property
    def units(self) -> int:
        return len(self.most)

    def part(self, chosen: Sequence[int]) -> Rates:
        """Of these units alone."""
        with_coordinator = [*chosen, self.units]
        return Rates(
            self.layers,
            np.ascontiguousarray(self.most[list(chosen)]),
            np.ascontiguousarray(self.speed[list(chosen)]),
            np.ascontiguousarray(self.link[np.ix_(with_coordinator, with_coordinator)]),
            np.ascontiguousarray(self.nic_in[list(chosen)]),
            np.ascontiguousarray(self.nic_out[list(chosen)]),
            self.limit,
        )

    def passes(self, unit: int, first: int, end: int) -> float:
        """What one unit passes while it holds these layers."""
        most = float(self.speed[unit, end - first])
        if first > 0:
            most = min(most, float(self.nic_in[unit]))
        if end < self.layers:
            most = min(most, float(self.nic_out[unit]))
        return most


def rates(cluster: Cluster, model: Model, units: Sequence[Unit]) -> Rates:
    """Of these units of a cluster."""
    layers = model.layers
    most = np.array([min(unit.profile.max_layers, layers) for unit in units], np.int32)
    speed = np.zeros((len(units), int(max(most, default=0)) + 1))
    for unit, row, held in zip(units, speed, most, strict=True):
        row[: held + 1] = unit.profile.throughput[: held + 1]
    onward = model.activation_bytes + model.token_bytes
    count = len(units)
    link = _bytes_per_s(cluster, [unit.node for unit in units])
    link[:count, :count] /= onward
    link[count, :] /= model.token_bytes
    link[:count, count] /= model.token_bytes
    nodes = {node.id: node for node in cluster.nodes}
    homes = [unit.node for unit in units]
    alone = np.array([homes.count(home) == 1 for home in homes], bool)
    nic_in = np.array([nodes[home].in_bytes_per_s for home in homes]) / onward
    nic_out = np.array([nodes[home].out_bytes_per_s for home in homes]) / onward
    hub = cluster.coordinator
    return Rates(
        layers=layers,
        most=most,
        speed=speed,
        link=np.ascontiguousarray(link),
        nic_in=np.where(alone, nic_in, np.inf),
        nic_out=np.where(alone, nic_out, np.inf),
        limit=min(hub.in_bytes_per_s, hub.out_bytes_per_s) / model.token_bytes,
    )


def _bytes_per_s(cluster: Cluster, homes: Sequence[str]) -> Numbers:
    """[sender, receiver] with the coordinator last: the link, and the connections at its ends."""
    nodes = {node.id: node for node in cluster.nodes}
    ends = [*(nodes[home] for home in homes), cluster.coordinator]
    names = [*homes, COORDINATOR]
    found = np.empty((len(ends), len(ends)))
    for row, (name, end) in enumerate(zip(names, ends, strict=True)):
        for column, (other, far) in enumerate(zip(names, ends, strict=True)):
            if name == other:
                found[row, column] = np.inf
            elif way := cluster.ways.get((name, other)) or cluster.regions.get(
                (end.region, far.region)
            ):
                found[row, column] = way.bytes_per_s
            else:
                found[row, column] = cluster.way(name, other).bytes_per_s
    np.fill_diagonal(found, 0.0)
    sends = np.array([end.out_bytes_per_s for end in ends])
    receives = np.array([end.in_bytes_per_s for end in ends])
    shared = np.array([[a == b for b in names] for a in names])
    bounded = np.minimum(found, np.minimum(sends[:, None], receives[None, :]))
    return np.where(shared, found, bounded)
