"""Rings of real stages that lose peers at any move, and still say what the whole model says.

The machine's own rules are in `test_mending.py`, the plan in `test_resume.py`.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import PeerLost
from hexswarm.instructions import Turn
from hexswarm.records import PeerId, Route, Sampling, Stage
from hexswarm.session import Session
from tests.loopback import VOCABULARY, Loopback, Told, answer

RINGS = {
    1: ((0, 6),),
    2: ((0, 2), (2, 6)),
    3: ((0, 2), (2, 4), (4, 6)),
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
NEW = 8


def double(stages: int, copies: int = 2) -> Loopback:
    """A swarm in which each stage has `copies` peers; p0, p1, ... are the first of each."""
    swarm = Loopback(*RINGS[stages] * copies)
    swarm.mender = substitute(swarm)
    return swarm


def substitute(swarm: Loopback, *, wait: bool = False) -> Callable[[Session], Route | None]:
    """Broken stages are replaced by others of the same span, in order of their names.

    `wait`: until there are such, instead of giving up.
    """

    def mend(session: Session) -> Route | None:
        stages: list[Stage] = []
        taken = {stage.peer for stage in session.route.stages}
        for stage in session.route.stages:
            if stage.peer not in session.broken:
                stages.append(stage)
                continue
            fit = [
                peer
                for peer, host in swarm.hosts.items()
                if host.model.span == stage.span and peer not in taken | swarm.frozen
            ]
            fit += [stage.peer] if stage.peer in swarm.hosts.keys() - swarm.frozen else []
            if not fit:
                return session.route if wait else None
            taken.add(fit[0])
            stages.append(replace(stage, peer=fit[0]))
        return Route(tuple(stages), 0.0, 0.0)

    return mend


def begin(swarm: Loopback, stages: int, prompt: list[int] = PROMPT) -> tuple[Session, Told]:
    """A turn that has just begun on the first peer of each stage."""
    session, told = swarm.opened(route=swarm.route(*(f"p{i}" for i in range(stages))))
    swarm.ask(session, prompt, NEW)
    return session, told


def step(swarm: Loopback, moves: int, rng: random.Random | None = None) -> None:
    for _ in range(moves):
        if possible := swarm.moves():
            (rng.choice(possible) if rng else possible[0])()


def done(swarm: Loopback) -> None:
    """Close every session; nothing may be left with anybody."""
    for _, session, _ in swarm.sessions.values():
        swarm.carry_out(session, session.close())
    swarm.frozen.clear()
    swarm.run()
    swarm.check()
    swarm.check_clean()


def complete(swarm: Loopback, told: Told, prompt: list[int] = PROMPT) -> None:
    """The whole answer came, each token once; what was lost later failed nothing any more."""
    assert told.tokens == answer(prompt, NEW, 6), told.error
    assert told.positions == list(range(len(prompt), len(prompt) + NEW))
    assert told.finish == "length"
    swarm.check()


# --- one loss, at every move ----------------------------------------------------------------------


def quiet_length(stages: int) -> int:
    """Moves of an undisturbed turn."""
    swarm = double(stages)
    begin(swarm, stages)
    moves = 0
    while possible := swarm.moves():
        possible[0]()
        moves += 1
    return moves


@pytest.mark.parametrize(("stages", "victim"), [(n, i) for n in RINGS for i in range(n)])
def test_a_stage_killed_at_any_move(stages: int, victim: int) -> None:
    """Head, middle and tail; in the prompt and at every token; the last one included."""
    for moves in range(quiet_length(stages)):
        swarm = double(stages)
        _, told = begin(swarm, stages)
        step(swarm, moves)
        swarm.kill(f"p{victim}")
        swarm.run()
        complete(swarm, told)
        done(swarm)


@pytest.mark.parametrize(("stages", "victim"), [(n, i) for n in RINGS for i in range(n)])
def test_a_stage_that_comes_back_empty_is_used_again(stages: int, victim: int) -> None:
    """There is no other; it may be back before anybody missed it."""
    for moves in range(0, quiet_length(stages), 3):
        swarm = double(stages, copies=1)
        _, told = begin(swarm, stages)
        step(swarm, moves)
        swarm.kill(f"p{victim}")
        swarm.restart(f"p{victim}")
        swarm.run()
        complete(swarm, told)
        done(swarm)


# --- more than one loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_several_stages_at_once(pair: tuple[int, ...]) -> None:
    for moves in range(0, quiet_length(3), 2):
        swarm = double(3)
        _, told = begin(swarm, 3)
        step(swarm, moves)
        for victim in pair:
            swarm.kill(f"p{victim}")
        swarm.run()
        complete(swarm, told)
        done(swarm)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("later", range(0, 40, 3))
def test_the_replacement_is_lost_during_its_replay(victim: int, later: int) -> None:
    """At any move after it was asked; the third peer of that span ends the answer."""
    swarm = double(3, copies=3)
    session, told = begin(swarm, 3)
    step(swarm, 45)
    assert told.tokens, "some tokens are there already"
    swarm.kill(f"p{victim}")
    while not session.epoch:
        swarm.moves()[0]()
    step(swarm, later)
    swarm.kill(f"p{victim + 3}")
    swarm.run()
    complete(swarm, told)
    assert session.epoch == 2 or told.finish
    done(swarm)


def test_another_stage_is_lost_during_a_repair() -> None:
    for later in range(40):
        swarm = double(3)
        session, told = begin(swarm, 3)
        step(swarm, 45)
        swarm.kill("p1")
        while not session.epoch:
            swarm.moves()[0]()
        step(swarm, later)
        swarm.kill("p2")
        swarm.run()
        complete(swarm, told)
        done(swarm)


def test_without_anybody_else_the_layers_are_named() -> None:
    swarm = double(3, copies=1)
    session, told = begin(swarm, 3)
    step(swarm, 45)
    before = list(told.tokens)
    swarm.kill("p1")
    swarm.run()
    assert isinstance(told.error, PeerLost)
    assert told.error.layers == (2, 4)
    assert told.tokens[: len(before)] == before == answer(PROMPT, len(before), 6)
    assert session.mends == ()
    done(swarm)


# --- stages that are well, or seem so -------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_frozen_stage_that_wakes_later_disturbs_nobody(victim: int) -> None:
    """It goes on with the abandoned route until it hears that it was left."""
    for moves in range(0, quiet_length(3), 4):
        swarm = double(3)
        session, told = begin(swarm, 3)
        step(swarm, moves)
        swarm.freeze(f"p{victim}")
        swarm.run()
        if session.running:
            lost = PeerLost(f"p{victim}", None, "is silent")
            swarm.carry_out(session, session.suspect(PeerId(f"p{victim}"), lost))
        step(swarm, moves % 13)
        swarm.thaw(f"p{victim}")
        swarm.run()
        complete(swarm, told)
        left = session.epoch > 0 or session.failed is not None
        assert len(swarm.hosts[PeerId(f"p{victim}")].table) == (not left)
        done(swarm)


@pytest.mark.parametrize("leaving", [(0,), (1,), (2,), (0, 1, 2)])
def test_stages_that_are_well_are_replaced_while_they_serve(leaving: tuple[int, ...]) -> None:
    for moves in range(0, quiet_length(3), 2):
        swarm = double(3)
        session, told = begin(swarm, 3)
        step(swarm, moves)
        if not session.running:
            break
        peers = [f"p{i + 3 * (i in leaving)}" for i in range(3)]
        swarm.carry_out(session, session.reroute(swarm.route(*peers)))
        swarm.run()
        complete(swarm, told)
        assert [len(swarm.hosts[PeerId(f"p{i}")].table) for i in leaving] == [0] * len(leaving)
        assert told.broken == []
        if told.error is None:
            assert [mend.lost for mend in session.mends] == [tuple(f"p{i}" for i in leaving)]
        done(swarm)


def test_the_hole_is_filled_by_more_stages_or_fewer() -> None:
    """Also a stage that stays may be given other layers: it begins anew."""
    wide = [((0, 2), (2, 4), (4, 6)), ((0, 6), (1, 6), (2, 4), (4, 6))]
    routes = [(("p3", "p4"), ((0, 1), (1, 6))), (("p0", "p4"), ((0, 2), (2, 6))), (("p3",), None)]
    for moves in range(0, quiet_length(3), 3):
        for peers, spans in routes:
            swarm = Loopback(*wide[0], *wide[1])
            swarm.mender = lambda _, w=swarm, p=peers, s=spans: w.route(*p, spans=s)  # type: ignore[misc]
            _, told = begin(swarm, 3)
            step(swarm, moves)
            swarm.kill("p1")
            swarm.run()
            complete(swarm, told)
            done(swarm)
    for moves in range(0, quiet_length(3), 3):
        swarm = Loopback((0, 5), (2, 4), (4, 6), (3, 6))
        swarm.mender = lambda _, w=swarm: w.route("p0", "p3", spans=((0, 4), (4, 6)))  # type: ignore[misc]
        peers = swarm.route("p0", "p1", "p2", spans=((0, 2), (2, 4), (4, 6)))
        session, told = swarm.opened(route=peers)
        swarm.ask(session, PROMPT, NEW)
        step(swarm, moves)
        swarm.kill("p1")
        swarm.run()
        complete(swarm, told)
        done(swarm)


# --- without journals, with other loops, with more turns ------------------------------------------


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_journal_that_had_to_go_costs_computing_and_no_token(victim: int) -> None:
    for moves in range(0, quiet_length(3), 2):
        swarm = double(3)
        for host in swarm.hosts.values():
            host.journal.most_bytes = 0
        _, told = begin(swarm, 3)
        step(swarm, moves)
        swarm.kill(f"p{victim}")
        swarm.run()
        complete(swarm, told)
        done(swarm)


def chosen(told: Told) -> int:
    """What the client's own loop makes of the newest logits."""
    row = struct.unpack(f"<{VOCABULARY}f", told.logits[-1])
    return row.index(1.0)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_the_client_loop_survives_too(victim: int) -> None:
    """Also if the loss comes while the caller thinks, and if it answers during the repair."""
    for moves in range(0, 90, 4):
        swarm = double(3)
        session, told = swarm.open(client_loop=True, route=swarm.route("p0", "p1", "p2"))
        swarm.run()
        swarm.carry_out(session, session.generate(Turn(0, tuple(PROMPT), NEW, Sampling(), ())))
        tokens: list[int] = []
        left = moves
        while len(tokens) < NEW:
            if len(told.logits) > len(tokens):
                tokens.append(chosen(told))
                swarm.carry_out(session, session.feed(tokens[-1]))
                continue
            if not left:
                swarm.kill(f"p{victim}")
            left -= 1
            swarm.moves()[0]()
        swarm.run()
        assert tokens == answer(PROMPT, NEW, 6)
        assert len(told.logits) == NEW + 1, "one for each id that was fed, whatever was repeated"
        assert session.epoch == (moves > left)
        done(swarm)


def test_the_next_turn_reuses_what_the_new_stages_hold() -> None:
    for victim in range(3):
        swarm = double(3)
        session, told = begin(swarm, 3)
        step(swarm, 45)
        swarm.kill(f"p{victim}")
        swarm.run()
        complete(swarm, told)
        assert session.epoch == 1
        longer = [*PROMPT, *told.tokens, 8, 9]
        swarm.ask(session, longer, NEW)
        assert len(session.cached) == len(longer)
        swarm.run()
        complete(swarm, told, longer)
        done(swarm)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2), st.integers(0, 90), st.integers(0, 40), st.randoms(use_true_random=False))
def test_cancelled_after_a_repair_the_session_is_as_good_as_before(
    victim: int, before: int, after: int, rng: random.Random
) -> None:
    """What a newcomer has not computed yet is not taken for cached."""
    swarm = double(3)
    session, told = begin(swarm, 3)
    step(swarm, before, rng)
    swarm.kill(f"p{victim}")
    while not told.mended and swarm.moves():
        rng.choice(swarm.moves())()
    step(swarm, after, rng)
    swarm.carry_out(session, session.cancel())
    if session.failed is None:
        other = [*PROMPT, 77, 78, 79]
        swarm.ask(session, other, NEW)
        swarm.run(rng)
        complete(swarm, told, other)
    done(swarm)


# --- everything at once ---------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(RINGS)),
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 8), st.sampled_from("kkfsr")), max_size=5
    ),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_whatever_is_lost_when_in_any_order_the_answer_is_the_same(
    stages: int,
    events: list[tuple[int, int, str]],
    prompt: list[int],
    journals: bool,
    rng: random.Random,
) -> None:
    """Kills, restarts, freezes, wrong suspicions and frames that come twice."""
    swarm = double(stages, copies=3)
    swarm.mender = substitute(swarm, wait=True)
    if not journals:
        for host in swarm.hosts.values():
            host.journal.most_bytes = 0
    session, told = begin(swarm, stages, prompt)
    for moves, number, what in events:
        step(swarm, moves, rng)
        peer = PeerId(f"p{number % (3 * stages)}")
        trouble(swarm, session, peer, what, rng)
    for peer in sorted(swarm.frozen):
        swarm.carry_out(session, session.suspect(peer, PeerLost(peer, None, "is silent")))
    step(swarm, 30, rng)
    swarm.frozen.clear()
    for peer in sorted(swarm.dead):
        swarm.restart(peer)
    swarm.run(rng)
    complete(swarm, told, prompt)
    done(swarm)


def trouble(swarm: Loopback, session: Session, peer: PeerId, what: str, rng: random.Random) -> None:
    match what:
        case "k" if peer in swarm.hosts:
            swarm.kill(peer)
        case "k":
            swarm.restart(peer)
        case "f":
            swarm.freeze(peer) if peer in swarm.hosts else None
        case "s":
            swarm.carry_out(session, session.suspect(peer, PeerLost(peer, None, "seems slow")))
        case "r":
            full = sorted(channel for channel, queue in swarm.channels.items() if queue)
            if full:
                swarm.repeat(rng.choice(full))
