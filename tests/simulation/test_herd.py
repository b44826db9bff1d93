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
MODULES = ("herd_world", "herd_events", "herd_policies", "herd")


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


@pytest.fixture(scope="module")
def events(herd: ModuleType) -> ModuleType:
    return sys.modules["herd_events"]


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
    """Always the same ring, with a promise for each stage; records what the client was told."""

    def __init__(self, ring: list[tuple[int, int]], step_s: float = 0.0) -> None:
        self.ring, self.heard, self.step_s = ring, [], step_s

    def route(self, now: float, view: Any, client: int, request: Any, refused: Any) -> Any:
        choice = sys.modules["herd_events"].Choice
        return None if refused else choice(self.ring, (self.step_s,) * len(self.ring))

    def told(self, now: float, client: int, loads: dict[int, Load], *, opened: bool) -> None:
        self.heard.append((loads, opened))


def request(worlds: ModuleType, arrive_s: float, prompt: int = 10, answer: int = 50) -> Any:
    return worlds.Request(arrive_s, 0, prompt, answer, 1.5, 0.5, True)


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


def test_an_idle_ring_takes_what_its_layers_and_links_take(
    worlds: ModuleType, events: ModuleType
) -> None:
    world = lone_world(worlds, 0.001, [(0, 16), (16, 32)])
    result = events.simulate(world, [request(worlds, 0.0)], Fixed([(0, 16), (1, 16)]), 1)
    (outcome,) = result.outcomes
    # 32 layers and the head of 1 ms, two ways of 10 ms with 5 % jitter in the mean.
    assert outcome.tpot_s == pytest.approx(0.033 + 2 * 0.01 * 1.05, rel=0.03)
    # Opening there and back, the prompt's way, its one batch at both peers, and the way home.
    assert outcome.ttft_s == pytest.approx(0.02 + 0.01 + 0.033 + 0.01 + 0.01, rel=0.1)


def test_sessions_that_meet_share_a_batch(worlds: ModuleType, events: ModuleType) -> None:
    """Eight sessions on one peer fall into two batches that alternate: a token waits for two first
    rows and six further ones, not for eight first ones."""
    world = lone_world(worlds, 0.001, [(0, 32)])
    alone = events.simulate(world, [request(worlds, 0.0)], Fixed([(0, 32)]), 1).outcomes
    many = [request(worlds, 0.0) for _ in range(8)]
    together = events.simulate(world, many, Fixed([(0, 32)]), 1).outcomes
    slow = max(outcome.tpot_s for outcome in together) / alone[0].tpot_s
    assert slow == pytest.approx(2 + 6 / 5, rel=0.05)


def test_kv_is_leased_or_refused_and_given_back(worlds: ModuleType, events: ModuleType) -> None:
    """4,000 tokens hold one session of 2,500 at a time; the next may come when it is over."""
    world = lone_world(worlds, 0.001, [(0, 32)])
    policy = Fixed([(0, 32)])
    wanted = [request(worlds, at, 2000, 500) for at in (0.0, 1.0, 100.0)]
    outcomes = events.simulate(world, wanted, policy, 1).outcomes
    by_arrival = sorted(outcomes, key=lambda item: item.request.arrive_s)
    assert [item.accepted for item in by_arrival] == [True, False, True]
    assert [opened for _, opened in policy.heard] == [True, False, True]
    told = [loads[0].free_kv_tokens for loads, _ in policy.heard]
    assert told == [1500, 1500, 1500]


def test_load_is_told_and_fades(worlds: ModuleType, events: ModuleType) -> None:
    """A peer that computes is busier than when nothing came for a minute."""
    world = lone_world(worlds, 0.001, [(0, 32)])
    policy = Fixed([(0, 32)])
    wanted = [request(worlds, at, 100, 100) for at in (0.0, 0.0, 0.0, 3.0, 90.0)]
    events.simulate(world, wanted, policy, 1)
    (first, *_), (busy, _), (later, _) = policy.heard[0], policy.heard[3], policy.heard[4]
    assert first[0].rows == first[0].busy == 0
    assert busy[0].rows > 0.3
    assert 0 < busy[0].busy < 1
    assert later[0].rows < 0.01
    assert later[0].queue_s < busy[0].queue_s


def test_views_are_old_but_not_from_the_future(worlds: ModuleType, events: ModuleType) -> None:
    world = worlds.draw_world(random.Random(3), 12, 20)
    ages = []

    class Watching(Fixed):
        def route(self, now: float, view: Any, client: int, request: Any, refused: Any) -> Any:
            ages.extend(now - item.issued_s for item in view.announcements if item.sequence)
            return None

    drawn = worlds.draw_requests(world, 0.5, 20, random.Random(3))
    outcomes = events.simulate(world, drawn, Watching([]), 3).outcomes
    assert not any(outcome.accepted for outcome in outcomes)
    assert min(ages) >= 0
    assert max(ages) <= events.ANNOUNCE_S[1] + events.REFRESH_S
    assert sum(ages) / len(ages) > events.ANNOUNCE_S[0]


@pytest.mark.parametrize("name", ["petals", "per-layer", "ours", "limits"])
def test_equal_seeds_give_equal_figures(herd: ModuleType, name: str) -> None:
    """And every request is accounted for, whichever the policy."""
    limits = herd.Limits(0.2, 0.5) if name == "limits" else None
    make = herd.POLICIES.get(name) or (lambda world, seed: herd.Ours(world, seed, limits=limits))

    def told() -> Any:
        found = herd.run(name, make, 0.3, 5, requests=25, peers=16, clients=20, limits=limits)
        return replace(found, wall_s=0.0)

    once = told()
    # Not-a-number is unlike itself.
    assert repr(once) == repr(told())
    assert once.requests == 25
    assert 0 <= once.refused < 1
    assert math.isfinite(once.tpot_p95_s)
    assert (0 < once.limited < 25) == (name == "limits")


def test_promises_are_given_refused_and_kept(worlds: ModuleType, events: ModuleType) -> None:
    """A step of 33 ms can be promised to one session here, not to six that come at once; and who
    asks for nothing is refused as well, as long as it would break the promise."""
    world = lone_world(worlds, 0.001, [(0, 32)])
    many = [request(worlds, 0.001 * at, 10, 200) for at in range(6)]
    strict = events.simulate(world, many, Fixed([(0, 32)], 0.035), 1).outcomes
    assert [item.accepted for item in strict].count(True) == 1
    assert all(item.tpot_s <= 0.035 for item in strict if item.accepted)
    loose = events.simulate(world, many, Fixed([(0, 32)], 0.2), 1).outcomes
    assert all(item.accepted and item.tpot_s <= 0.2 for item in loose)

    class First(Fixed):
        def route(self, now: float, view: Any, client: int, request: Any, refused: Any) -> Any:
            self.step_s = 0.035 if now == 0 else 0.0
            return super().route(now, view, client, request, refused)

    wanted = [*many, request(worlds, 100.0)]
    mixed = events.simulate(world, wanted, First([(0, 32)]), 1).outcomes
    by_arrival = sorted(mixed, key=lambda item: item.request.arrive_s)
    assert [item.accepted for item in by_arrival] == [True, *[False] * 5, True]


def test_the_other_rules_cover_the_model_and_see_no_load(herd: ModuleType) -> None:
    """Petals' rule takes the same ring however long the queue is; the cost per layer does not."""
    policies, worlds, events = (
        sys.modules[name] for name in ("herd_policies", "herd_world", "herd_events")
    )
    world = worlds.draw_world(random.Random(2), 24, 5)
    free = [machine.kv_tokens for machine in world.machines]
    idle = [world.announcement(n, Load(free_kv_tokens=kv), 0.0, 0) for n, kv in enumerate(free)]
    wanted = request(worlds, 0.0)
    for rule, swayed in ((policies.Petals(world), False), (policies.PerLayer(world), True)):
        ring = rule.route(0.0, events.View((0, 0), tuple(idle)), 0, wanted, frozenset())
        assert sum(layers for _, layers in ring.ring) == worlds.LAYERS
        used = {index for index, _ in ring.ring}
        jammed = [
            item.with_load(Load(9.0, 500.0, 0.9, item.free_kv_tokens)) if n in used else item
            for n, item in enumerate(idle)
        ]
        again = rule.route(0.0, events.View((0, 1), tuple(jammed)), 0, wanted, frozenset())
        assert (again != ring) == swayed
        without = rule.route(0.0, events.View((0, 0), tuple(idle)), 0, wanted, frozenset(used))
        assert without is None or not used & {index for index, _ in without.ring}


def test_the_summary_compares_with_the_better_rule_seed_by_seed(herd: ModuleType) -> None:
    def figure(p95: float, accepted: float = math.nan, kept: float = math.nan) -> Any:
        limited = 0 if math.isnan(accepted) else 100
        rest = (0.0, limited, accepted, kept, 0.0, 3.0, 0.4, 0.1, 1.0)
        return herd.Figures("any", 0.0, 0, 100, 0.1, p95, 1.0, *rest)

    case = herd.Case
    found = {
        case("petals", 0.8, 1): figure(1.0),
        case("per-layer", 0.8, 1): figure(2.0),
        case("ours", 0.8, 1): figure(0.5),
        case("petals", 0.8, 2): figure(3.0),
        case("per-layer", 0.8, 2): figure(2.0),
        case("ours", 0.8, 2): figure(0.6),
        case("petals", 0.3, 1): figure(1.0),
        case("per-layer", 0.3, 1): figure(0.8),
        case("ours", 0.3, 1): figure(0.6),
        case("petals", 0.05, 1): figure(1.0),
        case("per-layer", 0.05, 1): figure(1.0),
        case("ours", 0.05, 1): figure(1.1),
        case("one choice", 0.8, 1): figure(0.75),
        case("ours", 0.7, 1): figure(9.9),
        case("ours", 0.7, 1, "idle"): figure(0.2, 0.5, 0.9),
        case("ours", 0.7, 2, "idle"): figure(0.2, 0.1, 1.0),
    }
    told = herd.summary(found)
    assert told["p95_ratio"] == {"worst": 0.5, "mean": pytest.approx(0.4), "met": True}
    assert told["p95_ratio_low_load"] == {"0.05": 1.1, "0.3": pytest.approx(0.75)}
    assert told["ablations"]["one choice"] == [1.5]
    assert told["limits_accepted"]["idle"] == pytest.approx(0.3)
    assert told["limits_kept"]["idle"] == pytest.approx((45 + 10) / 60)
    assert not told["limits_met"]
