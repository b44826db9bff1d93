"""What a peer says while it has no host."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hexswarm.messages import Failed, Hidden, Open, Refuse, Tokens
from hexswarm.peer.away import answers
from hexswarm.records import PeerId
from hexswarm.wire import Frame
from tests import frames

ME = PeerId("me")


@given(st.lists(frames.frames, max_size=8))
def test_openings_are_refused_steps_disowned_and_nothing_else_answered(asked: list[Frame]) -> None:
    """One word for each, in their order, of the same session and epoch."""
    wanted = [one.message for one in asked if isinstance(one.message, Open | Tokens | Hidden)]
    said = answers(ME, asked)
    assert [(one.session, one.epoch) for one in said] == [
        (one.session, one.epoch) for one in wanted
    ]
    for one, asks in zip(said, wanted, strict=True):
        if isinstance(asks, Open):
            assert isinstance(one, Refuse)
            assert one.code == "draining"
            assert one.retry_s > 0
        else:
            assert isinstance(one, Failed)
            assert (one.code, one.peer) == ("unknown", ME)
