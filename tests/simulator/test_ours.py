"""Our policy: the real router on stale words, what it hears, whom it avoids, what it promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hexswarm.records import Load, Route
from hexswarm.router.network import Snapshot
from hexswarm.router.routing import find_route
from hexswarm.simulator.board import peer_of, unit_of
from hexswarm.simulator.churn import Outage
from hexswarm.simulator.ours import Ours, Wishes
from hexswarm.simulator.policy import Request
from hexswarm.simulator.report import Report
from hexswarm.simulator.run import simulate
from tests.simulator.small import MODEL, profile, request, world

TWICE = [(0, 8), (0, 8)]


class Watched(Ours):
    """Keeps what its router was asked and said."""

    def __init__(self, *world: Any, **options: Any) -> None:
        super().__init__(*world, search=self._watch, **options)
        self.seen: list[Snapshot] = []
        self.routes: list[Route] = []

    def _watch(self, view: Snapshot, *asked: Any) -> Route:
        self.seen.append(view)
        self.routes.append(find_route(view, *asked))
        return self.routes[-1]

    def units(self) -> list[list[int]]:
        return [[unit_of(stage.peer) for stage in route.stages] for route in self.routes]


def run(
    policy: Ours, made: Any, requests: list[Request], until_s: float = 100.0, **more: Any
) -> Report:
    cluster, plan = made
    return simulate(cluster, MODEL, plan, policy, requests, until_s=until_s, **more)


def test_it_prefers_the_faster_and_shares_under_load() -> None:
    made = world(TWICE, profiles=[profile(slower=3), profile()])
    policy = Watched(made[0], MODEL, made[1])
    run(policy, made, [request(0, 5.0, 50, 20)])
    assert policy.units() == [[1]]
    made = world(TWICE)
    policy = Watched(made[0], MODEL, made[1], seed=2)
    report = run(policy, made, [request(n, 0.3 * n, 300, 60) for n in range(60)])
    assert report.finished == 60
    shares = [use.busy for use in report.uses]
    assert min(shares) > 0.3 * max(shares)


def test_it_knows_better_of_those_it_asked_itself() -> None:
    """No unit announces a second time, yet a session is seen as soon as it was opened."""
    made = world(TWICE)
    policy = Watched(made[0], MODEL, made[1])
    run(policy, made, [request(0, 5.0, 500, 400), request(1, 5.5, 500, 400)], until_s=5.6)
    first, second = policy.seen
    chosen = peer_of(policy.units()[0][0])

    def free(view: Snapshot) -> int:
        return view.announcement(MODEL.name, chosen).free_kv_tokens

    assert free(second) <= free(first) - 900


def test_a_refusal_goes_to_the_spare() -> None:
    made = world([(0, 8)] * 3, profiles=[profile(kv=500), profile(kv=4096, slower=2), profile()])
    policy = Watched(made[0], MODEL, made[1])
    # The directory is from before the first one came, whose room the second one finds taken.
    cluster, plan = made
    policy.opened = lambda *_: None  # type: ignore[method-assign, assignment]
    policy.refused = lambda *_: None  # type: ignore[method-assign, assignment]
    requests = [request(n, 5.0, 200, 3000) for n in range(3)]
    report = simulate(cluster, MODEL, plan, policy, requests, until_s=7.0)
    assert report.refusals >= 1
    assert report.waiting >= 1
    assert report.running == 2
    assert {use.unit for use in report.uses if use.busy} == {"n1", "n2"}


def test_the_dead_are_avoided_until_they_speak_again() -> None:
    made = world(TWICE, profiles=[profile(), profile(slower=2)])
    policy = Watched(made[0], MODEL, made[1])
    requests = [request(n, 5.0 + 2 * n, 50, 5) for n in range(40)]
    run(policy, made, requests, outages=[Outage(10.0, 30.0, 0)])
    used = policy.units()
    times = [one.arrives_s for one in requests]
    assert len(used) >= 40
    late = [units for units, when in zip(used[-15:], times[-15:], strict=True) if when > 60]
    assert [0] in late
    assert used[0] == [0]


def test_a_limit_is_promised_by_the_stages_or_refused() -> None:
    made = world(TWICE)
    strict = Watched(made[0], MODEL, made[1], wishes=Wishes(tpot_s=0.001))
    assert run(strict, made, [request()]).finished == 0
    policy = Watched(made[0], MODEL, made[1], wishes=Wishes(tpot_s=0.02, percentile=95))
    policy.opened = lambda *_: None  # type: ignore[method-assign, assignment]
    policy.refused = lambda *_: None  # type: ignore[method-assign, assignment]
    free = Watched(made[0], MODEL, made[1])
    requests = [request(n, 0.01 * n, 100, 20) for n in range(40)]
    kept, open_ = run(policy, made, requests, 1.0), run(free, made, requests, 1.0)
    # Its view knows of nobody, so the stages themselves say no.
    assert kept.refusals > 0
    assert 0 < kept.running + kept.finished < open_.running + open_.finished
    assert kept.decode.p50_s < 0.02 < open_.decode.p50_s


@pytest.mark.parametrize("sticky", [True, False])
def test_a_gateway_does_not_stay_on_one_route_unless_it_is_told_to(sticky: bool) -> None:
    made = world([(0, 8)] * 4)
    policy = Watched(made[0], MODEL, made[1], wishes=Wishes(sticky=sticky))
    run(policy, made, [request(n, 5.0 + n, 20, 2) for n in range(30)])
    assert (len({tuple(units) for units in policy.units()}) == 1) == sticky


def test_clients_in_two_places_choose_what_is_near() -> None:
    cluster, plan = world(TWICE)
    far = {pair: replace(way, one_way_s=0.2) for pair, way in cluster.ways.items()}
    cluster = replace(cluster, ways=far)
    policy = Watched(cluster, MODEL, plan, wishes=Wishes(spread=0.0))
    requests = [request(n, 5.0 + n, 20, 2, client=f"n{n % 2}") for n in range(10)]
    report = run(policy, (cluster, plan), requests)
    assert policy.units() == [[n % 2] for n in range(10)]
    assert report.ttft.p95_s < 0.1


def test_what_is_heard_counts_until_a_later_word_is_read() -> None:
    made = world(TWICE)
    policy = Ours(made[0], MODEL, made[1])
    client = policy._client("coordinator")
    client.heard[0] = (3.0, Load(rows=7.0))
    told: list[float] = []

    def search(view: Snapshot, *asked: Any) -> Route:
        told.append(view.announcement(MODEL.name, peer_of(0)).rows)
        return find_route(view, *asked)

    policy._search = search
    run(policy, made, [request(0, 4.0, 20, 2), request(1, 60.0, 20, 2)])
    assert told[0] == 7.0
    assert told[1] < 1.0
