"""A LAN of peers that form groups, on a virtual clock: the double for the tests of formation.

Each machine has a `Formation` and carries its actions out: messages that take a while and keep
their order, loads that take longer, streams that open once all ranks load, announcements that
others see later and that outlive a machine by 90 s. Machines die, freeze (they do nothing, and are
missed after `SILENCE_S`), come back, and lie. Whatever must never be is asserted as it happens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hexswarm.peer.cuts import Sizes
from hexswarm.peer.groups import actions as does
from hexswarm.peer.groups.actions import Action, Facts, Own
from hexswarm.peer.groups.formation import Formation
from hexswarm.peer.groups.invitation import Invitation, Refusal
from hexswarm.records import Announcement, PeerId, Span, Speed

SIZES = Sizes(64, 8, 4, 16, 128, 256, 4, word_matrices=2)
MODEL = "ab" * 32
LAYERS = 8
KV_TOKENS = 64
SILENCE_S = 8.0
"""When a frozen peer is missed."""
LOOK_S = 1.0
EXPIRE_S = 90.0
DETECT_S = 2.0
"""Within this a collective tells that a stream of its epoch is cut."""
WALL_S = 1.7e9
ROOM = 1 << 30


def sizes_of(span: Span) -> Sizes:
    return Sizes(64, 8, 4, 16, 128, 256, len(span), word_matrices=1)


def peer_name(number: int) -> PeerId:
    return PeerId(f"12D3KooW{number:04d}")


def announced(peer: PeerId, **changes: Any) -> Announcement:
    values: dict[str, Any] = {
        "peer": peer,
        "model": MODEL,
        "model_name": "M",
        "layers": LAYERS,
        "span": Span(0, 4),
        "state": "joining",
        "dtype": "float32",
        "device": "cpu",
        "speed": Speed(1e-3, 1e-4, 0.0),
        "free_kv_tokens": 0,
        "queue_s": 0.0,
        "addresses": (),
    }
    return Announcement(**{**values, **changes})


@dataclass
class Machine:
    """One peer, and what its daemon would hold."""

    number: int
    name: str
    size: int
    leads: bool
    free_bytes: int
    layer_s: float
    lie: str = ""
    """`mute`, `never`, `stale`, `leaver`: what it does to leaders that ask it."""
    span: Span = field(default=Span(0, 4))
    sessions: int = 0
    alive: bool = True
    frozen: bool = False
    late: list[Callable[[], None]] = field(default_factory=list)
    """What happens to it when it thaws."""
    held: Invitation | None = None
    """The epoch of the part that it loads or has loaded."""
    weights: bool = False
    loaded: bool = False
    gone: set[PeerId] = field(default_factory=set)
    served: dict[str, int] = field(default_factory=dict)
    """The latest epoch of each group that it led in this life."""
    formation: Formation = field(init=False)
    peer: PeerId = field(init=False)

    def __post_init__(self) -> None:
        self.peer = peer_name(self.number)

    @property
    def own(self) -> Own:
        return Own(self.span, self.free_bytes, self.layer_s, self.sessions)

    def facts(self) -> Facts:
        return Facts(
            *(self.peer, self.name, self.size, MODEL, LAYERS, "float32"),
            *("10.0.0.1", 1 + self.number, self.leads, KV_TOKENS, 4, sizes_of),
        )


class Lan:
    """All machines and what is on its way between them."""

    def __init__(self, rng: Random, machines: list[Machine], *, rtt_s: float = 3e-4) -> None:
        self.rng, self.now, self.rtt_s = rng, 0.0, rtt_s
        self.machines = {machine.peer: machine for machine in machines}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._arrival: dict[tuple[PeerId, PeerId], float] = {}
        self.told: dict[PeerId, list[tuple[float, float, Announcement]]] = {}
        """Of each peer its words: when others see it, when it ends."""
        self.broken: dict[PeerId, float] = {}
        """Since when a leader's epoch that serves has lacked a rank."""
        self.reached: dict[Invitation, set[PeerId]] = {}
        """Of each epoch the ranks that have had their part loaded."""
        self.serves: list[tuple[float, Invitation]] = []
        """All epochs that ever served, and since when."""
        for machine in machines:
            self.start(machine)

    # --- time ------------------------------------------------------------------------------------

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._count, event))

    def run(self, seconds: float) -> None:
        end_s = self.now + seconds
        while self._queue and self._queue[0][0] <= end_s:
            self.now, _, event = heapq.heappop(self._queue)
            event()
            self.check()
        self.now = end_s

    def until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Run until something holds, for so long at most; whether it does."""
        end_s = self.now + seconds
        while not holds():
            if self.now >= end_s:
                return False
            self.run(1.0)
        return True

    # --- machines --------------------------------------------------------------------------------

    def start(self, machine: Machine) -> None:
        machine.formation = Formation(machine.facts(), Random(machine.number))
        machine.alive, machine.frozen, machine.late = True, False, []
        machine.held, machine.weights, machine.loaded = None, False, False
        machine.gone, machine.served = set(), {}
        self._announce(machine)
        self._look(machine, machine.formation)

    def kill(self, machine: Machine) -> None:
        """Its links break, and those in its epoch hear of it from the streams."""
        held, machine.alive, machine.frozen = machine.held, False, False
        machine.held, machine.loaded = None, False
        self._cut(machine.peer, held)
        for other in self._others(machine):
            self.after(self._short_s(), lambda other=other: self._lost_link(other, machine.peer))

    def freeze(self, machine: Machine, seconds: float) -> None:
        machine.frozen = True
        if seconds > SILENCE_S:
            held = machine.held
            self.after(SILENCE_S, lambda: self._missed(machine, held))
        self.after(seconds, lambda: self._thaw(machine))

    def _missed(self, machine: Machine, held: Invitation | None) -> None:
        if machine.frozen:
            self._cut(machine.peer, held)
            for other in self._others(machine):
                self._lost_link(other, machine.peer)
                self._do(machine, lambda other=other: self._lost_link(machine, other.peer))

    def _thaw(self, machine: Machine) -> None:
        if not machine.frozen:
            return
        machine.frozen, late, machine.late = False, machine.late, []
        for event in late:
            event()
        self._look(machine, machine.formation)

    def _others(self, machine: Machine) -> list[Machine]:
        return [one for one in self.machines.values() if one is not machine]

    def _do(self, machine: Machine, event: Callable[[], None]) -> None:
        """Now, or when it thaws; never if it is another life by then."""
        formation = machine.formation

        def act() -> None:
            if machine.alive and machine.formation is formation:
                event()

        if machine.frozen:
            machine.late.append(act)
        else:
            act()

    def _lost_link(self, machine: Machine, peer: PeerId) -> None:
        machine.gone.add(peer)
        self._do(machine, lambda: self.carry(machine, machine.formation.on_gone(peer, self.now)))
        self.after(3.0, lambda: machine.gone.discard(peer))

    def _cut(self, peer: PeerId, held: Invitation | None) -> None:
        """The streams of a peer's epoch are cut: the others' collectives say so."""
        if held is None:
            return
        told = (held.group, held.epoch, peer, "was cut off")
        for seat in held.seats:
            other = self.machines[seat.peer]
            if other.peer != peer and other.held == held:
                late_s = self.rng.uniform(0.01, DETECT_S)
                self.after(
                    late_s, lambda other=other: self._do(other, lambda: self._lose(other, told))
                )

    def _lose(self, machine: Machine, told: tuple[str, int, PeerId, str]) -> None:
        if machine.loaded:
            self.carry(machine, machine.formation.on_lost(*told, self.now))
        else:
            group, epoch, peer, how = told
            failed = machine.formation.on_failed(group, epoch, how, self.now, peer)
            self.carry(machine, failed)

    # --- what is known ---------------------------------------------------------------------------

    def _look(self, machine: Machine, formation: Formation) -> None:
        if not machine.alive or machine.formation is not formation:
            return
        if not machine.frozen:
            view, rtts = self.view(machine), self.rtts(machine)
            wall = WALL_S + self.now
            self.carry(machine, formation.look(machine.own, view, rtts, self.now, wall))
            self._announce(machine)
        self.after(LOOK_S * self.rng.uniform(0.8, 1.2), lambda: self._look(machine, formation))

    def view(self, machine: Machine) -> list[Announcement]:
        seen = []
        for peer in sorted(self.told):
            known = [
                word
                for since_s, end_s, word in self.told[peer]
                if since_s <= self.now < end_s or (peer == machine.peer and self.now < end_s)
            ]
            seen += known[-1:]
        return seen

    def rtts(self, machine: Machine) -> dict[PeerId, float]:
        others = (one for one in self._others(machine) if one.alive)
        return {one.peer: self.rtt_s for one in others if one.peer not in machine.gone}

    def _announce(self, machine: Machine) -> None:
        formation = machine.formation
        online = formation.serving or formation.reported or formation.single(machine.own)
        word = announced(
            machine.peer,
            span=machine.span,
            state="online" if online else "joining",
            speed=Speed(machine.layer_s, 1e-4, 0.0),
            group=formation.membership,
            offer=formation.offer(machine.own),
        )
        words = self.told.setdefault(machine.peer, [])
        if not words or words[-1][2] != word or words[-1][1] < self.now + 60:
            seen_s = self.now + self.rng.uniform(0.05, 2.0)
            words.append((seen_s, self.now + EXPIRE_S, word))
            del words[:-8]

    # --- actions ---------------------------------------------------------------------------------

    def carry(self, machine: Machine, todo: list[Action]) -> None:
        for action in todo:
            match action:
                case does.Invite(peer, invitation):
                    self._send(machine, peer, lambda m, i=invitation: self._invited(m, machine, i))
                case does.Answer(leader, group, epoch, refusal):
                    self._answer(machine, leader, group, epoch, refusal)
                case does.Commit(peer, group, epoch):
                    self._send(
                        machine,
                        peer,
                        lambda m, g=group, e=epoch: m.formation.on_commit(
                            machine.peer, g, e, self.now
                        ),
                    )
                case does.Report(leader, group, epoch):
                    if machine.lie != "never":
                        self._tell(machine, leader, "on_report", group, epoch)
                    if machine.lie == "leaver":
                        self._tell(machine, leader, "on_leave", group, epoch, "just so")
                case does.Leave(leader, group, epoch, how):
                    self._tell(machine, leader, "on_leave", group, epoch, how)
                case does.Release(peer, group, epoch):
                    self._tell(machine, peer, "on_release", group, epoch)
                case does.Load(invitation, rank):
                    self._load(machine, invitation, rank)
                case does.Close(group, epoch, _):
                    self._close(machine, group, epoch)
                case does.Serve(invitation):
                    self._serve(machine, invitation)
                case does.Announce():
                    self._announce(machine)

    def _send(self, sender: Machine, to: PeerId, event: Callable[[Machine], list[Action]]) -> None:
        """Messages keep their order, and break off with the link."""
        receiver = self.machines[to]
        if not receiver.alive or to in sender.gone:
            self.after(self._short_s(), lambda: self._lost_link(sender, to))
            return
        way = (sender.peer, to)
        arrival_s = max(self.now + self._short_s(), self._arrival.get(way, 0.0) + 1e-6)
        self._arrival[way] = arrival_s

        def arrive() -> None:
            if sender.peer not in receiver.gone:
                self.carry(receiver, event(receiver))

        self.after(arrival_s - self.now, lambda: self._do(receiver, arrive))

    def _tell(
        self, sender: Machine, to: PeerId, what: str, group: str, epoch: int, *more: str
    ) -> None:
        def event(receiver: Machine) -> list[Action]:
            told: list[Action] = getattr(receiver.formation, what)(
                sender.peer, group, epoch, *more, self.now
            )
            return told

        self._send(sender, to, event)

    def _invited(self, machine: Machine, leader: Machine, invitation: Invitation) -> list[Action]:
        if machine.lie == "mute":
            return []
        wall = WALL_S + self.now
        return machine.formation.on_invitation(leader.peer, invitation, machine.own, self.now, wall)

    def _answer(
        self, machine: Machine, leader: PeerId, group: str, epoch: int, refusal: Refusal | None
    ) -> None:
        if machine.lie == "stale":
            refusal = Refusal("stale", "", epoch + self.rng.choice([0, 1, 5, 1 << 40]))
        self._send(
            machine,
            leader,
            lambda m: m.formation.on_answer(machine.peer, group, epoch, refusal, self.now),
        )

    def _load(self, machine: Machine, invitation: Invitation, rank: int) -> None:
        assert machine.held is None, "a part of one epoch at a time"
        assert invitation.seats[rank].peer == machine.peer
        machine.held, machine.weights, machine.loaded = invitation, False, False

        def read() -> None:
            if machine.held == invitation:
                machine.weights = True
                self._open_streams(invitation)

        self.after(self.rng.uniform(0.2, 4.0), lambda: self._do(machine, read))

    def _open_streams(self, invitation: Invitation) -> None:
        """Once every rank has its weights, all streams are open."""
        together = [self.machines[seat.peer] for seat in invitation.seats]
        if any(one.held != invitation or not one.weights for one in together):
            return
        for one in together:
            self.after(
                self._short_s(),
                lambda one=one: self._do(one, lambda: self._opened(one, invitation)),
            )

    def _opened(self, machine: Machine, invitation: Invitation) -> None:
        if machine.held == invitation and not machine.loaded:
            machine.loaded = True
            self.reached.setdefault(invitation, set()).add(machine.peer)
            told = (invitation.group, invitation.epoch)
            self.carry(machine, machine.formation.on_loaded(*told, self.now))

    def _close(self, machine: Machine, group: str, epoch: int) -> None:
        held = machine.held
        assert held is not None, "what is closed was loaded"
        assert (held.group, held.epoch) == (group, epoch)
        machine.held, machine.weights, machine.loaded = None, False, False
        self._cut(machine.peer, held)

    def _short_s(self) -> float:
        return self.rng.uniform(1e-4, 2e-2)

    # --- what must never be ----------------------------------------------------------------------

    def _serve(self, machine: Machine, invitation: Invitation) -> None:
        """An epoch begins to serve: each rank is there, or was until a moment ago."""
        assert machine.held == invitation
        assert machine.loaded
        ranks = {seat.peer for seat in invitation.seats}
        assert self.reached[invitation] == ranks, "some rank never had its part"
        latest = machine.served.get(invitation.group, 0)
        assert latest < invitation.epoch, "epochs count up"
        machine.served[invitation.group] = invitation.epoch
        self.serves.append((self.now, invitation))

    def whole(self, invitation: Invitation) -> bool:
        """Every rank of the epoch is alive and has its part."""
        ranks = [self.machines[seat.peer] for seat in invitation.seats]
        return all(
            one.alive and not one.frozen and one.held == invitation and one.loaded for one in ranks
        )

    @property
    def serving(self) -> list[Invitation]:
        """The epochs that serve at this moment."""
        return [
            one.held
            for one in self.machines.values()
            if one.alive and one.formation.serving and one.held is not None
        ]

    def check(self) -> None:
        for machine in self.machines.values():
            if not machine.alive or machine.frozen or not machine.formation.serving:
                self.broken.pop(machine.peer, None)
                continue
            assert machine.held is not None
            if self.whole(machine.held):
                self.broken.pop(machine.peer, None)
                continue
            since_s = self.broken.setdefault(machine.peer, self.now)
            assert self.now - since_s <= SILENCE_S + DETECT_S + 0.1, "serves without a rank"
        groups = [told.group for told in self.serving]
        assert len(groups) == len(set(groups)), "one epoch of a group serves"
