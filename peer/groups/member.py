"""A peer as a member of somebody else's group: what it accepts, and when it leaves; pure.

    free ── invitation accepted ──▶ promised ── commit ──▶ loading ── loaded ──▶ reported
      ◀────────────── released, leader gone or silent, collective failed ───────────┘

A promise holds for `PROMISE_S`: a leader that heard a no from somebody else says so, and one that
fell silent may have crashed. A peer that promised says no to everybody else; so it is never in two
epochs. While it loads it waits for nobody for longer than `LOAD_S`; from then on the streams of the
epoch tell it when the epoch is over, and the link to the leader when the leader is.

It remembers the latest epoch of each group: an old invitation, however well signed, is refused, and
the leader told how far the count was.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hexswarm.errors import OutOfMemory, UsageError
from hexswarm.peer.groups.actions import (
    Action,
    Announce,
    Answer,
    Close,
    Facts,
    Leave,
    Load,
    Own,
    Report,
)
from hexswarm.peer.groups.division import check_room
from hexswarm.peer.groups.invitation import (
    LAN_RTT_S,
    SKEW_S,
    VALID_S,
    Invitation,
    Refusal,
)
from hexswarm.peer.groups.neighbourhood import irreplaceable
from hexswarm.records import Announcement, GroupMembership, PeerId

PROMISE_S = 10.0
LOAD_S = 900.0
"""For weights to be read, perhaps downloaded, and streams to open."""
MOST_GROUPS = 256
"""Whose epochs are remembered."""

Phase = Literal["promised", "loading", "reported"]


@dataclass(frozen=True, slots=True)
class Sight:
    """What a member knows of the others when it is asked."""

    view: Sequence[Announcement] = ()
    rtts: Mapping[PeerId, float] | None = None


class Member:
    """At most one epoch at a time."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self.phase: Phase | None = None
        self.invitation: Invitation | None = None
        self.deadline_s = math.inf
        self._epochs: dict[str, int] = {}

    @property
    def membership(self) -> GroupMembership | None:
        """None as long as nothing is loaded for the group."""
        if self.invitation is None or self.phase == "promised":
            return None
        return self.invitation.membership(self._rank)

    @property
    def _rank(self) -> int:
        assert self.invitation is not None
        rank = self.invitation.rank_of(self._facts.peer)
        assert rank is not None
        return rank

    def on_invitation(
        self,
        sender: PeerId,
        invitation: Invitation,
        own: Own,
        sight: Sight,
        now: float,
        wall: float,
    ) -> list[Action]:
        """Say yes or no; a leader that asks again has given up its earlier epoch."""
        if sender != invitation.leader:
            return []
        told = (sender, invitation.group, invitation.epoch)
        refusal = self._refusal(invitation, own, sight, wall)
        if refusal is not None:
            return [Answer(*told, refusal)]
        closed = self._end("the leader began another epoch")
        self.phase, self.invitation, self.deadline_s = "promised", invitation, now + PROMISE_S
        self._epochs.pop(invitation.group, None)
        self._epochs[invitation.group] = invitation.epoch
        if len(self._epochs) > MOST_GROUPS:
            del self._epochs[next(iter(self._epochs))]
        return [*closed, Answer(*told, None)]

    def on_commit(self, leader: PeerId, group: str, epoch: int, now: float) -> list[Action]:
        if not self._is(leader, group, epoch) or self.phase != "promised":
            # It may have waited for too long: the leader should not wait for us.
            known = self._is(leader, group, epoch)
            return [] if known else [Leave(leader, group, epoch, "made no such promise")]
        assert self.invitation is not None
        self.phase, self.deadline_s = "loading", now + LOAD_S
        return [Announce(), Load(self.invitation, self._rank)]

    def on_loaded(self, group: str, epoch: int) -> list[Action]:
        invitation = self.invitation
        if invitation is None or self.phase != "loading" or not self._of(group, epoch):
            return []
        self.phase, self.deadline_s = "reported", math.inf
        return [Announce(), Report(invitation.leader, group, epoch)]

    def on_over(self, group: str, epoch: int, how: str, *, tell: bool) -> list[Action]:
        """The epoch is over for us; `tell` the leader."""
        invitation = self.invitation
        if invitation is None or not self._of(group, epoch):
            return []
        leave = [Leave(invitation.leader, group, epoch, how)] if tell else []
        return [*self._end(how), *leave]

    def on_release(self, leader: PeerId, group: str, epoch: int) -> list[Action]:
        return self._end("the leader ended it") if self._is(leader, group, epoch) else []

    def on_gone(self, peer: PeerId) -> list[Action]:
        """Other members are the leader's to watch, and the streams tell of them."""
        leads = self.invitation is not None and self.invitation.leader == peer
        return self._end("the leader is gone") if leads else []

    def tick(self, now: float) -> list[Action]:
        invitation = self.invitation
        if invitation is None or now < self.deadline_s:
            return []
        return self.on_over(invitation.group, invitation.epoch, "took too long", tell=True)

    def stop(self) -> list[Action]:
        invitation = self.invitation
        if invitation is None:
            return []
        return self.on_over(invitation.group, invitation.epoch, "leaves the swarm", tell=True)

    # --- inside ----------------------------------------------------------------------------------

    def _end(self, how: str) -> list[Action]:
        invitation, loaded = self.invitation, self.phase in ("loading", "reported")
        self.phase, self.invitation, self.deadline_s = None, None, math.inf
        if invitation is None or not loaded:
            return []
        return [Close(invitation.group, invitation.epoch, how), Announce()]

    def _of(self, group: str, epoch: int) -> bool:
        invitation = self.invitation
        return invitation is not None and (invitation.group, invitation.epoch) == (group, epoch)

    def _is(self, leader: PeerId, group: str, epoch: int) -> bool:
        invitation = self.invitation
        return invitation is not None and invitation.leader == leader and self._of(group, epoch)

    def _refusal(
        self, invitation: Invitation, own: Own, sight: Sight, wall: float
    ) -> Refusal | None:
        """Why not, if not: what costs nothing to find out comes first."""
        facts, rank = self._facts, invitation.rank_of(self._facts.peer)
        if invitation.name != facts.name:
            return Refusal("off", f"not to be had for groups called {invitation.name}")
        if not rank:
            return Refusal("unnamed", "not one of the members")
        if (invitation.model, invitation.layers) != (facts.model, facts.layers):
            return Refusal("model", "another model")
        if invitation.numerics != facts.numerics:
            return Refusal("numerics", f"computes with {facts.numerics}")
        if not wall - SKEW_S <= invitation.expires_s <= wall + VALID_S + SKEW_S:
            return Refusal("expired", "the invitation is not of now")
        rtt_s = (sight.rtts or {}).get(invitation.leader, math.inf)
        if not rtt_s <= LAN_RTT_S:
            return Refusal("far", f"{rtt_s * 1e3:.1f} ms away")
        if self.invitation is not None and self.invitation.leader != invitation.leader:
            return Refusal("taken", "in another group")
        latest = self._epochs.get(invitation.group, 0)
        if invitation.epoch <= latest:
            return Refusal("stale", f"epoch {latest} was known already", latest)
        if own.sessions and self.invitation is None:
            return Refusal("busy", f"has {own.sessions} sessions")
        others: Collection[PeerId] = {seat.peer for seat in invitation.seats} - {facts.peer}
        if irreplaceable(facts, sight.view, facts.peer, others, invitation.span):
            return Refusal("needed", "nobody else holds some layers")
        return self._too_large(invitation, rank, own)

    def _too_large(self, invitation: Invitation, rank: int, own: Own) -> Refusal | None:
        facts = self._facts
        try:
            sizes = facts.sizes_of(invitation.span)
            pool = (invitation.kv_tokens, facts.kv_value_bytes)
            check_room(sizes, invitation.shares, rank, own.free_bytes, *pool)
        except OutOfMemory as error:
            return Refusal("memory", error.cause)
        except UsageError as error:
            return Refusal("cut", error.cause)
        return None
