"""What a node of the directory keeps: room for those who are there, and for newcomers if fair."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hexswarm.records import PeerId
from hexswarm.shelf import MAX_KEYS, SWEEP_S, Kept, Shelf

KEY = "key"


def peer(number: int) -> PeerId:
    return PeerId(f"p{number}")


def kept(block: str = "", sequence: int = 1, expires_s: float = 90.0) -> Kept:
    return Kept(block, sequence, expires_s)


def test_of_one_peer_the_higher_sequence_counts_whatever_its_expiry() -> None:
    shelf = Shelf()
    assert shelf.put(KEY, peer(1), kept(sequence=5), 0.0) == []
    assert shelf.put(KEY, peer(1), kept(sequence=4, expires_s=95.0), 1.0) is None
    assert shelf.put(KEY, peer(1), kept(sequence=5, expires_s=95.0), 1.0) is None
    assert shelf.put(KEY, peer(1), kept(sequence=6, expires_s=40.0), 1.0) == [(KEY, peer(1))]
    assert shelf.put(KEY, peer(1), kept(sequence=1, expires_s=99.0), 41.0) == [(KEY, peer(1))]
    assert len(shelf) == 1


def test_a_crowd_from_one_block_gives_way_and_those_of_others_stay() -> None:
    shelf = Shelf(per_key=10)
    assert shelf.put(KEY, peer(0), kept("honest"), 0.0) == []
    for number in range(1, 10):
        assert shelf.put(KEY, peer(number), kept("crowd"), 0.0) == []
    assert shelf.put(KEY, peer(10), kept("crowd"), 1.0) is None
    assert shelf.put(KEY, peer(11), kept("other"), 1.0) == [(KEY, peer(9))]
    assert shelf.put(KEY, peer(0), kept("honest", 2), 1.0) == [(KEY, peer(0))]
    assert shelf.count(KEY) == 10


def test_a_crowd_of_many_blocks_throws_nobody_out() -> None:
    shelf = Shelf(per_key=10)
    for number in range(10):
        assert shelf.put(KEY, peer(number), kept(f"block {number}"), 0.0) == []
    assert shelf.put(KEY, peer(99), kept("block 99"), 1.0) is None


def test_what_ran_out_makes_room() -> None:
    shelf = Shelf(per_key=2)
    shelf.put(KEY, peer(1), kept("a", expires_s=5.0), 0.0)
    shelf.put(KEY, peer(2), kept("b"), 0.0)
    assert shelf.put(KEY, peer(3), kept("c"), 1.0) is None
    assert shelf.put(KEY, peer(3), kept("c"), 1.0 + SWEEP_S) == []
    assert shelf.count(KEY) == 2


def test_the_whole_node_is_bounded_and_one_identity_has_few_keys() -> None:
    shelf = Shelf(per_key=5, total=20)
    for number in range(50):
        shelf.put(f"key {number % 10}", peer(number), kept("crowd"), 0.0)
    assert len(shelf) == 20
    assert shelf.put("key x", peer(99), kept("other"), 1.0) is not None
    assert len(shelf) == 20
    wide = Shelf()
    taken = [wide.put(f"key {n}", peer(1), kept(), 0.0) is not None for n in range(20)]
    assert taken == [True] * MAX_KEYS + [False] * (20 - MAX_KEYS)


class Books(RuleBasedStateMachine):
    """Whoever comes: the books agree with a storage that does what they say, and are bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf, self.now = Shelf(per_key=4, total=9), 0.0
        self.stored: dict[tuple[str, PeerId], Kept] = {}

    @rule(
        key=st.sampled_from("abc"),
        number=st.integers(0, 8),
        block=st.sampled_from(["x", "y", ""]),
        sequence=st.integers(0, 3),
        life_s=st.sampled_from([1.0, 20.0]),
    )
    def put(self, key: str, number: int, block: str, sequence: int, life_s: float) -> None:
        told = Kept(block, sequence, self.now + life_s)
        held = self.stored.get((key, peer(number)))
        dropped = self.shelf.put(key, peer(number), told, self.now)
        if dropped is None:
            return
        if held is not None and held.expires_s > self.now:
            assert told.sequence > held.sequence
        for entry in dropped:
            self.stored.pop(entry, None)
        self.stored[key, peer(number)] = told

    @rule(seconds=st.sampled_from([0.5, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.stored = {e: held for e, held in self.stored.items() if held.expires_s > self.now}

    @invariant()
    def bounded_and_true(self) -> None:
        assert len(self.shelf) <= 9
        assert set(self.stored) <= set(self.shelf._kept)
        for key in "abc":
            members = [entry for entry in self.shelf._kept if entry[0] == key]
            assert len(members) == self.shelf.count(key) <= 4


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase
