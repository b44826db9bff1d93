"""Groups in the simulated world: they form, serve and come back, and each rule catches a mistake.

As in `test_world.py`, which plays groups among everything else; here are the planted mistakes.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from hexswarm.peer.exchange import Exchange
from hexswarm.peer.groups.formation import Formation
from hexswarm.peer.groups.grouped import Grouped
from hexswarm.peer.groups.leader import Leader
from hexswarm.peer.groups.member import Member
from hexswarm.peer.reduction import Swap
from tests.simulation import invariants
from tests.simulation.collective import Account
from tests.simulation.direct import DirectStream
from tests.simulation.faults import Fault
from tests.simulation.lan import GroupSpec
from tests.simulation.outcome import Outcome
from tests.simulation.peers import name_of
from tests.simulation.plans import Plan, draw
from tests.simulation.processes import Process, run
from tests.simulation.test_world import Patch, verdict, wrapped
from tests.simulation.wires import Trace, Wires
from tests.simulation.world import play

pytestmark = pytest.mark.simulation

BEGIN_S = 12.0
"""By then groups serve."""
GROUPED = [seed for seed in range(80) if draw(seed).lan]
SPARED = [seed for seed in GROUPED if len(draw(seed).lan) == draw(seed).lan[0].size + 1]
"""One group, and a peer to spare."""
USED = [30, 45, 46, 32, 63]
"""Whose groups clients use a great deal."""

PlanOf = Callable[[int], Plan]


def quiet(seed: int) -> Plan:
    return draw(seed, quiet=True)


def ranks(plan: Plan, name: str) -> list[GroupSpec]:
    """Who is to be in a group's first epoch, its leader first; who is to spare comes last."""
    lan = [spec for spec in plan.lan if spec.name == name]
    leader = min((spec for spec in lan if spec.leads), key=lambda spec: spec.peer)
    return sorted(lan, key=lambda spec: (spec != leader, spec.layer_s, spec.peer))


def befalls(kind: str, for_s: float, rank: int = 1) -> PlanOf:
    """Plans in which this, and nothing else, happens to a rank of each group that serves."""

    def plan_of(seed: int) -> Plan:
        plan = quiet(seed)
        struck = [ranks(plan, name)[rank] for name in sorted({spec.name for spec in plan.lan})]
        wrong = [Fault(BEGIN_S, kind, for_s, one.number, amount=0.9) for one in struck]
        end_s = max(plan.faults_end_s, BEGIN_S + for_s + 1.0)
        return replace(plan, mild=False, faults=tuple(wrong), faults_end_s=end_s)

    return plan_of


def noticed(*rules: str, plan_of: PlanOf = draw, seeds: list[int] = GROUPED) -> Outcome:
    """The first seed that goes red; it must do so by one of these rules."""
    for seed in seeds:
        outcome = play(seed, plan=plan_of(seed))
        if outcome.broken:
            assert outcome.broken[0][0] in rules, verdict(outcome)
            return outcome
    raise AssertionError(f"nobody noticed within {len(seeds)} seeds")


def test_a_world_with_groups_loads_no_tensors() -> None:
    """What decides about groups and carries it out runs without PyTorch, whose import takes 2 s."""
    told = "import sys, hexswarm.peer.groups.grouped; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_groups_form_and_serve() -> None:
    """Without faults each group has one epoch, and clients use some of them."""
    for seed in USED[:3]:
        outcome = play(seed, quiet=True)
        assert not outcome.broken, verdict(outcome)
        assert outcome.epochs == len({spec.name for spec in draw(seed).lan})
        assert outcome.sums > 100


@pytest.mark.parametrize("kind", ["kill", "stop", "drain"])
def test_a_lost_member_costs_an_epoch(kind: str) -> None:
    """Killed, frozen or drained: the group serves again, with the spare, and all is well."""
    seed = SPARED[0]
    outcome = play(seed, plan=befalls(kind, 12.0)(seed))
    assert not outcome.broken, verdict(outcome)
    assert outcome.epochs >= 2


def test_nothing_is_read_behind_a_hole() -> None:
    """What is written after a frame was torn, and before the cut, does not come: TLS would fail."""
    here, there = name_of(30), name_of(31)
    read: list[bytes] = []

    async def story() -> None:
        wires = Wires(random.Random(0), Trace(), 0.002)
        near, far = wires.lan.transport(here), wires.lan.transport(there)

        async def serve(inner: Any) -> None:
            while data := await DirectStream(wires, there, inner).said(100):
                read.append(data)

        await far.listen(serve)
        stream = DirectStream(wires, here, await near.dial(there))
        stream.write(b"whole")
        wires.harm(here, there).tear = True
        stream.write(b"halved")
        stream.write(b"behind")
        await asyncio.sleep(0.1)
        await far.close()

    run(story())
    assert b"".join(read) == b"wholehal"


def test_a_torn_command_is_no_other_command() -> None:
    """The next one, sent within the same millisecond, was read as the rest of it (I10)."""
    outcome = play(33580)
    assert not outcome.broken, verdict(outcome)


def test_i10_a_sum_does_not_wait_for_all(monkeypatch: Patch) -> None:
    """Nobody waits for the last rank's part."""

    def careless(original: Any, self: Any, rank: int) -> int:
        return 0 if rank == max(self._others) else int(original(self, rank))

    wrapped(monkeypatch, Swap, "lacks", careless)
    noticed("I10", plan_of=quiet, seeds=USED)


def test_i10_a_part_is_stale(monkeypatch: Patch) -> None:
    """Now and then a rank sends again what it gave to the sum before."""
    sent: dict[int, int] = {}

    def stale(original: Any, self: Any) -> Any:
        sent[id(self)] = sent.get(id(self), 0) + 1
        if sent[id(self)] % 7 or not self._rank:
            return original(self)
        encode, self._wire = self._wire, Silent(self._wire)
        try:
            return original(self)
        finally:
            self._wire = encode

    class Silent:
        def __init__(self, wire: Any) -> None:
            self._wire = wire

        def encode(self, values: Any, out: Any) -> None:
            """What is there stays."""

    wrapped(monkeypatch, Swap, "begin", stale)
    noticed("I10", plan_of=quiet, seeds=USED)


def test_i10_the_tokens_tell_it_as_well(monkeypatch: Patch) -> None:
    """Without the account, a part that is missing is another token."""

    def careless(original: Any, self: Any, rank: int) -> int:
        return 0 if rank == max(self._others) else int(original(self, rank))

    wrapped(monkeypatch, Swap, "lacks", careless)
    monkeypatch.setattr(Account, "used", lambda *given: None)
    monkeypatch.setattr(Account, "gave", lambda *given: None)
    noticed("I1", plan_of=quiet, seeds=USED)


def test_i11_nobody_asks_a_group_that_is_idle(monkeypatch: Patch) -> None:
    """Without beats a frozen member is missed when its links fall silent, after 8 s."""

    async def never(original: Any, self: Any) -> None:
        await asyncio.get_running_loop().create_future()

    wrapped(monkeypatch, Grouped, "_beat_for_ever", never)
    noticed("I11", plan_of=befalls("stop", 12.0))


def test_i12_a_sum_without_a_deadline(monkeypatch: Patch) -> None:
    """Who is late is waited for, for ever, and the end of a link says nothing."""
    wrapped(monkeypatch, Exchange, "tick", lambda original, self, now: None)
    wrapped(monkeypatch, Formation, "on_gone", lambda original, self, peer, now: [])
    monkeypatch.setattr(invariants, "not_shown_without_a_rank", lambda *given: iter(()))
    noticed("I12", plan_of=befalls("stop", 25.0))


def test_i13_a_group_that_was_lost_stays_so(monkeypatch: Patch) -> None:
    """A leader begins no second epoch."""

    def once(original: Any, self: Any, *given: Any) -> Any:
        return [] if self._served else original(self, *given)

    wrapped(monkeypatch, Leader, "_begin", once)
    noticed("I13", plan_of=befalls("kill", 2.0))


def test_i14_speaks_of_two_epochs_at_once() -> None:
    """A peer whose streams are open in two of them, and one that has left the first."""
    first, second = (SimpleNamespace(group="g", epoch=number) for number in (1, 2))

    def peer(*states: Any) -> Any:
        epochs = [
            SimpleNamespace(group=group, place=SimpleNamespace(invitation=asked))
            for group, asked in states
        ]
        return SimpleNamespace(epochs=epochs, process=Process("peer30"))

    streams = object()
    (said,) = invariants.one_epoch_at_a_time(peer((streams, first), (streams, second)))
    assert "('g', 1), ('g', 2)" in said
    assert not list(invariants.one_epoch_at_a_time(peer((None, first), (streams, second))))


def test_i14_epochs_do_not_count_up(monkeypatch: Patch) -> None:
    """Leader and members forget that they have had this epoch."""

    def again(original: Any, self: Any, *given: Any) -> Any:
        self._epochs.clear()
        return original(self, *given)

    monkeypatch.setattr(invariants, "not_shown_without_a_rank", lambda *given: iter(()))
    wrapped(monkeypatch, Leader, "_begin", again)
    wrapped(monkeypatch, Member, "on_invitation", again)
    noticed("I14", plan_of=befalls("kill", 2.0))
