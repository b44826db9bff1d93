"""Direct streams: who may open one, and how each kind of end looks from the other side.

Real sockets on loopback. Nothing here waits for a fixed time: streams are awaited with `poll`.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hexswarm.errors import PeerLost, WrongPeer
from hexswarm.identity import Identity, peer_id
from hexswarm.records import PeerId
from hexswarm.transports import direct
from hexswarm.transports.direct import MARK, DirectStream, Listener, dial
from hexswarm.transports.pinning import context, shown

ALICE, BOB, EVE = (Identity(bytes([number]) * 32) for number in (1, 2, 3))
HOST = "127.0.0.1"
SHORT_S = 0.3
PIECE_BYTES = 64 << 10
TCP_REPAIR = 19
"""Linux: a socket in repair mode is closed without telling the other end."""


class Door:
    """A listener of Bob's, and the streams that came in."""

    def __init__(self) -> None:
        self.arrived: queue.Queue[DirectStream] = queue.Queue()
        self.known: set[PeerId] = {ALICE.peer}
        self.listener = Listener(
            BOB,
            HOST,
            0,
            allowed=lambda peer: peer in self.known,
            deliver=self.arrived.put,
            timeout_s=SHORT_S,
        )
        self.port = self.listener.port

    def pair(self, topic: bytes = b"") -> tuple[DirectStream, DirectStream]:
        """Alice's end and Bob's."""
        near = dial(ALICE, BOB.peer, HOST, self.port, topic)
        return near, self.arrived.get(timeout=5)


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door()
    yield made
    made.listener.close()
    while not made.arrived.empty():
        made.arrived.get().close()


class Impostor:
    """Answers one connection with `act`, in a thread of its own."""

    def __init__(self, act: Callable[[socket.socket], None]) -> None:
        self._server = socket.create_server((HOST, 0))
        self.port: int = self._server.getsockname()[1]
        self.errors: queue.Queue[Exception | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(act,))
        self._thread.start()

    def _run(self, act: Callable[[socket.socket], None]) -> None:
        raw, _ = self._server.accept()
        raw.settimeout(5)
        try:
            act(raw)
            self.errors.put(None)
        except (OSError, ValueError) as error:
            self.errors.put(error)
        finally:
            raw.close()

    def close(self) -> None:
        self._thread.join(5)
        self._server.close()


def claim(raw: socket.socket, public: bytes) -> None:
    raw.sendall(MARK + public)
    assert len(raw.recv(40, socket.MSG_WAITALL)) == 40


def take(stream: DirectStream, count: int) -> bytes:
    """Exactly so many bytes; fewer if the stream closes first."""
    data = bytearray(count)
    got = 0
    while got < count:
        came = stream.recv_into(memoryview(data)[got:])
        if came is None:
            wait(stream)
        elif came == 0:
            break
        else:
            got += came
    return bytes(data[:got])


def wait(stream: DirectStream, seconds: float = 5.0) -> None:
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLIN)
    assert poll.poll(seconds * 1e3), "nothing came"


def give(stream: DirectStream, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.send(view) :]


# --- opening --------------------------------------------------------------------------------------


def test_both_ends_know_who_is_there_and_what_for(door: Door) -> None:
    near, far = door.pair(b"group 7, epoch 1, rank 0")
    assert (near.remote, far.remote) == (BOB.peer, ALICE.peer)
    assert near.topic == far.topic == b"group 7, epoch 1, rank 0"
    give(near, b"there")
    give(far, b"back")
    assert (take(far, 5), take(near, 4)) == (b"there", b"back")
    near.close()


def test_the_socket_is_set_for_small_exchanges_and_for_dead_neighbours(door: Door) -> None:
    for end in door.pair():
        options = end._tls
        assert options.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert options.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert options.version() == "TLSv1.3"
        end.close()


def test_another_peer_at_the_address_is_named(door: Door) -> None:
    with pytest.raises(WrongPeer) as caught:
        dial(ALICE, EVE.peer, HOST, door.port)
    assert (caught.value.expected, caught.value.answered) == (EVE.peer, BOB.peer)
    assert BOB.peer[-8:] in str(caught.value)
    assert door.arrived.empty()


def test_who_was_not_invited_gets_no_handshake(door: Door) -> None:
    with pytest.raises(PeerLost) as caught:
        dial(EVE, BOB.peer, HOST, door.port)
    assert caught.value.peer == BOB.peer
    assert door.arrived.empty()


def test_a_caller_without_the_key_that_it_claims_is_refused(door: Door) -> None:
    """Eve calls in the name of Alice, who is welcome, with a certificate of her own key."""
    raw = socket.create_connection((HOST, door.port), timeout=5)
    claim(raw, ALICE.public)
    with (  # TLS 1.3: the caller is through first, the refusal comes as an alert
        context(EVE, BOB.public, server=False).wrap_socket(raw) as tls,
        pytest.raises(ssl.SSLError, match="alert"),
    ):
        tls.recv(1)
    assert door.arrived.empty()


def test_an_answer_without_the_key_that_it_claims_is_refused() -> None:
    """Eve answers in the name of Bob."""

    def act(raw: socket.socket) -> None:
        claim(raw, BOB.public)
        context(EVE, ALICE.public, server=True).wrap_socket(raw, server_side=True)

    eve = Impostor(act)
    with pytest.raises(WrongPeer) as caught:
        dial(ALICE, BOB.peer, HOST, eve.port)
    assert caught.value.expected == BOB.peer
    assert isinstance(eve.errors.get(timeout=5), ssl.SSLError)
    eve.close()


def test_a_leaf_in_the_name_of_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name and key are different things: Eve's key signs a leaf that is issued by "Bob"."""
    from hexswarm.transports import pinning

    honest = pinning._certificate

    def forged(subject: str, issuer: str, *rest: object, authority: bool) -> object:
        name = issuer if authority else BOB.peer
        return honest(subject, name, *rest, authority=authority)  # type: ignore[arg-type]

    def act(raw: socket.socket) -> None:
        claim(raw, BOB.public)
        made.wrap_socket(raw, server_side=True)

    monkeypatch.setattr(pinning, "_certificate", forged)
    made = context(EVE, ALICE.public, server=True)
    monkeypatch.undo()
    eve = Impostor(act)
    with pytest.raises(WrongPeer):
        dial(ALICE, BOB.peer, HOST, eve.port)
    eve.close()


def test_the_key_that_was_proved_is_the_one_of_the_peer_id(door: Door) -> None:
    near, far = door.pair()
    for end in (near, far):
        key = shown(end._tls)
        assert key is not None
        assert peer_id(key) == end.remote


@pytest.mark.parametrize("dialling", [True, False])
def test_tls_1_2_is_refused(door: Door, dialling: bool) -> None:
    def old(identity: Identity, expected: Identity) -> ssl.SSLContext:
        made = context(identity, expected.public, server=not dialling)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        return made

    if dialling:
        raw = socket.create_connection((HOST, door.port), timeout=5)
        claim(raw, ALICE.public)
        with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
            old(ALICE, BOB).wrap_socket(raw)
        assert door.arrived.empty()
    else:

        def act(raw: socket.socket) -> None:
            claim(raw, BOB.public)
            old(BOB, ALICE).wrap_socket(raw, server_side=True)

        bob = Impostor(act)
        with pytest.raises(PeerLost, match=r"(?i)version"):
            dial(ALICE, BOB.peer, HOST, bob.port)
        bob.close()


def test_another_protocol_is_recognised() -> None:
    impostor = Impostor(lambda raw: raw.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 4))
    with pytest.raises(PeerLost, match="another protocol"):
        dial(ALICE, BOB.peer, HOST, impostor.port)
    impostor.close()


def test_nobody_there() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PeerLost, match="cannot be reached"):
        dial(ALICE, BOB.peer, HOST, port)


def test_a_silent_answer_costs_the_limit_and_no_more() -> None:
    with socket.create_server((HOST, 0)) as server:  # the system accepts, nobody speaks
        began_s = time.monotonic()
        with pytest.raises(PeerLost, match="did not open"):
            dial(ALICE, BOB.peer, HOST, server.getsockname()[1], timeout_s=SHORT_S)
        assert SHORT_S <= time.monotonic() - began_s < SHORT_S + 2


def test_silent_callers_keep_nobody_out_for_long(door: Door) -> None:
    """They hold all the room there is, until their time is over."""
    silent = [
        socket.create_connection((HOST, door.port), timeout=5) for _ in range(direct.MOST_OPENING)
    ]
    for caller in silent:  # each sees the end of its stream
        while caller.recv(64):
            pass
        caller.close()
    near, far = door.pair()
    give(near, b"in")
    assert take(far, 2) == b"in"


# --- ends -----------------------------------------------------------------------------------------


def test_a_close_is_an_end_and_a_cut_is_an_error(door: Door) -> None:
    near, far = door.pair()
    give(near, b"last words")
    near.close()
    assert take(far, 99) == b"last words"
    assert far.recv_into(memoryview(bytearray(1))) == 0
    near, far = door.pair()
    near.abort()
    with pytest.raises(PeerLost, match="cut off") as caught:
        take(far, 1)
    assert caught.value.peer == ALICE.peer


class Cutter:
    """Passes everything on until `cut` is set, then 100 bytes of what the caller sends, then an end
    of that direction alone."""

    def __init__(self, port: int) -> None:
        self.cut = threading.Event()
        self._server = socket.create_server((HOST, 0))
        self.port: int = self._server.getsockname()[1]
        self._target = port
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        caller, _ = self._server.accept()
        onward = socket.create_connection((HOST, self._target))
        back = threading.Thread(target=self._pump, args=(onward, caller, threading.Event()))
        back.start()
        with caller, onward:
            self._pump(caller, onward, self.cut)
            back.join(5)

    def _pump(self, source: socket.socket, target: socket.socket, cut: threading.Event) -> None:
        while data := source.recv(1 << 16):
            if cut.is_set():
                target.sendall(data[:100])
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)

    def close(self) -> None:
        self._thread.join(5)
        self._server.close()


def test_a_cut_in_mid_record_is_an_error_of_that_stream_alone(door: Door) -> None:
    """The alert that the cut one gets in answer must not reach another stream of the thread."""
    cutter = Cutter(door.port)
    near = dial(ALICE, BOB.peer, HOST, cutter.port)
    far = door.arrived.get(timeout=5)
    healthy, other = door.pair()
    cutter.cut.set()
    give(near, bytes(5000))
    with pytest.raises(PeerLost, match="cut off"):
        take(far, 5000)
    far.close()
    wait(near)
    near.close()
    cutter.close()
    assert healthy.recv_into(memoryview(bytearray(1))) is None
    give(healthy, b"well")
    assert take(other, 4) == b"well"


def test_an_abort_wakes_who_waits(door: Door) -> None:
    near, _ = door.pair()
    waiter = threading.Thread(target=wait, args=(near,))
    waiter.start()
    near.abort()
    waiter.join(5)
    assert not waiter.is_alive()
    with pytest.raises(PeerLost):
        take(near, 1)


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="the system has no such option")
def test_a_half_open_stream_is_noticed(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other machine has lost all memory of the stream: a probe finds out, nobody sends."""
    monkeypatch.setattr(direct, "KEEPALIVE_S", 1)
    near, far = door.pair()
    near._tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # nothing is sent again, then
    try:
        near._tls.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    except OSError as error:
        pytest.skip(f"needs the right to administer the network: {error}")
    os.close(near._tls.detach())
    assert far.recv_into(memoryview(bytearray(1))) is None
    with pytest.raises(PeerLost, match="cut off"):
        take(far, 1)


def test_a_full_stream_takes_nothing_and_loses_nothing(door: Door) -> None:
    near, far = door.pair()
    data = bytes(range(256)) * (1 << 16)
    sent, view = 0, memoryview(data)
    while count := near.send(view[sent : sent + PIECE_BYTES]):
        sent += count
    assert 0 < sent < len(data)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(take(far, len(data))))
    reader.start()
    poll = select.poll()
    poll.register(near.fileno(), select.POLLOUT)
    while sent < len(data):
        assert poll.poll(5000)
        sent += near.send(view[sent : sent + PIECE_BYTES])
    reader.join(5)
    assert received == [data]
