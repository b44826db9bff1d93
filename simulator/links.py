"""Messages between machines: bandwidth, queueing, one-way latency.

A message passes three pipes at once: the sender's connection, the pair's own way, the receiver's
connection. Each is first come, first served and carries one byte after the other; the message has
arrived when the slowest of them has carried its last byte, plus the latency. It need not be stored
between them, as packets are not.

*Lanes.* Our peers keep two streams to every neighbour, one for tokens and one for bulk, which
share the line like any two connections do: half each while both have something to send. So an
urgent message waits for urgent ones alone and travels at half the rate while bulk is under way,
and bulk is set back by what it carried.

The receiver's pipe is booked when a message is sent and not when it comes (the latency is added
behind it): else a message from afar would hold up those from nearby that come first. Jitter, loss
and TCP's slow start are left out, for everybody.
"""

from __future__ import annotations

from hexswarm.router.placement.cluster import Cluster, Way


class Pipe:
    """One line with a rate."""

    __slots__ = ("bulk_s", "carried", "rate", "urgent_s")

    def __init__(self, bytes_per_s: float) -> None:
        self.rate = bytes_per_s
        self.bulk_s = self.urgent_s = 0.0
        """When each lane is free."""
        self.carried = 0.0
        """Bytes so far."""

    def take(self, size: float, start_s: float, urgent: bool) -> tuple[float, float]:
        """From when to when it carries so many bytes that are there at `start_s`."""
        self.carried += size
        alone_s = size / self.rate
        if not urgent:
            begin_s = max(start_s, self.bulk_s)
            self.bulk_s = begin_s + alone_s
            return begin_s, self.bulk_s
        begin_s = max(start_s, self.urgent_s)
        if self.bulk_s > begin_s:
            self.urgent_s = begin_s + 2 * alone_s
            self.bulk_s += alone_s
        else:
            self.urgent_s = self.bulk_s = begin_s + alone_s
        return begin_s, self.urgent_s


class Links:
    """All lines of a cluster."""

    def __init__(self, cluster: Cluster, *, lanes: bool) -> None:
        self._cluster = cluster
        self._lanes = lanes
        every = (*cluster.nodes, cluster.coordinator)
        self._out = {node.id: Pipe(node.out_bytes_per_s) for node in every}
        self._in = {node.id: Pipe(node.in_bytes_per_s) for node in every}
        self._pairs: dict[tuple[str, str], tuple[Pipe, Way]] = {}

    def send(
        self, sender: str, receiver: str, size: float, now: float, *, urgent: bool = False
    ) -> float:
        """When a message that leaves now has come."""
        if sender == receiver:
            return now
        urgent = urgent and self._lanes
        pipe, way = self._pair(sender, receiver)
        begin_s, out_s = self._out[sender].take(size, now, urgent)
        begin_s, way_s = pipe.take(size, begin_s, urgent)
        _, in_s = self._in[receiver].take(size, begin_s, urgent)
        return max(out_s, way_s, in_s) + way.one_way_s

    def one_way_s(self, sender: str, receiver: str) -> float:
        """Of a message without bytes."""
        return 0.0 if sender == receiver else self._pair(sender, receiver)[1].one_way_s

    def carried(self) -> dict[tuple[str, str], float]:
        """Bytes by pair, for those that carried any."""
        return {pair: pipe.carried for pair, (pipe, _) in self._pairs.items() if pipe.carried}

    def _pair(self, sender: str, receiver: str) -> tuple[Pipe, Way]:
        held = self._pairs.get((sender, receiver))
        if held is None:
            way = self._cluster.way(sender, receiver)
            held = self._pairs[sender, receiver] = Pipe(way.bytes_per_s), way
        return held
