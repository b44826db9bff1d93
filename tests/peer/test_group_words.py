"""How a leader waits for its members: until all are done, and not for ever."""

from __future__ import annotations

import itertools

import pytest

from hexswarm.errors import MemberLost, OutOfMemory
from hexswarm.peer.groups import words


class Group:
    """Stands for a collective of two: what the member answers, asked again and again."""

    def __init__(self, answers):
        self._answers = iter(answers)

    def broadcast(self, data):
        assert words.unpack(memoryview(data)) == words.STATUS

    def gather(self, own, most_bytes):
        said = next(self._answers)
        assert len(said) <= most_bytes
        return [own, memoryview(said)]

    def lost(self, rank, how):
        return MemberLost(rank, "peer", 1, how)


def said_by_member(answer):
    """What a member puts on the wire."""
    sent = []

    class Member:
        def gather(self, own, most_bytes):
            assert len(own) <= most_bytes
            sent.append(bytes(own))

    words.answer_status(Member(), answer)
    return sent[0]


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(words, "STATUS_EVERY_S", 0.0)


def test_waits_until_the_member_is_done():
    words.await_all(Group([b"", b"", said_by_member(["done"])]))


@pytest.mark.parametrize("letter", ["a", "\N{SNOWMAN}", "\N{PILE OF POO}"])
def test_a_reason_of_any_length_comes_through(letter):
    with pytest.raises(OutOfMemory, match=f"rank 1 .*{letter * 20}"):
        words.await_all(Group([said_by_member(["failed", letter * 5000])]))


def test_a_member_that_is_never_done_is_lost(monkeypatch):
    monkeypatch.setattr(words, "LONG_S", 0.01)
    with pytest.raises(MemberLost) as caught:
        words.await_all(Group(itertools.repeat(b"")))
    assert caught.value.rank == 1
