"""What goes wrong in a seed: drawn beforehand, done and undone at its time.

A seed is *mild* or *wild*. In a mild one every fault has a victim in it (or a way of a victim), and
the peers that are no victims can serve alone, with room for all, joined to each other and to every
client at all times: there no request may fail. In a wild one anything may happen to anybody, and a
failure needs an excuse (`invariants.excused`). All faults have ended at `Plan.faults_end_s`, except
that a victim may stay dead.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgpack

from hexswarm.directory import _CONTEXT, EXPIRE_S, _to_body, sign
from hexswarm.records import Announcement
from tests.simulation.peers import PeerSpec, identity, name_of
from tests.simulation.processes import EPOCH_S
from tests.simulation.wires import pairs

if TYPE_CHECKING:
    from tests.simulation.world import World

STRANGER = 90
"""Number of the hostile one, who belongs to nobody's plan."""

OF_PEER = ("kill", "kill", "kill", "stop", "stop", "slow", "drain", "full", "lie", "clock")
OF_WAY = ("cut", "cut", "tear", "vanish", "delay", "twice", "swap", "late", "silence")
OF_ALL = ("partition", "board", "forge", "garbage", "client")
ALL_KINDS = (OF_PEER, OF_PEER, OF_WAY, OF_WAY, OF_ALL)
LAN_KINDS = (OF_PEER, OF_PEER, OF_WAY, ("partition",))
"""What goes wrong with a group: what concerns all is drawn elsewhere."""
FOREVER_S = 1e6

Undo = Callable[[], None] | None


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong; `a` and `b` are numbers of peers or clients."""

    at_s: float
    kind: str
    for_s: float
    a: int = -1
    b: int = -1
    amount: float = 0.0
    group: tuple[int, ...] = ()

    def __str__(self) -> str:
        who = f"{self.a}" if self.b < 0 else f"{self.a}>{self.b}"
        return f"{self.at_s:6.2f} {self.kind} {who} for {self.for_s:.1f} s ({self.amount:.2g})"


def draw(
    rng: random.Random,
    specs: Sequence[PeerSpec],
    clients: Sequence[int],
    victims: Sequence[int],
    begin_s: float,
    end_s: float,
    *,
    mild: bool,
    counts: tuple[int, int] = (2, 9),
    kinds: Sequence[Sequence[str]] = ALL_KINDS,
) -> tuple[Fault, ...]:
    """The faults of a seed, in order of time."""
    peers = [spec.number for spec in specs]
    faults = []
    for _ in range(rng.randint(*counts)):
        at_s = rng.uniform(begin_s, end_s - 1.0)
        for_s = min(rng.choice((0.3, 1.0, 3.0, 8.0, 30.0)) * rng.uniform(0.7, 1.3), end_s - at_s)
        a = rng.choice(victims if mild else peers)
        kind = rng.choice(rng.choice(kinds))
        fault = Fault(at_s, kind, for_s, a, amount=rng.uniform(0.2, 1.0))
        if kind in OF_WAY:
            b = rng.choice([n for n in [*peers, *clients] if n != a])
            fault = replace(fault, a=b, b=a) if rng.random() < 0.5 else replace(fault, b=b)
        elif kind == "kill" and mild and rng.random() < 0.2:
            fault = replace(fault, for_s=FOREVER_S)
        elif kind == "partition":
            group = tuple(n for n in (victims if mild else peers) if rng.random() < 0.5)
            fault = replace(fault, group=group or (a,))
        elif kind == "client":
            fault = replace(fault, a=rng.choice(clients))
        faults.append(fault)
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


async def commit(world: World, fault: Fault) -> None:
    """Do it at its time, and undo it."""
    await asyncio.sleep(fault.at_s - world.now)
    world.note("fault", str(fault))
    undo = _KINDS[fault.kind](world, fault)
    world.look()
    if undo is None or fault.for_s >= FOREVER_S:
        return
    await asyncio.sleep(fault.for_s)
    world.note("end of", str(fault))
    undo()
    world.look()


# --- of a peer ----------------------------------------------------------------------------------


def _kill(world: World, fault: Fault) -> Undo:
    peer = world.serving(fault.a)
    if peer is None:
        return None
    world.kill(peer)
    return lambda: world.restart(fault.a)


def _stop(world: World, fault: Fault) -> Undo:
    peer = world.serving(fault.a)
    if peer is None or peer.process.stopped:
        return None
    peer.process.stop()

    def go_on() -> None:
        if peer.process.stopped:
            peer.process.go_on()

    return go_on


def _slow(world: World, fault: Fault) -> Undo:
    peer = world.serving(fault.a)
    if peer is None:
        return None
    peer.set_slow(10.0)
    return lambda: peer.set_slow(1.0)


def _drain(world: World, fault: Fault) -> Undo:
    peer = world.serving(fault.a)
    if peer is None or peer.state == "draining":
        return None
    world.drain(peer)
    return None  # it comes back as soon as it has gone


def _full(world: World, fault: Fault) -> Undo:
    world.stranger.hog(name_of(fault.a))
    return lambda: world.stranger.let_go(name_of(fault.a))


def _lie(world: World, fault: Fault) -> Undo:
    """Speeds a hundred times too good, or room for KV that is not there."""

    def fast(said: Announcement) -> Announcement:
        speed = said.speed
        quick = replace(
            speed,
            decode_layer_s=speed.decode_layer_s / 100,
            prefill_layer_s=speed.prefill_layer_s / 100,
        )
        return replace(said, speed=quick)

    def roomy(said: Announcement) -> Announcement:
        return replace(said, free_kv_tokens=1 << 20, kv_tokens=1 << 20)

    lie = fast if fault.amount < 0.6 else roomy
    peer = world.serving(fault.a)
    if peer is None:
        return None
    peer.lie = lie
    return lambda: setattr(peer, "lie", lambda said: said)


def _clock(world: World, fault: Fault) -> Undo:
    """Somebody sets the machine's clock."""
    peer = world.serving(fault.a)
    if peer is None:
        return None
    step_s = (3600.0 if fault.amount < 0.6 else -60.0) * (1 + fault.amount)
    peer.process.skew_s += step_s

    def set_back() -> None:
        peer.process.skew_s -= step_s

    return set_back


# --- of a way -----------------------------------------------------------------------------------


def _cut(world: World, fault: Fault) -> Undo:
    a, b, why = name_of(fault.a), name_of(fault.b), f"cut {fault.at_s}"
    world.wires.cut(a, b, why)
    return lambda: world.wires.heal(a, b, why)


def _silence(world: World, fault: Fault) -> Undo:
    a, b, why = name_of(fault.a), name_of(fault.b), f"silence {fault.at_s}"
    world.wires.freeze(a, b, why)
    return lambda: world.wires.heal(a, b, why)


def _tear(world: World, fault: Fault) -> Undo:
    harm = world.wires.harm(name_of(fault.a), name_of(fault.b))
    harm.tear = True
    return lambda: setattr(harm, "tear", False)


def _vanish(world: World, fault: Fault) -> Undo:
    a, b = name_of(fault.a), name_of(fault.b)
    world.wires.vanish(a, b, True)
    return lambda: world.wires.vanish(a, b, False)


def _delay(world: World, fault: Fault) -> Undo:
    a, b = name_of(fault.a), name_of(fault.b)
    usual_s = world.delay_s(fault.a, fault.b)
    world.wires.shape(a, b, usual_s + fault.amount, one_way=True)
    return lambda: world.wires.shape(a, b, usual_s, one_way=True)


def _mischief(name: str) -> Callable[[World, Fault], Undo]:
    def begin(world: World, fault: Fault) -> Undo:
        harm = world.wires.harm(name_of(fault.a), name_of(fault.b))
        setattr(harm, name, 0.5 * fault.amount)
        return lambda: setattr(harm, name, 0.0)

    return begin


# --- of all -------------------------------------------------------------------------------------


def _partition(world: World, fault: Fault) -> Undo:
    group = [name_of(n) for n in fault.group]
    rest = [name_of(n) for n in world.numbers if n not in fault.group]
    why = f"partition {fault.at_s}"
    divide = world.wires.freeze if fault.amount < 0.5 else world.wires.cut
    for a, b in pairs(group, rest):
        divide(a, b, why)

    def unite() -> None:
        for a, b in pairs(group, rest):
            world.wires.heal(a, b, why)

    return unite


def _board(world: World, fault: Fault) -> Undo:
    world.board.down = True
    return lambda: setattr(world.board, "down", False)


def _forge(world: World, fault: Fault) -> None:
    """Records that must not be taken: altered, in another's name, immortal; and an old one again.

    Those that are taken all the same count as violations.
    """
    shown = world.board.last(name_of(fault.a))
    if shown is None:
        return
    record, now = shown.record, EPOCH_S + world.now
    altered = bytearray(record.data)
    altered[int(fault.amount * (len(altered) - 1))] ^= 1
    key_owner = record.peer
    mine = replace(record.announcement, peer=name_of(STRANGER), sequence=1, issued_s=now)
    own = sign(mine, now + EXPIRE_S, identity(STRANGER))
    immortal = sign(mine, now + 10 * EXPIRE_S, identity(STRANGER))
    words = _to_body(replace(record.announcement, sequence=1 << 61), now + EXPIRE_S)
    body = msgpack.packb(words)
    named = msgpack.packb([body, identity(STRANGER).sign(_CONTEXT + body)])
    for data, subkey, expires_s in (
        (named, key_owner, now + EXPIRE_S),
        (bytes(altered), key_owner, record.expires_s),
        (own.data, key_owner, own.expires_s),
        (record.data, key_owner, record.expires_s + 60.0),
        (record.data, name_of(STRANGER), record.expires_s),
        (immortal.data, name_of(STRANGER), immortal.expires_s),
        (record.data, key_owner, record.expires_s),
    ):
        key = f"hexswarm/1/{record.announcement.model}/0of1"
        if world.board.store(key, subkey, data, expires_s, sure=True):
            world.judge.blame("forged", f"a forged record of {subkey[-6:]} was taken")


def _garbage(world: World, fault: Fault) -> None:
    world.stranger.pester(name_of(fault.a), fault.amount)


def _client(world: World, fault: Fault) -> None:
    world.kill_client(fault.a)


_KINDS: Mapping[str, Callable[[World, Fault], Undo]] = {
    "kill": _kill,
    "stop": _stop,
    "slow": _slow,
    "drain": _drain,
    "full": _full,
    "lie": _lie,
    "clock": _clock,
    "cut": _cut,
    "silence": _silence,
    "tear": _tear,
    "vanish": _vanish,
    "delay": _delay,
    "twice": _mischief("twice"),
    "swap": _mischief("swap"),
    "late": _mischief("late"),
    "partition": _partition,
    "board": _board,
    "forge": _forge,
    "garbage": _garbage,
    "client": _client,
}
