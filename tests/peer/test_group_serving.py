"""A LAN group over real streams on loopback, its members threads: the answers of one process, and
an end within a second or two when a member is gone, stuck, or says what nobody agreed to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hexswarm.errors import MemberLost, OutOfMemory, RemoteProtocolError
from hexswarm.identity import Identity
from hexswarm.peer.groups import words
from hexswarm.peer.groups.checks import Checks
from hexswarm.peer.groups.division import cut_of
from hexswarm.peer.groups.invitation import Invitation, Seat
from hexswarm.peer.groups.leading import Led, joined
from hexswarm.peer.groups.obeying import Obeying
from hexswarm.peer.groups.streams import Door, Place
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.slices import read_sizes
from hexswarm.peer.steps import Batch
from hexswarm.peer.stream_sums import StreamSums
from hexswarm.peer.weights import load_span
from hexswarm.records import Span
from hexswarm.store import ModelFolder, resolve
from hexswarm.transports.direct import dial
from tests import tiny
from tests.peer.test_ranks import ALL, BATCHES, logits, one_process

torch.set_num_threads(1)
HOST = "127.0.0.1"
IDS = [Identity(bytes([number + 41]) * 32) for number in range(4)]
KV_TOKENS = 128
TOLD_S = 2.0
"""Until clients must be told."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    home = tmp_path_factory.mktemp("group")
    return resolve(str(tiny.save_folder(home / "model", tiny.model("qwen3"), "1MB")), home=home)


class Member:
    """One rank in a thread of its own, from the load to the end."""

    def __init__(self, folder: ModelFolder, door: Door, place: Place, checks: Checks) -> None:
        self.lost: MemberLost | None = None
        self.sums = StreamSums()
        self._given = (folder, door, place, checks)
        self._thread = threading.Thread(target=self._live)
        self._thread.start()

    def _live(self) -> None:
        folder, door, place, checks = self._given
        shard = load(folder, place, self.sums)
        group = joined(door.open(place, 10), place.rank, place.invitation.epoch, self.sums)
        try:
            self.lost = Obeying(shard, self.sums, checks).run()
        finally:
            group.close()

    def wait(self) -> MemberLost:
        self._thread.join(20)
        assert self.lost is not None
        return self.lost


def load(folder: ModelFolder, place: Place, sums: StreamSums) -> Shard:
    asked, span = place.invitation, place.invitation.span
    part = cut_of(read_sizes(folder.config, span), asked.shares).parts[place.rank]
    tensors = load_span(folder, span, dtype=torch.float32, part=part)
    a = architecture(folder.config)
    return Shard(a, span, a.layers, tensors, part=part, sums=sums)


@dataclass
class Group:
    led: Led
    members: list[Member]

    def runner(self) -> Runner:
        return Runner(self.led.shard, self.led.shard.make_pool(8))  # type: ignore[arg-type]


Make = Callable[..., Group]


@pytest.fixture
def make(folder: ModelFolder) -> Iterator[Make]:
    """make(shares, checks=...) gives a group that is ready; all of it has ended afterwards."""
    closing: list[Callable[[], Any]] = []

    def group(shares: tuple[int, ...] = (600, 400), checks: Checks | None = None) -> Group:
        doors = [Door(IDS[rank], HOST, 0) for rank in range(len(shares))]
        closing.extend(door.close for door in doors)
        seats = tuple(
            Seat(one.peer, HOST, door.port) for one, door in zip(IDS, doors, strict=False)
        )
        asked = invitation(folder, shares, seats)
        members = []
        for rank, door in enumerate(doors):
            place = Place(asked, rank)
            door.expect(place)
            if rank:
                checked = checks or Checks(ALL, folder.spec.vocabulary, KV_TOKENS)
                members.append(Member(folder, door, place, checked))
        sums, place = StreamSums(), Place(asked, 0)
        shard = load(folder, place, sums)
        joined(doors[0].open(place, 10), 0, asked.epoch, sums)
        led = Led(shard, sums, asked)
        closing.append(led.close)
        closing.extend(member.wait for member in members)
        return Group(led, members)

    yield group
    for close in closing:
        close()


def invitation(folder: ModelFolder, shares: tuple[int, ...], seats: tuple[Seat, ...]) -> Invitation:
    layers = folder.spec.layers
    return Invitation(
        *("home", 3, folder.spec.digest, layers, Span(0, layers), "float32", shares, seats),
        kv_tokens=KV_TOKENS,
        expires_s=0.0,
    )


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@pytest.mark.parametrize("shares", [(600, 400), (500, 300, 200)], ids=["two", "three"])
def test_a_group_answers_as_one(folder: ModelFolder, make: Make, shares: tuple[int, ...]) -> None:
    runner, whole = make(shares).runner(), one_process(folder, ALL)
    for rows in BATCHES:
        got, expected = (logits(one.run(Batch(rows))) for one in (runner, whole))
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    runner.forget((3, 1))


def test_beats_keep_an_idle_group(make: Make) -> None:
    """And it computes afterwards as ever."""
    group = make()
    runner = group.runner()
    group.led._told_s -= words.BEAT_S
    group.led.beat()
    group.led.beat()  # said lately: nothing
    assert group.led.lost is None
    logits(runner.run(Batch(BATCHES[0])))


def test_the_end_of_a_member_is_noticed_while_nothing_is_computed(make: Make) -> None:
    group = make()
    group.runner()
    lost = MemberLost(1, "self", 3, "dies")
    group.members[0].sums.leave(lost)
    group.members[0].wait()
    group.led._told_s -= words.BEAT_S
    with within(TOLD_S):
        group.led.beat()
    assert group.led.lost is not None
    assert group.led.lost.rank == 1
    assert group.led.lost.peer == IDS[1].peer


class Stuck(Checks):
    """A member that stands still when it is to compute."""

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(ALL, folder.spec.vocabulary, KV_TOKENS)
        self.thaw = threading.Event()

    def check(self, command: Any) -> None:
        if command[0] == "forward":
            self.thaw.wait(20)
        super().check(command)


def test_a_member_that_stands_still_is_blamed_in_time(folder: ModelFolder, make: Make) -> None:
    """Of three: by all, and it learns of it when it wakes up."""
    stuck = Stuck(folder)
    group = make((500, 300, 200), stuck)
    runner = group.runner()
    with within(TOLD_S), pytest.raises(MemberLost):
        runner.run(Batch(BATCHES[0]))
    with pytest.raises(MemberLost):
        runner.run(Batch(BATCHES[0]))
    stuck.thaw.set()
    assert all(member.wait() for member in group.members)


@pytest.mark.parametrize(
    "command",
    [
        ["forward", [[0, 1, [999], 16]], 0, tiny.LAYERS, 1],
        ["pool", 1 << 20, 16],
        ["__init__", 1],
        ["embed", [-1]],
    ],
)
def test_a_leader_that_oversteps_ends_its_group(make: Make, command: list[Any]) -> None:
    group = make()
    group.runner()
    group.led.tell(command)
    lost = group.members[0].wait()
    assert lost.rank == 0
    assert "not agreed" in lost.how


def test_a_member_without_room_is_told_of_in_words(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(shard: Shard, blocks: int, block_size: int = 16) -> Any:
        raise OutOfMemory("no room for KV")

    group = make()
    own = group.led.shard._shard
    assert isinstance(own, Shard)
    real = Shard.make_pool
    monkeypatch.setattr(
        Shard, "make_pool", lambda shard, *args: (real if shard is own else full)(shard, *args)
    )
    with pytest.raises(OutOfMemory, match="rank 1 of the group cannot do its part: no room for KV"):
        group.runner()


def test_strangers_and_other_epochs_do_not_get_in(folder: ModelFolder) -> None:
    """A door lets in the higher ranks of the epoch that is expected, and nobody else."""
    door = Door(IDS[0], HOST, 0)
    try:
        seats = (Seat(IDS[0].peer, HOST, door.port), Seat(IDS[1].peer, HOST, 1))
        place = Place(invitation(folder, (500, 500), seats), 0)
        door.expect(place)
        stranger = IDS[2]
        with pytest.raises(Exception, match=r"hung up|broke off"):
            dial(stranger, IDS[0].peer, HOST, door.port, place.topic(1), timeout_s=2)
        other = dial(IDS[1], IDS[0].peer, HOST, door.port, b"group/of/old/1", timeout_s=2)
        with pytest.raises(MemberLost, match=r"rank 1 .*in time"):
            door.open(place, 0.2)
        other.close()
        door.expect(None)
        with pytest.raises(MemberLost, match="left the epoch"):
            door.open(place, 5)
    finally:
        door.close()


def test_what_is_no_command_is_refused() -> None:
    for said in (b"\xc1", words.pack([]), b"\x93\x01\x02\x03", b"\x81\x01\x02"):
        with pytest.raises(RemoteProtocolError):
            words.unpack(memoryview(said))


def test_a_pool_is_at_most_what_was_agreed() -> None:
    Checks(ALL, 10, kv_tokens=100).check(["pool", 7, 16])
    with pytest.raises(RemoteProtocolError, match="larger than was agreed"):
        Checks(ALL, 10, kv_tokens=100).check(["pool", 8, 16])
