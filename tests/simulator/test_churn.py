"""Machines that die: the law, and what becomes of their sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest

from hexswarm.errors import UsageError
from hexswarm.simulator.churn import Churn, Outage, outages
from hexswarm.simulator.ours import Ours
from hexswarm.simulator.policy import Policy, Visits
from hexswarm.simulator.report import Report
from hexswarm.simulator.run import simulate
from tests.simulator.small import MODEL, WAY, WHOLE, Fixed, chain, request, world

SPANS = [(0, 4), (4, 8), (4, 8), (0, 4)]


def run(policy: Policy, dead: Sequence[Outage], answer: int = 60, until_s: float = 60.0) -> Report:
    cluster, plan = world(SPANS)
    requests = [request(prompt=100, answer=answer)]
    return simulate(cluster, MODEL, plan, policy, requests, until_s=until_s, outages=dead)


class Mended(Fixed):
    """The first route, and after a death the second."""

    def repair(self, *asked: object) -> Visits | None:
        self.asked = asked
        return self.routes[1]


def fixed(kind: type[Fixed] = Fixed, *, ring: bool = True) -> Fixed:
    _, plan = world(SPANS)
    execution = replace(WHOLE, ring=ring)
    return kind(chain(plan, 0, 1), chain(plan, 0, 2), execution=execution)


@pytest.mark.parametrize("ring", [True, False])
def test_a_mended_route_costs_the_replay_and_the_time_to_notice(ring: bool) -> None:
    calm, torn = run(fixed(ring=ring), []), run(fixed(Mended, ring=ring), [Outage(1.0, 99.0, 1)])
    assert (torn.finished, torn.repairs) == (1, 1)
    longer_s = torn.outcomes[0].last_s - calm.outcomes[0].last_s
    known = 100 + _before(calm, 1.0) - 1
    replay_s = known * MODEL.activation_bytes / WAY.bytes_per_s
    assert 1.0 + replay_s < longer_s < 1.0 + replay_s + 0.2
    assert torn.outcomes[0].tokens == 60


def _before(report: Report, moment_s: float) -> int:
    """Tokens that were there at that moment, in a run at an even pace."""
    one = report.outcomes[0]
    return 1 + int((moment_s - one.first_s) / one.tpot_s)


def test_who_cannot_mend_begins_anew_with_the_tokens_so_far() -> None:
    torn = run(fixed(), [Outage(1.0, 99.0, 1)])
    assert (torn.finished, torn.repairs) == (1, 1)
    assert torn.outcomes[0].tokens == 60
    assert torn.decode.count == 59


def test_a_prompt_that_was_under_way_is_sent_again() -> None:
    policy = fixed(Mended)
    torn = run(policy, [Outage(0.05, 99.0, 1)])
    assert (torn.finished, torn.repairs) == (1, 1)
    assert policy.asked[3] == frozenset({1})
    assert policy.asked[4] == 100
    assert torn.ttft.p50_s > 1.05


def test_two_deaths_at_once_are_one_repair() -> None:
    torn = run(fixed(), [Outage(1.0, 3.0, 0), Outage(1.2, 4.0, 1)])
    assert (torn.finished, torn.repairs) == (1, 1)


def test_a_death_while_a_mended_route_catches_up_begins_the_replay_again() -> None:
    """Unit 2 has come for unit 1 and lacks its tokens when the head dies too."""
    _, plan = world(SPANS)

    class Twice(Fixed):
        def repair(self, *asked: object) -> Visits | None:
            return chain(plan, 0, 2) if asked[3] == {1} else chain(plan, 3, 2)

    policy = Twice(chain(plan, 0, 1), execution=replace(WHOLE, ring=True))
    torn = run(policy, [Outage(1.0, 99.0, 1), Outage(2.05, 99.0, 0)])
    assert (torn.finished, torn.repairs) == (1, 2)
    assert torn.outcomes[0].tokens == 60


def test_the_last_token_may_come_although_its_route_died_behind_it() -> None:
    calm = run(fixed(ring=False), [])
    just_s = calm.outcomes[0].last_s - WAY.one_way_s / 2
    torn = run(fixed(Mended, ring=False), [Outage(just_s, 99.0, 1)])
    assert (torn.finished, torn.repairs) == (1, 0)
    assert torn.outcomes[0].last_s == calm.outcomes[0].last_s


def test_our_router_fills_the_hole_and_keeps_the_rest() -> None:
    cluster, plan = world(SPANS)
    policy = Ours(cluster, MODEL, plan)
    seen: list[tuple[Visits, Visits | None]] = []
    mend = policy.repair

    def watch(*asked: object) -> Visits | None:
        seen.append((asked[2], mend(*asked)))  # type: ignore[arg-type]
        return seen[-1][1]

    policy.repair = watch  # type: ignore[method-assign, assignment]
    torn = run(policy, [Outage(1.5, 99.0, 1), Outage(1.5001, 99.0, 3)], answer=200)
    assert torn.finished == 1
    before, after = seen[0]
    assert after is not None
    assert [visit.unit for visit in after] == [0, 2]
    assert {visit.unit for visit in before} & {1, 3}
    assert torn.outcomes[0].tokens == 200


def test_lives_and_absences_follow_the_law() -> None:
    _, plan = world([(0, 8)] * 40 + [None])
    law = Churn(life_s=100.0, away_s=10.0, since_s=50.0)
    drawn = outages(plan, law, 2000.0, seed=4)
    assert drawn == tuple(sorted(drawn)) == outages(plan, law, 2000.0, seed=4)
    assert {one.unit for one in drawn} == set(range(40))
    assert min(one.dies_s for one in drawn) > 50
    assert fmean(one.back_s - one.dies_s for one in drawn) == pytest.approx(10, rel=0.15)
    assert len(drawn) == pytest.approx(40 * 1950 / 110, rel=0.15)
    few = outages(world([(0, 8)] * 3)[1], law, 2000.0, seed=4)
    assert few == tuple(one for one in drawn if one.unit < 3)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="comes back"):
        Outage(2.0, 1.0, 0)
    with pytest.raises(UsageError, match="positive"):
        Churn(life_s=0.0)
