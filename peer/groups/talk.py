"""What members and leaders say to each other, between messages and `Formation`'s words.

Actions that are words for somebody become messages on the link to it (a peer is asked only if it is
linked); messages become events. Who sent a message is who its stream was authenticated for, so a
`GroupCommit` of anybody but the leader is a word about an epoch that does not exist.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from hexswarm.errors import RemoteProtocolError
from hexswarm.identity import Identity
from hexswarm.links import Links
from hexswarm.messages import (
    GroupAnswer,
    GroupCommit,
    GroupInvite,
    GroupLeave,
    GroupRelease,
    GroupReport,
    Message,
)
from hexswarm.peer.groups.actions import (
    Action,
    Answer,
    Commit,
    Invite,
    Leave,
    Own,
    Release,
    Report,
)
from hexswarm.peer.groups.formation import Formation
from hexswarm.peer.groups.invitation import CODES, Code, Refusal, open_invitation, sign
from hexswarm.records import PeerId
from hexswarm.skew import SteadyClock
from hexswarm.wire import Frame

log = logging.getLogger(__name__)

MOST_TEXT = 200
"""Characters of a reason."""
KINDS = (GroupInvite, GroupAnswer, GroupCommit, GroupReport, GroupRelease, GroupLeave)


class Talk:
    """Says actions, and hears frames."""

    def __init__(
        self,
        formation: Formation,
        links: Links,
        identity: Identity,
        clock: SteadyClock,
        own: Callable[[], Own],
    ) -> None:
        self._formation, self._links, self._identity = formation, links, identity
        self._clock, self._own = clock, own

    def say(self, action: Action) -> bool:
        """Send it if it is for somebody else; False if it is not."""
        match action:
            case Invite(peer=peer, invitation=invitation):
                told = GroupInvite(invitation.group, invitation.epoch)
                self._tell(peer, told, sign(invitation, self._identity))
            case Commit(peer=peer, group=group, epoch=epoch):
                self._tell(peer, GroupCommit(group, epoch))
            case Release(peer=peer, group=group, epoch=epoch):
                self._tell(peer, GroupRelease(group, epoch))
            case Answer(leader=leader, group=group, epoch=epoch, refusal=None):
                self._tell(leader, GroupAnswer(group, epoch, "", "", 0))
            case Answer(leader=leader, group=group, epoch=epoch, refusal=Refusal() as no):
                reason = no.reason[:MOST_TEXT]
                self._tell(leader, GroupAnswer(group, epoch, no.code, reason, no.epoch))
            case Report(leader=leader, group=group, epoch=epoch):
                self._tell(leader, GroupReport(group, epoch))
            case Leave(leader=leader, group=group, epoch=epoch, how=how):
                self._tell(leader, GroupLeave(group, epoch, how[:MOST_TEXT]))
            case _:
                return False
        return True

    def hear(self, peer: PeerId, frame: Frame) -> list[Action] | None:
        """What is to be done about a frame; None if it does not concern groups."""
        formation, now, message = self._formation, self._clock.monotonic(), frame.message
        match message:
            case GroupInvite():
                return self._invited(peer, frame.payload)
            case GroupAnswer(group=group, epoch=epoch):
                if message.code:
                    log.warning("peer %s declines: %s %s", peer[-8:], message.code, message.reason)
                return formation.on_answer(peer, group, epoch, _refusal(message), now)
            case GroupCommit(group=group, epoch=epoch):
                return formation.on_commit(peer, group, epoch, now)
            case GroupReport(group=group, epoch=epoch):
                return formation.on_report(peer, group, epoch, now)
            case GroupRelease(group=group, epoch=epoch):
                return formation.on_release(peer, group, epoch, now)
            case GroupLeave(group=group, epoch=epoch, how=how):
                return formation.on_leave(peer, group, epoch, how, now)
        return None

    def _invited(self, peer: PeerId, data: bytes) -> list[Action]:
        """A bad invitation is not worth an answer."""
        try:
            invitation = open_invitation(data)
        except RemoteProtocolError as error:
            log.info("peer %s sent %s", peer[-8:], error)
            return []
        now, wall = self._clock.monotonic(), self._clock.wall()
        return self._formation.on_invitation(peer, invitation, self._own(), now, wall)

    def _tell(self, peer: PeerId, message: Message, payload: bytes = b"") -> None:
        if not self._links.tell(peer, message, payload):
            log.info("no way to tell peer %s of its group", peer[-8:])


def _refusal(message: GroupAnswer) -> Refusal | None:
    """None for a yes; a code that we do not know is a no all the same."""
    if not message.code:
        return None
    other: Code = "off"
    known = next((code for code in CODES if code == message.code), other)
    return Refusal(known, message.reason, message.latest)
