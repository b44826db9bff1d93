"""Advice between peers: signed, read by others, valued by each, carried out in turn.

The world is small and virtual: real announcers, directories, signatures, rules of admission and
`Advising`; a peer that moves is away for `LOAD_S`. Time goes in steps of a second.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, field, replace

import msgpack
import pytest

from hexswarm.advice import SignedAdvice, advice_key, check_entry, sign, tail_of
from hexswarm.directory import Directory
from hexswarm.directory import sign as sign_announcement
from hexswarm.identity import Identity
from hexswarm.peer.advising import DRAWN, MOST_PEERS, SAME_S, YOUNG_S, Advising
from hexswarm.peer.announcer import Announcer
from hexswarm.records import (
    Announcement,
    GroupMembership,
    GroupOffer,
    Span,
    Speed,
    State,
    uncovered,
)
from hexswarm.router import native
from hexswarm.router.placement import advice
from hexswarm.router.placement.flow import arrays, solver
from tests.strategies import MODEL

LAYERS = 8
MOST = 4
LOAD_S = 5.0
BEGIN_S = 1.7e9
LONGEST = tuple(min(MOST, LAYERS - first) for first in range(LAYERS))

needs_search = pytest.mark.skipif(not native.available(), reason="no compiled search here")


@pytest.fixture(autouse=True)
def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight peers need no more."""
    monkeypatch.setattr(advice, "TRIES", 2)


@dataclass
class Volunteer:
    """One peer: what it is, and the parts of the product that decide for it."""

    number: int
    span: Span
    layer_s: float = 1e-3
    moves: bool = True
    state: State = "online"
    back_s: float = 0.0
    went: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.identity = Identity(bytes([self.number]) * 32)
        self.advising = Advising(self.identity.peer, MODEL, LONGEST, 100)
        self.advising.load_s = LOAD_S
        self.announcer = Announcer(64, random.Random(self.number))
        self.directory = Directory()

    def word(self) -> Announcement:
        return Announcement(
            peer=self.identity.peer,
            model=MODEL,
            model_name="m",
            layers=LAYERS,
            span=self.span,
            state=self.state,
            dtype="float32",
            device="cpu",
            speed=Speed(self.layer_s, self.layer_s, 0.0),
            free_kv_tokens=64,
            queue_s=0.0,
            addresses=(),
            most_layers=self.advising.most_layers if self.moves else 0,
        )


class World:
    """A directory that admits by the product's rule and shows everything to everybody."""

    def __init__(self, peers: list[Volunteer]) -> None:
        self.peers, self.now = peers, BEGIN_S
        self.published: list[SignedAdvice] = []

    def step(self) -> None:
        self.now += 1.0
        for peer in self.peers:
            if peer.state == "joining" and self.now >= peer.back_s:
                peer.state = "online"
            self.announce(peer)
        for peer in self.peers:
            if peer.state == "online":
                self.live(peer)
        # Nobody is ever without a ring.
        assert not uncovered([p.span for p in self.peers if p.state == "online"], LAYERS)

    def announce(self, peer: Volunteer) -> None:
        if not peer.announcer.due(peer.word(), self.now):
            return
        stamped, expires_s = peer.announcer.stamp(peer.word(), self.now, self.now)
        record = sign_announcement(stamped, expires_s, peer.identity)
        for reader in self.peers:
            reader.directory.merge([record], self.now)

    def live(self, peer: Volunteer) -> None:
        view = peer.directory.alive(self.now)
        task = peer.advising.task(view, self.now)
        found = None if task is None else task.run()
        if found is not None:
            self.publish(sign(peer.advising.proposal(found), peer.identity))
        peer.advising.hear(self.published, view, self.now)
        to = peer.advising.turn(view, peer.span, self.now)
        if to is not None:
            peer.span, peer.state, peer.back_s = to, "joining", self.now + LOAD_S
            peer.went.append(self.now)
            self.announce(peer)

    def publish(self, told: SignedAdvice) -> None:
        key = hashlib.sha1(msgpack.packb(advice_key(MODEL))).digest()
        owner, value = msgpack.packb(told.author), msgpack.packb(told.data)
        admitted = check_entry(key, owner, value, told.expires_s, self.now)
        assert isinstance(admitted, SignedAdvice)
        self.published.append(admitted)

    def flow(self) -> float:
        census = self.peers[0].advising._census([p.word() for p in self.peers])
        solve = solver(census.rates)
        solve.load(*arrays(census.spans))
        return solve.value()


def crowd(moves: bool = True) -> list[Volunteer]:
    """Six at the front and two that hold the rest: the back is a third of the front."""
    front = [Volunteer(number, Span(0, 4), moves=moves) for number in range(1, 7)]
    return [*front, Volunteer(7, Span(4, 8)), Volunteer(8, Span(4, 8))]


@needs_search
def test_a_swarm_reaches_the_better_plan_step_by_step() -> None:
    """Once one has published, all carry it out in turn, and afterwards nobody moves any more."""
    world = World(crowd())
    before = world.flow()
    for _ in range(160):
        world.step()
    assert world.flow() >= 1.9 * before
    assert len(world.published) == 1
    went = sorted(at for peer in world.peers for at in peer.went)
    assert len(went) == len(world.published[0].proposal.moves)
    apart = [later - sooner for sooner, later in itertools.pairwise(went)]
    assert min(apart) >= LOAD_S, "of eight one at a time"
    assert not any(peer.advising.following for peer in world.peers)


@needs_search
def test_who_was_given_its_span_is_advised_nothing() -> None:
    """And the advice is made of what the others can do."""
    world = World(crowd(moves=False))
    for _ in range(130):
        world.step()
    assert not any(peer.went for peer in world.peers)
    half = crowd()
    for fixed in half[:3]:
        fixed.moves = False
    world = World(half)
    before = world.flow()
    for _ in range(160):
        world.step()
    assert world.flow() >= 1.4 * before
    assert not any(fixed.went for fixed in half[:3])


@needs_search
def test_a_group_is_one_peer_that_stays() -> None:
    """Its leader counts and is advised nothing, its members and those who wait do not count."""
    peers = [Volunteer(n, span) for n, span in enumerate([Span(0, 4), Span(4, 8)] * 2, 1)]
    lead, member, waiting, other = (peer.word() for peer in peers)
    group = GroupMembership("g", 0, 2, 1, (500, 500))
    offer = GroupOffer("lab", 1 << 30, "10.0.0.1", 4711, waiting=True)
    view = [
        replace(lead, group=group),
        replace(member, span=lead.span, group=replace(group, rank=1)),
        replace(waiting, state="joining", offer=offer),
        other,
    ]
    census = peers[3].advising._census(view)
    assert census.peers == (lead.peer, other.peer)
    assert census.staying == {lead.peer}
    assert census.rates.most.tolist() == [4, 4]
    assert peers[3].advising._census(view[:3]).spans == (lead.span,)


def test_a_search_that_found_nothing_is_not_repeated() -> None:
    peers = [Volunteer(1, Span(0, 4)), Volunteer(2, Span(4, 8))]
    view = [peer.word() for peer in peers]
    asked = [
        at
        for at in range(0, int(1.5 * SAME_S), 20)
        if peers[0].advising.task(view, BEGIN_S + at) is not None
    ]
    assert 1 <= len(asked) <= 2
    joined = [*view, Volunteer(3, Span(0, 4)).word()]
    later = (BEGIN_S + 2 * SAME_S + at for at in range(0, 1200, 20))
    assert any(peers[0].advising.task(joined, now) for now in later)


def drawn_minute(peer: str, peers: list[str]) -> float:
    """A time in a minute in which `peer` is drawn."""
    minute = next(m for m in range(int(BEGIN_S // 60), 10**9) if advice.drawn(peers, m) == peer)
    return 60.0 * minute + 1.0


@needs_search
def test_one_searches_when_drawn_and_all_serve() -> None:
    peers = crowd()
    view = [peer.word() for peer in peers]
    names = [peer.identity.peer for peer in peers]
    me = peers[0]
    now = drawn_minute(me.identity.peer, names)
    assert all(peer.advising.task(view, now) is None for peer in peers[1:])
    loading = [replace(view[-1], state="joining"), *view[:-1]]
    assert me.advising.task(loading, now) is None
    assert me.advising.task(view[:1], now) is None, "alone"
    many = [replace(view[1], peer=f"{at}") for at in range(MOST_PEERS)]  # type: ignore[arg-type]
    assert me.advising.task([view[0], *many], drawn_minute(names[0], [names[0]])) is None
    assert me.advising.task(view, now) is not None
    assert me.advising.task(view, now + 1.0) is None, "once a minute"


@pytest.fixture(scope="module")
def published() -> tuple[list[Volunteer], SignedAdvice, float]:
    """A good advice, its readers, and when it was made."""
    peers = crowd()
    view = [peer.word() for peer in peers]
    author = peers[0]
    now = drawn_minute(author.identity.peer, [peer.identity.peer for peer in peers])
    census = author.advising._census(view)
    found = advice.advise(census, LOAD_S, now, tries=2)
    assert found is not None
    return peers, sign(author.advising.proposal(found), author.identity), now


@needs_search
def test_who_is_believed(published: tuple[list[Volunteer], SignedAdvice, float]) -> None:
    """Peers of the model that were drawn, as long as their word is young; then what it is worth."""
    peers, told, now = published
    view = [peer.word() for peer in peers]

    def heard(told: SignedAdvice, *, view: list[Announcement] = view, late_s: float = 0.0) -> bool:
        return Volunteer(2, Span(0, 4)).advising.hear([told], view, now + late_s)

    assert heard(told)
    assert heard(told, late_s=YOUNG_S - 5.0)
    assert not heard(told, late_s=YOUNG_S)
    assert not heard(told, late_s=-10.0), "from the future"
    assert not heard(told, view=view[1:]), "its author does not serve"
    said, author = told.proposal, peers[0].identity
    for change in ({"model": "cd" * 32}, {"layers": 9}):
        assert not heard(sign(replace(said, **change), author))  # type: ignore[arg-type]
    worse = tuple((tail_of(peer.identity.peer), Span(0, 4)) for peer in peers[6:])
    assert not heard(sign(replace(said, moves=worse, tokens_per_s=1e9), author))
    minute = int(now // 60)
    ranked = sorted(peers, key=lambda peer: advice.lot(peer.identity.peer, minute))
    assert ranked[0].identity.peer == author.peer
    for place, peer in enumerate(ranked):
        own = sign(replace(said, author=peer.identity.peer), peer.identity)
        assert heard(own) == (place < DRAWN)


@needs_search
def test_a_move_is_made_only_where_the_layers_fit_and_others_hold_what_is_left(
    published: tuple[list[Volunteer], SignedAdvice, float],
) -> None:
    peers, told, now = published
    view = [peer.word() for peer in peers]
    tail, to = told.proposal.moves[0]
    first = next(peer for peer in peers if tail_of(peer.identity.peer) == tail)
    me = Volunteer(first.number, first.span)
    assert me.advising.hear([told], view, now)
    alone = [item for item in view if item.peer == first.identity.peer or item.span != first.span]
    assert me.advising.turn(view, me.span, now + advice.READ_S - 1.0) is None, (
        "others have not read it"
    )
    assert me.advising.turn(alone, me.span, now + advice.READ_S) is None, "the last copy"
    assert me.advising.turn(view, me.span, now + advice.READ_S) == to
    small = Volunteer(first.number, first.span)
    small.advising = Advising(first.identity.peer, MODEL, (1,) * LAYERS, 100)
    assert small.advising.hear([told], view, now)
    assert small.advising.turn(view, small.span, now + advice.READ_S) is None


def test_the_rule_does_not_undo_what_was_gained() -> None:
    peers = [Volunteer(n, span) for n, span in enumerate([Span(0, 4), Span(4, 8)] * 2, 1)]
    view = [peer.word() for peer in peers]
    assert peers[0].advising.harmful(view, Span(4, 8))
    assert not peers[0].advising.harmful(view[:1], Span(4, 8)), "nothing passes before either"
    more = [*view, Volunteer(5, Span(0, 4)).word(), Volunteer(6, Span(0, 4)).word()]
    assert not peers[0].advising.harmful(more, Span(4, 8))


@pytest.mark.parametrize(
    ("longest", "most"),
    [(LONGEST, MOST), ((8, 7, 6, 5, 4, 3, 2, 1), 8), ((3, 4, 4, 4, 3, 2, 1, 1), 1)],
)
def test_the_most_layers_fit_wherever_they_begin(longest: tuple[int, ...], most: int) -> None:
    told = Advising(Volunteer(1, Span(0, 4)).identity.peer, MODEL, longest, 100)
    assert told.most_layers == most
