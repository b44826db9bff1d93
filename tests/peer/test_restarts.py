"""Pauses that double, an end, and a fresh start for who served calmly."""

from __future__ import annotations

from hexswarm.peer.restarts import Restarts


def test_pauses_double_until_it_is_enough() -> None:
    restarts = Restarts(tries=4, first_s=0.5)
    assert [restarts.failed(float(n)) for n in range(5)] == [0.5, 1.0, 2.0, 4.0, None]


def test_a_start_that_does_not_last_is_a_failure_like_others() -> None:
    restarts = Restarts(tries=2, first_s=1.0, calm_s=100.0)
    pauses = []
    for n in range(3):
        restarts.started(1000.0 * n)
        pauses.append(restarts.failed(1000.0 * n + 99.0))
    assert pauses == [1.0, 2.0, None]


def test_who_served_calmly_starts_afresh() -> None:
    restarts = Restarts(tries=2, first_s=1.0, calm_s=100.0)
    restarts.failed(0.0)
    restarts.failed(1.0)
    restarts.started(10.0)
    assert restarts.failed(110.0) == 1.0
    assert restarts.failed(500.0) == 2.0, "time alone, without serving, mends nothing"
