"""Peers that hold the layers of a model together, each a part of every layer: real processes.

One swarm for all tests of this module, in the order of the file: a leader, a member and a spare,
of which members are lost one after the other. `benchmarks/tensor_parallel.py --rows group` measures
the same with more losses.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hexswarm import demo
from hexswarm.blocking import BlockingConversation, Client, Stream
from hexswarm.errors import NoRoute
from hexswarm.identity import Identity
from hexswarm.messages import GroupInvite
from hexswarm.peer.groups.invitation import Invitation, Seat, sign
from hexswarm.records import Announcement, Span
from tests.end_to_end.swarm import TINY_LAYERS, LivingSwarm, node, refresh, until
from tests.end_to_end.test_two_machines import adapted, lines_marked

pytestmark = pytest.mark.end_to_end

PROMPT = [5, 6, 7]
TOKENS = 400
BEGUN = 20
TOLD_S, GONE_S, AGAIN_S = 10.0, 15.0, 60.0
"""After a member is lost: the client knows, the record is gone, it serves again. The bars are
2, 5 and 15 s, and held by the benchmark: here other tests may keep all cores busy."""
POOL = "4096"
WHOLE = f"0:{TINY_LAYERS}"


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> Iterator[LivingSwarm]:
    """A leader and a member; more may be added."""
    extra = ("--kv-tokens", POOL, "--group", "home")
    with LivingSwarm((), model=str(tiny_model), extra=extra) as local:
        leader, member = local.spawn_peer(WHOLE), local.spawn_peer(None)
        member.wait_for("address", demo.READY_S)
        leader.wait_for("serving", demo.READY_S)
        yield local
        assert not any("Traceback" in peer.log_text for peer in local.peers)


@pytest.fixture(scope="module")
def asker(local: LivingSwarm) -> Iterator[Client]:
    with local.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(tiny_client: Client) -> tuple[int, ...]:
    """The answer of peers that hold whole layers."""
    return tiny_client.generate(PROMPT, max_new_tokens=TOKENS).ids


def serving(asker: Client, epoch: int = 1) -> list[Announcement] | None:
    """Who says to be in the epoch that serves, if that is `epoch` or later, by rank; read now.

    None until both say so. The dead are in the directory for another minute, with their old epoch.
    """
    found = [item for item in refresh(asker) if item.group is not None]
    served = max((epoch_of([item]) for item in found if item.serving), default=0)
    members = [item for item in found if epoch_of([item]) == served]
    members.sort(key=lambda item: item.group.rank if item.group else 0)
    return members if served >= epoch and len(members) == 2 else None


def epoch_of(members: list[Announcement]) -> int:
    assert members[0].group is not None
    return members[0].group.epoch


def test_a_group_answers_as_peers_with_whole_layers(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    answer = asker.generate(PROMPT, max_new_tokens=TOKENS)
    assert answer.ids == expected
    (stage,) = answer.route.stages
    assert stage.peer == local.id_of(local.peers[0])
    leader, member = until(lambda: serving(asker), GONE_S, "both announce the group")
    assert leader.group is not None
    assert member.group is not None
    assert (leader.peer, leader.group.rank) == (stage.peer, 0)
    assert (member.peer, member.group.rank) == (local.id_of(local.peers[1]), 1)
    assert leader.group.shares == member.group.shares
    assert not member.serving


def begun(talk: BlockingConversation) -> Stream:
    stream = talk.generate(PROMPT, stream=True, max_new_tokens=TOKENS)
    for _ in range(BEGUN):
        next(stream)
    return stream


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_member_is_replaced_by_a_spare(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...], how: signal.Signals
) -> None:
    local.add_peer(None)
    before = until(lambda: serving(asker), AGAIN_S, "the group serves")
    victim = local.peer_of(before[1].peer)
    with asker.conversation() as talk:
        stream = begun(talk)
        session = talk._conversation._session
        assert session is not None
        victim.send(how)
        try:
            until(lambda: session.machine.mending, TOLD_S, "the client is told", 0.02)
            until(lambda: not asker_sees(asker, before), GONE_S, "the record is gone")
            after = until(lambda: serving(asker, epoch_of(before) + 1), AGAIN_S, "it serves again")
            list(stream)
        finally:
            victim.send(signal.SIGKILL)
            victim.wait()
    assert stream.completion.ids == expected
    assert after[0].peer == before[0].peer
    assert after[1].peer != before[1].peer


def asker_sees(asker: Client, before: list[Announcement]) -> bool:
    """The epoch of before is still said to serve."""
    found = [item for item in refresh(asker) if item.peer == before[0].peer and item.serving]
    return any(item.group is not None and item.group == before[0].group for item in found)


def test_who_is_no_leader_of_theirs_is_not_followed(local: LivingSwarm, asker: Client) -> None:
    """Somebody else's invitation, one with a bad signature, and nonsense."""
    members = until(lambda: serving(asker), AGAIN_S, "the group serves")
    victim, links, identity = members[1], asker._client._member.links, Identity.generate()
    seats = (Seat(identity.peer, "127.0.0.1", 9), Seat(victim.peer, "127.0.0.1", 9))
    asked = Invitation(
        *("home", 1 << 40, victim.model, TINY_LAYERS, Span(0, TINY_LAYERS), "float32"),
        *((500, 500), seats),
        kv_tokens=64,
        expires_s=time.time() + 30,
    )
    signed = sign(asked, identity)

    async def ask() -> None:
        await links.connect(victim.peer, victim.addresses)
        for payload in (signed, signed[:-1] + b"x", b""):
            assert links.tell(victim.peer, GroupInvite(asked.group, asked.epoch), payload)

    asker._wait(ask())
    assert len(asker.generate(PROMPT, max_new_tokens=50).ids) == 50
    assert serving(asker) is not None


def test_a_group_without_a_spare_serves_no_longer_and_serves_again_when_one_comes(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    before = until(lambda: serving(asker), AGAIN_S, "the group serves")
    local.peer_of(before[1].peer).end(signal.SIGKILL)
    until(lambda: not asker_sees(asker, before), GONE_S, "the record is gone")
    with pytest.raises(NoRoute):
        asker.generate(PROMPT, max_new_tokens=5)
    assert not any(item.serving for item in refresh(asker))
    local.add_peer(None)
    until(lambda: serving(asker, epoch_of(before) + 1), AGAIN_S, "it serves again")
    assert asker.generate(PROMPT, max_new_tokens=TOKENS).ids == expected


def test_a_member_that_is_told_to_stop_lets_answers_end_if_nobody_can_take_its_place(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    before = until(lambda: serving(asker), AGAIN_S, "the group serves")
    leaving = local.peer_of(before[1].peer)
    with asker.conversation() as talk:
        stream = begun(talk)
        leaving.send(signal.SIGTERM)
        list(stream)
    assert stream.completion.ids == expected
    assert stream.completion.mends == ()
    assert leaving.wait() == 0
    until(lambda: not asker_sees(asker, before), GONE_S, "the record is gone")
    local.add_peer(None)
    until(lambda: serving(asker, epoch_of(before) + 1), AGAIN_S, "it serves again")


def test_a_leader_that_is_gone_leaves_its_members_free(local: LivingSwarm, asker: Client) -> None:
    before = until(lambda: serving(asker), AGAIN_S, "the group serves")
    leader = local.peer_of(before[0].peer)
    leader.end(signal.SIGKILL)
    local.again(leader, WHOLE)
    after = until(lambda: serving(asker, epoch_of(before) + 1), AGAIN_S, "it serves again")
    assert [item.peer for item in after] == [item.peer for item in before]


def test_group_of_the_readme(tmp_path: Path) -> None:
    """Its lines as they stand, but for the machine: the first leads, the second follows."""
    nodes: list[demo.Process] = []

    def start(name: str, words: list[str]) -> demo.Process:
        home = tmp_path / name
        nodes.append(node(words, home, home.with_suffix(".log")))
        return nodes[-1]

    try:
        seed = start("seed", ["bootstrap", "--port", "0"])
        address = next(line for line in seed.wait_for("/p2p/", demo.READY_S) if "/p2p/" in line)
        lines = [adapted(words, address) for words in lines_marked("test_group_of_the_readme")]
        leader, member = (start(f"peer-{n}", words) for n, words in enumerate(lines))
        leader.wait_for("serving layers 0:30", 2 * demo.READY_S)
        member.wait_for("waiting for the group home", demo.READY_S)
        with Client([address], home=tmp_path / "client") as client:
            answer = client.generate("The capital of France is", max_new_tokens=4)
        assert len(answer.ids) == 4
    finally:
        for one in reversed(nodes):
            one.send(signal.SIGTERM)
        for one in nodes:
            one.wait()
