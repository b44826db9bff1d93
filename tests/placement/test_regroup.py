"""General plans for flow and for service: groups and placement together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from hexswarm.router.placement import regroup, service
from hexswarm.router.placement.aims import Capacity, Service, Site, Sited
from hexswarm.router.placement.bound import upper_bound
from hexswarm.router.placement.expected import Load
from hexswarm.router.placement.flow import Flow
from hexswarm.router.placement.plan import Plan
from tests.placement.test_pipelines import SMALL, cluster


def clock(step_s: float = 0.02) -> Callable[[], float]:
    moments = itertools.count(0.0, step_s)
    return lambda: next(moments)


def target(tokens_per_s: float) -> service.Target:
    return service.Target(Load.of(SMALL, tokens_per_s))


def test_a_plan_for_flow_groups_anew_and_gets_better() -> None:
    """It is worth the flow that it tells, better plans come one after the other, and machines whose
    speed as wholes the file does not know are in it too."""
    pool = cluster(("fast", 4, "x"), ("slow", 3, "x"), ("fast", 1, "x"))
    heard: list[Sited] = []
    found = regroup.general(
        pool, SMALL, Capacity(), rng=random.Random(2), clock=clock(), until=2.0,
        told=lambda plan, sited: heard.append(sited),
    )  # fmt: skip
    plan = found.plan
    assert plan.missing(SMALL.layers) == []
    assert Flow(pool, SMALL, plan.units).value(plan.spans) == pytest.approx(found.flow)
    assert [sited.flow for sited in heard] == sorted(sited.flow for sited in heard)
    assert heard[-1].flow == pytest.approx(found.flow)
    assert found.groupings > 2
    gpus = [gpu for unit in plan.units for gpu in unit.members]
    assert len(gpus) == len(set(gpus))
    assert {unit.node for unit in plan.units} == {"n0", "n1", "n2"}


def test_a_plan_for_service_has_flow_enough_and_is_worth_what_it_tells() -> None:
    pool = cluster(("fast", 4, "x"), ("slow", 4, "x"))
    most = regroup.general(
        pool, SMALL, Capacity(), rng=random.Random(1), clock=clock(), until=1.0
    ).flow
    aim = Service(target(0.3 * most))
    heard: list[float] = []
    found = regroup.general(
        pool, SMALL, aim, rng=random.Random(1), clock=clock(0.05), until=4.0,
        told=lambda plan, sited: heard.append(sited.worth),
    )  # fmt: skip
    assert found.flow >= aim.needed * (1 - 1e-9)
    assert heard == sorted(heard)
    assert 0 < heard[-1] <= aim.most(Site(pool, SMALL, found.plan.units)) == 1.0


def test_units_that_cannot_carry_the_load_are_passed_over() -> None:
    """What no placement of them can be worth is told by their bound."""
    pool = cluster(("fast", 4, "x"))
    made = regroup.general(
        pool, SMALL, Capacity(), rng=random.Random(1), clock=clock(), until=0.5
    ).plan
    bound = upper_bound(pool, SMALL, made.units)
    aim = Service(target(2 * bound))
    most = aim.most(Site(pool, SMALL, made.units))
    assert most == pytest.approx(bound / (2.4 * bound) - 1)
    placed = aim.place(Site(pool, SMALL, made.units), made.spans, random.Random(1), lambda: False)
    assert -1 < placed.worth <= most


def test_only_machines_of_several_known_gpus_are_regrouped() -> None:
    pool = cluster(("fast", 4, "x"), ("fast", 1, "x"))
    several, one = pool.nodes
    assert regroup.regroupable(pool, several)
    assert not regroup.regroupable(pool, one)
    assert not regroup.regroupable(replace(pool, estimate={}), several)
    types = {name: replace(type, spec=None) for name, type in pool.types.items()}
    assert not regroup.regroupable(replace(pool, types=types), several)
    many = {name: replace(type, gpus=16) for name, type in pool.types.items()}
    assert not regroup.regroupable(replace(pool, types=many), several)


def test_a_group_of_the_whole_machine_is_called_by_its_name() -> None:
    """If the file knows how fast that is; else it stays a group."""
    pool = cluster(("fast", 2, "x"))
    made = regroup.grouping(pool, SMALL, pool.nodes[0], (2,))
    assert made is not None
    plan = Plan(SMALL.name, pool.name, made, (None,))
    assert regroup.settled(pool, plan) == plan
    kind = pool.types["fast2"]
    known = replace(kind, profiles={SMALL.name: {2: made[0].profile}})
    pool = replace(pool, types={"fast2": known})
    (unit,) = regroup.settled(pool, plan).units
    assert unit.id == "n0"
    assert not unit.grouped
