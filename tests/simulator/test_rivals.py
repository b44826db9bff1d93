"""How Swarm, Petals, pipelines and chance route, by hand; and what all rivals owe the world."""

from __future__ import annotations

from collections import Counter

import pytest

from hexswarm.errors import UsageError
from hexswarm.router.placement.cluster import COORDINATOR, Way
from hexswarm.simulator.policy import Computed, Policy, Request, View
from hexswarm.simulator.rival_helix import Helix
from hexswarm.simulator.rival_hexgen import HexGen
from hexswarm.simulator.rival_hops import BARRED_S
from hexswarm.simulator.rival_petals import Petals
from hexswarm.simulator.rival_separate import Separate, chains, requests_per_s
from hexswarm.simulator.rival_swarm import Swarm
from hexswarm.simulator.rivals import NAMES, rival
from hexswarm.simulator.run import simulate
from tests.simulator.rival_world import FORK, LAYERS, MODEL, MS, ask, profile, units, view, world


def test_swarm_prefers_who_answers_sooner() -> None:
    cluster, plan = world(FORK)
    swarm = Swarm(cluster, MODEL, plan)
    for _ in range(20):  # averages settle
        swarm.computed(0.0, Computed(0, 0, 75, 0.9, 0))
        swarm.computed(0.0, Computed(1, 0, 75, 0.3, 0))
    visited = Counter(units(swarm.route(0.0, ask(n), view(plan)))[0] for n in range(400))  # type: ignore[index]
    assert visited[1] / visited[0] == pytest.approx(3.0, rel=0.05)


def test_swarm_learns_from_prompts_alone_and_adds_the_way() -> None:
    far = {(COORDINATOR, "slow"): Way(1e9, 0.5)}
    cluster, plan = world(FORK, ways=far)
    swarm = Swarm(cluster, MODEL, plan)
    swarm.computed(0.0, Computed(0, 8, 0, 99.0, 0))
    for _ in range(20):
        for unit in (0, 1):
            swarm.computed(0.0, Computed(unit, 0, 75, 0.1, 0))
    visited = Counter(units(swarm.route(0.0, ask(n), view(plan)))[0] for n in range(350))  # type: ignore[index]
    assert visited[1] / visited[0] == pytest.approx(0.6 / 0.1, rel=0.06)


def test_petals_takes_the_path_of_least_seconds() -> None:
    quick = {"a": profile(layer_s=5 * MS), "all": profile(layer_s=20 * MS)}
    cluster, plan = world({"a": (0, 2), "b": (2, 4), "all": (0, 4)}, quick)
    # a + b: 2 x (1 + 18) + 2 x 5 + 2 x 1 + 1 = 51 ms; all: 1 + 18 + 80 + 1 = 100 ms
    petals = Petals(cluster, MODEL, plan)
    assert units(petals.route(0.0, ask(0), view(plan))) == (0, 1)
    slower = quick | {"a": profile(layer_s=35 * MS)}  # now 111 ms
    cluster, plan = world({"a": (0, 2), "b": (2, 4), "all": (0, 4)}, slower)
    assert units(Petals(cluster, MODEL, plan).route(0.0, ask(0), view(plan))) == (2,)


def test_petals_herds_until_a_cache_is_announced_as_full() -> None:
    cluster, plan = world({"a": (0, 4), "b": (0, 4)}, {"b": profile(layer_s=2 * MS)})
    petals = Petals(cluster, MODEL, plan)
    assert {units(petals.route(0.0, ask(n), view(plan))) for n in range(20)} == {(0,)}
    full = view(plan)
    full = View((view(plan, free=10).announced[0], full.announced[1]), full.reading)
    assert units(petals.route(0.0, ask(30), full)) == (1,)


PAIRS = {"a1": (0, 2), "b1": (0, 2), "a2": (2, 4), "b2": (2, 4)}
KINDS = {name: name[0] for name in PAIRS}


def test_chains_stay_within_a_type() -> None:
    cluster, plan = world(PAIRS, types=KINDS)
    assert chains(cluster, MODEL, plan) == ((0, 2), (1, 3))
    cluster, plan = world({"a": (0, 3), "b": (2, 4)})
    assert chains(cluster, MODEL, plan) == ()
    with pytest.raises(UsageError):
        Separate(cluster, MODEL, plan)


def test_what_a_pipeline_takes() -> None:
    # 10,000 / 100 = 100 rows; busy 2 x 7.5 + 25 x 2 / 100 ms (a piece below the least measured one
    # costs in proportion), and 100 requests are through in 30 ms + 25 x 4 ms
    _, plan = world(PAIRS, types=KINDS)
    assert requests_per_s(MODEL, plan, (0, 2)) == pytest.approx(1 / 15.5e-3)
    small = {name: profile(kv=100) for name in PAIRS}
    _, plan = world(PAIRS, small, types=KINDS)
    assert requests_per_s(MODEL, plan, (0, 2)) == pytest.approx(1 / 130e-3)


def test_separate_pipelines_get_turns_and_hexgen_evens_loads() -> None:
    slow = {name: profile(layer_s=(3 * MS if name[0] == "b" else MS)) for name in PAIRS}
    cluster, plan = world(PAIRS, slow, types=KINDS)
    separate = Separate(cluster, MODEL, plan)
    turns = Counter(units(separate.route(0.0, ask(n), view(plan))) for n in range(100))
    assert turns[0, 2] == pytest.approx(75, abs=1)
    hexgen = HexGen(cluster, MODEL, plan)
    first = [units(hexgen.route(0.0, ask(n), view(plan))) for n in range(8)]
    assert Counter(first) == {(0, 2): 6, (1, 3): 2}
    for number in range(8):
        if first[number] == (0, 2):
            hexgen.ended(1.0, ask(number), ())
    assert {units(hexgen.route(1.0, ask(n), view(plan))) for n in range(20, 26)} == {(0, 2)}


@pytest.mark.parametrize("name", NAMES)
def test_routes_are_whole_seeded_and_avoid_the_dead_and_the_refusing(name: str) -> None:
    """Every layer once, in order, within what units hold; equal seeds, equal routes."""
    cluster, plan = world(PAIRS, types=KINDS)

    def made() -> Policy:
        return rival(name, cluster, MODEL, plan, seed=3)

    policy, twin = made(), made()
    for number in range(60):
        visits = policy.route(0.0, ask(number), view(plan))
        assert visits == twin.route(0.0, ask(number), view(plan))
        assert visits is not None
        reached = 0
        for visit in visits:
            held = plan.spans[visit.unit]
            assert visit.span.first == reached
            assert held is not None
            assert held.covers(visit.span)
            reached = visit.span.end
        assert reached == LAYERS
    refused = policy.route(0.0, ask(100), view(plan, refused=frozenset({0})))
    assert refused is not None
    assert 0 not in {visit.unit for visit in refused}
    policy.lost(10.0, 1)
    later = policy.route(11.0, ask(101), view(plan))
    assert later is not None
    assert 1 not in {visit.unit for visit in later}
    alone = view(plan, refused=frozenset({0}))
    assert policy.route(12.0, ask(102), alone) is None, "both heads are barred"
    assert policy.route(10.0 + BARRED_S, ask(103), alone) is not None


def test_chance_is_even_and_names_are_checked() -> None:
    cluster, plan = world(PAIRS)
    policy = rival("random", cluster, MODEL, plan, seed=1)
    heads = Counter(units(policy.route(0.0, ask(n), view(plan)))[0] for n in range(1000))  # type: ignore[index]
    assert heads[0] == pytest.approx(500, abs=60)
    with pytest.raises(UsageError, match="helix"):
        rival("nobody", cluster, MODEL, plan)


def test_a_plan_with_a_hole_is_refused() -> None:
    cluster, plan = world({"a": (0, 2), "b": (3, 4)})
    with pytest.raises(UsageError, match="2:3"):
        rival("swarm", cluster, MODEL, plan)


@pytest.mark.parametrize("name", NAMES)
def test_every_request_ends_in_the_world_even_when_kv_is_short(name: str) -> None:
    """Twenty at once where five have room: those who wait come on, and nothing stays booked."""
    cluster, plan = world(PAIRS, {unit: profile(kv=300) for unit in PAIRS}, types=KINDS)
    requests = [Request(n, 0.01 * n, 75, 5 + n % 3, COORDINATOR) for n in range(20)]
    policy = rival(name, cluster, MODEL, plan, seed=2)
    report = simulate(cluster, MODEL, plan, policy, requests, until_s=120.0)
    assert [one.tokens for one in report.outcomes] == [item.output_tokens for item in requests]
    assert (report.running, report.waiting) == (0, 0)
    if isinstance(policy, Helix):
        assert policy.room.held == [0.0] * len(PAIRS)
