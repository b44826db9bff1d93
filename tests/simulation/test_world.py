"""The simulated world: its seeds are green, it replays, and each of its rules catches a mistake.

Some hundred seeds here, a thousand in CI (`run.py --seeds 0:1000`). A planted mistake
changes one decision; within a few seeds the world must notice, by the rule that is there for it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hexswarm.failover
import hexswarm.links
import hexswarm.peer.order
import hexswarm.resume
import hexswarm.session
from hexswarm.directory import Directory
from hexswarm.errors import PeerLost
from hexswarm.instructions import Emit
from hexswarm.links import Links
from hexswarm.messages import Cancel, Close
from hexswarm.peer.admission import Admission
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.engine import Engine
from hexswarm.peer.journal import Journal
from hexswarm.peer.stage import StageTable
from hexswarm.resume import Part
from tests.simulation import invariants
from tests.simulation.faults import FOREVER_S, Fault
from tests.simulation.outcome import Outcome
from tests.simulation.plans import Plan, draw
from tests.simulation.run import again
from tests.simulation.world import play

pytestmark = pytest.mark.simulation

ROOT = Path(__file__).parents[2]
SEEDS = 40
"""`make world` plays a thousand."""
BLOCKS = 2
PLANTED_SEEDS = range(40)
"""So many seeds a planted mistake may take to be noticed."""


def verdict(outcome: Outcome) -> str:
    told = "\n".join(f"  {rule}: {what}" for rule, what in outcome.broken)
    return f"seed {outcome.seed}:\n{told}\n  {again(outcome.seed)}"


@pytest.mark.parametrize("block", range(BLOCKS))
def test_nothing_is_lost_whatever_goes_wrong(block: int) -> None:
    """In every seed all rules hold."""
    share = SEEDS // BLOCKS
    broken = [o for o in map(play, range(block * share, (block + 1) * share)) if o.broken]
    assert not broken, "\n".join(map(verdict, broken))


def test_without_faults_nothing_fails_or_stalls() -> None:
    """A quiet world answers everything, and no token is late."""
    for seed in range(10):
        outcome = play(seed, quiet=True)
        assert not outcome.broken, verdict(outcome)
        assert outcome.failed == outcome.abandoned == 0
        assert max(outcome.stalls_s, default=0.0) < 1.5


def test_a_mild_world_excuses_nothing() -> None:
    """Where healthy peers could serve alone all the time, no request fails at all."""
    mild = [seed for seed in range(60) if draw(seed).mild][:15]
    assert sum(play(seed).failed for seed in mild) == 0


# --- it replays ---------------------------------------------------------------------------------


def test_a_cut_of_the_only_way_is_tried_again_soon() -> None:
    """Both ends call each other lost, and there is nobody else: avoiding them cost 8.5 s."""
    outcome = play(6759)
    assert not outcome.broken, verdict(outcome)
    assert max(outcome.stalls_s) < 7


def test_the_same_seed_is_the_same_story() -> None:
    """Twice in one process: the same frames at the same times."""
    for seed in (1, 2):
        assert play(seed).trace == play(seed).trace
    assert play(1).trace != play(2).trace


def test_no_hash_of_this_process_decides_anything() -> None:
    """Under another PYTHONHASHSEED a seed tells the same story, so that any machine replays it."""
    told = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests/simulation/run.py"), "--seed", "4", "--events", "1"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=False,
        )
        told.append(json.loads(done.stdout.splitlines()[-1])["trace"])
    assert told[0] == told[1] == play(4).trace


def test_a_plan_is_drawn_without_looking_at_the_code_under_test() -> None:
    """The same faults at the same times whatever the swarm does: a seed keeps its meaning."""
    assert str(draw(5)) == str(draw(5))
    assert draw(5).faults_end_s >= max(fault.at_s for fault in draw(5).faults)


# --- each rule catches a mistake ------------------------------------------------------------------

Patch = Any


def noticed(*rules: str, plan_of: Callable[[int], Plan] = draw) -> Outcome:
    """The first seed that goes red; it must do so by one of these rules."""
    for seed in PLANTED_SEEDS:
        outcome = play(seed, plan=plan_of(seed))
        if outcome.broken:
            assert outcome.broken[0][0] in rules, verdict(outcome)
            return outcome
    raise AssertionError(f"nobody noticed within {len(PLANTED_SEEDS)} seeds")


def only(kind: str, for_s: float) -> Callable[[int], Plan]:
    """Plans in which this, and nothing else, happens to every peer that may be harmed."""

    def plan_of(seed: int) -> Plan:
        plan = draw(seed, quiet=True)
        harmed = [
            Fault(plan.settled_s + 1.0 + 0.8 * turn, kind, for_s, victim, amount=0.9)
            for turn, victim in enumerate(plan.victims)
        ]
        end_s = plan.settled_s + 7.0 + (for_s if for_s < FOREVER_S else 0.0)
        return replace(plan, faults=tuple(harmed), faults_end_s=max(plan.faults_end_s, end_s))

    return plan_of


def all_cut_off(seed: int) -> Plan:
    """For five seconds the client reaches nobody."""
    plan = draw(seed, quiet=True)
    peers = tuple(spec.number for spec in (*plan.specs, *plan.lan))
    fault = Fault(plan.settled_s + 1.0, "partition", 5.0, amount=0.9, group=peers)
    return replace(plan, mild=False, faults=(fault,), faults_end_s=plan.settled_s + 7.0)


def all_said_twice(seed: int) -> Plan:
    """Between any two peers that may be harmed every second frame comes again."""
    plan = only("kill", 1.0)(seed)
    ways = [(a.number, b.number) for a in plan.specs for b in plan.specs if a != b]
    harm = tuple(Fault(plan.settled_s + 1.0, "twice", 10.0, *way, amount=1.0) for way in ways)
    return replace(plan, mild=False, faults=harm)


def wrapped(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Call `change(original, *arguments)` in place of a function."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kw: change(original, *args, **kw))


def test_i1_a_token_said_twice(monkeypatch: Patch) -> None:
    """The session hands a token out again after a repair."""

    def twice(original: Any, self: Any, peer: Any, message: Any) -> Any:
        made = original(self, peer, message)
        emitted = [item for item in made if isinstance(item, Emit) and not item.finish]
        return [*emitted, *made] if self.mends else made

    wrapped(monkeypatch, hexswarm.session.Session, "_on_token", twice)
    noticed("I1")


def test_i1_a_journal_that_keeps_the_wrong_rows(monkeypatch: Patch) -> None:
    """What is replayed is the output of a neighbouring position."""

    def shifted(original: Any, self: Any, *where: Any) -> Any:
        pieces = original(self, *where)
        return [
            replace(piece, data=piece.data[4:] + piece.data[:4]) if piece.count > 1 else piece
            for piece in pieces
        ]

    wrapped(monkeypatch, Journal, "pieces", shifted)
    noticed("I1")


def test_i1_a_newcomer_is_believed_to_know_all(monkeypatch: Patch) -> None:
    """The plan takes no notice of what a stage has: a gap that must not pass as an answer."""

    def blind(original: Any, held: Any, end: int) -> Any:
        return [Part(end - 1, end - 1) for _ in original(held, end)]

    wrapped(monkeypatch, hexswarm.resume, "plan_resume", blind)
    noticed("I1", "I5", "I9")


def test_i2_what_comes_again_is_computed_again(monkeypatch: Patch) -> None:
    """A repeated step counts as the next one."""

    def easy(original: Any, self: Any, position: int, *rest: Any, **kw: Any) -> Any:
        said = original(self, position, *rest, **kw)
        return "next" if said == "again" else said

    wrapped(monkeypatch, hexswarm.peer.order.Order, "judge", easy)
    noticed("I2", plan_of=all_said_twice)


def test_i3_a_lease_is_not_given_back(monkeypatch: Patch) -> None:
    """A stage forgets the session, and its KV stays leased."""
    wrapped(monkeypatch, Admission, "end", lambda original, self, session: None)
    noticed("I3")


def test_i3_blocks_get_lost(monkeypatch: Patch) -> None:
    """A released lease gives back one block too few."""

    def short(original: Any, self: Any, session: bytes, *rest: Any) -> bool:
        holder = self._holders.get(session)
        if holder is not None:
            holder.lease = replace(holder.lease, blocks=holder.lease.blocks[1:])
        return bool(original(self, session, *rest))

    wrapped(monkeypatch, BlockTables, "release", short)
    noticed("I3")


def test_i4_nobody_is_told_the_end(monkeypatch: Patch) -> None:
    """A stage takes no notice when its client ends a turn or closes: the ring goes on."""

    def deaf(original: Any, self: Any, peer: Any, frame: Any, now: float) -> Any:
        if isinstance(frame.message, Cancel | Close):
            return []
        return original(self, peer, frame, now)

    wrapped(monkeypatch, StageTable, "on_frame", deaf)
    noticed("I3", "I4")


def test_i4_a_closed_session_still_computes(monkeypatch: Patch) -> None:
    """The engine hands out steps of a session that the table has closed."""

    def hold_on(original: Any, self: Any, session: bytes, *names: Any) -> bool:
        asyncio.get_running_loop().call_later(2.0, original, self, session, *names)
        return True

    wrapped(monkeypatch, Engine, "close", hold_on)
    monkeypatch.setattr(invariants, "leases_add_up", lambda peer: iter(()))
    noticed("I4", plan_of=only("slow", 8.0))


def test_i5_nobody_mends(monkeypatch: Patch) -> None:
    """A loss ends the request although others could serve."""

    def never(original: Any, self: Any, session: Any) -> None:
        session.give_up(next(iter(session.machine.broken.values())))

    wrapped(monkeypatch, hexswarm.failover.Mender, "_on_broken", never)
    noticed("I5")


def test_i5_nobody_notices_a_silent_stage(monkeypatch: Patch) -> None:
    """Without pings and suspicion a stage that hangs is waited for, for ever."""
    wrapped(monkeypatch, hexswarm.failover.Mender, "_beat", lambda original, self, now: None)
    wrapped(monkeypatch, Links, "_beat", lambda original, self, now: None)
    noticed("I5", plan_of=only("stop", 15.0))


def test_i6_records_live_for_ever(monkeypatch: Patch) -> None:
    """The directory does not look at the expiry."""

    def undying(original: Any, self: Any, now: float) -> Any:
        return original(self, -math.inf)

    wrapped(monkeypatch, Directory, "alive", undying)
    wrapped(monkeypatch, Directory, "expire", lambda original, self, now: None)
    noticed("I6", plan_of=only("kill", FOREVER_S))


def test_i7_who_was_out_of_reach_is_never_dialled_again(monkeypatch: Patch) -> None:
    """A link that was lost or could not be made is not tried a second time."""
    gone: set[tuple[int, str]] = set()

    def drop(original: Any, self: Any, link: Any, how: str) -> None:
        gone.add((id(self), link.peer))
        original(self, link, how)

    async def reach(original: Any, self: Any, peer: Any, addresses: Any) -> None:
        if (id(self), peer) in gone:
            raise PeerLost(peer, None, "was lost before")
        await original(self, peer, addresses)

    wrapped(monkeypatch, Links, "_drop", drop)
    wrapped(monkeypatch, Links, "reach", reach)
    noticed("I7", plan_of=all_cut_off)


def test_i8_a_watch_is_left_behind(monkeypatch: Patch) -> None:
    """A stage does not end to depend on its neighbours when a session ends."""
    wrapped(monkeypatch, Links, "unwatch", lambda original, self, peer: None)
    noticed("I3")


def test_i8_a_task_is_left_behind(monkeypatch: Patch) -> None:
    """Closing the links cancels nothing."""

    async def lazy(original: Any, self: Any) -> None:
        self._closed = True

    wrapped(monkeypatch, Links, "close", lazy)
    noticed("I8")


def test_i9_a_mistake_is_only_logged(monkeypatch: Patch) -> None:
    """The table raises at a lost neighbour; the links go on, and say so."""

    def clumsy(original: Any, self: Any, peer: Any) -> Any:
        raise KeyError(peer)

    wrapped(monkeypatch, StageTable, "on_lost", clumsy)
    noticed("I9")


def test_forged_records_are_noticed(monkeypatch: Patch) -> None:
    """A rule of admission that looks at no signature."""
    import hexswarm.directory

    def credulous(original: Any, peer: Any, message: bytes, signature: bytes) -> bool:
        return True

    wrapped(monkeypatch, hexswarm.directory, "verify", credulous)
    opener: Any = hexswarm.directory.open_record
    if hasattr(opener, "cache_clear"):
        opener.cache_clear()
    try:
        noticed("forged", plan_of=only("forge", 1.0))
    finally:
        if hasattr(opener, "cache_clear"):
            opener.cache_clear()
