"""A peer that hosts its layers with others of its LAN, or alone meanwhile: the effects.

`Grouped` is the peer's `Hosting` (`hexswarm.peer.hosting`): the daemon asks it for something that
computes, and is told when that is lost. In between it carries out what `Formation` decides: words
to others, epochs that load, serve and end. So for the daemon a leader is a peer whose device comes
and goes, and a member is one that is still waiting for a device.

An epoch begins to load only while the daemon waits in `ready`, that is, when nothing else is held.
What the daemon serves by itself (`auto`, as long as that is better) is given up first: it is told
that its host is lost, closes it as ever, and comes back to `ready`.

What has threads and tensors is made elsewhere (`begin`, in `hexswarm.peer.groups.entry`), so that
this file also runs in the simulated world, where an epoch is integers on a virtual clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from hexswarm.errors import HexswarmError, MemberLost
from hexswarm.messages import GroupInvite, GroupLeave
from hexswarm.peer.groups.actions import Action, Close, Leave, Load, Own, Serve
from hexswarm.peer.groups.formation import Formation
from hexswarm.peer.groups.near import Near
from hexswarm.peer.groups.single import Single
from hexswarm.peer.groups.streams import Door, Place
from hexswarm.peer.groups.talk import Talk
from hexswarm.peer.groups.words import BEAT_S
from hexswarm.records import Announcement, PeerId, Span
from hexswarm.wire import Frame

if TYPE_CHECKING:  # these load PyTorch
    from hexswarm.peer.division import Places
    from hexswarm.peer.groups.epoch import Epoch, Owner
    from hexswarm.peer.groups.leading import Led
    from hexswarm.peer.hosting import Host, Hosting
    from hexswarm.peer.life import Life
    from hexswarm.progress import Progress
    from hexswarm.store import ModelFolder

    Begin = Callable[[Place, Owner, Epoch | None], Epoch]

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Formation looks at what is known so often, and when something happened."""
POLITE_S = 2.0
"""A member whose collective broke leaves it to the leader to find out whose fault it was."""
LEAVES = "leaves the swarm"
"""What a member says that could stay a while."""
STOP_S = 3.0
"""For an epoch's thread to end."""


class Grouped:
    """Call `run_for_ever` from the peer's joining on, and `close` before its links."""

    def __init__(
        self,
        life: Life,
        machine: Hosting,
        formation: Formation,
        door: Door,
        begin: Begin,
        own: Own,
    ) -> None:
        """`machine` hosts what the peer serves by itself; `begin` makes an epoch, given the last
        one; `own` is what the peer knows of itself.
        """
        self._life, self._machine, self._door, self._begin_epoch = life, machine, door, begin
        self.formation, self._own = formation, own
        links, clock = life.member.links, life.clock
        self._near = Near(links, clock)
        self._talk = Talk(formation, links, life.identity, clock, self.own)
        self._changed, self._stirred = asyncio.Event(), asyncio.Event()
        self._waiting = False
        """The daemon is in `ready`."""
        self._begun: Epoch | None = None
        """The epoch that we are in."""
        self._last: Epoch | None = None
        self._led: Led | None = None
        """What leads it, once all are there."""
        self._complete: Led | None = None
        """It, once all have reported."""
        self._next: Led | None = None
        """What `start` gives, if not something of this machine."""
        self._host: Led | Single | None = None
        self._draining: asyncio.Task[None] | None = None
        self._meeting: set[asyncio.Task[None]] = set()

    # --- what the daemon asks --------------------------------------------------------------------

    def places(self, device: str) -> Places | None:
        return self._machine.places(device)

    async def ready(self) -> None:
        """Until we lead an epoch in which everybody is there, or serve by ourselves."""
        self._waiting, self._host = True, None
        try:
            while True:
                self._begin()
                led = self._complete
                if led is not None and led.lost is None:  # else its end is about to be told
                    self._next = led
                    return
                if self._begun is None and self.formation.single(self.own()):
                    await self._machine.ready()
                    return
                await self._changed.wait()
                self._changed.clear()
        finally:
            self._waiting = False

    def start(
        self, folder: ModelFolder, span: Span, device: str, dtype: str, progress: Progress
    ) -> Host:
        led, self._next = self._next, None
        if led is not None:
            self._host = led
            return led
        single = Single(self._machine.start(folder, span, device, dtype, progress))
        self._host = single
        return single

    def lost(self, error: HexswarmError) -> None:
        """Of a group's end `Formation` has heard already."""
        if isinstance(self._host, Single) and self._host.given_up is None:
            self._machine.lost(error)

    @property
    def leading(self) -> bool:
        """What is served is a group's."""
        return self._host is not None and not isinstance(self._host, Single)

    # --- what is told to others ------------------------------------------------------------------

    def own(self) -> Own:
        """What changes of us."""
        server = self._life.server
        sessions = 0 if server is None else len(server.table)
        return replace(self._own, span=self._life.claimed, sessions=sessions)

    def announced(self, item: Announcement) -> Announcement:
        """The peer's announcement with what it says of groups."""
        formation, begun = self.formation, self._begun
        told = replace(item, group=formation.membership, offer=formation.offer(self.own()))
        if self._life.engine is None:  # what a cut is made by
            speed = replace(item.speed, decode_layer_s=self._own.layer_s)
            told = replace(told, speed=speed)
        if begun is None or begun.place.rank == 0:
            return told
        span = begun.place.invitation.span
        return replace(told, span=span, state="online" if formation.reported else "joining")

    # --- what happens ----------------------------------------------------------------------------

    def on_frames(self, peer: PeerId, frames: Iterable[Frame]) -> list[Frame]:
        """Take what concerns groups; the other frames."""
        rest = []
        for frame in frames:
            if isinstance(frame.message, GroupInvite) and (item := self._unmet(peer)):
                task = asyncio.create_task(self._meet(item, frame))
                self._meeting.add(task)
                task.add_done_callback(self._meeting.discard)
                continue
            if self._must_drain(peer, frame):
                self._draining = asyncio.create_task(self._drain(peer, frame))
                continue
            actions = self._talk.hear(peer, frame)
            if actions is None:
                rest.append(frame)
            else:
                self._carry_out(actions)
        return rest

    def _unmet(self, peer: PeerId) -> Announcement | None:
        """Its announcement, if nobody measured yet how far it is."""
        if not self._near.unknown(peer):
            return None
        return next((item for item in self._life.member.others() if item.peer == peer), None)

    async def _meet(self, item: Announcement, invitation: Frame) -> None:
        """Somebody invites us whom we have not met: see how far it is, then answer."""
        await self._near.get_to_know(item)
        self._look()
        self._carry_out(self._talk.hear(item.peer, invitation) or ())

    def _must_drain(self, peer: PeerId, frame: Frame) -> bool:
        """A member wants to leave, and nobody is there to take its place: answers may end first."""
        said, begun, server = frame.message, self._begun, self._life.server
        if not isinstance(said, GroupLeave) or said.how != LEAVES or self._draining is not None:
            return False
        if begun is None or not self.formation.serving or server is None or not len(server.table):
            return False
        asked, name = begun.place.invitation, self._life.config.group
        inside = (said.group, said.epoch) == (asked.group, asked.epoch) and asked.rank_of(peer)
        spare = any(
            item.offer is not None and item.offer.name == name and item.group is None
            for item in self._life.member.others()
            if item.peer in self._near.rtts and item.peer != peer
        )
        return bool(inside) and not spare

    async def _drain(self, peer: PeerId, frame: Frame) -> None:
        """Let sessions end or move on, then let the member go."""
        life, server = self._life, self._life.server
        assert server is not None
        life.state = "draining"
        await server.drain(life.config.drain_s, _nothing_more)
        self._draining = None
        self._carry_out(self._talk.hear(peer, frame) or ())

    def on_lost(self, peer: PeerId) -> None:
        """The link to a peer is at its end."""
        self._carry_out(self.formation.on_gone(peer, self._life.clock.monotonic()))

    async def run_for_ever(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._measure_for_ever())
            tasks.create_task(self._beat_for_ever())
            tasks.create_task(self._life.member.transport.died())
            while True:
                self._look()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stirred.wait(), LOOK_S)
                self._stirred.clear()

    async def close(self) -> None:
        """Tell the others that we leave, and end what we are in.

        A member tells its leader first, and goes on until that has let its sessions end.
        """
        begun = self._begun
        if begun is not None and self.formation.reported:
            asked = begun.place.invitation
            self._talk.say(Leave(asked.leader, asked.group, asked.epoch, LEAVES))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._life.config.drain_s):
                    while self._begun is begun:
                        await self._stirred.wait()
                        self._stirred.clear()
        self._carry_out(self.formation.stop(self._life.clock.monotonic()))
        self._door.close()
        if self._last is not None:
            await asyncio.to_thread(self._last.wait, STOP_S)

    # --- what epochs tell ------------------------------------------------------------------------

    def joined(self, epoch: Epoch, led: Led | None) -> None:
        if epoch is not self._begun:
            if led is not None:
                led.close()
            return
        self._led = led
        asked, now = epoch.place.invitation, self._life.clock.monotonic()
        self._carry_out(self.formation.on_loaded(asked.group, asked.epoch, now))

    def failed(self, epoch: Epoch, how: str, blamed: PeerId | None) -> None:
        log.warning("no part in a group: %s", how)
        asked, now = epoch.place.invitation, self._life.clock.monotonic()
        self._carry_out(self.formation.on_failed(asked.group, asked.epoch, how, now, blamed))

    def over(self, epoch: Epoch, lost: MemberLost) -> None:
        if epoch is not self._begun:
            return
        if epoch.place.rank == 0:
            self._tell_lost(epoch, lost)
        else:
            asyncio.get_running_loop().call_later(POLITE_S, self._tell_lost, epoch, lost)

    def _tell_lost(self, epoch: Epoch, lost: MemberLost) -> None:
        if epoch is not self._begun:
            return
        asked, now = epoch.place.invitation, self._life.clock.monotonic()
        peer = asked.seats[lost.rank].peer
        told = (asked.group, asked.epoch, peer, lost.how)
        self._carry_out(self.formation.on_lost(*told, now))

    # --- inside ----------------------------------------------------------------------------------

    def _look(self) -> None:
        life = self._life
        now, wall, view = life.clock.monotonic(), life.clock.wall(), life.member.alive()
        self._carry_out(self.formation.look(self.own(), view, self._near.rtts, now, wall))

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if self._talk.say(action):
                continue
            match action:
                case Load(invitation=invitation, rank=rank):
                    place = Place(invitation, rank)
                    self._begun = self._begin_epoch(place, self, self._last)
                    self._join(place)
                case Serve():
                    self._complete = self._led
                case Close(how=how):
                    self._end(how)
            self._changed.set()

    def _join(self, place: Place) -> None:
        """Depend on the others, and give up what is served."""
        asked, links = place.invitation, self._life.member.links
        log.warning(
            "rank %d of %d in epoch %d of group %s, layers %s",
            *(place.rank, asked.size, asked.epoch, asked.group, asked.span),
        )
        for seat in asked.seats:
            if seat.peer != self._life.peer:
                links.watch(seat.peer)
        if isinstance(self._host, Single):
            self._host.give_up(place.lost(place.rank, "joins a group"))

    def _begin(self) -> None:
        """The daemon holds nothing: load what is to be loaded."""
        epoch = self._begun
        if epoch is not None and epoch is not self._last:
            self._last = epoch
            epoch.start()

    def _end(self, how: str) -> None:
        epoch, self._begun = self._begun, None
        self._led = self._complete = None
        if epoch is None:
            return
        log.warning("epoch %d of the group is over: %s", epoch.place.invitation.epoch, how)
        epoch.end(how)
        self._door.expect(None)
        for seat in epoch.place.invitation.seats:
            if seat.peer != self._life.peer:
                self._life.member.links.unwatch(seat.peer)
        self._stirred.set()

    async def _measure_for_ever(self) -> None:
        """Know how far those are that offer themselves under our name."""
        name = self._life.config.group
        while True:
            offers = [
                item
                for item in self._life.member.others()
                if item.offer is not None and item.offer.name == name
            ]
            await self._near.measure(offers)
            await asyncio.sleep(LOOK_S)

    async def _beat_for_ever(self) -> None:
        """While nothing is computed, see that all are there."""
        while True:
            await asyncio.sleep(BEAT_S / 2)
            engine, host = self._life.engine, self._host
            if engine is None or host is None or isinstance(host, Single):
                continue
            if host.lost is None:
                beaten = asyncio.wrap_future(engine.between(host.beat))
                await asyncio.wait({beaten})


async def _nothing_more() -> None:
    """The next tick announces it."""
