"""Words of a group's formation as messages: what one says the other hears, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from hexswarm.clock import VirtualClock
from hexswarm.config import PeerConfig
from hexswarm.errors import UsageError
from hexswarm.identity import Identity
from hexswarm.messages import GroupInvite, Message, Ping
from hexswarm.peer.groups import actions as does
from hexswarm.peer.groups.entry import MOST_FLOOR_S, direct_host, limits_of
from hexswarm.peer.groups.invitation import CODES, Invitation, Refusal, Seat, sign
from hexswarm.peer.groups.talk import Talk
from hexswarm.peer.patience import LIMITS
from hexswarm.records import PeerId, Span, Speed
from hexswarm.wire import Frame, FrameDecoder, pack

LEADER, MEMBER = Identity(b"l" * 32), Identity(b"m" * 32)
SEATS = (Seat(LEADER.peer, "10.0.0.1", 7), Seat(MEMBER.peer, "10.0.0.2", 8))
ASKED = Invitation(
    *("home", 4, "ab" * 32, 8, Span(2, 6), "float32", (600, 400), SEATS),
    kv_tokens=64,
    expires_s=1e9,
)
GROUP, EPOCH = ASKED.group, ASKED.epoch
OWN = does.Own(Span(0, 4), 1, 1e-3)


class Heard:
    """Stands for a formation: notes what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.events.append((name, *given)) or []


class Pair:
    """One that says, and one that hears it over the wire."""

    def __init__(self, says: Identity) -> None:
        self.says, self.heard, self.decoder = says, Heard(), FrameDecoder()
        clock: Any = VirtualClock()
        self.clock = clock
        links: Any = SimpleNamespace(tell=self._tell)
        nobody: Any = Heard()
        formation: Any = self.heard
        self._mouth = Talk(nobody, links, says, clock, lambda: OWN)
        self._ear = Talk(formation, links, MEMBER, clock, lambda: OWN)
        self.told: list[PeerId] = []

    def _tell(self, peer: PeerId, message: Message, payload: bytes = b"") -> bool:
        self.told.append(peer)
        for frame in self.decoder.feed(b"".join(map(bytes, pack(message, payload))), 0.0):
            assert self._ear.hear(self.says.peer, frame) == []
        return True

    def say(self, action: does.Action) -> list[tuple[Any, ...]]:
        assert self._mouth.say(action)
        return self.heard.events

    def hear(self, frame: Frame) -> Any:
        return self._ear.hear(self.says.peer, frame)


def test_an_invitation_arrives_whole() -> None:
    pair = Pair(LEADER)
    ((name, sender, invitation, own, *_),) = pair.say(does.Invite(MEMBER.peer, ASKED))
    assert (name, sender, invitation, own) == ("on_invitation", LEADER.peer, ASKED, OWN)
    assert pair.told == [MEMBER.peer]


@pytest.mark.parametrize("code", CODES)
def test_a_refusal_arrives_with_its_reason(code: Any) -> None:
    refusal = Refusal(code, "why", 9)
    events = Pair(MEMBER).say(does.Answer(LEADER.peer, GROUP, EPOCH, refusal))
    assert events == [("on_answer", MEMBER.peer, GROUP, EPOCH, refusal, 0.0)]


@pytest.mark.parametrize(
    ("action", "event"),
    [
        (does.Answer(LEADER.peer, GROUP, EPOCH, None), ("on_answer", None)),
        (does.Commit(MEMBER.peer, GROUP, EPOCH), ("on_commit",)),
        (does.Report(LEADER.peer, GROUP, EPOCH), ("on_report",)),
        (does.Release(MEMBER.peer, GROUP, EPOCH), ("on_release",)),
        (does.Leave(LEADER.peer, GROUP, EPOCH, "x" * 999), ("on_leave", "x" * 200)),
    ],
    ids=lambda item: type(item).__name__,
)
def test_words_arrive_as_events(action: does.Action, event: tuple[Any, ...]) -> None:
    name, *more = event
    events = Pair(LEADER).say(action)
    assert events == [(name, LEADER.peer, GROUP, EPOCH, *more, 0.0)]


def test_what_is_for_nobody_is_not_said() -> None:
    pair = Pair(LEADER)
    for action in (does.Load(ASKED, 1), does.Serve(ASKED), does.Close(GROUP, EPOCH, "x")):
        assert not pair._mouth.say(action)
    assert pair.told == []


def test_other_messages_are_left_to_others() -> None:
    assert Pair(LEADER).hear(Frame(Ping(1))) is None


def altered(data: bytes) -> bytes:
    body, signature = msgpack.unpackb(data)
    return msgpack.packb([body.replace(b"10.0.0.2", b"10.0.0.3"), signature])


@pytest.mark.parametrize(
    "spoil",
    [altered, lambda data: data[:-1], lambda data: b"", lambda data: data + bytes(1 << 16)],
    ids=["altered", "cut", "empty", "huge"],
)
def test_a_spoilt_invitation_is_not_worth_an_answer(spoil: Any) -> None:
    """Nothing is decided, and nothing is said."""
    pair = Pair(LEADER)
    assert pair.hear(Frame(GroupInvite(GROUP, EPOCH), spoil(sign(ASKED, LEADER)))) == []
    assert pair.heard.events == []


def test_an_invitation_that_somebody_passes_on_is_his_word() -> None:
    """The formation is told who sent it, and who signed it is in it."""
    pair = Pair(MEMBER)
    pair.hear(Frame(GroupInvite(GROUP, EPOCH), sign(ASKED, LEADER)))
    ((_, sender, invitation, *_),) = pair.heard.events
    assert sender == MEMBER.peer != invitation.leader


def test_where_direct_streams_come_in() -> None:
    config = PeerConfig(host="192.168.1.4")
    assert direct_host(config, ("/ip4/10.0.0.9/tcp/4",)) == "192.168.1.4"
    everywhere = replace(config, host="0.0.0.0")
    relay = "/ip4/1.2.3.4/tcp/4/p2p/Qm/p2p-circuit"
    assert direct_host(everywhere, (relay, "/ip4/10.0.0.9/tcp/4")) == "10.0.0.9"
    with pytest.raises(UsageError, match="--host"):
        direct_host(everywhere, (relay,))


def test_who_computes_slowly_is_not_taken_for_frozen() -> None:
    quick, slow, slowest = (limits_of(Speed(1e-3, each_s, 0.0)) for each_s in (1e-5, 1e-2, 1.0))
    assert quick == LIMITS
    assert LIMITS.floor_s < slow.floor_s < slowest.floor_s == MOST_FLOOR_S
    assert slowest.floor_s + slowest.grace_s < slowest.most_s
