"""What a client names is found again, by it alone, and changes no token whatever goes wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hexswarm import prefix
from hexswarm.errors import LocalProtocolError
from hexswarm.instructions import Turn
from hexswarm.messages import Open, Opened
from hexswarm.prefix import HASH_BYTES, MOST_BLOCKS, NOTHING, Namer, Offer
from hexswarm.records import PeerId, Route, Sampling, Span, Stage
from hexswarm.resume import Held, Part, plan_resume
from hexswarm.session import Session
from hexswarm.wire import Frame
from tests.loopback import CLIENT, MODEL, Loopback, Told, answer
from tests.swarm.test_mended_rings import NEW, RINGS, double, step

PROMPT = [(7 * i) % 97 for i in range(40)]
ROUTE = Route((Stage(PeerId("p0"), Span(0, 2)), Stage(PeerId("p1"), Span(2, 6))), 0.0, 0.0)
ALIKE = st.lists(st.sampled_from([1, 2]), max_size=5).map(
    lambda blocks: [i for i in blocks for _ in range(16)]
)
"""Few different blocks, so that prompts part and meet again: equal blocks behind unequal ones."""
IDS = st.one_of(ALIKE, st.lists(st.integers(0, 1 << 17), max_size=80))


# --- names --------------------------------------------------------------------------------------


@given(IDS, IDS, st.binary(min_size=1, max_size=8), st.binary(min_size=1, max_size=8))
@example([1] * 16 + [3] * 16, [2] * 16 + [3] * 16, b"x", b"y")
def test_names_agree_as_far_as_the_ids_do(a: list[int], b: list[int], x: bytes, y: bytes) -> None:
    """Hash i is the same if and only if the first i blocks are, and the secret is."""
    one, other = Namer(x, MODEL).hashes(a), Namer(x, MODEL).hashes(b)
    assert (len(one), len(other)) == (len(a) // 16, len(b) // 16)
    for i, (p, q) in enumerate(zip(one, other, strict=False)):
        assert (p == q) == (a[: 16 * i + 16] == b[: 16 * i + 16])
    foreign = Namer(y, MODEL).hashes(a)
    assert (set(one) & set(foreign)) == (set(one) if x == y else set())
    assert not set(one) & set(Namer(x, "cd" * 32).hashes(a))


def test_a_mark_tells_who_computes_up_to_a_stage() -> None:
    namer = Namer(b"secret", MODEL)
    first, second = namer.marks(ROUTE)
    other = replace(ROUTE, stages=(replace(ROUTE.stages[0], peer=PeerId("x")), ROUTE.stages[1]))
    behind = replace(ROUTE, stages=(ROUTE.stages[0], replace(ROUTE.stages[1], peer=PeerId("x"))))
    assert first not in namer.marks(other)
    assert second not in namer.marks(other)
    assert namer.marks(behind)[0] == first
    assert namer.marks(behind)[1] != second


@given(st.binary(min_size=16, max_size=16), st.lists(st.binary(min_size=16, max_size=16)))
def test_an_offer_comes_out_as_it_went_in(mark: bytes, hashes: list[bytes]) -> None:
    told = prefix.unpack(prefix.pack(mark, hashes))
    assert told == (Offer(mark, tuple(hashes)) if hashes else NOTHING)
    assert told.tokens == 16 * len(hashes)


@pytest.mark.parametrize("size", [0, 1, 16, 33, 47, HASH_BYTES * (MOST_BLOCKS + 2)])
def test_what_is_no_offer_offers_nothing(size: int) -> None:
    assert prefix.unpack(bytes(size)) == NOTHING


def test_so_many_blocks_and_no_more_are_named() -> None:
    hashes = Namer(b"s", MODEL).hashes([1] * (16 * (MOST_BLOCKS + 3)))
    assert len(hashes) == MOST_BLOCKS
    assert prefix.unpack(prefix.pack(bytes(16), hashes)).hashes == hashes


# --- rings --------------------------------------------------------------------------------------


def ask(
    swarm: Loopback, prompt: list[int], route: Route | None = None, who: PeerId = CLIENT
) -> tuple[Session, Told]:
    """A turn under way, of a session that was opened for it."""
    session, told = swarm.open(100, route, who=who, prompt=prompt)
    swarm.run()
    assert session.open, session.failed
    swarm.ask(session, prompt, NEW)
    return session, told


def hear(
    swarm: Loopback, prompt: list[int], *, route: Route | None = None, who: PeerId = CLIENT
) -> tuple[Session, int]:
    """An answer, from beginning to end; how much of the prompt was there."""
    session, told = ask(swarm, prompt, route, who)
    known = session._turn.position
    swarm.run()
    assert told.tokens == answer(prompt, NEW, swarm.layers), told.error
    swarm.check()
    return session, known


def end(swarm: Loopback, *sessions: Session) -> None:
    for session in sessions:
        swarm.carry_out(session, session.close())
    swarm.run()
    swarm.check()


@pytest.mark.parametrize("spans", list(RINGS.values()), ids=str)
def test_a_prompt_begins_where_all_stages_know_it(spans: tuple[tuple[int, int], ...]) -> None:
    swarm = Loopback(*spans)
    one, known = hear(swarm, PROMPT)
    assert known == 0
    two, known = hear(swarm, [*PROMPT[:36], 1, 2, 3])
    assert known == 32, "the first still runs"
    end(swarm, one, two)
    for host in swarm.hosts.values():
        assert sum(key[0] == two.key for key in host.computed) == 39 - 32 + NEW - 1
    talk = [*PROMPT, *answer(PROMPT, NEW, swarm.layers), 5]
    three, known = hear(swarm, talk)
    assert known == 32, "of 47 that are cached two blocks are full"
    end(swarm, three)
    four, known = hear(swarm, [*talk, *answer(talk, NEW, swarm.layers), 6, 7])
    assert known == 48
    end(swarm, four)
    swarm.check_clean()


def test_a_session_that_found_everything_computes_the_last_token() -> None:
    swarm = Loopback(*RINGS[3])
    end(swarm, hear(swarm, PROMPT[:32])[0])
    assert hear(swarm, PROMPT[:32])[1] == 16


def test_nobody_finds_what_another_client_said() -> None:
    swarm = Loopback(*RINGS[2])
    end(swarm, hear(swarm, PROMPT)[0])
    other = PeerId("other")
    assert hear(swarm, PROMPT, who=other)[1] == 0
    mine, theirs = (Namer(who.encode(), MODEL) for who in (CLIENT, other))
    payload = prefix.pack(mine.marks(swarm.route())[0], mine.hashes(PROMPT))
    opening = Open(b"k" * 16, 0, MODEL, 0, 2, "p1", "p1", ("/x",), 64)
    assert mine.hashes(PROMPT) != theirs.hashes(PROMPT)
    for who, cached in ((other, 0), (CLIENT, 32)):
        opening = replace(opening, session=who.encode().ljust(16, b"k"))
        swarm.sessions[opening.session] = swarm.sessions[next(iter(swarm.sessions))]
        swarm.say(who, "p0", opening, payload)
        swarm.run()
        host = swarm.hosts[PeerId("p0")]
        assert host.ledger.tables.length(opening.session) == cached, "not with stolen names either"


def test_what_one_stage_forgot_all_compute_again() -> None:
    swarm = Loopback(*RINGS[3])
    end(swarm, hear(swarm, PROMPT)[0])
    tables = swarm.hosts[PeerId("p1")].ledger.tables
    tables.give_back(tables.borrow(64, 0.0), 0.0)
    one, known = hear(swarm, PROMPT)
    assert known == 0
    two, known = hear(swarm, PROMPT)
    assert known == 32
    end(swarm, one, two)
    swarm.hosts[PeerId("p2")].ledger.tables._keep = False
    assert hear(swarm, PROMPT)[1] == 0


def test_kv_from_behind_another_peer_is_not_used() -> None:
    """What a peer that means ill made of a prompt does not come back in other routes."""
    swarm = double(3)
    usual, other = swarm.route("p0", "p1", "p2"), swarm.route("p3", "p1", "p2")
    for route, known in ((usual, 0), (other, 0), (usual, 32), (other, 32)):
        session, found = hear(swarm, PROMPT, route=route)
        assert found == known
        end(swarm, session)


def test_a_turn_that_goes_back_goes_back_to_a_block_that_others_read() -> None:
    swarm = Loopback(*RINGS[3])
    one, _ = hear(swarm, PROMPT)
    two, _ = hear(swarm, PROMPT)
    for session, word in ((one, 50), (two, 51)):
        prompt = [*PROMPT[:20], word, *PROMPT[20:]]
        swarm.ask(session, prompt, NEW)
        assert session._turn.position == 16
        swarm.run()
        told = swarm.sessions[session.key][2]
        assert (told.tokens, told.error) == (answer(prompt, NEW, 6), None)
        swarm.check()
    end(swarm, one, two)
    assert hear(swarm, PROMPT)[1] == 16, "what was written elsewhere is not found by the old name"


def test_a_session_says_what_it_was_opened_for() -> None:
    swarm = Loopback(*RINGS[2])
    session, _ = swarm.open(100, prompt=PROMPT)
    swarm.run()
    with pytest.raises(LocalProtocolError):
        session.generate(Turn(0, (1, 2, 3), 4, Sampling(), ()))


def test_a_stage_that_claims_more_than_was_named_is_not_believed() -> None:
    session = Session(bytes(16), ROUTE, MODEL, 64, namer=Namer(b"s", MODEL), prompt=PROMPT)
    session.start()
    for peer in ("p0", "p1"):
        opened = Opened(bytes(16), 0, 64, cached=1000)
        session.on_frame(PeerId(peer), Frame(opened))
    assert session.cached == PROMPT[:32]


# --- losses -------------------------------------------------------------------------------------


def test_a_stage_goes_back_to_the_beginning_of_a_block_that_has_a_name() -> None:
    held = [Held(40, 32), Held(40, 32), Held(5, 5)]
    assert plan_resume(held, 41) == [Part(5, 5), Part(5, 5), Part(5, 5)]
    assert plan_resume(held, 41, 32) == [Part(0, 0), Part(0, 5), Part(5, 5)]


@settings(max_examples=25, deadline=None)
@given(
    stages=st.sampled_from([2, 3]),
    moves=st.integers(0, 90),
    victims=st.lists(st.integers(0, 5), min_size=1, max_size=2),
    beside=st.booleans(),
    both=st.booleans(),
    rng=st.randoms(use_true_random=False),
)
def test_answers_that_began_with_what_was_known_survive_their_peers(
    stages: int, moves: int, victims: list[int], beside: bool, both: bool, rng: random.Random
) -> None:
    """Whoever dies when, whether the next one has the prefix, whoever reads the same blocks."""
    swarm = double(stages)
    first = swarm.route(*(f"p{i}" for i in range(stages)))
    second = swarm.route(*(f"p{i}" for i in range(stages - 1)), f"p{2 * stages - 1}")
    for route in [first, second] if both else [first]:
        end(swarm, hear(swarm, PROMPT, route=route)[0])
    asked = [ask(swarm, PROMPT, first) for _ in range(2 if beside else 1)]
    assert all(session._turn.position == 32 for session, _ in asked)
    step(swarm, moves, rng)
    for number in victims:
        peer = PeerId(f"p{number % (2 * stages)}")
        twin = PeerId(f"p{(number + stages) % (2 * stages)}")
        if {peer, twin} <= set(swarm.hosts):
            swarm.kill(peer)
    swarm.run(rng)
    for session, told in asked:
        assert told.tokens == answer(PROMPT, NEW, 6), told.error
        swarm.carry_out(session, session.close())
    swarm.run(rng)
    swarm.check()
    living = [min(p for p in swarm.hosts if int(p[1:]) % stages == i) for i in range(stages)]
    end(swarm, hear(swarm, PROMPT, route=swarm.route(*living))[0])
    swarm.check_clean()
