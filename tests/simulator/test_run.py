"""Runs: times by hand, and the laws that every run keeps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.records import Route, Span
from hexswarm.router.placement.cluster import Way
from hexswarm.router.routing import find_route
from hexswarm.simulator.churn import Churn, outages
from hexswarm.simulator.ours import Ours
from hexswarm.simulator.policy import Execution, Policy, Request, View, Visit, Visits
from hexswarm.simulator.records import Settings
from hexswarm.simulator.report import Report
from hexswarm.simulator.run import World, simulate
from tests.simulator.small import (
    MODEL,
    READ_S,
    ROW_S,
    TOKEN_S,
    WAY,
    WHOLE,
    Fixed,
    chain,
    profile,
    request,
    world,
)

HALVES = [(0, 4), (4, 8)]
PROMPT, ANSWER = 100, 5

PROMPT_S = 8 * PROMPT * TOKEN_S
STEP_S = 8 * (READ_S + ROW_S)
ACT_S, ID_S = MODEL.activation_bytes / WAY.bytes_per_s, MODEL.token_bytes / WAY.bytes_per_s
"""Of one token on a way."""


def one(execution: Execution) -> Report:
    cluster, plan = world(HALVES)
    policy = Fixed(chain(plan, 0, 1), execution=execution)
    requests = [request(at_s=1.0, prompt=PROMPT, answer=ANSWER)]
    return simulate(cluster, MODEL, plan, policy, requests, until_s=60.0)


def test_one_request_over_the_coordinator_takes_what_the_formula_says() -> None:
    report = one(WHOLE)
    first_s = PROMPT_S + PROMPT * (ID_S + ACT_S) + ID_S + 3 * WAY.one_way_s
    assert report.ttft.p50_s == pytest.approx(first_s)
    around_s = STEP_S + ACT_S + 2 * ID_S + 3 * WAY.one_way_s
    assert report.decode.p50_s == report.decode.p99_s == pytest.approx(around_s)
    assert report.latency.p50_s == pytest.approx(first_s + (ANSWER - 1) * around_s)
    assert (report.finished, report.decode.count, report.goodput) == (1, ANSWER - 1, 1.0)


def test_one_request_in_a_ring_opens_first_and_then_spares_the_way_to_its_client() -> None:
    report = one(replace(WHOLE, ring=True, opens=True))
    opens_s = 4 * WAY.one_way_s  # client - head - tail and back
    first_s = opens_s + PROMPT_S + PROMPT * (ID_S + ACT_S) + ID_S + 3 * WAY.one_way_s
    # The tail's connection carries the token to the head first.
    assert report.ttft.p50_s == pytest.approx(first_s, abs=1e-5)
    around_s = STEP_S + ACT_S + ID_S + 2 * WAY.one_way_s
    assert report.decode.p50_s == pytest.approx(around_s)
    assert report.outcomes[0].latency_s == pytest.approx(first_s + 4 * around_s, abs=1e-5)


@pytest.mark.parametrize("ring", [True, False])
def test_every_byte_travels_once(ring: bool) -> None:
    cluster, plan = world(HALVES)
    policy = Fixed(chain(plan, 0, 1), execution=replace(WHOLE, chunked=True, ring=ring))
    requests = [request(0, 1.0, 300, 20), request(1, 1.1, 50, 30)]
    made = World(cluster, MODEL, plan, policy, requests, 0, 60.0, 0.0, None)
    made.run(None)
    steps = 20 - 1 + 30 - 1
    carried = made.swarm.links.carried()
    assert carried["n0", "n1"] == (300 + 50 + steps) * MODEL.activation_bytes
    assert carried["n1", "coordinator"] == 50 * MODEL.token_bytes
    again = steps * MODEL.token_bytes
    assert carried.get(("n1", "n0"), 0.0) == (again if ring else 0.0)
    asked = carried["coordinator", "n0"] - 350 * MODEL.token_bytes
    assert asked == (0.0 if ring else again)


def test_a_chunked_prompt_overlaps_its_stages() -> None:
    """Pieces of 64 and 36: the way is never idle, from the head's first to the tail's last."""
    whole, chunked = one(WHOLE), one(replace(WHOLE, chunked=True))
    hidden_s = PROMPT_S - 4 * (64 + 36) * TOKEN_S
    assert chunked.ttft.p50_s == pytest.approx(whole.ttft.p50_s - hidden_s)
    assert chunked.decode.p50_s == pytest.approx(whole.decode.p50_s)


def test_the_last_token_of_a_prompt_does_not_overtake_its_pieces() -> None:
    """Pieces of 16, 16 and 1: alone the last one looks like a step."""
    cluster, plan = world(HALVES, way=Way(1e5, 0.01))
    policy = Fixed(chain(plan, 0, 1), execution=Execution())
    settings = Settings(scheduling=lambda usual: replace(usual, chunk_tokens=16, chunk_floor=16))
    requests = [request(0, 1.0, 33, 5)]
    report = simulate(cluster, MODEL, plan, policy, requests, until_s=60.0, settings=settings)
    assert report.finished == 1
    assert report.ttft.p50_s > 33 * MODEL.activation_bytes / 1e5


def test_the_router_predicts_what_a_lone_request_gets() -> None:
    cluster, plan = world([(0, 4), (4, 8), (0, 3), (3, 8)])
    told: list[Route] = []

    def search(*asked: Any) -> Route:
        told.append(find_route(*asked))
        return told[-1]

    policy = Ours(cluster, MODEL, plan, seed=3, search=search)
    requests = [request(at_s=20.0, prompt=16, answer=40)]
    report = simulate(cluster, MODEL, plan, policy, requests, until_s=60.0)
    # The simulator counts no framing (0.2 ms a hop), the router no bytes of token ids, and a piece
    # costs these machines no read of the weights.
    assert report.decode.p50_s == pytest.approx(told[0].tpot_s, abs=0.0006)
    read_s = 8 * (READ_S + ROW_S - 16 * TOKEN_S)
    assert report.ttft.p50_s == pytest.approx(told[0].ttft_s - read_s, abs=0.001)


def test_a_stage_of_whole_prompts_waits_like_a_queue_with_constant_service() -> None:
    """M/D/1, one prompt at a time."""
    cluster, plan = world([(0, 8)], profiles=[profile(kv=10**7, prompts=1)])
    service_s, rho, rng = 8 * 1000 * TOKEN_S, 0.6, random.Random(1)
    now, requests = 0.0, []
    for number in range(1500):
        now += rng.expovariate(rho / service_s)
        requests.append(request(number, now, 1000, 1))
    policy = Fixed(chain(plan, 0))
    report = simulate(cluster, MODEL, plan, policy, requests, until_s=now + 20)
    idle_s = service_s + 1000 * ID_S + ID_S + 2 * WAY.one_way_s
    assert report.finished == 1500
    wait_s = rho * service_s / (2 * (1 - rho))
    assert report.ttft.mean_s - idle_s == pytest.approx(wait_s, rel=0.07)
    assert report.uses[0].busy == pytest.approx(1500 * service_s / (now + 20), rel=1e-6)


def test_a_refused_request_takes_the_next_route_in_the_same_breath() -> None:
    cluster, plan = world([(0, 8), (0, 8)])
    policy = Fixed(chain(plan, 0), chain(plan, 1))
    requests = [request(number, 0.0, 1000, 1000) for number in range(3)]
    report = simulate(cluster, MODEL, plan, policy, requests, until_s=1000.0)
    # 4096 tokens hold two of them; the third one goes to the other machine without a wait.
    assert report.refusals == 1
    assert report.finished == 3
    assert [one.begun_s for one in report.outcomes] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("central", [True, False])
def test_who_finds_no_room_waits_and_is_served(central: bool) -> None:
    cluster, plan = world([(0, 8)])
    policy = Fixed(chain(plan, 0), execution=replace(WHOLE, central=central, retry_s=2.0))
    requests = [request(number, 0.1 * number, 3000, 10) for number in range(3)]
    report = simulate(cluster, MODEL, plan, policy, requests, until_s=1000.0)
    ends = [one.ended_s for one in report.outcomes]
    assert report.finished == 3
    assert ends == sorted(ends)
    for before, after in zip(report.outcomes, report.outcomes[1:], strict=False):
        waited_s = after.begun_s - before.ended_s
        assert waited_s == 0.0 if central else 0.0 <= waited_s <= 2.0


def test_who_waits_for_a_word_in_the_directory_is_tried_again() -> None:
    """Nobody is served meanwhile whose end could wake the coordinator."""
    cluster, plan = world(HALVES)

    class Late(Fixed):
        def route(self, now: float, asked: Request, view: View) -> Visits | None:
            return super().route(now, asked, view) if now >= 7.5 else None

    policy = Late(chain(plan, 0, 1), execution=replace(WHOLE, central=True, retry_s=2.0))
    requests = [request(number, 1.0 + number) for number in range(3)]
    report = simulate(cluster, MODEL, plan, policy, requests, until_s=20.0)
    assert [one.begun_s for one in report.outcomes] == [9.0, 9.0, 9.0]
    assert report.finished == 3


def test_patience_ends() -> None:
    cluster, plan = world([(0, 8)])
    policy = Fixed(chain(plan, 0))
    requests = [request(0, 0.0, 3000, 1000), request(1, 0.0, 3000, 1000)]
    report = simulate(
        cluster, MODEL, plan, policy, requests, until_s=60.0, settings=Settings(patience_s=3.0)
    )
    assert (report.finished, report.gave_up, report.waiting) == (1, 1, 0)
    assert 3.0 <= report.outcomes[1].ended_s <= 4.0


def test_mistakes_are_named() -> None:
    cluster, plan = world(HALVES)
    whole = chain(plan, 0, 1)
    with pytest.raises(UsageError, match="nobody holds layers 4:8"):
        simulate(cluster, MODEL, world([(0, 4), None])[1], Fixed(whole), [], until_s=1.0)
    with pytest.raises(UsageError, match="shorter"):
        simulate(cluster, MODEL, plan, Fixed(whole), [], until_s=1.0, warmup_s=1.0)
    unordered = [request(0, 2.0), request(1, 1.0)]
    with pytest.raises(UsageError, match="order"):
        simulate(cluster, MODEL, plan, Fixed(whole), unordered, until_s=9.0)
    for wrong in (whole[:1], whole[::-1], (Visit(0, Span(0, 8)),), (whole[0], *whole)):
        with pytest.raises(UsageError, match="a route that is none"):
            simulate(cluster, MODEL, plan, Fixed(wrong), [request()], until_s=9.0)


# --- laws -----------------------------------------------------------------------------------------

LETTERS = ("", "e", "h", "hi", "hia", "hiap", "ip", "hep", "ea")
"""The second ones of what `Execution` has."""

SPANS = [(0, 5), (5, 8), (0, 3), (3, 8), (2, 6), None]


def drawn(seed: int, count: int) -> list[Request]:
    rng = random.Random(seed)
    times = sorted(rng.uniform(0, 8) for _ in range(count))
    return [
        request(number, when, rng.randrange(4, 400), rng.randrange(1, 30))
        for number, when in enumerate(times)
    ]


def made_of(letters: str, seed: int) -> World:
    """A system by its letters; o: our own."""
    rng = random.Random(seed)
    profiles = [profile(kv=rng.choice((700, 1500, 4000)), slower=rng.choice((1, 5))) for _ in SPANS]
    cluster, plan = world(SPANS, way=Way(2e5, rng.choice((0.001, 0.05))), profiles=profiles)
    policy: Policy = Ours(cluster, MODEL, plan, seed=seed)
    if "o" not in letters:
        routes = chain(plan, 0, 1), chain(plan, 2, 3), chain(plan, 2, 4, 1)
        parts = ("chunked", "ring", "central", "lanes", "opens")
        chosen = {part: part[1] in letters for part in parts}
        policy = Fixed(*routes, execution=Execution(**chosen))
    fine = Settings(scheduling=lambda usual: replace(usual, chunk_tokens=16, chunk_floor=16))
    settings = rng.choice((fine, Settings(detect_s=0.2)))
    made = World(cluster, MODEL, plan, policy, drawn(seed, 25), seed, 400.0, 0.0, settings)
    for outage in outages(plan, Churn(12.0, 2.0), 30.0, seed) if seed % 2 else ():
        made.agenda.at(outage.dies_s, made.mending.die, outage.unit)
        made.agenda.at(outage.back_s, made.mending.come_back, outage.unit)
    return made


@effort(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), letters=st.sampled_from(["o", *LETTERS]))
def test_whatever_happens_every_request_ends_once_and_leaves_nothing(
    seed: int, letters: str
) -> None:
    """Machines die and return, KV is short: each request is answered in full, no stage idles
    while something waits, and no KV, promise or session is left."""
    made = made_of(letters, seed)
    swarm = made.swarm
    while made.agenda.next_s <= 400.0 and made.clients.ended < 25:
        made.agenda.run(made.agenda.next_s)
        for stage in filter(None, swarm.stages):
            idle = stage.running is None and len(stage.queue) and stage.wake_s is None
            assert not idle, f"unit {stage.number} idles at {made.agenda.now}"
            leased = sum(len(stage.tables.blocks(session)) for session in stage.tables.sessions)
            assert leased + stage.tables.free_blocks == stage.tables.total_blocks
    made.agenda.run(400.0)
    report = made.report()
    assert (report.finished, report.running, report.waiting) == (25, 0, 0)
    for one_ in report.outcomes:
        assert one_.tokens == one_.request.output_tokens
        assert one_.request.arrives_s <= one_.begun_s < one_.first_s <= one_.last_s == one_.ended_s
    tokens = sum(one_.request.output_tokens for one_ in report.outcomes)
    assert report.decode_tokens_per_s * 400 == pytest.approx(tokens)
    assert report.decode.count == tokens - 25
    assert not swarm.sessions
    for stage in filter(None, swarm.stages):
        assert stage.tables.free_blocks == stage.tables.total_blocks
        assert len(stage.promises) == len(stage.queue) == 0
        assert stage.running is None or not stage.alive


def test_equal_seeds_give_equal_reports() -> None:
    reports = []
    for _ in range(2):
        made = made_of("o", 11)
        made.run(None)
        reports.append(made.report())
    assert reports[0] == reports[1]
    assert reports[0].repairs > 0


def test_progress_is_told_and_changes_nothing() -> None:
    cluster, plan = world(HALVES)
    told: list[tuple[float, int, int]] = []

    def run(**more: object) -> Report:
        policy = Fixed(chain(plan, 0, 1))
        return simulate(cluster, MODEL, plan, policy, drawn(4, 12), until_s=50.0, **more)

    assert run(told=lambda *each: told.append(each)) == run()
    assert told[-1] == (50.0, 12, 12)
    assert [now for now, *_ in told] == sorted(now for now, *_ in told)
    assert len(told) >= 100
