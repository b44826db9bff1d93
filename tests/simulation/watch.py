"""What must hold of groups at every moment; beside `invariants.py`, since it has to remember.

I10 and I14 are checked as parts are given to sums (`collective.Account`), the others by looking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hexswarm.peer.groups.actions import AUTO
from hexswarm.records import PeerId
from tests.simulation import invariants
from tests.simulation.collective import Account
from tests.simulation.epochs import VirtualEpoch
from tests.simulation.lan import LAN_DELAY_S, GroupPeer, GroupSpec
from tests.simulation.processes import Process

if TYPE_CHECKING:
    from tests.simulation.world import World


class Watch:
    """Of one world."""

    def __init__(self, world: World) -> None:
        self.account = Account(world.judge.blame)
        self.epochs_served = 0
        self.longest_shown_s = self.longest_away_s = 0.0
        """That a group was shown without a rank, and did not serve although nothing ailed it."""
        self._world = world
        self._held_s: dict[Process, float] = {}
        """When each process was last seen stopped."""
        self._whole_s: dict[Process, float] = {}
        """When the group that each leader announces was last whole."""
        self._calm_s: dict[str, float] = {}
        """When each LAN was last disturbed."""
        self._lans: dict[str, list[GroupSpec]] = {}
        for spec in world.plan.lan:
            self._lans.setdefault(spec.name, []).append(spec)

    def served(self, peer: GroupPeer) -> None:
        """An epoch begins to serve."""
        self.epochs_served += 1
        self._world.note(peer.process.name, "serves epoch", peer.epochs[-1].place.invitation.epoch)

    @property
    def waiting(self) -> bool:
        """Some group does not serve yet, and is expected to."""
        return any(self._leader_of(name) is None for name in self._lans if name != AUTO)

    def look(self, now: float) -> None:
        judge = self._world.judge
        for peer in self._peers():
            if not peer.process.running:
                self._held_s[peer.process] = now
                continue
            held_s = self._held_s.get(peer.process, 0.0)
            judge.hear("I12", invariants.no_sum_hangs(peer, held_s, now))
            judge.hear("I14", invariants.one_epoch_at_a_time(peer))
            whole_s = self._whole_s.setdefault(peer.process, now)
            if self._shown_whole(peer):
                self._whole_s[peer.process] = now
            else:
                since_s = max(whole_s, held_s)
                self.longest_shown_s = max(self.longest_shown_s, now - since_s)
                judge.hear("I11", invariants.not_shown_without_a_rank(peer, since_s, now))
            if peer.main.done() and not peer.gone and not peer.main.cancelled():
                judge.blame("I9", f"{peer.process.name} ended: {peer.main.exception()!r}")
        for name, specs in self._lans.items():
            if name == AUTO or self._disturbed(specs) or name not in self._calm_s:
                self._calm_s[name] = now
            elif self._leader_of(name) is None:
                self.longest_away_s = max(self.longest_away_s, now - self._calm_s[name])
                said = invariants.group_serves_again(name, self._calm_s[name], now)
                judge.hear("I13", said)
            else:
                self._calm_s[name] = now

    # --- inside ----------------------------------------------------------------------------------

    def _peers(self) -> Iterator[GroupPeer]:
        return (peer for peer in self._world.peers.values() if isinstance(peer, GroupPeer))

    def _leader_of(self, name: str) -> GroupPeer | None:
        """Who serves for this LAN."""
        for peer in self._peers():
            serves = peer.state == "online" and peer.host is not None and peer.host.lost is None
            if peer.spec.name == name and serves and peer.process.running:
                return peer
        return None

    def _shown_whole(self, peer: GroupPeer) -> bool:
        """What this peer announces to serve is there, or it announces no such thing."""
        said = peer.said
        if said is None or said.state != "online" or said.group is None or said.group.rank:
            return True
        told = (said.group.group, said.group.epoch)
        asked = next(one.place.invitation for one in peer.epochs if _name(one) == told)
        seats, peers = [seat.peer for seat in asked.seats], self._by_id()
        for seat in seats:
            member = peers.get(seat)
            if member is None or not member.process.running or member.present is None:
                return False
            if _name(member.present) != told:
                return False
        return self._joined(seats)

    def _by_id(self) -> dict[PeerId, GroupPeer]:
        return {peer.peer: peer for peer in self._peers()}

    def _joined(self, peers: Sequence[PeerId]) -> bool:
        wires = self._world.wires
        return all(wires.joins(a, b) for a in peers for b in peers if a < b)

    def _disturbed(self, specs: Sequence[GroupSpec]) -> bool:
        """Whether anything keeps these peers from being a group, at this moment."""
        world, peers = self._world, self._by_id()
        there = [peers[spec.peer] for spec in specs if spec.peer in peers]
        if world.board.down or len(there) < len(specs):
            return True
        if not all(one.process.running and not one.process.skew_s for one in there):
            return True
        if any(one.state == "draining" or one.gone for one in there):
            return True
        ids = [spec.peer for spec in specs]
        if not self._joined(ids) or not all(self._near(a, b) for a in ids for b in ids if a != b):
            return True
        return not all(self._known(one) for one in there) or not all(
            self._enough(one, ids) for one in there if one.spec.leads
        )

    def _near(self, a: PeerId, b: PeerId) -> bool:
        return self._world.wires.network.wire(a, b).delay_s <= LAN_DELAY_S

    def _known(self, peer: GroupPeer) -> bool:
        """Whether others can read its last word."""
        shown, said = self._world.board.last(peer.peer), peer.said
        if shown is None or said is None:
            return False
        told = shown.record.announcement
        return told.sequence == said.sequence and shown.visible_s <= self._world.now

    def _enough(self, leader: GroupPeer, ids: Sequence[PeerId]) -> bool:
        """Whether those that it does not leave out can be a group."""
        leads, now = leader.groups.formation._leader, leader.clock.monotonic()
        ready = [one for one in ids if not leads._standing.out(one, now)]
        least = 2 if leads._served else leader.spec.size
        return leader.peer in ready and len(ready) >= least


def _name(epoch: VirtualEpoch) -> tuple[str, int]:
    return epoch.place.invitation.group, epoch.place.invitation.epoch
