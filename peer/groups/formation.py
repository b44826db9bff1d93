"""The life of a peer in groups of its LAN: events in, actions out.

    formation = Formation(facts, rng)
    actions = formation.look(own, view, rtts, now, wall)   # each second, and when things changed
    actions = formation.on_...(..., now)                   # whatever was heard or happened
    ...                                                    # carry the actions out, in their order
    formation.offer(own), formation.membership             # to announce, after each event

One object for each peer that offers itself; it is leader or member as things are (`role`). A group
comes to be in two rounds, so that nobody loads weights for a cut that does not come about:

    leader                                         member
    Invite to all ────────────────────────────▶    Answer: yes (and it keeps itself free), or no
    all said yes: Commit to all, Load its own ─▶   Load: drop what it holds, weights, streams
    all reported, own part loaded: Serve      ◀──  Report
    Release to all ───────────────────────────▶    Close

Whatever goes wrong ends the epoch, never mends it: the leader stops (`Close`) and tells the others
(`Release`), and the next epoch is an invitation of its own, with a spare, or with those who remain
and another cut. The leader alone says that an epoch serves, and it serves one at a time; so at most
one epoch of a group serves, and none with a rank missing that the leader knows of. What it does
not know yet, the group's next sum tells it: a group without a rank computes nothing.

A member is in one epoch at a time. It leaves when its leader says so, is gone, or starts a later
epoch, when a collective fails, or when what it waits for does not come in time.

Who fails is left out for a while, longer each time (`hexswarm.peer.groups.standing`).

Rejected: votes among members (two machines have no majority, and a leader that is gone takes the
group's address with it anyway); a member that takes the lead of the same group (clients know the
leader's id; another leader is another group).

Pure: no clock, no I/O. `now` goes steadily, `wall` is Unix time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal

from hexswarm.peer.groups import teams
from hexswarm.peer.groups.actions import AUTO, Action, Answer, Facts, Own
from hexswarm.peer.groups.invitation import Invitation, Refusal
from hexswarm.peer.groups.leader import Leader
from hexswarm.peer.groups.member import Member, Sight
from hexswarm.peer.groups.standing import Standing
from hexswarm.records import Announcement, GroupMembership, GroupOffer, PeerId

Role = Literal["alone", "leader", "member"]


class Formation:
    """One peer's part in groups; see the module's text.

    Calls that name a group and an epoch are no matter if that is not the present one.
    """

    def __init__(self, facts: Facts, rng: random.Random) -> None:
        self._facts = facts
        self._leader = Leader(facts, Standing(rng))
        self._member = Member(facts)
        self._sight = Sight()
        self._stopped = False

    # --- to be read after each event

    @property
    def role(self) -> Role:
        """`alone`: nothing is held or loaded for a group."""
        if self._leader.membership is not None:
            return "leader"
        return "alone" if self._member.membership is None else "member"

    @property
    def membership(self) -> GroupMembership | None:
        """To announce."""
        return self._leader.membership or self._member.membership

    @property
    def serving(self) -> bool:
        """We lead an epoch that serves: announce `online`, and `joining` before."""
        return self._leader.serving

    @property
    def reported(self) -> bool:
        """A member whose part is loaded: announces `online`, which makes it no server."""
        return self._member.phase == "reported"

    @property
    def wake_s(self) -> float:
        """Call `tick` then (a time of `now`), at the latest."""
        attempt = self._leader.attempt
        return min(self._member.deadline_s, math.inf if attempt is None else attempt.deadline_s)

    def single(self, own: Own) -> bool:
        """In no epoch, and to serve by itself meanwhile: a peer of `auto` whose layers fit.

        Peers of a named group wait for it instead.
        """
        return (
            self.role == "alone" and self._facts.name == AUTO and teams.fits_alone(self._facts, own)
        )

    def offer(self, own: Own) -> GroupOffer:
        """To announce, as long as the peer is to be had."""
        facts = self._facts
        waiting = self.role == "alone" and not self.single(own)
        return GroupOffer(
            *(facts.name, own.free_bytes, facts.host, facts.port, facts.leads, waiting)
        )

    # --- what is known

    def look(
        self,
        own: Own,
        view: Sequence[Announcement],
        rtts: Mapping[PeerId, float],
        now: float,
        wall: float,
    ) -> list[Action]:
        """What is known now: announcements alive, and round trips measured to peers that are
        linked (no others: a peer that is gone must not be in `rtts`)."""
        self._sight = Sight(view, rtts)
        if self._stopped:
            return []
        idle = self._member.invitation is None
        return [*self.tick(now), *self._leader.look(own, view, rtts, now, wall, may_begin=idle)]

    def tick(self, now: float) -> list[Action]:
        """Deadlines."""
        return [*self._leader.tick(now), *self._member.tick(now)]

    # --- what others say

    def on_invitation(
        self, sender: PeerId, invitation: Invitation, own: Own, now: float, wall: float
    ) -> list[Action]:
        """Opened by `open_invitation`; `sender` as its stream was authenticated."""
        told = (sender, invitation.group, invitation.epoch)
        if self._stopped:
            return [Answer(*told, Refusal("off", "leaves the swarm"))]
        if self._leader.attempt is not None:
            return [Answer(*told, Refusal("taken", "leads a group of its own"))]
        return self._member.on_invitation(sender, invitation, own, self._sight, now, wall)

    def on_answer(
        self, peer: PeerId, group: str, epoch: int, refusal: Refusal | None, now: float
    ) -> list[Action]:
        return self._leader.on_answer(peer, refusal, now) if self._leads(group, epoch) else []

    def on_commit(self, leader: PeerId, group: str, epoch: int, now: float) -> list[Action]:
        return self._member.on_commit(leader, group, epoch, now)

    def on_report(self, peer: PeerId, group: str, epoch: int, now: float) -> list[Action]:
        return self._leader.on_report(peer, now) if self._leads(group, epoch) else []

    def on_release(self, leader: PeerId, group: str, epoch: int, now: float) -> list[Action]:
        return self._member.on_release(leader, group, epoch)

    def on_leave(self, peer: PeerId, group: str, epoch: int, how: str, now: float) -> list[Action]:
        return self._leader.on_left(peer, how, now, said=True) if self._leads(group, epoch) else []

    # --- what happened here

    def on_loaded(self, group: str, epoch: int, now: float) -> list[Action]:
        """Our own part is loaded, and the streams to all other ranks are open."""
        if self._leads(group, epoch):
            return self._leader.on_report(self._facts.peer, now)
        return self._member.on_loaded(group, epoch)

    def on_failed(
        self, group: str, epoch: int, how: str, now: float, blamed: PeerId | None = None
    ) -> list[Action]:
        """Loading or opening streams failed; `blamed`, if a stream to somebody did not open."""
        if self._leads(group, epoch):
            return self._leader.on_lost([blamed or self._facts.peer], how, now)
        return self._member.on_over(group, epoch, how, tell=True)

    def on_lost(self, group: str, epoch: int, peer: PeerId, how: str, now: float) -> list[Action]:
        """A collective of the epoch raised MemberLost for `peer`."""
        if self._leads(group, epoch):
            return self._leader.on_lost([peer], how, now)
        return self._member.on_over(group, epoch, how, tell=True)

    def on_gone(self, peer: PeerId, now: float) -> list[Action]:
        """The link to `peer` broke, or the peer was seen dead."""
        return [
            *self._leader.on_left(peer, "a member is gone", now, said=False),
            *self._member.on_gone(peer),
        ]

    def stop(self, now: float) -> list[Action]:
        """We drain or end: everybody is released, and nothing begins any more."""
        self._stopped = True
        return [*self._leader.stop(), *self._member.stop()]

    # --- inside ----------------------------------------------------------------------------------

    def _leads(self, group: str, epoch: int) -> bool:
        attempt = self._leader.attempt
        if attempt is None:
            return False
        return (attempt.invitation.group, attempt.invitation.epoch) == (group, epoch)
