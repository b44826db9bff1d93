"""Links: latency, rate, queueing, shared connections, lanes."""

from __future__ import annotations

import random

import pytest

from hexswarm.router.placement.cluster import Way
from hexswarm.simulator.links import Links
from tests.simulator.small import world

RATE, ONE_WAY_S = 1e6, 0.01


def links(nic: float = 1e9, *, lanes: bool = False) -> Links:
    cluster, _ = world([(0, 8)] * 4, way=Way(RATE, ONE_WAY_S), nic=nic)
    return Links(cluster, lanes=lanes)


def test_a_message_alone_takes_its_bytes_and_the_way() -> None:
    assert links().send("n0", "n1", 5000, 1.0) == pytest.approx(1.0 + 0.005 + ONE_WAY_S)
    assert links().send("n0", "n1", 0, 1.0) == pytest.approx(1.0 + ONE_WAY_S)
    assert links().send("n0", "n0", 5000, 1.0) == 1.0


def test_one_pair_is_first_come_first_served_and_directions_are_apart() -> None:
    some = links()
    first, second = (some.send("n0", "n1", 1e6, 0.0) for _ in range(2))
    assert (first, second) == (pytest.approx(1 + ONE_WAY_S), pytest.approx(2 + ONE_WAY_S))
    assert some.send("n1", "n0", 1e6, 0.0) == pytest.approx(1 + ONE_WAY_S)
    assert some.send("n0", "n2", 1e6, 0.0) == pytest.approx(1 + ONE_WAY_S, abs=0.01)


def test_a_link_saturates_at_its_rate() -> None:
    some, rng = links(), random.Random(1)
    last, sent = 0.0, 0
    for number in range(2000):  # offered at 1.5 times the rate
        size = rng.randrange(100, 5000)
        sent += size
        last = some.send("n0", "n1", size, number * 2550 / RATE / 1.5)
    assert sent / (last - ONE_WAY_S) == pytest.approx(RATE, rel=1e-3)
    assert some.carried() == {("n0", "n1"): sent}


def test_a_connection_is_shared_by_all_pairs() -> None:
    """Four ways of 1 MB/s through a connection of 2 MB/s: half as fast."""
    out, into = links(nic=2 * RATE), links(nic=2 * RATE)
    ends = [out.send("n0", to, 1e6, 0.0) for to in ("n1", "n2", "n3", "coordinator")]
    assert max(ends) == pytest.approx(2 + 0.5 + ONE_WAY_S, abs=0.51)
    assert max(ends) >= 2 + ONE_WAY_S
    ends = [into.send(sender, "n0", 1e6, 0.0) for sender in ("n1", "n2", "n3", "coordinator")]
    assert max(ends) >= 2 + ONE_WAY_S


def test_waits_are_those_of_a_queue_with_constant_service() -> None:
    """M/D/1: the mean wait is rho x service / (2 (1 - rho))."""
    some, rng = links(), random.Random(7)
    rho, service_s = 0.7, 0.004
    now, waited_s, count = 0.0, 0.0, 40_000
    for _ in range(count):
        now += rng.expovariate(rho / service_s)
        waited_s += some.send("n0", "n1", service_s * RATE, now) - now - service_s - ONE_WAY_S
    assert waited_s / count == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.05)


def test_urgent_messages_pass_bulk_at_half_the_rate_and_bulk_pays() -> None:
    some = links(lanes=True)
    bulk = some.send("n0", "n1", 1e6, 0.0)
    urgent = some.send("n0", "n1", 1e3, 0.5, urgent=True)
    assert bulk == pytest.approx(1 + ONE_WAY_S)
    assert urgent == pytest.approx(0.5 + 0.002 + ONE_WAY_S)
    assert some.send("n0", "n1", 1e6, 0.5) == pytest.approx(2.001 + ONE_WAY_S)
    late = some.send("n0", "n1", 1e3, 3.0, urgent=True)
    assert late == pytest.approx(3.001 + ONE_WAY_S)


def test_without_lanes_everything_waits_in_line() -> None:
    some = links(lanes=False)
    some.send("n0", "n1", 1e6, 0.0)
    assert some.send("n0", "n1", 1e3, 0.5, urgent=True) == pytest.approx(1.001 + ONE_WAY_S)


def test_lanes_together_carry_no_more_than_the_line() -> None:
    some, rng = links(lanes=True), random.Random(3)
    ends, sent, now = [0.0], 0, 0.0
    for _ in range(3000):
        now += rng.expovariate(2 * RATE / 2000)
        size = 2000 if rng.random() < 0.5 else 1000
        sent += size
        ends.append(some.send("n0", "n1", size, now, urgent=size == 1000))
    assert sent / (max(ends) - ONE_WAY_S) <= RATE * 1.001
