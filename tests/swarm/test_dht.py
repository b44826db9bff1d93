"""The directory on real nodes: libp2p daemons and hivemind's DHT on loopback.

What the rules of admission say is in `test_directory.py`; here hostile nodes try to get past them
on the wire, as hivemind's own code would let them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from hexswarm import advice
from hexswarm.clock import RealClock
from hexswarm.dht import (
    SwarmDht,
    load_remembered,
    save_remembered,
)
from hexswarm.directory import (
    EXPIRE_S,
    INDEX,
    MAX_RECORD_BYTES,
    SignedAnnouncement,
    directory_key,
    sign,
)
from hexswarm.errors import (
    AddressInUse,
    BootstrapUnreachable,
    ClockSkew,
    PeerLost,
    UsageError,
)
from hexswarm.guard import MAX_DEPTH, MAX_KEYS, guard_decoding
from hexswarm.identity import Identity
from hexswarm.links import BULK, STEP, Links
from hexswarm.messages import GoAway
from hexswarm.records import Announcement, PeerId, Remembered, Span, Speed
from hexswarm.shelf import MAX_ENTRIES
from hexswarm.transports.base import Stream
from hexswarm.transports.libp2p import Libp2pTransport, load_hivemind, multiaddress
from hexswarm.wire import Frame

MODEL = "ab" * 32


class Node:
    """A node of the directory with an identity of its own."""

    def __init__(self, transport: Libp2pTransport, dht: SwarmDht, identity: Identity) -> None:
        self.transport, self.dht, self.identity = transport, dht, identity
        self.where: tuple[str, ...] = ()

    @property
    def peer(self) -> PeerId:
        return self.transport.local

    @property
    def full(self) -> tuple[str, ...]:
        """Addresses for others to join at."""
        return tuple(f"{address}/p2p/{self.peer}" for address in self.where)

    def word(self, sequence: int = 1, *, expires_s: float | None = None) -> SignedAnnouncement:
        told = announcement(self.identity.peer, self.where, sequence)
        return sign(told, expires_s or time.time() + EXPIRE_S, self.identity)

    async def close(self) -> None:
        await self.dht.close()
        await self.transport.close()


def announcement(peer: PeerId, where: tuple[str, ...], sequence: int = 1) -> Announcement:
    return Announcement(
        peer=peer,
        model=MODEL,
        model_name="M",
        layers=6,
        span=Span(0, 6),
        state="online",
        dtype="float32",
        device="cpu",
        speed=Speed(0.1, 0.1, 0.1),
        free_kv_tokens=1,
        queue_s=0.0,
        addresses=where,
        issued_s=time.time(),
        sequence=sequence,
    )


@asynccontextmanager
async def transports(folder: Path, count: int) -> AsyncIterator[list[Libp2pTransport]]:
    async with AsyncExitStack() as stack:
        made = await asyncio.gather(
            *(
                Libp2pTransport.create(identity=_key(folder, n), host="127.0.0.1")
                for n in range(count)
            )
        )
        for transport in made:
            stack.push_async_callback(transport.close)
        yield list(made)


def _key(folder: Path, number: int) -> Path:
    path = folder / f"{number}.key"
    Identity.load(path)
    return path


async def join(folder: Path, number: int, *others: Node, client: bool = False) -> Node:
    """A node that enters by way of `others`."""
    path = _key(folder, number)
    transport = await Libp2pTransport.create(identity=path, host=None if client else "127.0.0.1")
    bootstrap = [address for other in others for address in other.full]
    dht = await SwarmDht.join(transport, bootstrap=bootstrap, client=client, clock=RealClock())
    node = Node(transport, dht, Identity.load(path))
    node.where = await transport.addresses()
    return node


@asynccontextmanager
async def nodes(folder: Path, count: int) -> AsyncIterator[list[Node]]:
    """`count` nodes; the later ones know the first one."""
    first = await join(folder, 0)
    rest = await asyncio.gather(*(join(folder, n, first) for n in range(1, count)))
    made = [first, *rest]
    try:
        yield made
    finally:
        await asyncio.gather(*(node.close() for node in made), return_exceptions=True)


async def seen(node: Node, count: int, model: str = MODEL) -> list[SignedAnnouncement]:
    """What `node` reads, once it is `count` records: stores travel in the background."""
    found: list[SignedAnnouncement] = []
    for _ in range(50):
        found = await node.dht.read(model)
        if len(found) >= count:
            break
    return sorted(found, key=lambda record: record.peer)


@pytest.mark.end_to_end
def test_announcements_travel_and_outlive_the_first_node(tmp_path: Path) -> None:
    """Told at one node, read at a third; newer words win; no node is needed for ever."""

    async def act() -> None:
        async with nodes(tmp_path, 3) as (a, b, c):
            assert a.peer == a.identity.peer, "go-libp2p makes the id that we make"
            record = b.word()
            assert await b.dht.announce(record)
            assert await seen(c, 1) == [record]
            assert await seen(c, 1, INDEX) == [record]
            newer = b.word(2)
            assert await b.dht.announce(newer)
            assert await c.dht.read(MODEL) == [newer]
            own = c.word()
            await c.dht.announce(own)
            both = sorted([newer, own], key=lambda found: found.peer)
            assert await seen(a, 2) == both

            for node in (b, c):
                await node.dht.meet([newer, own])
            await a.close()
            last = b.word(3)
            assert await b.dht.announce(last)
            assert last in await seen(c, 2)
            guest = await join(tmp_path, 9, b, client=True)
            assert last in await seen(guest, 2)
            await guest.close()

    asyncio.run(act())


@pytest.mark.end_to_end
def test_hostile_records_are_refused_on_the_wire(tmp_path: Path) -> None:
    async def act() -> None:
        async with nodes(tmp_path, 2) as (a, b):
            honest = b.word(5)
            assert await b.dht.announce(honest)
            async with transports(tmp_path / "more", 1) as (transport,):
                await transport.connect(a.peer, a.where)
                villain = await Villain.create(transport, a)
                for name, attack in villain.attacks(tmp_path, honest).items():
                    assert not await attack, f"{name} was taken"
                assert await villain.put(villain.honest), "an honest word of the same node is"
                found = await seen(a, 2)
                assert {record.peer for record in found} == {honest.peer, villain.peer}
                assert honest in found
                assert await a.dht.read(MODEL) == await b.dht.read(MODEL)
                await villain.node.shutdown()

    asyncio.run(act())


@pytest.mark.end_to_end
def test_advice_travels_and_only_in_its_authors_name(tmp_path: Path) -> None:
    async def act() -> None:
        async with nodes(tmp_path, 2) as (a, b):
            moves = ((advice.tail_of(a.peer), Span(0, 3)),)
            said = advice.Proposal(b.peer, MODEL, 6, moves, 10.0, 1, time.time())
            first = advice.sign(said, b.identity)
            assert await b.dht.advise(first)
            newer = advice.sign(replace(said, issued_s=said.issued_s + 1.0), b.identity)
            assert await b.dht.advise(newer)
            assert not await a.dht.advise(first), "an older one"
            for reader in (a, b):
                assert await reader.dht.read_advice(MODEL) == [newer]
                assert await reader.dht.read_advice("cd" * 32) == []
                assert await reader.dht.read(MODEL) == []
            key, expires_s = advice.advice_key(MODEL), newer.expires_s
            put = a.dht._node.store
            assert not await put(key, newer.data, expires_s, subkey=a.peer)
            assert not await put(key, newer.data, expires_s + 3.0, subkey=b.peer)
            other = advice.advice_key("cd" * 32)
            assert not await put(other, newer.data, expires_s, subkey=b.peer)
            assert not await put(key, a.word().data, a.word().expires_s, subkey=a.peer)

    asyncio.run(act())


class Villain:
    """A DHT node without rules, that says to `target` whatever it likes."""

    def __init__(self, transport: Libp2pTransport, target: PeerId) -> None:
        hivemind = load_hivemind()
        self.node: Any = None
        self.peer = transport.local
        self.target = hivemind.PeerID.from_base58(target)
        self.key = _key_id(MODEL)
        self.honest: SignedAnnouncement
        self.identity: Identity

    @classmethod
    async def create(cls, transport: Libp2pTransport, target: Node) -> Villain:
        made = cls(transport, target.peer)
        made.node = await load_hivemind().DHTNode.create(
            p2p=transport.p2p,
            initial_peers=[f"/ip4/127.0.0.1/tcp/1/p2p/{target.peer}"],
            ensure_bootstrap_success=False,
            strict=False,
        )
        return made

    async def put(
        self,
        record: SignedAnnouncement | None = None,
        *,
        value: Any = None,
        subkey: Any = "",
        expires_s: float | None = None,
        key: Any = None,
    ) -> bool:
        """Ask the target to store something; whether it did."""
        if record is not None:
            value, subkey = msgpack.packb(record.data), subkey or record.peer
            expires_s = expires_s or record.expires_s
        answer = await self.node.protocol.call_store(
            self.target,
            keys=[key or self.key],
            values=[value],
            expiration_time=[expires_s or time.time() + 60.0],
            subkeys=None if subkey is None else [subkey or self.peer],
        )
        return bool(answer and answer[0])

    async def put_many(self, records: Sequence[SignedAnnouncement]) -> int:
        """The same for many of this model; how many were taken."""
        answer = await self.node.protocol.call_store(
            self.target,
            keys=[self.key] * len(records),
            values=[msgpack.packb(record.data) for record in records],
            expiration_time=[record.expires_s for record in records],
            subkeys=[record.peer for record in records],
        )
        return sum(answer or [])

    async def ask(self, keys: int) -> bool:
        """Ask the target for so many keys at once; whether it answered."""
        from hivemind.dht.routing import DHTID

        wanted = [DHTID(number) for number in range(keys)]
        return await self.node.protocol.call_find(self.target, wanted) is not None

    async def put_dictionary(self, data: bytes) -> bool:
        """The same for the bytes of a whole dictionary, which hivemind decodes before we see it."""
        from hivemind.proto import dht_pb2

        protocol = self.node.protocol
        request = dht_pb2.StoreRequest(
            keys=[self.key.to_bytes()],
            subkeys=[protocol.IS_DICTIONARY],
            values=[data],
            expiration_time=[time.time() + 60.0],
            in_cache=[False],
        )
        try:
            answer = await protocol.get_stub(self.target).rpc_store(request, timeout=3.0)
        except Exception:  # hivemind's own kinds, which bring the remote's words
            return False
        return any(answer.store_ok)

    def attacks(self, folder: Path, victim: SignedAnnouncement) -> dict[str, Any]:
        """What must not work, by name."""
        self.identity = Identity.load(folder / "more" / "0.key")
        assert self.identity.peer == self.peer
        mine = announcement(self.peer, ())
        later = time.time() + EXPIRE_S
        self.honest = sign(mine, later, self.identity)
        stolen = replace(victim, expires_s=later + 4, data=_resigned(victim, self.identity))
        whole = _dictionary()
        whole.store(victim.peer, msgpack.packb(b"erased"), later + 4)
        other = _key_id("cd" * 32)
        return {
            "a record signed by another": self.put(stolen),
            "a victim's record prolonged": self.put(victim, expires_s=victim.expires_s + 4),
            "a good record under a victim's name": self.put(self.honest, subkey=victim.peer),
            "junk under a victim's name": self.put(
                value=msgpack.packb(b"x"), subkey=victim.peer, expires_s=later + 4
            ),
            "a plain value in place of the dictionary": self.put(
                value=msgpack.packb(b"x"), subkey=None, expires_s=later + 4
            ),
            "a whole dictionary": self.put(value=whole, subkey=None, expires_s=later + 4),
            "a foreign type": self.put(value=msgpack.packb([1, 2, 3])),
            "an oversized record": self.put(value=msgpack.packb(bytes(MAX_RECORD_BYTES + 1))),
            "a large oversized record": self.put(value=msgpack.packb(bytes(1 << 20))),
            "a deeply nested record": self.put(value=_nested(300)),
            "a dictionary that is nested deeply": self.put_dictionary(_nested(300)),
            "a dictionary that is none": self.put_dictionary(b"\xc7\x01\x50\x90"),
            "a record for ever": self.put(
                sign(mine, later + 1e6, self.identity), expires_s=later + 1e6
            ),
            "a record under another model's key": self.put(self.honest, key=other),
        }


def _key_id(model: str) -> Any:
    from hivemind.dht.routing import DHTID

    return DHTID.generate(source=directory_key(model, 0, 1))


def _dictionary() -> Any:
    from hivemind.dht.storage import DictionaryDHTValue

    return DictionaryDHTValue()


def _nested(depth: int) -> bytes:
    """Tuples in tuples, each an extension type for hivemind's decoder to recurse into."""
    data = b"\x90"
    for _ in range(depth):
        data = b"\xc9" + (1 + len(data)).to_bytes(4, "big") + b"\x40\x91" + data
    return data


def _resigned(victim: SignedAnnouncement, thief: Identity) -> bytes:
    """The victim's words with the thief's signature."""
    body, _ = msgpack.unpackb(victim.data)
    data: bytes = msgpack.packb([body, thief.sign(b"hexswarm/1 announcement\0" + body)])
    return data


@pytest.mark.end_to_end
def test_joining(tmp_path: Path) -> None:
    """Dead bootstraps do not matter if a remembered peer lives; alone is an error unless asked."""

    async def act() -> None:
        dead = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer}"
        clock = RealClock()
        async with nodes(tmp_path, 1) as (a,), transports(tmp_path / "more", 1) as (transport,):
            with pytest.raises(BootstrapUnreachable, match="none of the 1"):
                await SwarmDht.join(transport, bootstrap=[dead], clock=clock)
            with pytest.raises(UsageError, match="not the address"):
                await SwarmDht.join(transport, bootstrap=["127.0.0.1:4"], clock=clock)
            await a.dht.announce(a.word())
            damaged = Remembered(PeerId("no peer id"), ("no address",), 1.0)
            known = [damaged, Remembered(a.peer, a.where, 2.0)]
            dht = await SwarmDht.join(transport, bootstrap=[dead], remembered=known, clock=clock)
            assert [record.peer for record in await dht.read(MODEL)] == [a.peer]
            await dht.meet([a.word(), a.word()])
            await dht.close()
            lonely = await SwarmDht.join(transport, bootstrap=[dead], alone=True, clock=clock)
            assert await lonely.read(MODEL) == []
            await lonely.close()

    asyncio.run(act())


@pytest.mark.end_to_end
def test_a_flood_of_good_records_hides_nobody(tmp_path: Path) -> None:
    """A stranger with 2,500 keys fills a model's key; honest peers are read, and may still come.

    Without a bound the answer to a reader passes 4 MiB, and a fresh client reads nothing at all.
    """

    async def act() -> None:
        async with nodes(tmp_path, 2) as (a, b):
            assert await b.dht.announce(b.word())
            async with transports(tmp_path / "more", 1) as (transport,):
                await transport.connect(a.peer, a.where)
                villain = await Villain.create(transport, a)
                padding = tuple(f"/ip4/6.6.6.{n}/tcp/1/" + "x" * 200 for n in range(8))
                crowd = [Identity(n.to_bytes(32, "big")) for n in range(1, 2500)]
                words = [
                    sign(announcement(i.peer, padding), time.time() + EXPIRE_S, i) for i in crowd
                ]
                assert sum(len(word.data) for word in words) > 4 << 20
                taken = sum(
                    [await villain.put_many(words[n : n + 200]) for n in range(0, 2500, 200)]
                )
                assert 1000 < taken <= MAX_ENTRIES
                await villain.node.shutdown()
            late = await join(tmp_path, 7, a)
            assert await late.dht.announce(late.word())
            fresh = await join(tmp_path, 8, a, client=True)
            found = {record.peer for record in await fresh.dht.read(MODEL)}
            assert len(found) > 1000
            assert {b.peer, late.peer} <= found
            for node in (late, fresh):
                await node.close()

    asyncio.run(act())


@pytest.mark.end_to_end
def test_an_answer_for_ever_does_not_end_a_search(tmp_path: Path) -> None:
    """A node that says "nothing, until the end of time" is not the last one that is asked."""

    async def act() -> None:
        async with nodes(tmp_path, 2) as (a, b):
            assert await b.dht.announce(b.word())
            async with transports(tmp_path / "more", 1) as (transport,):
                await transport.connect(a.peer, a.where)
                villain = await Villain.create(transport, a)
                for forever in (float("inf"), 1e18):
                    villain.node.protocol.storage.store(villain.key, _dictionary(), forever)
                where = await transport.addresses()
                liar = Node(transport, None, Identity.generate())  # type: ignore[arg-type]
                liar.where = where
                fresh = await join(tmp_path, 8, liar, client=True)
                await fresh.transport.connect(a.peer, a.where)
                await fresh.transport.connect(b.peer, b.where)
                assert await seen(fresh, 1) == await seen(a, 1)
                for _ in range(20):  # in one of a few the liar answers first
                    assert len(await fresh.dht.read(MODEL)) == 1
                await fresh.close()
                await villain.node.shutdown()

    asyncio.run(act())


@pytest.mark.end_to_end
def test_sequences_and_large_requests_on_the_wire(tmp_path: Path) -> None:
    """Of one peer the later word stays, also if it ends earlier; too many keys are not served."""

    async def act() -> None:
        async with nodes(tmp_path, 1) as (a,), transports(tmp_path / "more", 1) as (transport,):
            await transport.connect(a.peer, a.where)
            villain = await Villain.create(transport, a)
            identity = Identity.load(tmp_path / "more" / "0.key")
            soon, later = time.time() + 40, time.time() + EXPIRE_S

            def word(sequence: int, expires_s: float) -> SignedAnnouncement:
                return sign(announcement(identity.peer, (), sequence), expires_s, identity)

            assert await villain.put(word(5, later))
            assert not await villain.put(word(4, later + 2)), "an older word that lives longer"
            assert await villain.put(word(6, soon)), "a newer word that ends earlier"
            assert not await villain.put(word(5, later)), "the older one again"
            assert [held.announcement.sequence for held in await a.dht.read(MODEL)] == [6]
            assert not await villain.put(word(7, time.time() - 1)), "a word that has run out"
            assert await villain.ask(MAX_KEYS)
            assert not await villain.ask(MAX_KEYS + 1)
            await villain.node.shutdown()

    asyncio.run(act())


class Shifted(RealClock):
    """A machine whose clock is wrong."""

    def __init__(self, ahead_s: float) -> None:
        self.ahead_s = ahead_s

    def wall(self) -> float:
        return super().wall() + self.ahead_s


@pytest.mark.end_to_end
@pytest.mark.parametrize("ahead_s", [-5.0, 3600.0])
def test_a_wrong_clock_is_named_when_joining(tmp_path: Path, ahead_s: float) -> None:
    """Not "unreachable": the offset. Who may stay alone joins all the same, a small one is fine."""

    async def act() -> None:
        async with nodes(tmp_path, 1) as (a,), transports(tmp_path / "more", 1) as (transport,):
            way = "ahead of" if ahead_s > 0 else "behind"
            with pytest.raises(
                ClockSkew, match=rf"{abs(ahead_s) - 0.1:,.1f}|{abs(ahead_s):,.1f}"
            ) as e:
                await SwarmDht.join(transport, bootstrap=a.full, clock=Shifted(ahead_s))
            assert way in str(e.value)
            for clock, alone in ((Shifted(ahead_s), True), (Shifted(2.0), False)):
                dht = await SwarmDht.join(transport, bootstrap=a.full, clock=clock, alone=alone)
                await dht.close()

    asyncio.run(act())


@pytest.mark.end_to_end
def test_links_over_libp2p(tmp_path: Path) -> None:
    """Both lanes, authenticated ids, both sides dialling at once, ends, and hostile addresses."""

    async def act() -> None:
        async with transports(tmp_path, 2) as (a, b):
            reads: asyncio.Queue[tuple[PeerId, list[Frame]]] = asyncio.Queue()
            lost: asyncio.Queue[PeerId] = asyncio.Queue()
            made = [
                Links(
                    transport,
                    RealClock(),
                    lambda peer, frames: reads.put_nowait((peer, frames)),
                    lambda peer, _: lost.put_nowait(peer),
                )
                for transport in (a, b)
            ]
            for links in made:
                await links.start(listen=True)
            here, there = made
            here.watch(b.local)  # guests may not send as much as this test does
            there.watch(a.local)
            await asyncio.gather(
                here.connect(b.local, await b.addresses()),
                there.connect(a.local, await a.addresses()),
            )
            for lane in (STEP, BULK):
                assert here.send(b.local, [(GoAway(1.0), bytes(1 << 20))], lane)
                assert await reads.get() == (a.local, [Frame(GoAway(1.0), bytes(1 << 20))])
                assert there.send(a.local, [(GoAway(2.0), b"x"), (GoAway(3.0), b"y")], lane)
                peer, frames = await reads.get()
                assert (peer, [frame.payload for frame in frames]) == (b.local, [b"x", b"y"])
            for addresses in (("nonsense",), ("/ip4/127.0.0.1/tcp/9",), ("/ip4/300.1.1.1/tcp/9",)):
                with pytest.raises(PeerLost):
                    await here.connect(Identity.generate().peer, addresses)
            with pytest.raises(PeerLost):
                await here.connect(PeerId("no peer id"), ("/ip4/127.0.0.1/tcp/9",))
            await there.close()
            assert await lost.get() == b.local
            await here.close()
            assert lost.empty()

    asyncio.run(act())


@pytest.mark.end_to_end
def test_a_stream_that_nobody_reads_can_be_closed(tmp_path: Path) -> None:
    """What waits to be sent must not keep a closed stream and its reader alive."""

    async def act() -> None:
        async with transports(tmp_path, 2) as (a, b):
            hold = asyncio.Event()

            async def ignore(stream: Stream) -> None:
                await hold.wait()

            await b.listen(ignore)
            stream = await a.dial(b.local, await b.addresses())
            stream.write([bytes(64 << 20)])
            assert stream.backlog > 1 << 20
            stream.close()
            async with asyncio.timeout(20):
                while await stream.read(1 << 16):
                    continue
            assert stream.backlog == 0
            hold.set()

    asyncio.run(act())


@pytest.mark.end_to_end
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async def act() -> None:
        async with transports(tmp_path, 1) as (a,):
            port = int((await a.addresses())[0].rsplit("/", 1)[1])
            with pytest.raises(AddressInUse, match=str(port)):
                await Libp2pTransport.create(host="127.0.0.1", port=port)

    asyncio.run(act())


@pytest.mark.end_to_end
def test_the_depth_of_decoding_is_bounded() -> None:
    """hivemind alone decodes tuples in tuples until Python's stack ends."""
    serializer = load_hivemind().MSGPackSerializer
    guard_decoding()
    assert serializer.loads(_nested(MAX_DEPTH)) is not None
    for depth in (MAX_DEPTH + 1, 3000):
        with pytest.raises(ValueError, match="nested too deeply"):
            serializer.loads(_nested(depth))
    assert serializer.loads(serializer.dumps(((1, 2), "a"))) == ((1, 2), "a")


# --- without a network --------------------------------------------------------------------------


def test_peers_are_remembered_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "peers.json"
    assert load_remembered(path) == []
    known = [Remembered(PeerId(f"p{n}"), (f"/a{n}",), float(n)) for n in range(100)]
    save_remembered(path, known)
    assert load_remembered(path) == sorted(known, key=lambda entry: -entry.seen_s)[:64]
    for damage in ("", "[]", "{", "[1]", '[{"peer": 1}]', '{"a": 1}', "null"):
        path.write_text(damage)
        assert load_remembered(path) == []
    save_remembered(tmp_path / "deep" / "peers.json" / "below", known)


def test_addresses() -> None:
    assert multiaddress("127.0.0.1", 5) == "/ip4/127.0.0.1/tcp/5"
    assert multiaddress("::1", 5) == "/ip6/::1/tcp/5"
    with pytest.raises(UsageError, match="not an IP address"):
        multiaddress("localhost", 5)
