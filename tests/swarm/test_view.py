"""The client's snapshot is kept, mended or built anew, and is the same thing each time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hexswarm.directory import Directory, SignedAnnouncement
from hexswarm.records import Announcement, Link, Load, PeerId, Span, Speed
from hexswarm.router.experience import Experience
from hexswarm.router.network import Snapshot
from hexswarm.view import MEND, TOLD_FOR_S, UNREACHABLE_FOR_S, UNREACHABLE_S, Told, View, same_ways

ME = PeerId("me")
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
LIFE_S = 90.0


class Clock:
    """Set by hand; the epoch lies 1,000 s before the clock's zero."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1000.0 + self.now


class World:
    """A view and all that it looks at."""

    def __init__(self) -> None:
        self.clock, self.directory, self.experience = Clock(), Directory(), Experience()
        self.loads: dict[PeerId, tuple[float, Load]] = {}
        self.ways: dict[PeerId, Link] = {}
        self.sequence = 0
        self.view = self.fresh()

    def fresh(self) -> View:
        return View(self.directory, self.clock, self.experience, lambda: dict(self.loads))

    def announce(self, peer: PeerId, **changes: Any) -> None:
        self.sequence += 1
        word = Announcement(
            peer=peer, model="m", model_name="M", layers=4, span=Span(0, 4), state="online",
            dtype="float32", device="cpu", speed=Speed(0.01, 0.01, 0.01), free_kv_tokens=100,
            queue_s=0.0, addresses=("/x",), issued_s=self.clock.wall(), sequence=self.sequence,
        )  # fmt: skip
        word = replace(word, **changes)
        self.directory.merge([SignedAnnouncement(word, self.clock.wall() + LIFE_S, b"")])

    def hear(self, peer: PeerId, queue_s: float) -> None:
        self.loads[peer] = (self.clock.now, Load(queue_s=queue_s, free_kv_tokens=7))

    def look(self, view: View | None = None) -> Snapshot:
        return (view or self.view).snapshot(ME, self.ways, None)

    def queues(self) -> Mapping[PeerId, float]:
        return {item.peer: item.queue_s for item in self.look().of_model("m")}


def world(*peers: PeerId) -> World:
    made = World()
    for peer in peers:
        made.announce(peer)
    return made


def test_nothing_changed_nothing_is_built() -> None:
    w = world(A, B)
    first = w.look()
    w.clock.now += 60
    assert w.look() is first


def test_a_new_word_replaces_the_old_one() -> None:
    w = world(A, B)
    w.look()
    w.announce(B, queue_s=0.5)
    w.announce(C)
    assert w.queues() == {A: 0.0, B: 0.5, C: 0.0}


def test_a_peer_that_runs_out_is_gone() -> None:
    w = world(A)
    w.clock.now += 50
    w.announce(B)
    assert set(w.queues()) == {A, B}
    w.clock.now += LIFE_S - 50
    assert set(w.queues()) == {B}
    w.announce(A)
    assert set(w.queues()) == {A, B}


def test_a_peer_that_was_seen_dead_is_gone_until_it_speaks() -> None:
    w = world(A, B)
    w.look()
    w.directory.forget(A)
    assert set(w.queues()) == {B}
    w.announce(A)
    assert set(w.queues()) == {A, B}


def test_a_peer_may_change_its_model() -> None:
    w = world(A, B)
    w.look()
    w.announce(A, model="other")
    view = w.look()
    assert [item.peer for item in view.of_model("m")] == [B]
    assert [item.peer for item in view.of_model("other")] == [A]


def test_the_later_word_on_load_counts() -> None:
    w = world(A, B)
    w.look()
    w.clock.now += 5
    w.hear(A, 0.3)
    assert w.queues() == {A: 0.3, B: 0.0}
    w.clock.now += 5
    w.announce(A, queue_s=0.1)
    assert w.queues() == {A: 0.1, B: 0.0}, "what was heard is older than the announcement"
    w.clock.now += 5
    w.hear(A, 0.2)
    assert w.queues() == {A: 0.2, B: 0.0}


def test_experience_slows_a_peer_down() -> None:
    w = world(A, B)
    w.look()
    w.experience.observe_stage(A, 0.01, 0.05, w.clock.now)
    w.view.doubt([A])
    seen = w.look()
    assert seen.announcement("m", A).speed.decode_layer_s > 0.02
    assert seen.announcement("m", B).speed.decode_layer_s == 0.01


def test_ways_are_seen_and_their_jitter_is_not() -> None:
    w = world(A, B)
    w.ways[A] = Link(0.1)
    w.view.told.remember((B, A), Link(0.05), w.clock.now)
    first = w.look()
    assert first.link(ME, A).rtt_s == first.link(A, ME).rtt_s == 0.1
    assert first.known_link(A, B) == (first.link(B, A), "measured")
    w.ways[A] = Link(0.105)
    assert w.look() is first
    w.ways[A] = Link(0.15)
    w.announce(B, queue_s=0.5)
    later = w.look()
    assert later.link(ME, A).rtt_s == 0.15
    assert later.announcement("m", B).queue_s == 0.5
    assert later.announcement("m", A) is first.announcement("m", A), "mended, not built anew"


def test_what_could_not_be_measured_is_far_away_for_a_minute() -> None:
    told = Told()
    told.remember((A, B), None, 10.0)
    told.remember((B, C), Link(0.1), 10.0)
    assert told.ways(11.0) == {(A, B): Link(UNREACHABLE_S), (B, C): Link(0.1)}
    assert told.ways(10.0 + UNREACHABLE_FOR_S) == {(B, C): Link(0.1)}
    assert told.ways(10.0 + TOLD_FOR_S) == {}
    told.doubt((B, A))
    assert told.doubted([(A, B), (B, C)]) == {(A, B)}
    told.remember((A, B), Link(0.1), 20.0)
    assert told.doubted([(A, B), (B, A)]) == set()


def test_same_ways() -> None:
    link = Link(0.1, 1e6)
    assert same_ways({(A, B): link}, {(A, B): Link(0.105, 1.5e6)})
    for other in (Link(0.12, 1e6), Link(0.1, 3e6), Link(0.1, math.inf), Link(0.1, 1e6, 0.05)):
        assert not same_ways({(A, B): link}, {(A, B): other})
    assert not same_ways({(A, B): link}, {})


events = st.lists(
    st.tuples(
        st.sampled_from(["announce", "hear", "forget", "wait", "doubt", "way", "look", "expire"]),
        st.sampled_from([PeerId(name) for name in "abcdefghijkl"]),
        st.sampled_from([0.1, 0.4, 31.0]),
    ),
    max_size=40,
)


@given(events)
def test_a_mended_view_is_the_same_as_a_new_one(happens: list[tuple[str, PeerId, float]]) -> None:
    """Whatever happens between looks, a view that is kept shows what a fresh one would."""
    w = World()
    for what, peer, amount in happens:
        w.clock.now += 0.001
        match what:
            case "announce":
                w.announce(peer, queue_s=amount)
            case "hear":
                w.hear(peer, amount)
            case "forget":
                w.directory.forget(peer)
            case "wait":
                w.clock.now += amount
            case "doubt":
                w.experience.observe_stage(peer, 0.01, 0.01 + amount, w.clock.now)
                w.view.doubt([peer])
            case "way":
                w.ways[peer] = Link(amount)
            case "expire":
                w.directory.expire(w.clock.wall())
            case "look":
                w.look()
    kept, fresh = w.look(), w.look(w.fresh())
    assert [_seen(item) for item in kept.announcements] == [
        _seen(item) for item in fresh.announcements
    ]
    assert kept.links == fresh.links


def _seen(item: Announcement) -> tuple[Any, ...]:
    # Experience fades by the second, and a snapshot that nothing else changed is not told.
    return replace(item, speed=Speed(0, 0, 0)), round(item.speed.decode_layer_s, 2)


def test_many_changes_build_anew() -> None:
    w = world(A)
    w.look()
    for number in range(MEND + 1):
        w.announce(PeerId(f"p{number}"))
    assert len(w.look().of_model("m")) == MEND + 2
