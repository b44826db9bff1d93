"""Groups form, serve, lose members and form again; whoever dies, freezes, lies or comes late."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.peer.groups.invitation import Invitation
from hexswarm.records import Span
from tests.peer.lan import ROOM, SILENCE_S, Lan, Machine

SMALL = 600_000
"""Bytes that hold half of the span, and not the whole of it."""


def machine(number: int, *, name: str = "lab", size: int = 2, **changes: object) -> Machine:
    usual: dict[str, object] = {"leads": number == 0, "free_bytes": ROOM, "layer_s": 0.01}
    return Machine(number, name, size, **{**usual, **changes})  # type: ignore[arg-type]


def lan(count: int, seed: int = 0, **changes: object) -> Lan:
    return Lan(Random(seed), [machine(number, **changes) for number in range(count)])


def only(world: Lan) -> tuple[int, ...]:
    """Numbers of the members of the one epoch that serves."""
    (told,) = world.serving
    return tuple(int(seat.peer[-4:]) for seat in told.seats)


def test_a_pair_forms_and_the_third_is_a_spare() -> None:
    world = lan(3)
    world.run(15)
    assert only(world) == (0, 1)
    told = world.serving[0]
    assert told.shares == (500, 500)
    assert told.epoch == 1
    spare = world.machines[machine(2).peer]
    assert spare.formation.role == "alone"
    assert spare.formation.offer(spare.own).waiting
    assert not spare.formation.single(spare.own)


def test_who_was_given_layers_leads_whatever_its_id() -> None:
    machines = [machine(0, leads=False), machine(1, leads=True, span=Span(2, 6))]
    world = Lan(Random(1), machines)
    world.run(15)
    assert only(world) == (1, 0)
    assert world.serving[0].span == Span(2, 6)


def test_a_group_waits_until_as_many_are_there_as_it_is_made_for() -> None:
    world = lan(3, size=4)
    world.run(60)
    assert not world.serving
    assert all(one.held is None for one in world.machines.values())
    late = machine(3, size=4)
    world.machines[late.peer] = late
    world.start(late)
    world.run(15)
    assert only(world) == (0, 1, 2, 3)


def test_size_nought_takes_all_there_are_up_to_what_can_be_cut() -> None:
    world = lan(4, size=0)
    world.run(20)
    assert only(world) == (0, 1, 2, 3)


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_lost_member_is_replaced_by_a_spare_within_fifteen_seconds(how: str) -> None:
    world = lan(3)
    world.run(15)
    lost = world.machines[machine(1).peer]
    if how == "kill":
        world.kill(lost)
    else:
        world.freeze(lost, 60)
    begun_s = world.now
    world.run(15)
    assert only(world) == (0, 2)
    since_s, told = world.serves[-1]
    assert told.epoch == 2
    assert since_s - begun_s <= (0 if how == "kill" else SILENCE_S) + 7


def test_without_a_spare_the_survivors_take_over_with_another_cut() -> None:
    world = lan(3, size=3)
    world.run(15)
    assert only(world) == (0, 1, 2)
    world.kill(world.machines[machine(1).peer])
    world.run(15)
    assert only(world) == (0, 2)
    assert world.serving[0].shares == (500, 500)


def test_the_last_survivor_waits_and_goes_on_when_the_other_is_back() -> None:
    world = lan(2)
    world.run(15)
    lost = world.machines[machine(1).peer]
    world.kill(lost)
    world.run(10)
    assert not world.serving
    assert all(one.held is None for one in world.machines.values())
    world.start(lost)
    world.run(30)
    assert only(world) == (0, 1)


def test_who_is_first_to_tell_of_a_loss_is_not_left_out_for_it() -> None:
    world = lan(3, size=3)
    world.run(15)
    lead, witness, lost = (world.machines[machine(number).peer] for number in range(3))
    told = world.serving[0]
    world.kill(lost)
    word = (witness.peer, told.group, told.epoch, "lost rank 2")
    world.carry(lead, lead.formation.on_leave(*word, world.now))
    world.run(6)
    assert only(world) == (0, 1)


def test_a_leader_that_comes_back_counts_on() -> None:
    """Members know the latest epoch; the leader's own word in the swarm, or they, tell it."""
    world = lan(2)
    world.run(15)
    lead = world.machines[machine(0).peer]
    world.kill(lead)
    world.run(5)
    assert world.machines[machine(1).peer].held is None
    world.told.clear()
    world.start(lead)
    world.run(30)
    assert [told.epoch for _, told in world.serves] == [1, 2]
    assert only(world) == (0, 1)


def test_a_dead_leader_frees_its_members_for_the_next() -> None:
    machines = [machine(number, leads=number < 2) for number in range(3)]
    world = Lan(Random(3), machines)
    world.run(15)
    assert only(world) == (0, 1)
    world.kill(machines[0])
    world.run(20)
    assert only(world) == (1, 2)


def test_two_leaders_that_see_each_other_late_resolve() -> None:
    """Both begin, whoever comes second gives way, and nothing is stuck."""
    for seed in range(10):
        machines = [machine(number, size=3, leads=number < 2) for number in range(4)]
        world = Lan(Random(seed), machines)
        world.run(45)
        assert only(world)[0] in (0, 1)
        assert len(only(world)) == 3


def test_an_epoch_that_serves_is_not_broken_by_a_leader_of_lower_id() -> None:
    machines = [machine(1, leads=True), machine(2, leads=False)]
    world = Lan(Random(4), machines)
    world.run(15)
    assert only(world) == (1, 2)
    early = machine(0, leads=True)
    world.machines[early.peer] = early
    world.start(early)
    world.run(60)
    assert only(world) == (1, 2)
    assert len(world.serves) == 1
    world.kill(machines[1])
    world.run(20)
    assert only(world) in [(0, 1), (1, 0)]


@pytest.mark.parametrize("lie", ["mute", "stale", "leaver"])
def test_a_member_that_lies_does_not_keep_the_others_from_serving(lie: str) -> None:
    world = Lan(Random(5), [machine(0), machine(1, lie=lie), machine(2), machine(3)])
    world.run(60)
    assert 1 not in only(world)


def test_a_member_whose_links_last_but_never_reports_is_given_up() -> None:
    world = Lan(Random(6), [machine(0), machine(1, lie="never")])
    world.run(10)
    spare = machine(2)
    world.machines[spare.peer] = spare
    world.start(spare)
    world.run(40)
    assert not world.serving
    world.run(40)
    assert only(world) == (0, 2)


def test_groups_by_policy_form_where_one_machine_is_too_small() -> None:
    world = lan(2, name="auto", free_bytes=SMALL, leads=False)
    world.run(30)
    assert only(world) == (0, 1)


def test_groups_by_policy_form_where_they_are_faster() -> None:
    """At 10 ms a layer two sums of a millisecond pay, at 1 ms they do not."""
    slow = lan(2, name="auto", leads=False, layer_s=0.01)
    slow.run(30)
    assert len(slow.serving) == 1
    quick = lan(2, name="auto", leads=False, layer_s=0.001)
    quick.run(30)
    assert not quick.serving
    assert all(one.formation.single(one.own) for one in quick.machines.values())


def test_policy_takes_nobody_whose_layers_nobody_else_holds() -> None:
    machines = [
        machine(0, name="auto", leads=False),
        machine(1, name="auto", leads=False, span=Span(4, 8)),
    ]
    world = Lan(Random(7), machines)
    world.run(60)
    assert not world.serving


def test_policy_takes_nobody_who_has_sessions() -> None:
    world = lan(2, name="auto", leads=False)
    busy = world.machines[machine(1).peer]
    busy.sessions = 1
    world.run(20)
    assert not world.serving
    busy.sessions = 0
    world.run(60)
    assert len(world.serving) == 1


def test_many_groups_by_policy_side_by_side() -> None:
    world = lan(6, name="auto", leads=False)
    world.run(120)
    assert len(world.serving) == 3


def test_who_stops_frees_the_others_at_once() -> None:
    world = lan(3)
    world.run(15)
    lead = world.machines[machine(0).peer]
    world.carry(lead, lead.formation.stop(world.now))
    world.run(1)
    assert all(one.held is None for one in world.machines.values())
    world.run(20)
    assert lead.held is None


def test_far_peers_form_nothing() -> None:
    world = lan(3)
    world.rtt_s = 2.1e-3
    world.run(30)
    assert not world.serves


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_happens_no_epoch_serves_without_a_rank_and_in_the_end_one_serves(
    data: st.DataObject,
) -> None:
    """Deaths, frosts and lies at random."""
    troubles(data)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.data())
def test_so_it_is_in_many_more_worlds(data: st.DataObject) -> None:
    """The same for a minute."""
    troubles(data)


def troubles(data: st.DataObject) -> None:
    """The world asserts at each event: one epoch a group, each rank's part there, none of two.

    When the troubles are over, those who are left and honest serve together, and what serves stays.
    """
    count = data.draw(st.integers(3, 5), label="machines")
    by_hand = data.draw(st.booleans(), label="by hand")
    leads = data.draw(st.integers(1, 3), label="leaders") if by_hand else 0
    name, room = ("lab", ROOM) if by_hand else ("auto", SMALL)
    kinds = st.sampled_from(["", "", "", "mute", "stale", "leaver"])
    lies = data.draw(st.lists(kinds, min_size=count - 2, max_size=count - 2), label="lies")
    machines = [
        machine(number, name=name, leads=number < leads, free_bytes=room, lie=lie)
        for number, lie in enumerate(["", "", *lies])
    ]
    world = Lan(Random(data.draw(st.integers(0, 999), label="seed")), machines)
    for _ in range(data.draw(st.integers(0, 6), label="troubles")):
        world.run(data.draw(st.floats(0.1, 12), label="after"))
        victim = data.draw(st.sampled_from(machines), label="victim")
        if not victim.alive:
            world.start(victim)
        elif data.draw(st.booleans(), label="kill"):
            world.kill(victim)
        elif not victim.frozen:
            world.freeze(victim, data.draw(st.sampled_from([2.0, 12.0]), label="for"))
    world.run(15)
    for one in machines:
        if not one.alive:
            world.start(one)
    served = world.until(lambda: any(map(world.whole, world.serving)), 400)
    assert served, [one.formation.role for one in machines]
    honest = [told for told in world.serving if world.whole(told) and not _liars(world, told)]
    world.run(30)
    assert all(told in world.serving for told in honest)


def _liars(world: Lan, told: Invitation) -> bool:
    return any(world.machines[seat.peer].lie for seat in told.seats)
