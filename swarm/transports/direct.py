"""Direct streams between peers of one LAN: TCP, TLS 1.3, both ends pinned to their peer ids.

They carry the collectives of tensor-parallel groups (`hexswarm.peer.collective`): some hundred
small exchanges for every token, each of which has to wait for the slowest member. There a hop
through the libp2p daemon (0.2 ms) is most of the time, and so is a turn of an asyncio loop: hence
these streams are sockets that never block, used by one thread that waits with `poll`. They are
therefore not a `hexswarm.transports.base.Transport`, whose streams are awaited; nor do they need
what that one is for, NAT traversal and relays: a LAN has neither.

How a stream opens. Both ends say at once who they are: a mark and their public key, in the clear.
So an unexpected caller costs us 40 bytes and no cryptography, and whoever dialled learns who
answers. Then both prove it in a TLS 1.3 handshake in which either end accepts the claimed key alone
(`pinning.py`). In TLS 1.3 the dialling end is through before the other one has seen its
certificate; so it then sends its *topic* (which group, which epoch, which rank: whatever the caller
wants), and the stream counts as open when the other end has answered with one byte.

That peer ids cross the LAN in the clear is accepted: announcements publish them with addresses.

A stream ends clean with TLS's close-notify. An end without it was a cut, whoever made it, and
raises. A peer whose machine vanished is noticed by keepalive and by the limit on unacknowledged
bytes, both a few seconds; collectives have shorter deadlines of their own.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator

from hexswarm.errors import AddressInUse, LocalProtocolError, PeerLost, WrongPeer
from hexswarm.identity import Identity, peer_id, public_key
from hexswarm.records import PeerId
from hexswarm.transports.pinning import context, shown

log = logging.getLogger(__name__)

MARK = b"HEXDRCT1"
TOPIC_BYTES = 512
OPEN_S = 5.0
"""Limit for the whole opening, at either end."""
MOST_OPENING = 16
"""Incoming streams that may be on the way to being open; more are closed unheard."""
KEEPALIVE_S = 2
KEEPALIVE_TRIES = 3
UNACKNOWLEDGED_MS = 6000
_WELCOME = b"\x01"
_LENGTH = struct.Struct("!H")


class DirectStream:
    """One open stream; nothing here waits. For one thread at a time, except `abort`."""

    def __init__(self, tls: ssl.SSLSocket, remote: PeerId, topic: bytes) -> None:
        tls.settimeout(0)
        self._tls = tls
        self.remote = remote
        self.topic = topic

    def fileno(self) -> int:
        return self._tls.fileno()

    def send(self, data: memoryview) -> int:
        """How many bytes the system took; 0: none now, offer the same again when writable.

        Raises PeerLost.
        """
        try:
            return self._tls.send(data)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0
        except OSError as error:
            raise self._cut(error) from error

    def recv_into(self, buffer: memoryview) -> int | None:
        """How many bytes came; None: none now; 0: the other end has closed. Raises PeerLost."""
        try:
            return self._tls.recv_into(buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except ssl.SSLZeroReturnError:
            return 0
        except OSError as error:
            raise self._cut(error) from error

    @property
    def pending(self) -> bool:
        """Bytes have been taken from the socket already: `poll` would not tell of them."""
        return self._tls.pending() > 0

    def abort(self) -> None:
        """Cut both directions, from any thread: whoever waits on this stream wakes up."""
        with contextlib.suppress(OSError):
            # Not through the TLS object: it would forget its session under the other thread.
            socket.socket.shutdown(self._tls, socket.SHUT_RDWR)

    def close(self) -> None:
        """Say so to the other end, and close."""
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()  # sends the close-notify; nobody waits for the answer
            # If an alert had come meanwhile, `unwrap` succeeds and leaves it in OpenSSL's queue of
            # this thread, where the next read of another, healthy stream would take it for its own.
            # Python empties that queue when it makes a TLS object, and offers no other way.
            self._tls.context.wrap_bio(
                ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=self._tls.server_side
            )
        self._tls.close()

    def _cut(self, error: OSError) -> PeerLost:
        ragged = isinstance(error, ssl.SSLEOFError)
        why = "without a word" if ragged else f"({error.strerror or error})"
        return PeerLost(self.remote, None, f"was cut off {why}")


def dial(
    identity: Identity,
    peer: PeerId,
    host: str,
    port: int,
    topic: bytes = b"",
    *,
    timeout_s: float = OPEN_S,
) -> DirectStream:
    """Open a stream to `peer`, which listens at `host`:`port`. Raises PeerLost, WrongPeer."""
    expected = public_key(peer)
    if expected is None:
        raise WrongPeer(peer, "", "which is not the id of an Ed25519 key")
    if len(topic) > TOPIC_BYTES:
        raise LocalProtocolError(f"a topic of {len(topic)} bytes; at most {TOPIC_BYTES}")
    end_s = time.monotonic() + timeout_s
    try:
        raw = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise PeerLost(peer, None, f"cannot be reached at {host}:{port}") from error
    with _closed_on_error(raw):
        try:
            return _dial(identity, expected, raw, topic, end_s)
        except TimeoutError as error:
            how = f"did not open the stream within {timeout_s:g} s"
            raise PeerLost(peer, None, how) from error
        except OSError as error:
            raise PeerLost(peer, None, f"broke off ({error.strerror or error})") from error


def _dial(
    identity: Identity, expected: bytes, raw: socket.socket, topic: bytes, end_s: float
) -> DirectStream:
    peer = peer_id(expected)
    claimed = _introduce(raw, identity, end_s)
    if claimed != expected:
        answered = peer_id(claimed)
        raise WrongPeer(peer, answered, f"peer {answered[-8:]} answered")
    tls = _prove(raw, identity, expected, end_s, server=False)
    with _closed_on_error(tls):
        _limit(tls, end_s)
        tls.sendall(_LENGTH.pack(len(topic)) + topic)
        if _exactly(tls, 1, end_s) != _WELCOME:
            raise PeerLost(peer, None, "answered nonsense")
        return DirectStream(tls, peer, topic)


class Listener:
    """Accepts streams, each in a short-lived thread, and hands them over when they are open."""

    def __init__(
        self,
        identity: Identity,
        host: str,
        port: int,
        *,
        allowed: Callable[[PeerId], bool],
        deliver: Callable[[DirectStream], None],
        timeout_s: float = OPEN_S,
    ) -> None:
        """`allowed` is asked by whoever claims to be somebody, before anything is computed; both
        functions run in threads of this listener. Raises AddressInUse.
        """
        self._identity, self._allowed, self._deliver = identity, allowed, deliver
        self._timeout_s = timeout_s
        self._room = threading.Semaphore(MOST_OPENING)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise AddressInUse(f"cannot listen on {host}:{port} ({error.strerror})") from error
        self.port: int = self._socket.getsockname()[1]
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="direct", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept nothing any more; streams that are open stay open."""
        self._stop.close()
        self._thread.join()
        self._socket.close()
        self._stopped.close()

    def _run(self) -> None:
        waiting = selectors.DefaultSelector()
        waiting.register(self._socket, selectors.EVENT_READ)
        waiting.register(self._stopped, selectors.EVENT_READ)
        while True:
            if any(key.fileobj is self._stopped for key, _ in waiting.select()):
                waiting.close()
                return
            with contextlib.suppress(OSError):  # the caller is gone already
                raw, _ = self._socket.accept()
                if self._room.acquire(blocking=False):
                    threading.Thread(target=self._open, args=(raw,), daemon=True).start()
                else:
                    raw.close()

    def _open(self, raw: socket.socket) -> None:
        try:
            with _closed_on_error(raw):
                stream = self._accept(raw, time.monotonic() + self._timeout_s)
                self._deliver(stream)
        except (OSError, WrongPeer, PeerLost) as error:
            log.info("a direct stream did not open: %s", error)
        finally:
            self._room.release()

    def _accept(self, raw: socket.socket, end_s: float) -> DirectStream:
        claimed = _introduce(raw, self._identity, end_s)
        peer = peer_id(claimed)
        if not self._allowed(peer):
            raise WrongPeer("of a group", peer, f"peer {peer[-8:]} called")
        tls = _prove(raw, self._identity, claimed, end_s, server=True)
        with _closed_on_error(tls):
            (length,) = _LENGTH.unpack(_exactly(tls, _LENGTH.size, end_s))
            if length > TOPIC_BYTES:
                raise PeerLost(peer, None, f"named a topic of {length} bytes")
            topic = _exactly(tls, length, end_s)
            tls.sendall(_WELCOME)
            return DirectStream(tls, peer, topic)


def _introduce(raw: socket.socket, identity: Identity, end_s: float) -> bytes:
    """Say who we are; the public key that the other end claims. Raises OSError."""
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_S),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", KEEPALIVE_TRIES),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS),
    ):
        if hasattr(socket, option):  # not every system has all of them
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    _limit(raw, end_s)
    raw.sendall(MARK + identity.public)
    answer = _exactly(raw, len(MARK) + 32, end_s)
    if not answer.startswith(MARK):
        raise ConnectionError("it speaks another protocol")
    return answer[len(MARK) :]


def _prove(
    raw: socket.socket, identity: Identity, expected: bytes, end_s: float, *, server: bool
) -> ssl.SSLSocket:
    """The handshake. Raises WrongPeer if the other end lacks the key that it claimed."""
    peer = peer_id(expected)
    _limit(raw, end_s)
    try:
        tls = context(identity, expected, server=server).wrap_socket(
            raw, server_side=server, suppress_ragged_eofs=False
        )
    except ssl.SSLCertVerificationError as error:
        raise WrongPeer(peer, "", "but who answered in its name lacks its key") from error
    if shown(tls) != expected:
        tls.close()
        raise WrongPeer(peer, "", "but who answered in its name showed another key")
    return tls


def _exactly(source: socket.socket, length: int, end_s: float) -> bytes:
    data = b""
    while len(data) < length:
        _limit(source, end_s)
        piece = source.recv(length - len(data))
        if not piece:
            raise ConnectionError("it hung up")
        data += piece
    return data


def _limit(source: socket.socket, end_s: float) -> None:
    """Let the next call wait until `end_s` at most: a byte a second gains nobody time."""
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    source.settimeout(left_s)


@contextlib.contextmanager
def _closed_on_error(opened: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        opened.close()
        raise
