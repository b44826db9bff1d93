"""What must hold in every simulated world, whatever goes wrong. Each rule is a function.

Rules that look at one moment are called again and again while the world runs, the others at its
end. A rule says what is wrong in words, or nothing. `Judge` collects what they say.

Of sessions: I1 same tokens, I2 nothing is computed twice, I3 KV adds up and is given back, I4 what
is closed is not computed, I5 every request ends, and fails only with an excuse, I6 nobody is
believed alive for too long, I7 the swarm serves again, I8 no task is left, I9 no error is logged.
Of groups (`watch.py`): I10 a step that is used is the sum of all ranks of one epoch, I11 a group
without a rank is not shown as serving for long, I12 no collective hangs, I13 a group serves again,
I14 a member computes for one epoch at a time, and never again for one that it left.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hexswarm.directory import EXPIRE_S
from hexswarm.errors import HexswarmError, NoRoute, Refused
from hexswarm.peer.patience import LIMITS
from hexswarm.peer.steps import Row, SessionKey
from hexswarm.records import PeerId
from tests.loopback import answer
from tests.simulation.epochs import VirtualLed
from tests.simulation.peers import LEASE_S, SimulatedPeer

if TYPE_CHECKING:
    from tests.simulation.lan import GroupPeer
    from tests.simulation.world import World

RECORD_SLACK_S = 12.0
"""A record may be late on the board, and one reading period older at a client."""
LEASE_SLACK_S = 15.0
"""Beyond a lease: what is under way, and the period of looking for ended leases."""
STALL_S = 8.0
"""Longest gap in an answer, detection, replan and replay included."""
CLOSE_S = 4.0
"""For the word that a session is closed, on an open way: delays of a second and more occur."""
SHOWN_S = 5.0
"""For the end of a group: that it is noticed, said, and written down."""
FORMED_S = 15.0
"""For a group to come about, or to be there again, with records that may be a reading old."""
EXCUSE_S = 20.0
"""So long after the swarm was whole again a failure may still come of the hole: a restarted peer
is known once its record is shown and read (period 10 s)."""


@dataclass(slots=True)
class Ask:
    """One request and what came of it."""

    number: int
    client: int
    at_s: float
    prompt: tuple[int, ...]
    max_new: int
    style: str
    """whole, cancel, talk or logits."""
    stops: frozenset[int]
    got: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    error: HexswarmError | None = None
    ended_s: float | None = None
    done: bool = False
    """It came to its end, or to where its caller wanted it."""
    abandoned: bool = False
    """Its client is gone."""

    def __str__(self) -> str:
        said = "done" if self.done else "abandoned" if self.abandoned else f"{self.error!r}"
        return f"ask {self.number} ({self.style}, {len(self.prompt)}+{self.max_new}): {said}"

    @property
    def stall_s(self) -> float:
        """The longest wait between two tokens."""
        times = self.arrivals_s
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


class Judge:
    """What was found wrong."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def blame(self, rule: str, what: str) -> None:
        if len(self.found) < 20:
            self.found.append((rule, what))

    def hear(self, rule: str, said: Iterable[str]) -> None:
        for what in said:
            self.blame(rule, what)


class Listener(logging.Handler):
    """I9: hears what is logged as an error while a world runs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]!r}"
        if "MemberLost" not in text:  # a batch that a group's end cut short: no mistake of the code
            self.heard.append(text[:300])


# --- at every moment --------------------------------------------------------------------------


def same_tokens(ask: Ask) -> Iterator[str]:
    """I1: what came is what a single process says, or (if it ended early) how that begins."""
    if ask.got != ask.wanted[: len(ask.got)]:
        yield f"{ask} got {ask.got} instead of {ask.wanted}"
    elif ask.done and ask.style != "cancel" and len(ask.got) != len(ask.wanted):
        yield f"{ask} got {len(ask.got)} of {len(ask.wanted)} tokens"


def wanted(prompt: Sequence[int], max_new: int, layers: int, stops: Iterable[int]) -> list[int]:
    """The single process's answer."""
    return answer(prompt, max_new, layers, stops)


def computed_once(peer: SimulatedPeer, row: Row) -> Iterator[str]:
    """I2: within an epoch and a turn a peer computes each position once."""
    counts = peer.engine.cells.computed
    for position in range(row.position, row.position + row.count):
        key = (row.session, row.epoch, row.turn, position)
        counts[key] += 1
        if counts[key] > 1:
            yield (
                f"{peer.process.name} computed position {position} of {row.session.hex()[:6]} "
                f"{counts[key]} times in epoch {row.epoch}, turn {row.turn}"
            )


def leases_add_up(peer: SimulatedPeer) -> Iterator[str]:
    """I3: KV in use is what the leases name, and each belongs to an open session."""
    tables = peer.engine.tables
    used = tables.total_blocks - tables.free_blocks
    leased = len({block for session in tables.sessions for block in tables.blocks(session)})
    if used != leased:
        yield f"{peer.process.name} uses {used} blocks and leases {leased}"
    if set(tables.sessions) != set(peer.table._sessions):
        yield f"{peer.process.name} leases KV to sessions that it does not know, or the reverse"


def leases_end(
    peer: SimulatedPeer, dead_since_s: Mapping[SessionKey, float], calm: Calm, now: float
) -> Iterator[str]:
    """I3: a session that its client has closed, or whose client is gone, holds no KV for long."""
    for session in peer.engine.tables.sessions:
        over_s = _given_up_s(peer, session, dead_since_s, calm, now)
        if over_s > 0:
            yield f"{peer.process.name} still holds KV of {session.hex()[:6]}, given up long ago"


def closed_is_closed(
    peer: SimulatedPeer,
    row: Row,
    dead_since_s: Mapping[SessionKey, float],
    calm: Calm,
    now: float,
) -> Iterator[str]:
    """I4: no row is begun of a session that is closed here, or that its client has given up."""
    if row.session not in peer.table._sessions:
        yield f"{peer.process.name} computes {row.session.hex()[:6]}, which is closed"
    elif _given_up_s(peer, row.session, dead_since_s, calm, now) > 0:
        yield f"{peer.process.name} computes {row.session.hex()[:6]}, given up long ago"


Calm = Callable[[PeerId, PeerId], float]
"""So many seconds the way between a client and a peer has been open, and both have been running."""


def _given_up_s(
    peer: SimulatedPeer,
    session: SessionKey,
    dead_since_s: Mapping[SessionKey, float],
    calm: Calm,
    now: float,
) -> float:
    """By how long a session has outlived the end that its client made of it, if it has.

    The word of the end takes a moment, or, if the way is disturbed, at most until the lease ends.
    """
    held, since_s = peer.table._sessions.get(session), dead_since_s.get(session)
    if held is None or since_s is None:
        return 0.0
    dead_s = now - since_s
    heard_s = min(dead_s, calm(held.client, peer.peer))
    return max(heard_s - CLOSE_S, dead_s - LEASE_S - LEASE_SLACK_S)


def in_time(ask: Ask, deadline_s: float, now: float) -> Iterator[str]:
    """I5: every request ends, by answer or by a typed error."""
    if ask.ended_s is None and now > deadline_s:
        yield f"{ask} has not ended {now - ask.at_s:.0f} s after it was made"


def goes_on(ask: Ask, whole: Sequence[tuple[float, bool]]) -> Iterator[str]:
    """I5: where others could take over at once, an answer never stands still for long."""
    if ask.stall_s > STALL_S and not _had_a_hole(ask, whole):
        yield f"{ask} stood still for {ask.stall_s:.1f} s"


def excused(ask: Ask, whole: Sequence[tuple[float, bool]]) -> Iterator[str]:
    """I5: a request fails only if the swarm was not whole at some time in its life.

    Whole: there is a ring of living peers with room, of which each reaches its neighbours and the
    client. `whole` tells when that began or ceased to be so. A client may also be refused for lack
    of room before its first token, with the time after which to ask again.
    """
    if ask.error is None or _had_a_hole(ask, whole):
        return
    if not ask.got and isinstance(ask.error, Refused) and ask.error.code == "full":
        return
    if not ask.got and isinstance(ask.error, NoRoute) and ask.error.binding == "kv":
        return
    yield f"{ask} failed after {len(ask.got)} tokens though the swarm was whole"


def _had_a_hole(ask: Ask, whole: Sequence[tuple[float, bool]]) -> bool:
    """Whether the swarm was not whole for a moment of the request's life, or shortly before."""
    end_s = math.inf if ask.ended_s is None else ask.ended_s
    begin_s = ask.at_s - EXCUSE_S
    first = max(bisect.bisect_right([at_s for at_s, _ in whole], begin_s) - 1, 0)
    return any(not good for at_s, good in whole[first:] if at_s <= end_s)


def records_end(
    seen: Iterable[PeerId], told_s: Mapping[PeerId, float], now: float
) -> Iterator[str]:
    """I6: nobody is believed alive for longer than a record lives after its last word."""
    for peer in seen:
        last_s = told_s.get(peer, now)
        if outlived(last_s, now):
            yield f"{peer[-6:]} is still believed alive {now - last_s:.0f} s after its last word"


def outlived(told_s: float, now: float) -> bool:
    """Whether a record told then may not be believed any more."""
    return now - told_s > EXPIRE_S + RECORD_SLACK_S


# --- of groups --------------------------------------------------------------------------------


def not_shown_without_a_rank(peer: GroupPeer, since_s: float, now: float) -> Iterator[str]:
    """I11: a group that is not whole does not say for long that it serves."""
    host, patience_s = peer.host, 0.0
    if isinstance(host, VirtualLed):  # where sums take long, a late one is waited for accordingly
        patience_s = host._group._exchange._pace.patience_s - LIMITS.floor_s
    if now - since_s > SHOWN_S + patience_s:
        yield f"{peer.process.name} has announced a group without a rank for {now - since_s:.1f} s"


def no_sum_hangs(peer: GroupPeer, held_s: float, now: float) -> Iterator[str]:
    """I12: a collective comes to its end, or to an error, while its process runs."""
    for epoch in peer.epochs:
        group = epoch.sums.bound
        if group is not None and group.busy_s is not None:
            busy_s = now - max(group.busy_s, held_s)
            if busy_s > LIMITS.most_s:
                yield f"{peer.process.name} has been in one sum for {busy_s:.1f} s"


def group_serves_again(name: str, calm_s: float, now: float) -> Iterator[str]:
    """I13: with enough members that nothing ails, a group serves, in a new epoch if need be."""
    if now - calm_s > FORMED_S:
        yield f"group {name} does not serve {now - calm_s:.0f} s after nothing ailed it any more"


def one_epoch_at_a_time(peer: GroupPeer) -> Iterator[str]:
    """I14: a peer has streams in one epoch at most."""
    live = [epoch.place.invitation for epoch in peer.epochs if epoch.group is not None]
    if len(live) > 1:
        yield f"{peer.process.name} is in epochs {[(one.group, one.epoch) for one in live]}"


# --- at the end -------------------------------------------------------------------------------


def serves_again(served_s: float | None, faults_end_s: float, within_s: float) -> Iterator[str]:
    """I7: after the faults the swarm serves again within two periods of announcing."""
    if served_s is None:
        yield f"nothing was served within {within_s:.0f} s after the faults ended"
    elif served_s - faults_end_s > within_s:
        yield f"it took {served_s - faults_end_s:.0f} s after the faults to serve again"


def nothing_is_held(world: World) -> Iterator[str]:
    """I3: in the end no KV is in use, no step waits, and nobody is watched for nobody's sake."""
    for peer in world.serving_now:
        tables = peer.engine.tables
        if tables.free_blocks != tables.total_blocks or len(peer.table):
            yield f"{peer.process.name} still holds {len(peer.table)} sessions"
        if len(peer.engine._scheduler):
            yield f"{peer.process.name} has steps that wait for nobody"
        if watched := set(peer.member.links._watched) - peer.fellows:
            yield f"{peer.process.name} still watches {sorted(watched)}"
        if peer.table.journal.used_bytes:
            yield f"{peer.process.name} keeps {peer.table.journal.used_bytes} bytes of journals"
    for client in world.clients.values():
        if client.killed:
            continue
        if len(client.runtime):
            yield f"{client.process.name} still has {len(client.runtime)} sessions"
        if client.member.links._watched:
            yield f"{client.process.name} still watches {dict(client.member.links._watched)}"


def no_task_is_left(processes: Iterable[Any]) -> Iterator[str]:
    """I8: who has closed runs nothing any more."""
    for process in processes:
        for task in process.tasks:
            yield f"{process.name} left {task.get_coro().__qualname__} behind: {task!r}"


def no_error_was_logged(listener: Listener) -> Iterator[str]:
    """I9: nothing happened that the code itself calls an error."""
    yield from listener.heard
