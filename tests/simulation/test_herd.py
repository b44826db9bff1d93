"""The simulation of policies under load: its world keeps its laws, and its comparison is fair."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hexswarm.records import Load, Span, Speed, uncovered

pytestmark = pytest.mark.simulation

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("herd_world", "herd_policies", "herd")


@pytest.fixture(scope="module")
def herd() -> Iterator[ModuleType]:
    """The script with its neighbours, loaded by path as `python benchmarks/herd.py` would."""
    before = list(sys.path)
    for name in MODULES:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    yield sys.modules["herd"]
    sys.path[:] = before
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def worlds(herd: ModuleType) -> ModuleType:
    return sys.modules["herd_world"]


def lone_world(worlds: ModuleType, layer_s: float, spans: list[tuple[int, int]]) -> Any:
    """One region, peers of one speed at 10 ms one way from each other and from one client."""
    speed = Speed(layer_s, layer_s / 50, layer_s, layer_s / 5)
    place = worlds.Coordinates((0.0, 0.0, 0.0), 0.01, 0.0)
    machines = tuple(
        worlds.Machine(f"peer{n}", 0, Span(*span), speed, 4000, 1e12, place)
        for n, span in enumerate(spans)
    )
    ways = worlds.np.full((len(spans), len(spans)), 0.01)
    worlds.np.fill_diagonal(ways, 0.0)
    return worlds.World(machines, ways, ways[:1] * 0 + 0.01, (0,), (0,), worlds.capacity(machines))


class Fixed:
    """Always the same ring; records what the client was told."""

    def __init__(self, ring: list[tuple[int, int]]) -> None:
        self.ring, self.heard = ring, []

    def route(self, now: float, view: Any, client: int, request: Any, refused: Any) -> Any:
        return None if refused else self.ring

    def told(self, now: float, client: int, loads: dict[int, Load], *, opened: bool) -> None:
        self.heard.append((loads, opened))


def request(worlds: ModuleType, arrive_s: float, prompt: int = 10, answer: int = 50) -> Any:
    return worlds.Request(arrive_s, 0, prompt, answer, 1.5, True)


@pytest.mark.parametrize("seed", range(5))
def test_a_drawn_swarm_covers_the_model_and_its_capacity_is_a_bound(
    worlds: ModuleType, seed: int
) -> None:
    world = worlds.draw_world(random.Random(seed))
    assert not uncovered((machine.span for machine in world.machines), worlds.LAYERS)
    for layer in range(worlds.LAYERS):
        held = [m for m in world.machines if layer in m.span]
        assert world.capacity <= sum(1 / worlds.layer_cost_s(m.speed) for m in held)
    everybody = sum(1 / worlds.layer_cost_s(m.speed) for m in world.machines)
    assert 0 < world.capacity <= everybody / worlds.LAYERS * (1 + 1e-9)


def test_capacity_counts_a_peer_once_for_all_layers_that_only_it_holds(worlds: ModuleType) -> None:
    """Layers 0 and 31 rest on the long peer alone, however many hold those between."""
    spans = [(0, 32), *[(1, 31)] * 20]
    world = lone_world(worlds, 0.001, spans)
    alone = 1 / worlds.layer_cost_s(world.machines[0].speed)
    assert world.capacity == pytest.approx(alone / 2)


def test_an_idle_ring_takes_what_its_layers_and_links_take(worlds: ModuleType) -> None:
    world = lone_world(worlds, 0.001, [(0, 16), (16, 32)])
    result = worlds.simulate(world, [request(worlds, 0.0)], Fixed([(0, 16), (1, 16)]), 1)
    (outcome,) = result.outcomes
    # 32 layers and the head of 1 ms, two ways of 10 ms with 5 % jitter in the mean.
    assert outcome.tpot_s == pytest.approx(0.033 + 2 * 0.01 * 1.05, rel=0.03)
    # Opening there and back, the prompt's way, its one batch at both peers, and the way home.
    assert outcome.ttft_s == pytest.approx(0.02 + 0.01 + 0.033 + 0.01 + 0.01, rel=0.1)


def test_sessions_that_meet_share_a_batch(worlds: ModuleType) -> None:
    """Eight sessions on one peer fall into two batches that alternate: a token waits for two first
    rows and six further ones, not for eight first ones."""
    world = lone_world(worlds, 0.001, [(0, 32)])
    alone = worlds.simulate(world, [request(worlds, 0.0)], Fixed([(0, 32)]), 1).outcomes
    many = [request(worlds, 0.0) for _ in range(8)]
    together = worlds.simulate(world, many, Fixed([(0, 32)]), 1).outcomes
    slow = max(outcome.tpot_s for outcome in together) / alone[0].tpot_s
    assert slow == pytest.approx(2 + 6 / 5, rel=0.05)


def test_kv_is_leased_or_refused_and_given_back(worlds: ModuleType) -> None:
    """4,000 tokens hold one session of 2,500 at a time; the next may come when it is over."""
    world = lone_world(worlds, 0.001, [(0, 32)])
    policy = Fixed([(0, 32)])
    wanted = [request(worlds, at, 2000, 500) for at in (0.0, 1.0, 100.0)]
    outcomes = worlds.simulate(world, wanted, policy, 1).outcomes
    by_arrival = sorted(outcomes, key=lambda item: item.request.arrive_s)
    assert [item.accepted for item in by_arrival] == [True, False, True]
    assert [opened for _, opened in policy.heard] == [True, False, True]
    told = [loads[0].free_kv_tokens for loads, _ in policy.heard]
    assert told == [1500, 1500, 1500]


def test_load_is_told_and_fades(worlds: ModuleType) -> None:
    """A peer that computes is busier than when nothing came for a minute."""
    world = lone_world(worlds, 0.001, [(0, 32)])
    policy = Fixed([(0, 32)])
    wanted = [request(worlds, at, 100, 100) for at in (0.0, 0.0, 0.0, 3.0, 90.0)]
    worlds.simulate(world, wanted, policy, 1)
    (first, *_), (busy, _), (later, _) = policy.heard[0], policy.heard[3], policy.heard[4]
    assert first[0].rows == first[0].busy == 0
    assert busy[0].rows > 0.3
    assert 0 < busy[0].busy < 1
    assert later[0].rows < 0.01
    assert later[0].queue_s < busy[0].queue_s


def test_views_are_old_but_not_from_the_future(worlds: ModuleType) -> None:
    world = worlds.draw_world(random.Random(3), 12, 20)
    ages = []

    class Watching(Fixed):
        def route(self, now: float, view: Any, client: int, request: Any, refused: Any) -> Any:
            ages.extend(now - item.issued_s for item in view.announcements if item.sequence)
            return None

    drawn = worlds.draw_requests(world, 0.5, 20, random.Random(3))
    outcomes = worlds.simulate(world, drawn, Watching([]), 3).outcomes
    assert not any(outcome.accepted for outcome in outcomes)
    assert min(ages) >= 0
    assert max(ages) <= worlds.ANNOUNCE_S[1] + worlds.REFRESH_S
    assert sum(ages) / len(ages) > worlds.ANNOUNCE_S[0]


@pytest.mark.parametrize("name", ["petals", "per-layer", "ours", "ours: limits"])
def test_equal_seeds_give_equal_figures(herd: ModuleType, name: str) -> None:
    """And every request is accounted for, whichever the policy."""

    def told() -> Any:
        found = herd.run(name, herd.POLICIES[name], 0.3, 5, requests=25, peers=16, clients=20)
        return replace(found, wall_s=0.0)

    once = told()
    assert once == told()
    assert once.requests == 25
    assert 0 <= once.refused < 1
    assert math.isfinite(once.tpot_p95_s)


def test_the_other_rules_cover_the_model_and_see_no_load(herd: ModuleType) -> None:
    """Petals' rule takes the same ring however long the queue is; the cost per layer does not."""
    policies, worlds = sys.modules["herd_policies"], sys.modules["herd_world"]
    world = worlds.draw_world(random.Random(2), 24, 5)
    free = [machine.kv_tokens for machine in world.machines]
    idle = [world.announcement(n, Load(free_kv_tokens=kv), 0.0, 0) for n, kv in enumerate(free)]
    wanted = request(worlds, 0.0)
    for rule, swayed in ((policies.Petals(world), False), (policies.PerLayer(world), True)):
        ring = rule.route(0.0, worlds.View((0, 0), tuple(idle)), 0, wanted, frozenset())
        assert sum(layers for _, layers in ring) == worlds.LAYERS
        used = {index for index, _ in ring}
        jammed = [
            item.with_load(Load(9.0, 500.0, 0.9, item.free_kv_tokens)) if n in used else item
            for n, item in enumerate(idle)
        ]
        again = rule.route(0.0, worlds.View((0, 1), tuple(jammed)), 0, wanted, frozenset())
        assert (again != ring) == swayed
        without = rule.route(0.0, worlds.View((0, 0), tuple(idle)), 0, wanted, frozenset(used))
        assert without is None or not used & {index for index, _ in without}


def test_the_summary_compares_with_the_better_rule_seed_by_seed(herd: ModuleType) -> None:
    def figure(policy: str, seed: int, p95: float, load: float = 0.8) -> Any:
        return herd.Figures(
            policy, load, seed, 100, 0.1, p95, 1.0, 1.0, 0.5, 0.9, 0.0, 3.0, 0.4, 0.1, 1.0
        )

    found = [
        figure("petals", 1, 1.0),
        figure("per-layer", 1, 2.0),
        figure("ours", 1, 0.5),
        figure("petals", 2, 3.0),
        figure("per-layer", 2, 2.0),
        figure("ours", 2, 0.6),
        figure("ours", 1, 9.9, load=0.3),
        figure("ours: limits", 1, 0.2, load=0.7),
    ]
    told = herd.summary(found)
    assert told["ratios_p95"]["ours"] == [0.5, 0.3]
    assert told["ratio_p95"] == pytest.approx(0.4)
    assert told["ratio_met"]
    assert told["limits_kept"] == pytest.approx(0.9)
    assert not told["limits_met"]
    assert told["limits_accepted"] == pytest.approx(0.5)
