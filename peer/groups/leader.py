"""A peer as the leader of its group: whom it asks, when an epoch begins, serves and ends; pure.

    idle ── enough peers near ──▶ inviting ── all said yes ──▶ loading ── all there ──▶ serving
      ◀── a no, silence, a loss, somebody who comes before us ──────────────────────────┘

Whatever goes wrong leads back to idle in one step (`_end`), and from there a new epoch begins with
whoever is not left out then: a spare if there is one. A group that served once also begins with
fewer than it was made for, if they can hold the span; the first time it waits until all are there.

A peer of a named group leads if it comes first (`neighbourhood.first`) and gives way as soon as it
does not, except when it serves. A peer of `auto` leads whenever policy says that a group is worth
it, those further back in the order of ids a few seconds later, so that not all ask each other at
once; and it asks nobody whose layers nobody else holds, nor while it has sessions itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hexswarm.peer.groups import neighbourhood, teams
from hexswarm.peer.groups.actions import (
    AUTO,
    Action,
    Announce,
    Close,
    Commit,
    Facts,
    Invite,
    Load,
    Own,
    Release,
    Serve,
)
from hexswarm.peer.groups.invitation import (
    MAX_EPOCH,
    VALID_S,
    Invitation,
    Refusal,
    Seat,
    group_id,
)
from hexswarm.peer.groups.policy import Team
from hexswarm.peer.groups.standing import Standing
from hexswarm.records import Announcement, GroupMembership, PeerId

ANSWER_S = 3.0
"""For a member to say yes or no."""
LOAD_S = 900.0
"""For all parts to be read, perhaps downloaded, and streams to open."""
REST_S = 60.0
REST_TIMES = 4.0
"""Once our part is there, for the others': so many times what ours took, at least `REST_S`."""
SETTLE_S = 3.0
"""A group of all there are begins when nobody new has come for so long."""
STAGGER_S = 3.0
"""By so much later each next peer of `auto` begins."""
MOST_JUMP = 1 << 20
"""A member may tell us that the count of epochs was so much further; more is a lie."""

Phase = Literal["inviting", "loading", "serving"]
Actions = list[Action]


@dataclass(slots=True)
class Attempt:
    """One epoch, from its invitations on."""

    invitation: Invitation
    deadline_s: float
    phase: Phase = "inviting"
    waiting: set[PeerId] = field(default_factory=set)
    """Members whose yes, or later whose report, is missing; ourselves while we load."""


class Leader:
    """At most one epoch at a time."""

    def __init__(self, facts: Facts, standing: Standing) -> None:
        self._facts = facts
        self._standing = standing
        self.attempt: Attempt | None = None
        self._epochs: dict[str, int] = {}
        """The latest epoch of each group that we led."""
        self._served: set[str] = set()
        """Groups that have served."""
        self._wanted_s: float | None = None
        """Since when a group of `auto` would be worth it."""
        self._around: tuple[PeerId, ...] = ()
        self._settled_s = 0.0
        """Since when `_around` has been the same."""

    @property
    def membership(self) -> GroupMembership | None:
        """None as long as not all have said yes."""
        attempt = self.attempt
        if attempt is None or attempt.phase == "inviting":
            return None
        return attempt.invitation.membership(0)

    @property
    def serving(self) -> bool:
        return self.attempt is not None and self.attempt.phase == "serving"

    def look(
        self,
        own: Own,
        view: Sequence[Announcement],
        rtts: Mapping[PeerId, float],
        now: float,
        wall: float,
        *,
        may_begin: bool,
    ) -> Actions:
        around = neighbourhood.near(self._facts, view, rtts)
        names = tuple(item.peer for item in around)
        if names != self._around:
            self._around, self._settled_s = names, now
        named = self._facts.name != AUTO
        if named and not neighbourhood.first(self._facts, self._stage, around):
            return [] if self.attempt is None else self._end("another peer leads")
        if self.attempt is not None or not may_begin or self._standing.out(self._facts.peer, now):
            return []
        self._recall(view)
        team = self._choose(own, view, around, rtts, now)
        return [] if team is None else self._begin(own, team, around, now, wall)

    def on_answer(self, peer: PeerId, refusal: Refusal | None, now: float) -> Actions:
        attempt = self.attempt
        if attempt is None or attempt.phase != "inviting" or peer not in attempt.waiting:
            return []
        if refusal is not None:
            self._strike(peer, refusal, now)
            return self._end(f"a member declined: {refusal.code}", but=peer)
        attempt.waiting.discard(peer)
        if attempt.waiting:
            return []
        invitation = attempt.invitation
        members = self._members()
        attempt.phase, attempt.deadline_s = "loading", now + LOAD_S
        attempt.waiting = {self._facts.peer, *members}
        told = (invitation.group, invitation.epoch)
        return [Announce(), *(Commit(one, *told) for one in members), Load(invitation, 0)]

    def on_report(self, peer: PeerId, now: float) -> Actions:
        """A member's part is there, or our own: then the others should not be far."""
        attempt = self.attempt
        if attempt is None or attempt.phase != "loading":
            return []
        attempt.waiting.discard(peer)
        if attempt.waiting:
            if peer == self._facts.peer:
                took_s = now - (attempt.deadline_s - LOAD_S)
                rest_s = max(REST_S, REST_TIMES * took_s)
                attempt.deadline_s = min(attempt.deadline_s, now + rest_s)
            return []
        attempt.phase, attempt.deadline_s = "serving", math.inf
        self._served.add(attempt.invitation.group)
        return [Serve(attempt.invitation), Announce()]

    def on_lost(
        self, peers: Iterable[PeerId], how: str, now: float, *, first_free: bool = False
    ) -> Actions:
        """Members left or were lost, or we could not load our own part."""
        attempt = self.attempt
        if attempt is None:
            return []
        lost = [peer for peer in peers if attempt.invitation.rank_of(peer) is not None]
        for peer in lost:
            self._standing.strike(peer, now, first_free=first_free)
        return self._end(how)

    def on_left(self, peer: PeerId, how: str, now: float, *, said: bool) -> Actions:
        """A member says that it is out, or its link broke: that ends our epoch, if it is in it.

        Who says so may have noticed before us that another is lost: once that is no fault of its.
        """
        inside = self.attempt is not None and peer in self._members()
        return self.on_lost([peer], how, now, first_free=said) if inside else []

    def tick(self, now: float) -> Actions:
        attempt = self.attempt
        if attempt is None or now < attempt.deadline_s:
            return []
        return self.on_lost(sorted(attempt.waiting), "a member took too long", now)

    def stop(self) -> Actions:
        return [] if self.attempt is None else self._end("leaves the swarm")

    # --- inside ----------------------------------------------------------------------------------

    @property
    def _stage(self) -> int:
        return 0 if self.membership is None else 2 if self.serving else 1

    def _members(self) -> list[PeerId]:
        """All but ourselves."""
        assert self.attempt is not None
        return [seat.peer for seat in self.attempt.invitation.seats[1:]]

    def _recall(self, view: Sequence[Announcement]) -> None:
        """Before a restart we may have led epochs: the swarm still has our word of it."""
        for item in view:
            if item.peer == self._facts.peer and item.group is not None and item.group.rank == 0:
                known = self._epochs.get(item.group.group, 0)
                self._epochs[item.group.group] = max(known, item.group.epoch)

    def _strike(self, peer: PeerId, refusal: Refusal, now: float) -> None:
        """Leave a member out that said no.

        Once we may simply have been behind with the count, or the member with reading our record:
        whom it does not know is far.
        """
        assert self.attempt is not None
        invitation = self.attempt.invitation
        epoch = invitation.epoch
        behind = refusal.code == "stale" and epoch <= refusal.epoch <= epoch + MOST_JUMP
        if behind:
            self._epochs[invitation.group] = refusal.epoch
        self._standing.strike(peer, now, first_free=behind or refusal.code == "far")

    def _end(self, how: str, but: PeerId | None = None) -> Actions:
        """The attempt is over, whatever it was; everybody learns so `but` who knows."""
        attempt = self.attempt
        assert attempt is not None
        told = (attempt.invitation.group, attempt.invitation.epoch)
        release = [Release(peer, *told) for peer in self._members() if peer != but]
        loaded = attempt.phase != "inviting"
        self.attempt, self._wanted_s = None, None
        return [Close(*told, how), *release, Announce()] if loaded else [*release]

    def _choose(
        self,
        own: Own,
        view: Sequence[Announcement],
        around: Sequence[Announcement],
        rtts: Mapping[PeerId, float],
        now: float,
    ) -> Team | None:
        facts = self._facts
        free = neighbourhood.free(facts, around, self._epochs)
        ready = [item for item in free if not self._standing.out(item.peer, now)]
        if facts.name != AUTO:
            again = group_id(facts.model, own.span, facts.peer) in self._served
            if facts.size == 0 and not again and now < self._settled_s + SETTLE_S:
                return None
            return teams.by_name(facts, own, neighbourhood.together(ready), again=again)
        spared: list[PeerId] = [facts.peer]
        for item in neighbourhood.together(ready):
            if not neighbourhood.irreplaceable(facts, view, item.peer, spared, own.span):
                spared.append(item.peer)
        asked = [item for item in ready if item.peer in spared]
        team = None if own.sessions else teams.by_policy(facts, own, asked, rtts)
        if team is None:
            self._wanted_s = None
            return None
        self._wanted_s = now if self._wanted_s is None else self._wanted_s
        before = sum(item.peer < facts.peer for item in free)
        return team if now >= self._wanted_s + before * STAGGER_S else None

    def _begin(
        self,
        own: Own,
        team: Team,
        around: Sequence[Announcement],
        now: float,
        wall: float,
    ) -> Actions:
        facts = self._facts
        offers = {item.peer: item.offer for item in around if item.offer is not None}
        seats = [Seat(facts.peer, facts.host, facts.port)]
        for one in team.members[1:]:
            offer = offers[one.peer]
            seats.append(Seat(one.peer, offer.host, offer.port))
        group = group_id(facts.model, own.span, facts.peer)
        self._epochs[group] = min(self._epochs.get(group, 0) + 1, MAX_EPOCH)
        invitation = Invitation(
            *(facts.name, self._epochs[group], facts.model, facts.layers, own.span),
            *(facts.numerics, team.shares, tuple(seats), facts.kv_tokens, wall + VALID_S),
        )
        members = [seat.peer for seat in seats[1:]]
        self.attempt = Attempt(invitation, now + ANSWER_S, waiting=set(members))
        return [Invite(peer, invitation) for peer in members]
