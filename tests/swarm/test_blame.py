"""Whom refusals and failures are about: what the pure functions say of a ring of three."""

from __future__ import annotations

import pytest

from hexswarm import blame
from hexswarm.errors import PeerLost, Refused, SessionClosed
from hexswarm.messages import Failed, Refuse
from hexswarm.records import PeerId, Route, Span, Stage

A, B, C, D = (PeerId(name) for name in "ABCD")
ROUTE = Route(
    tuple(Stage(peer, Span(first, first + 2)) for peer, first in ((A, 0), (B, 2), (C, 4), (D, 6))),
    *(0.0, 0.0),
)


def failed(code: str, about: str = "") -> Failed:
    return Failed(bytes(16), 0, code, "so it is", about)


def refuse(code: str) -> Refuse:
    return Refuse(bytes(16), 0, code, "so it is", 3.0)


@pytest.mark.parametrize("code", ["lost", "unknown"])
@pytest.mark.parametrize(
    ("sender", "about", "blamed"),
    [
        (B, A, A),
        (B, C, C),
        (B, D, B),
        (B, B, B),
        (B, "somebody", B),
        (A, D, D),
        (A, B, B),
        (D, A, A),
        (D, C, C),
        (D, B, D),
    ],
)
def test_a_stage_may_speak_of_its_neighbours_alone(
    code: str, sender: PeerId, about: str, blamed: str
) -> None:
    assert blame.failing(ROUTE, sender, failed(code, about)) == blamed


@pytest.mark.parametrize("code", ["gap", "full", "input", "conflict", "engine", "draining"])
def test_else_it_speaks_of_itself(code: str) -> None:
    assert blame.failing(ROUTE, B, failed(code, A)) == B


def test_a_failure_becomes_an_error_with_layers_or_a_code() -> None:
    lost = blame.failure(ROUTE, B, failed("lost", C))
    assert isinstance(lost, PeerLost)
    assert (lost.peer, lost.layers) == (C, (4, 6))
    gone = blame.failure(ROUTE, B, failed("draining"))
    assert isinstance(gone, PeerLost)
    assert gone.peer == B
    assert "has left" in gone.how
    for code in ("expired", "unknown"):
        assert isinstance(blame.failure(ROUTE, B, failed(code, B)), SessionClosed)
    other = blame.failure(ROUTE, B, failed("engine"))
    assert isinstance(other, Refused)
    assert (other.peer, other.code) == (B, "engine")
    lie = blame.failure(ROUTE, B, failed("lost", D))
    assert isinstance(lie, Refused)
    assert lie.peer == B


def test_who_cannot_be_reached_is_blocking_and_not_who_says_so() -> None:
    assert blame.blocking(ROUTE, B, refuse("unreachable")).peer == C
    assert blame.blocking(ROUTE, D, refuse("unreachable")).peer == A, "the ring is closed"
    assert blame.blocking(ROUTE, B, refuse("full")).peer == B
    far = blame.refused(ROUTE, D, refuse("unreachable"))
    assert isinstance(far, PeerLost)
    assert (far.peer, far.layers) == (A, (0, 2))
    full = blame.refused(ROUTE, B, refuse("full"))
    assert isinstance(full, Refused)
    assert (full.peer, full.code, full.retry_s) == (B, "full", 3.0)


def test_a_reservation_that_ends_blames_whom_it_waited_for() -> None:
    assert blame.overdue(ROUTE, A, {A, C, D}).peer == B
    assert blame.overdue(ROUTE, A, {C, D}).peer == B, "it waited for its next stage"
    assert blame.overdue(ROUTE, D, {B, C}).peer == A
    assert blame.overdue(ROUTE, A, {A}).peer == D, "the last of those that are silent"
