"""A client's sessions driven against real stages, in the order of a quiet network and any other.

The stages' own rules (who may say what, leases, hostile input) are in `tests/peer/test_stage.py`.
"""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm import orders
from hexswarm.errors import (
    LocalProtocolError,
    PeerLost,
    Refused,
    RemoteProtocolError,
    SessionClosed,
)
from hexswarm.instructions import Connect, EmitTraces, Fail, Send, Turn
from hexswarm.messages import (
    Failed,
    GoAway,
    Hidden,
    Logits,
    Open,
    Opened,
    Refuse,
    Token,
    Tokens,
    Trace,
    Traced,
)
from hexswarm.peer.admission import RESERVE_S
from hexswarm.records import PeerId, Sampling
from hexswarm.session import Session
from hexswarm.wire import Frame
from tests.loopback import CLIENT, MODEL, VOCABULARY, Loopback, answer

RINGS = {
    1: ((0, 6),),
    2: ((0, 2), (2, 6)),
    3: ((0, 2), (2, 4), (4, 6)),
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(params=[1, 2, 3])
def ring(request: pytest.FixtureRequest) -> Loopback:
    return Loopback(*RINGS[request.param])


def done(swarm: Loopback) -> None:
    """Close every session; nothing may be left."""
    for _, session, _ in swarm.sessions.values():
        swarm.carry_out(session, session.close())
    swarm.run()
    swarm.check_clean()


# --- a turn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[7], PROMPT, list(range(40))], ids=len)
def test_a_ring_answers_like_the_whole_model(ring: Loopback, prompt: list[int]) -> None:
    session, told = ring.opened()
    ring.ask(session, prompt, 5)
    ring.run()
    assert told.tokens == answer(prompt, 5, 6)
    assert told.positions == list(range(len(prompt), len(prompt) + 5))
    assert told.finish == "length"
    assert session.cached == prompt + told.tokens[:-1]
    done(ring)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(RINGS)),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
    st.integers(0, 8),
    st.randoms(use_true_random=False),
)
def test_any_order_gives_the_same_answer(
    stages: int, prompt: list[int], max_new: int, rng: random.Random
) -> None:
    """Lanes race each other, devices are slow or fast, Generate is early or late: no difference."""
    swarm = Loopback(*RINGS[stages])
    session, told = swarm.open()
    swarm.run(rng)
    swarm.ask(session, prompt, max_new)
    swarm.run(rng)
    assert told.tokens == answer(prompt, max(1, max_new), 6)
    assert told.error is None
    done(swarm)


def test_long_prompts_are_sent_in_frames(ring: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "PROMPT_FRAME_TOKENS", 8)
    session, told = ring.opened()
    ring.ask(session, list(range(29)))
    frames = 5 if len(ring.hosts) < 3 else 6
    assert sum(map(len, ring.channels.values())) == frames, (
        "four frames of ids, how to choose, and that it begins for who learns it from neither"
    )
    ring.run(random.Random(1))
    assert told.tokens == answer(range(29), 4, 6)
    done(ring)


def test_partial_entry() -> None:
    """Peers that hold more than the route asks of them."""
    swarm = Loopback((0, 5), (1, 6))
    session, told = swarm.opened(route=swarm.route("p0", "p1", spans=((0, 3), (3, 6))))
    swarm.ask(session, PROMPT)
    swarm.run()
    assert told.tokens == answer(PROMPT, 4, 6)
    done(swarm)


def test_stop_ids_end_a_turn(ring: Loopback) -> None:
    free = answer(PROMPT, 8, 6)
    stop = next(token for i, token in enumerate(free) if i and token not in free[:i])
    session, told = ring.opened()
    ring.ask(session, PROMPT, 8, stop_ids=[stop, 96])
    ring.run()
    assert told.tokens == free[: free.index(stop) + 1]
    assert told.finish == "stop"
    done(ring)


def test_the_lease_ends_a_turn(ring: Loopback) -> None:
    """A client that leased too little gets what there is room for, not an error."""
    session, told = ring.opened(kv_tokens=len(PROMPT) + 2)
    ring.ask(session, PROMPT, 50)
    ring.run()
    assert told.tokens == answer(PROMPT, 3, 6)
    assert told.finish == "length"
    done(ring)


def test_turns_reuse_what_is_cached(ring: Loopback) -> None:
    session, told = ring.opened()
    ring.ask(session, PROMPT, 4)
    ring.run()
    longer = [*PROMPT, *told.tokens, 8, 9]
    ring.ask(session, longer, 4)
    sent = [data for channel in ring.channels.values() for data in channel]
    assert sum(map(len, sent)) < 250, "the prompt is not sent again"
    ring.run()
    assert told.tokens == answer(longer, 4, 6)
    edited = [*PROMPT[:3], 50, 51]
    ring.ask(session, edited, 4)
    ring.run()
    assert told.tokens == answer(edited, 4, 6)
    done(ring)


def test_a_penalty_sends_the_history_to_the_tail_and_else_nothing_does(ring: Loopback) -> None:
    session, _ = ring.opened()
    for penalty, size in ((1.0, 0), (1.5, 4 * len(PROMPT))):
        turn = Turn(0, tuple(PROMPT), 1, Sampling(repetition_penalty=penalty), (), tuple(PROMPT))
        first, *_ = instructions = session.generate(turn)
        assert isinstance(first, Send)
        assert len(first.payload) == size
        ring.carry_out(session, instructions)
        ring.run()
    done(ring)


# --- the client loop ------------------------------------------------------------------------------


def test_the_client_may_choose_each_token(ring: Loopback) -> None:
    session, told = ring.open(client_loop=True)
    ring.run()
    turn = Turn(0, tuple(PROMPT), 9, Sampling(), ())
    ring.carry_out(session, session.generate(turn))
    chosen = []
    for _ in range(5):
        ring.run()
        row = struct.unpack(f"<{VOCABULARY}f", told.logits.pop())
        assert not told.logits
        chosen.append(max(range(VOCABULARY), key=row.__getitem__))
        ring.carry_out(session, session.feed(chosen[-1]))
    assert chosen == answer(PROMPT, 5, 6)
    ring.run()
    other = (chosen[-1] + 1) % VOCABULARY
    ring.carry_out(session, session.cancel())
    ids = [*session.cached, other]
    ring.carry_out(
        session, session.generate(Turn(len(session.cached), (other,), 9, Sampling(), ()))
    )
    ring.run()
    row = struct.unpack(f"<{VOCABULARY}f", told.logits[-1])
    assert row.index(1.0) == answer(ids, 1, 6)[0]
    done(ring)


def test_logits_that_were_not_asked_for_end_the_session() -> None:
    for payload, position in ((b"", 8), (b"odd", 8), (bytes(8), 9)):
        swarm = Loopback((0, 6))
        session, told = swarm.open(client_loop=True)
        swarm.run()
        swarm.carry_out(session, session.generate(Turn(0, tuple(PROMPT), 1, Sampling(), ())))
        frame = Frame(Logits(session.key, 0, 0, position), payload)
        swarm.carry_out(session, session.on_frame(PeerId("p0"), frame))
        assert isinstance(told.error, RemoteProtocolError)
        swarm.run()
        swarm.check_clean()


# --- cancelling -----------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(RINGS)),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_cancel_in_any_phase_and_go_on(
    stages: int, turns: list[tuple[int, int]], rng: random.Random
) -> None:
    """After any number of cancelled turns the next answer is right: KV has no gap anywhere."""
    swarm = Loopback(*RINGS[stages])
    session, told = swarm.opened(kv_tokens=200)
    talk = list(PROMPT)
    for moves, added in turns:
        swarm.ask(session, talk, 5)
        for _ in range(moves):
            if possible := swarm.moves():
                rng.choice(possible)()
        swarm.carry_out(session, session.cancel())
        assert not session.running
        keep = rng.randrange(len(talk) + 1)
        talk = [*talk[:keep], *told.tokens[: rng.randrange(6)], *range(added)]
        swarm.check()
    swarm.ask(session, talk, 5)
    swarm.run(rng)
    assert told.error is None
    assert told.tokens == answer(talk, 5, 6)
    done(swarm)


def test_cancel_tells_the_caller_and_every_stage_once(ring: Loopback) -> None:
    session, told = ring.opened()
    assert session.cancel() == []
    ring.ask(session, PROMPT)
    ring.carry_out(session, session.cancel())
    assert told.finish == "cancelled"
    assert session.cached == []
    assert session.cancel() == []
    ring.run()
    assert told.tokens == []
    done(ring)


# --- opening --------------------------------------------------------------------------------------


def test_extend_keeps_what_is_cached(ring: Loopback) -> None:
    session, told = ring.opened(kv_tokens=12)
    ring.ask(session, PROMPT, 3)
    ring.run()
    ring.carry_out(session, session.extend(100))
    assert not session.open
    ring.run()
    assert session.open
    assert told.ready == 2
    longer = [*PROMPT, *told.tokens, *range(30)]
    ring.ask(session, longer, 20)
    ring.run()
    assert told.tokens == answer(longer, 20, 6)
    done(ring)


def test_late_grants_of_a_shorter_lease_do_not_count(ring: Loopback) -> None:
    session, told = ring.open(kv_tokens=12)
    first = Frame(Opened(session.key, 0, 12))
    ring.run()
    ring.carry_out(session, session.extend(40))
    for peer in ring.hosts:
        ring.carry_out(session, session.on_frame(peer, first))
    assert not session.open
    ring.run()
    assert told.ready == 2
    done(ring)


def test_a_refusal_frees_the_stages_that_had_agreed() -> None:
    swarm = Loopback((0, 2), (2, 4), (4, 6), blocks=4)
    full, _ = swarm.opened(kv_tokens=40, route=swarm.route("p0", "p1", "p2"))
    _, told = swarm.open(kv_tokens=40)
    swarm.run()
    assert isinstance(told.error, Refused)
    assert told.error.code == "full"
    assert told.error.retry_s > 0
    swarm.check()
    assert all(len(host.table) == 1 for host in swarm.hosts.values())
    assert full.open
    done(swarm)


def test_one_stage_refuses_what_others_grant() -> None:
    swarm = Loopback((0, 2), (2, 4), (4, 6))
    swarm.act(swarm.hosts[PeerId("p1")], swarm.hosts[PeerId("p1")].table.drain(5.0))
    session, told = swarm.open()
    swarm.run()
    assert isinstance(told.error, Refused)
    assert (told.error.code, told.error.peer) == ("draining", "p1")
    assert isinstance(session.failed, Refused)
    swarm.check_clean()


def test_a_refused_extension_ends_the_session(ring: Loopback) -> None:
    session, told = ring.opened()
    ring.ask(session, PROMPT)
    ring.run()
    ring.carry_out(session, session.extend(10_000))
    ring.run()
    assert isinstance(told.error, Refused)
    assert not session.open
    with pytest.raises(SessionClosed):
        session.extend(20_000)
    ring.check_clean()


def test_a_stage_that_cannot_be_reached_is_named() -> None:
    swarm = Loopback((0, 2), (2, 4), (4, 6))
    swarm.unreachable.add(frozenset((CLIENT, PeerId("p1"))))
    _, told = swarm.open()
    swarm.run()
    assert isinstance(told.error, PeerLost)
    assert (told.error.peer, told.error.layers) == ("p1", (2, 4))
    swarm.check_clean()


def test_a_way_between_stages_that_is_closed_is_blamed_on_its_far_end() -> None:
    """The stage that says so is alive; the one it cannot reach most often is not."""
    for pair, lost in ((("p0", "p1"), "p1"), (("p1", "p2"), "p2"), (("p2", "p0"), "p0")):
        swarm = Loopback((0, 2), (2, 4), (4, 6))
        swarm.unreachable.add(frozenset(map(PeerId, pair)))
        _, told = swarm.open()
        swarm.run()
        assert isinstance(told.error, PeerLost)
        assert told.error.peer == lost
        assert told.error.layers is not None
        swarm.check_clean()


def test_all_who_refuse_are_known_to_the_caller() -> None:
    """Also those whose answer crossed the first one: the next route avoids all of them."""
    swarm = Loopback((0, 2), (2, 4), (4, 6))
    for peer in ("p0", "p2"):
        swarm.act(swarm.hosts[PeerId(peer)], swarm.hosts[PeerId(peer)].table.drain(5.0))
    session, told = swarm.open()
    swarm.run()
    assert isinstance(told.error, Refused)
    assert session.refusing == {"p0", "p2"}
    swarm.check_clean()


def test_the_first_refusal_waits_for_nobody() -> None:
    """It fails the session and frees the others in one go, though one has not answered at all."""
    swarm = Loopback((0, 2), (2, 4), (4, 6))
    session, _ = swarm.open()
    granted = Frame(Opened(session.key, 0, 64))
    assert session.on_frame(PeerId("p0"), granted) == []
    refuse = Frame(Refuse(session.key, 0, "full", "KV is full", 2.0))
    *closing, fail = session.on_frame(PeerId("p1"), refuse)
    assert [send.peer for send in closing if isinstance(send, Send)] == ["p0", "p1", "p2"]
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, Refused)
    assert session.refusing == {"p1"}
    for late in (granted, refuse, Frame(Refuse(session.key, 1, "full", "", 0.0))):
        assert session.on_frame(PeerId("p2"), late) == []
    assert session.refusing == {"p1", "p2"}
    unreachable = Frame(Refuse(session.key, 0, "unreachable", "", 0.0))
    assert session.on_frame(PeerId("p2"), unreachable) == []
    assert session.refusing == {"p0", "p1", "p2"}, "the one that it cannot reach"
    assert session.on_frame(PeerId("stranger"), refuse) == []
    assert session.on_lost(PeerId("stranger"), "") == []
    assert session.refusing == {"p0", "p1", "p2"}


def test_a_loss_counts_as_a_refusal_only_while_a_session_opens() -> None:
    """Later it is a dead peer, which the directory forgets anyway."""
    for opened in (False, True):
        swarm = Loopback((0, 2), (2, 6))
        session, told = swarm.opened() if opened else swarm.open()
        swarm.lose(CLIENT, "p1")
        assert isinstance(told.error, PeerLost)
        assert session.refusing == (set() if opened else {"p1"})


@pytest.mark.parametrize(
    ("granted", "expired", "blamed"),
    [
        ("p0 p2", "p0", "p1"),
        ("p2", "p2", "p1"),
        ("p1", "p0", "p1"),
        ("p0 p1", "p2", "p0"),
    ],
)
def test_reservations_that_end_while_one_stage_is_awaited(
    granted: str, expired: str, blamed: str
) -> None:
    """The caller learns whom to avoid: the stage that all the others waited for."""
    swarm = Loopback((0, 2), (2, 4), (4, 6))
    session, told = swarm.open()
    for peer in granted.split():
        session.on_frame(PeerId(peer), Frame(Opened(session.key, 0, 64)))
    failed = Frame(Failed(session.key, 0, "expired", "nothing came", expired))
    swarm.carry_out(session, session.on_frame(PeerId(expired), failed))
    assert isinstance(told.error, PeerLost)
    assert told.error.peer == blamed
    assert session.refusing == {blamed}


def test_a_long_prompt_keeps_the_reservations_of_all_stages() -> None:
    """A stage in the middle sees nothing of it until those before have computed a part."""
    swarm = Loopback((0, 2), (2, 4), (4, 6))
    session, told = swarm.opened()
    swarm.ask(session, PROMPT)
    for peer in swarm.hosts:
        swarm.deliver((CLIENT, peer, 0))
    for host in swarm.hosts.values():
        host.ledger.now = 3 * RESERVE_S
        swarm.act(host, host.table.expire(host.ledger.now))
    swarm.run()
    assert told.tokens == answer(PROMPT, 4, 6)
    done(swarm)


def test_the_client_loop_keeps_its_reservations_too(ring: Loopback) -> None:
    session, told = ring.open(client_loop=True)
    ring.run()
    ring.carry_out(session, session.generate(Turn(0, tuple(PROMPT), 9, Sampling(), ())))
    for peer in ring.hosts:
        ring.deliver((CLIENT, peer, 0))
    for host in ring.hosts.values():
        host.ledger.now = 3 * RESERVE_S
        assert host.table.expire(host.ledger.now) == []
    ring.run()
    assert len(told.logits) == 1
    done(ring)


def test_an_idle_session_that_never_began_ends_everywhere(ring: Loopback) -> None:
    session, told = ring.opened()
    host = ring.hosts[PeerId("p0")]
    host.ledger.now = RESERVE_S
    ring.act(host, host.table.expire(RESERVE_S))
    ring.run()
    assert isinstance(told.error, SessionClosed)
    assert not session.open
    ring.check_clean()


# --- tracing --------------------------------------------------------------------------------------


def test_a_trace_asks_every_stage_and_ends_with_the_last(ring: Loopback) -> None:
    session, told = ring.opened()
    ring.ask(session, PROMPT, 5)
    ring.run()
    asked = session.trace()
    assert asked == [Send(peer, Trace(session.key, 0, 1)) for peer in ring.hosts]
    ring.carry_out(session, asked)
    ring.run()
    assert told.traced == 1
    assert set(session.traced) == set(ring.hosts)
    assert [traced.steps for traced in session.traced.values()] == [4] * len(ring.hosts)
    done(ring)
    assert session.trace() == []
    assert session.traced == {}


def test_answers_to_a_trace_come_from_the_route_alone() -> None:
    swarm = Loopback((0, 2), (2, 6))
    session, _ = swarm.opened()
    session.trace()
    session.trace()
    traced = Traced(session.key, 0, 1, *[0.0] * 7, nonce=2)
    for peer, epoch, nonce in (("stranger", 0, 2), ("p0", 1, 2), ("p0", 0, 1)):
        message = Traced(session.key, epoch, 1, *[0.0] * 7, nonce=nonce)
        assert session.on_frame(PeerId(peer), Frame(message)) == []
    assert session.traced == {}
    assert session.on_frame(PeerId("p0"), Frame(traced)) == []
    assert session.on_frame(PeerId("p1"), Frame(traced)) == [EmitTraces()]


def test_each_stage_is_asked_for_its_own_promise() -> None:
    """Also when the lease is prolonged."""
    route = Loopback((0, 2), (2, 6)).route()
    session = Session(bytes(16), route, MODEL, 64, budgets=(0.25, 0.5))
    assert [made.message.step_s for made in session.start() if isinstance(made, Connect)] == [
        *(0.25, 0.5)
    ]
    for stage in route.stages:
        session.on_frame(stage.peer, Frame(Opened(bytes(16), 0, 64)))
    sent = [made.message for made in session.extend(128) if isinstance(made, Send)]
    assert [message.step_s for message in sent if isinstance(message, Open)] == [0.25, 0.5]


def test_who_refuses_for_its_slowness_alone_is_told_apart() -> None:
    swarm = Loopback((0, 2), (2, 4), (4, 6))
    session, _ = swarm.opened()
    for peer, code in (("p0", "busy"), ("p1", "slow"), ("p2", "full")):
        session.on_frame(PeerId(peer), Frame(Refuse(session.key, 0, code, "", 0.0)))
    assert session.refusing == {"p0", "p1", "p2"}
    assert session.too_slow == {"p1"}


def test_people_call_a_session_by_the_start_of_its_key() -> None:
    key = bytes.fromhex("0123456789abcdef") * 2
    assert Session(key, Loopback((0, 6)).route(), "", 1).name == "01234567"


# --- losses and other news ---------------------------------------------------------------------


@pytest.mark.parametrize("pair", [("p0", "p1"), ("p1", "p2"), ("p0", "p2")])
def test_a_lost_neighbour_is_named_with_its_layers(pair: tuple[str, str]) -> None:
    swarm = Loopback((0, 2), (2, 4), (4, 6))
    session, told = swarm.opened()
    swarm.ask(session, PROMPT, 20)
    for _ in range(25):
        swarm.moves()[0]()
    swarm.lose(*pair)
    swarm.run()
    assert isinstance(told.error, PeerLost)
    assert told.error.peer in pair
    first = 2 * int(told.error.peer[1])
    assert told.error.layers == (first, first + 2)
    assert f"layers {first}-{first + 1}" in str(told.error)
    swarm.check_clean()


def test_a_peer_lost_by_the_client() -> None:
    swarm = Loopback((0, 2), (2, 4), (4, 6))
    session, told = swarm.opened()
    swarm.ask(session, PROMPT, 20)
    swarm.lose(CLIENT, "p1")
    swarm.run()
    assert isinstance(told.error, PeerLost)
    assert told.error.peer == "p1"
    assert session.generate.__self__ is session
    with pytest.raises(SessionClosed):
        session.generate(Turn(0, (1,), 1, Sampling(), ()))
    assert session.feed(1) == []
    swarm.check_clean()


def test_a_stage_cannot_blame_a_stranger() -> None:
    """The blamed are forgotten by the client; a hostile stage must not choose them freely."""
    swarm = Loopback((0, 2), (2, 6))
    session, told = swarm.opened()
    failed = Failed(session.key, 0, "lost", "so I say", "somebody else")
    swarm.carry_out(session, session.on_frame(PeerId("p1"), Frame(failed)))
    assert isinstance(told.error, Refused)
    assert told.error.peer == "p1"
    swarm.run()
    swarm.check_clean()


def test_drain_lets_the_turn_end(ring: Loopback) -> None:
    session, told = ring.opened()
    ring.ask(session, PROMPT, 6)
    host = ring.hosts[PeerId("p0")]
    ring.act(host, host.table.drain(25.0))
    ring.run()
    assert session.leaving
    assert told.tokens == answer(PROMPT, 6, 6)
    assert told.finish == "length"
    assert isinstance(told.error, SessionClosed)
    assert len(host.table) == 0
    _, late = ring.open()
    ring.run()
    assert isinstance(late.error, Refused)
    ring.check_clean()


def test_drain_ends_an_idle_session_at_once(ring: Loopback) -> None:
    session, told = ring.opened()
    ring.ask(session, PROMPT, 3)
    ring.run()
    assert told.tokens == answer(PROMPT, 3, 6)
    host = ring.hosts[PeerId("p0")]
    ring.act(host, host.table.drain(25.0))
    ring.run()
    assert isinstance(told.error, SessionClosed)
    assert len(host.table) == 0
    ring.check_clean()


def test_drain_before_the_first_turn_names_who_leaves(ring: Loopback) -> None:
    """So that whoever opened the session takes another route."""
    session, told = ring.opened()
    host = ring.hosts[PeerId("p0")]
    ring.act(host, host.table.drain(25.0))
    ring.run()
    assert isinstance(told.error, PeerLost)
    assert (told.error.peer, session.open) == ("p0", False)
    ring.check_clean()


def test_drain_hands_back_what_takes_too_long(ring: Loopback) -> None:
    session, told = ring.opened()
    ring.ask(session, PROMPT, 6)
    host = ring.hosts[PeerId("p0")]
    ring.act(host, host.table.drain(25.0))
    ring.act(host, host.table.end_all())
    ring.run()
    assert isinstance(told.error, PeerLost)
    assert "left the swarm" in told.error.how
    ring.check_clean()


def test_an_expired_lease_ends_the_session_everywhere() -> None:
    swarm = Loopback((0, 2), (2, 6))
    session, told = swarm.opened()
    host = swarm.hosts[PeerId("p1")]
    host.ledger.now = 1000.0
    swarm.act(host, host.table.expire(host.ledger.now))
    swarm.run()
    assert isinstance(told.error, SessionClosed)
    assert session.failed is told.error
    swarm.check_clean()


def test_a_session_that_a_neighbour_forgot_fails_at_once() -> None:
    """Not after minutes without a token."""
    swarm = Loopback((0, 2), (2, 6))
    session, told = swarm.opened()
    forgetful = swarm.hosts[PeerId("p1")]
    forgetful.table._end(forgetful.table._sessions[session.key])
    forgetful.watched.clear()
    swarm.carry_out(session, session.generate(Turn(0, tuple(PROMPT), 4, Sampling(), ()))[1:])
    swarm.run()
    assert isinstance(told.error, SessionClosed)
    assert "p1" in str(told.error)
    swarm.check_clean()


def test_frames_of_others_and_of_the_past_are_ignored() -> None:
    swarm = Loopback((0, 2), (2, 6))
    session, told = swarm.opened()
    key, tail, head = session.key, PeerId("p1"), PeerId("p0")
    swarm.ask(session, PROMPT, 3)
    ignored = [
        (head, Token(key, 0, 0, 8, 1, "")),
        (PeerId("stranger"), Token(key, 0, 0, 8, 1, "")),
        (PeerId("stranger"), Failed(key, 0, "engine", "", "")),
        (PeerId("stranger"), GoAway(1.0)),
        (tail, Token(key, 0, 1, 8, 1, "")),
        (tail, Token(key, 1, 0, 8, 1, "")),
        (tail, Failed(key, 1, "engine", "", "")),
        (tail, Refuse(key, 1, "full", "", 0.0)),
        (tail, Opened(key, 1, 64)),
        (tail, Opened(key, 0, 64)),
        (tail, Tokens(key, 0, 0, 8, True)),
        (tail, Hidden(key, 0, 0, 8, 1, True, "float32")),
    ]
    for peer, message in ignored:
        assert session.on_frame(peer, Frame(message)) == []
    assert not session.leaving
    swarm.run()
    assert told.tokens == answer(PROMPT, 3, 6)
    assert session.on_frame(tail, Frame(Token(key, 0, 0, 11, 1, ""))) == []
    done(swarm)
    assert session.on_frame(tail, Frame(Failed(key, 0, "engine", "", ""))) == []
    assert session.on_lost(tail, "") == []


def test_a_tail_that_skips_positions_is_caught() -> None:
    swarm = Loopback((0, 6))
    session, told = swarm.opened()
    swarm.ask(session, PROMPT)
    frame = Frame(Token(session.key, 0, 0, 9, 1, ""))
    swarm.carry_out(session, session.on_frame(PeerId("p0"), frame))
    assert isinstance(told.error, RemoteProtocolError)
    swarm.run()
    swarm.check_clean()


def test_our_own_mistakes_are_named() -> None:
    session = Loopback((0, 6)).opened()[0]
    for turn in (Turn(0, (), 1, Sampling(), ()), Turn(1, (1,), 1, Sampling(), ())):
        with pytest.raises(LocalProtocolError):
            session.generate(turn)
    session.generate(Turn(0, (1,), 1, Sampling(), ()))
    with pytest.raises(SessionClosed, match="busy"):
        session.generate(Turn(0, (1,), 1, Sampling(), ()))
    with pytest.raises(SessionClosed, match="busy"):
        session.extend(100)
    assert isinstance(session, Session)
